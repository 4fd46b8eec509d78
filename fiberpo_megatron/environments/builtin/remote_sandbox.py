"""This module runs programs on a sandbox service, by the HTTP interface of SandboxFusion (`POST /run_code`).

The service gets code_runner.py as its program and the model's program with all inputs on stdin, so that one request
serves all tests of a program. How the service keeps programs apart is its own affair.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from fiberpo_megatron.environments.builtin.http_json import Address, HttpError, request_json
from fiberpo_megatron.environments.builtin.sandbox import (
    ENDED,
    RUNNER,
    Bounds,
    ProgramRun,
    json_bytes,
)
from fiberpo_megatron.environments.builtin.sandbox_system import START_S, SandboxError
from fiberpo_megatron.printable import printable

ATTEMPTS = 3
PAUSE_S = 1.0
"""Before the second attempt; it doubles with each further one."""


class RemoteSandbox:
    """Sends programs to a sandbox service. It has the methods of `Sandbox` that environments use.

    address: where the service is, without `/run_code`.
    """

    kind = "remote"

    def __init__(self, address: str, bounds: Bounds | None = None) -> None:
        self.address = Address.parse(address, "address")
        self.bounds = bounds or Bounds()
        self._runner = RUNNER.read_text(encoding="utf-8")

    @property
    def description(self) -> str:
        """Return one sentence that says which means are used."""
        bounds = self.bounds
        return (
            f"programs run on the sandbox service at {self.address} ({bounds.wall_s:g} s and {bounds.memory_mib} MiB "
            f"for each input, {bounds.program_s:g} s for each program)"
        )

    async def runs(
        self,
        text: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        fn_name: str | None = None,
        usual_names: bool = False,
        stop_after_failure: bool = False,
    ) -> AsyncGenerator[ProgramRun, None]:
        """Yield what a program did with each input; see `Sandbox.runs`."""
        job = {
            "program": text,
            "fn_name": fn_name,
            "usual_names": usual_names,
            "stop_after_failure": stop_after_failure,
            "uid": None,
            "bounds": self.bounds.for_runner(count_by_kernel=False, count_files=False),
        }
        request = {
            "language": "python",
            "code": self._runner,
            "stdin": b"".join(map(json_bytes, (job, *inputs))).decode(),
            "compile_timeout": START_S,
            "run_timeout": self.bounds.program_s + START_S,
        }
        for run in self._parsed(await self._answer(request), len(inputs)):
            yield run
            if stop_after_failure and run.status != "ok":
                return

    async def _answer(self, request: Mapping[str, Any]) -> str:
        """Return what the runner wrote. Raises SandboxError when the service does not run it."""
        limit = 2 * 6 * (self.bounds.output_kib << 10) * 100 + (1 << 20)
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                answer = await request_json(
                    self.address,
                    "/run_code",
                    request,
                    timeout_s=self.bounds.program_s + 2 * START_S,
                    limit_bytes=limit,
                )
                if answer.status != 200:
                    reason = f"it answered with status {answer.status}: {answer.text()}"
                    continue
                fields = json.loads(answer.body)
                result = fields.get("run_result")
                if fields.get("status") != "SandboxError" and isinstance(result, dict):
                    return str(result.get("stdout") or "")
                reason = printable(str(fields.get("message"))[:300]) or "it gave no run_result"
            except (HttpError, ValueError, AttributeError) as error:
                reason = str(error)
        raise SandboxError(
            f"the sandbox service at {self.address} did not run a program in {ATTEMPTS} attempts: {reason}; start the "
            "service, or correct `address`"
        )

    def _parsed(self, written: str, count: int) -> list[ProgramRun]:
        """Return the runs in what the runner wrote; what is missing ended with the runner."""
        lines = written.split("\n")
        if not lines or '"ready"' not in lines[0]:
            said = printable(written[:300]) or "nothing"
            raise SandboxError(f"the sandbox service at {self.address} did not start the runner; it wrote {said}")
        runs = []
        for line in lines[1 : count + 1]:
            try:
                runs.append(ProgramRun(**json.loads(line)))
            except (TypeError, ValueError):
                break
        missing = ProgramRun(ENDED, stderr="it ended its sandbox, or its time was used up")
        return runs + [missing] * (count - len(runs))
