"""The environment "code" takes programming problems from a data set and runs the answers' programs against unit tests.

Programs run in a sandbox (`sandbox.py`) or on a sandbox service, never in this process. Right answers stay here: a
program, whatever it does in its sandbox, can change nothing but its own outputs. It imports the standard library alone,
and pyarrow where the data set is a table; it runs on Python 3.10.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import lru_cache
from typing import Any

from fiberpo_megatron.environments import Outcome, Task, Turn
from fiberpo_megatron.environments.builtin.chat import Chat
from fiberpo_megatron.environments.builtin.problems import Problem
from fiberpo_megatron.environments.builtin.program_outputs import last_program, same_output, same_value
from fiberpo_megatron.environments.builtin.remote_sandbox import RemoteSandbox
from fiberpo_megatron.environments.builtin.sandbox import ENDED, Bounds, ProgramRun, Sandbox, SandboxError
from fiberpo_megatron.environments.builtin.unit_tests import LAYOUTS, UnitTest, UnitTests, unit_tests

KEPT = 64
"""Problems whose decoded tests a worker keeps."""
INSTRUCTIONS = {
    False: "Write a Python program that reads stdin and writes stdout. Put it into one block of ```python code.",
    True: "Write the Python code. Put all of it into one block of ```python code.",
}
"""What is asked for by default, by whether a function is called."""
KILLED = ("timeout", "memory", "processes", "output", "files")
"""How a run ends that exceeded a bound."""


class Code(Chat):
    """Offers programming problems, runs the program of an answer against their tests, and rewards those that pass.

    layout: which fields hold the tests. tests: `tests`, a list of {"input", "output"}, and perhaps `fn_name`; apps:
        `input_output` of APPS; livecodebench: `public_test_cases`, `private_test_cases` and `metadata`.
    reward: all: 1 where every test passes; the first that fails ends the run. share: the share of tests that pass.
    sandbox: auto: bubblewrap where it works, else namespaces; or bubblewrap, namespaces, rlimits (bounds without
        isolation: programs can read and write what you can), remote (the service at `address`).
    address: where a sandbox service listens that speaks SandboxFusion's interface, such as "http://host:8080".
    python: the interpreter of the programs; they can import what it can. Unset: that of the workers.
    timeout_s: seconds for one test, and seconds of the processor for each process.
    program_timeout_s: seconds for all tests of a program. Keep it below `deadline_s`.
    memory_mib: memory of a program (MiB).
    processes: processes and threads of a program at the same time.
    open_files: open files of each process.
    output_kib: output to stdout for one test (KiB); a program that writes more is killed.
    folder_mib: room in the program's folder (MiB).
    max_tests: only the first tests of a problem are used.
    float_tolerance: relative and absolute difference up to which numbers that are not whole are equal.
    languages: info strings of fenced blocks that are programs; "" is a block without one. The last block is run.
    needs_fence: an answer without any fenced block has no program; otherwise the whole answer is taken as one.
    usual_names: programs find the names of the usual modules defined, as the graders of both benchmarks do it.
    instruction: what follows the problem in the prompt; unset: one sentence that asks for a block of Python.
    prompt: the field of the problem; unset: the one of the layout. `starter_code`, where there is any, follows it.
    answer: the field of a solution, which `fiberpo sft` trains on.

    The other options are those of `chat`.

    Raises ValueError that names the option, or the file and the line or row, with the value and the fix.
    """

    not_options = ("answer_after",)
    _text_answers = False

    def __init__(
        self,
        train: str,
        held_out: str | None = None,
        layout: str = "tests",
        reward: str = "all",
        sandbox: str = "auto",
        address: str | None = None,
        python: str | None = None,
        timeout_s: float = 6.0,
        program_timeout_s: float = 30.0,
        memory_mib: int = 1024,
        processes: int = 16,
        open_files: int = 64,
        output_kib: int = 1024,
        folder_mib: int = 64,
        max_tests: int | None = None,
        float_tolerance: float = 1e-6,
        languages: Sequence[str] = ("python", "python3", "py", ""),
        needs_fence: bool = True,
        usual_names: bool = True,
        instruction: str | None = None,
        prompt: str | None = None,
        metadata: Sequence[str] = (),
        retry_message: str = "That program does not pass the tests. Try again.",
        **options: Any,
    ) -> None:
        _check(layout, reward, float_tolerance, max_tests, languages)
        bounds = Bounds(
            wall_s=timeout_s,
            program_s=program_timeout_s,
            memory_mib=memory_mib,
            processes=processes,
            open_files=open_files,
            output_kib=output_kib,
            folder_mib=folder_mib,
        )
        self._sandbox = _sandbox(sandbox, address, python, bounds)
        self.about = self._sandbox.description
        print(self.about, file=sys.stderr)  # in the worker's log
        self._layout_name, self._layout = layout, LAYOUTS[layout]
        self._all = reward == "all"
        self._tolerance = float_tolerance
        self._max_tests = max_tests
        self._languages = frozenset(language.lower() for language in languages)
        self._needs_fence, self._usual_names = needs_fence, usual_names
        self._instruction = instruction
        self._shown = tuple(metadata)
        starter = () if self._layout.starter_code is None else (self._layout.starter_code,)
        super().__init__(
            train,
            held_out,
            prompt=self._layout.prompt if prompt is None else prompt,
            metadata=tuple(dict.fromkeys((*metadata, *self._layout.fields, *starter))),
            retry_message=retry_message,
            **options,
        )
        self.deterministic = False  # a program may be slow once
        self._tests = lru_cache(maxsize=KEPT)(self._read_tests)

    # ---- tasks ----

    def train(self, index: int) -> Task:
        """Return the problem at `index`. Raises ValueError for tests that cannot be read."""
        return self._with_place(super().train(index), "train", index)

    def held_out(self, index: int) -> Task:
        """Return a problem for evaluation. Raises ValueError for tests that cannot be read."""
        return self._with_place(super().held_out(index), "held_out", self._order(index))

    def _with_place(self, task: Task, split: str, position: int) -> Task:
        """Return the task with what `score` needs to find its tests; tests of megabytes stay out of it."""
        tests = self._tests(split, position)
        metadata = {key: task.metadata[key] for key in ("source", *self._shown)}
        return replace(task, metadata={**metadata, "place": [split, position], "tests": len(tests.tests)})

    def _task(self, problem: Problem, default_id: str | None) -> Task:
        prompt = problem.prompt
        if isinstance(prompt, str):
            starter = problem.metadata.get(self._layout.starter_code or "")
            calls = self._read(problem).fn_name is not None
            instruction = INSTRUCTIONS[calls] if self._instruction is None else self._instruction
            parts = [prompt, f"```python\n{starter}\n```" if starter else "", instruction]
            problem = problem._replace(prompt="\n\n".join(filter(None, parts)))
        return super()._task(problem, default_id)

    def _read_tests(self, split: str, position: int) -> UnitTests:
        file = self._train if split == "train" else self._held_out
        assert file is not None, "there is no held-out problem"
        return self._read(file[position])

    def _read(self, problem: Problem) -> UnitTests:
        found = unit_tests(self._layout_name, problem.metadata, problem.source)
        return replace(found, tests=found.tests[: self._max_tests])

    # ---- scores ----

    async def score(self, task: Task, turn: Turn) -> Outcome:  # type: ignore[override]
        """Run the program of an answer against the tests. Raises SandboxError when no sandbox runs it."""
        split, position = task.metadata["place"]
        tests = self._tests(split, position)
        program = last_program(turn.text, self._languages, needs_fence=self._needs_fence)
        if program is None:
            return Outcome(0.0, {"tests": 0.0}, correct=False, metrics={"has_program": 0.0})
        passed, runs = await self._run(program, tests)
        share = passed / len(tests.tests)
        correct = passed == len(tests.tests)
        metrics = {
            "has_program": 1.0,
            "sandbox_s": sum(run.seconds for run in runs),
            "killed": float(any(run.status in KILLED for run in runs)),
            "timeout": float(any(run.status == "timeout" for run in runs)),
            "broke_sandbox": float(any(run.status == ENDED for run in runs)),
            "processes_left": float(sum(run.left for run in runs)),
        }
        return Outcome(float(correct) if self._all else share, {"tests": share}, correct=correct, metrics=metrics)

    async def _run(self, program: str, tests: UnitTests) -> tuple[int, list[ProgramRun]]:
        """Return how many tests pass, and what the program did in those that were run."""
        inputs: list[dict[str, Any]] = [
            {"stdin": test.stdin} if test.arguments is None else {"arguments": test.arguments} for test in tests.tests
        ]
        passed, runs = 0, []
        started = self._sandbox.runs(
            program,
            inputs,
            fn_name=tests.fn_name,
            usual_names=self._usual_names,
            stop_after_failure=self._all,
        )
        async with aclosing(started) as running:
            async for run in running:
                runs.append(run)
                right = self._right(tests.tests[len(runs) - 1], run)
                passed += right
                if self._all and not right:
                    break
        return passed, runs

    def _right(self, test: UnitTest, run: ProgramRun) -> bool:
        if run.status != "ok":
            return False
        if test.arguments is None:
            return same_output(test.expected, run.stdout, self._tolerance)
        return run.value is not None and same_value(test.expected, run.value, self._tolerance)


def _sandbox(kind: str, address: str | None, python: str | None, bounds: Bounds) -> Sandbox | RemoteSandbox:
    """Return the sandbox that the options name. Raises ValueError with the fix."""
    if (kind == "remote") != (address is not None):
        raise ValueError(
            f'sandbox = {kind!r} and address = {address!r}: the two belong together; set sandbox = "remote" and the '
            "address of the service, or leave `address` out"
        )
    if address is not None:
        if python is not None:
            raise ValueError(f"python = {python!r}: a sandbox service runs its own interpreter; leave it out")
        return RemoteSandbox(address, bounds)
    try:
        return Sandbox(kind, bounds, sys.executable if python is None else python)
    except SandboxError as error:
        raise ValueError(str(error)) from None


def _check(layout: Any, reward: Any, float_tolerance: Any, max_tests: Any, languages: Any) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    if reward not in ("all", "share"):
        raise ValueError(f'reward = {reward!r} is unknown; use "all" or "share"')
    if not isinstance(float_tolerance, (int, float)) or not 0 <= float_tolerance < 1:
        raise ValueError(f"float_tolerance = {float_tolerance!r} must be a number of at least 0 and below 1")
    if max_tests is not None and (not isinstance(max_tests, int) or isinstance(max_tests, bool) or max_tests < 1):
        raise ValueError(f"max_tests = {max_tests!r} must be a whole number of at least 1")
    if isinstance(languages, str) or not all(isinstance(language, str) for language in languages):
        raise ValueError(f'languages = {languages!r} must be a list of texts, such as ["python", ""]')
