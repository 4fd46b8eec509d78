"""This module starts one SGLang server on this machine, waits for it, checks it and stops it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fiberpo_megatron.engines.addresses import is_free
from fiberpo_megatron.engines.api_key import key_pipe
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.command import Server, interpreter, server_command, server_environment, sglang_version
from fiberpo_megatron.engines.errors import EngineRefused, EngineStartError, EngineUnreachable
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.engines.temporary import TemporaryFolder, make_temporary
from fiberpo_megatron.subprocesses import exit_text

POLL_S = 0.1
CHECK_TIMEOUT_S = 30.0
HEALTH_TIMEOUT_S = 5.0
"""Seconds for which a publication waits for a server that was started again."""
ONE_TOKEN = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
LAUNCHER = Path(__file__).with_name("launcher.py")


def check_startable(config: EngineConfig, model: Path, host: str) -> None:
    """Raise for everything that can be known to fail before a process is started."""
    python = interpreter(config)
    if sglang_version(python) is None:
        raise EngineStartError(
            "(not started)",
            f"{python} has no sglang",
            "Run `make env`, install fiberpo-megatron[cuda], or name the Python that has it in rollout.engine.python",
        )
    if not (model / "config.json").is_file():
        raise EngineStartError(
            "(not started)", f"{model} has no config.json", "Set model.path to a Hugging Face folder"
        )
    for i in range(config.count if config.port is not None else 0):
        port = (config.port or 0) + i
        if not is_free(port, host):
            raise EngineStartError(
                f"http://{host}:{port}",
                f"port {port} is in use by another process",
                "Stop that process, change rollout.engine.port, or leave it unset to have a free one found",
            )


def check_reachable(address: EngineAddress) -> None:
    """Raise EngineUnreachable unless a server answers at this address."""
    try:
        with httpx.Client(headers=address.headers, trust_env=False, timeout=CHECK_TIMEOUT_S) as http:
            status = _status(http, "GET", f"{address.url}/model_info")
        if status == httpx.codes.UNAUTHORIZED:
            what = "the server asks for another API key than this run has"
            raise EngineRefused(address.url, what, address.key_fix)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EngineUnreachable(
            address.url,
            f"no SGLang server answers ({type(error).__name__}: {error})",
            f"Start it, or correct {address.section}.urls",
        ) from error
    if status != httpx.codes.OK:
        raise EngineUnreachable(
            address.url,
            f"no SGLang server answers (HTTP {status} to /model_info)",
            f"Start it, or correct {address.section}.urls",
        )


@dataclass(frozen=True)
class EngineProcess:
    """Represents a server that was started here."""

    address: EngineAddress
    process: "subprocess.Popen[bytes]"
    temporary: TemporaryFolder

    def is_healthy(self) -> bool:
        """Return whether the server generates a token, and refuses to do so without the API key."""
        with httpx.Client(base_url=self.address.url, headers=self.address.headers, trust_env=False) as http:
            healthy = _generates(http, HEALTH_TIMEOUT_S)
        return healthy and (not self.address.api_key or _refuses_strangers(self.address.url, CHECK_TIMEOUT_S))

    def wait_until_healthy(self, deadline: float) -> None:
        """Return once the server has generated a token, and has refused to do so without the API key.

        `deadline` is a time of time.monotonic().
        """
        begin = time.monotonic()
        with httpx.Client(base_url=self.address.url, headers=self.address.headers, trust_env=False) as http:
            while True:
                code = self.process.poll()
                if code is not None:
                    raise EngineStartError(
                        self.address.url,
                        f"the server process ended with {exit_text(code)} while starting",
                        "The end of its log says why",
                        self.address.log,
                    )
                left = deadline - time.monotonic()
                if left <= 0:
                    raise EngineStartError(
                        self.address.url,
                        f"the server was not healthy after {time.monotonic() - begin:.0f} s",
                        "See its log; raise rollout.engine.start_timeout_s if it was still loading",
                        self.address.log,
                    )
                if _generates(http, left):
                    break
                time.sleep(POLL_S)
        if self.address.api_key and not _refuses_strangers(self.address.url, max(left, CHECK_TIMEOUT_S)):
            raise EngineStartError(
                self.address.url,
                "the server answers without the API key",
                "Leave SGLANG_PLUGINS unset: the key is set by the plugin in engines/sglang_plugin",
                self.address.log,
            )


def start_server(server: Server, config: EngineConfig, log: Path, api_key: str | None = None) -> EngineProcess:
    """Start one server in a separate process group; it dies with this process, even when that is killed with
    SIGKILL.

    The API key goes through a pipe, so that it is in no file that could stay behind.
    """
    command = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *server_command(server, config)]
    temporary = make_temporary()
    key = key_pipe(api_key) if api_key else None
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=server_environment(os.environ, config, server, key) | {"TMPDIR": str(temporary.path)},
                pass_fds=() if key is None else (key,),
                start_new_session=True,
            )
    except BaseException:
        temporary.remove()
        raise
    finally:
        if key is not None:
            os.close(key)
    address = EngineAddress(f"http://{server.host}:{server.port}", log, api_key)
    return EngineProcess(address, process, temporary)


def stop_all(started: Sequence[EngineProcess]) -> None:
    """Send SIGKILL to the process groups; return when the servers are gone.

    No SIGTERM is sent first: SGLang looks for it only every 5 s, and a server holds nothing that is worth saving.
    """
    for engine in started:
        with suppress(ProcessLookupError):
            os.killpg(engine.process.pid, signal.SIGKILL)
    for engine in started:
        engine.process.wait()
        engine.temporary.remove()


def _generates(http: httpx.Client, timeout_s: float) -> bool:
    """Return whether the server generates a token. (SGLang's /health asks for one too, and then sleeps 1 s.)"""
    try:
        return _status(http, "POST", "/generate", json=ONE_TOKEN, timeout=timeout_s) == httpx.codes.OK
    except httpx.TransportError:
        return False


def _refuses_strangers(url: str, timeout_s: float) -> bool:
    """Return whether the server refuses a request without an API key."""
    with httpx.Client(base_url=url, trust_env=False, timeout=timeout_s) as stranger:
        found = [_status(stranger, "POST", "/generate", json=ONE_TOKEN), _status(stranger, "GET", "/model_info")]
    return all(status == httpx.codes.UNAUTHORIZED for status in found)


def _status(http: httpx.Client, method: str, path: str, **request: Any) -> int:
    """Return the status of an answer, whose content is not read: nothing bounds its size."""
    with http.stream(method, path, **request) as answer:
        return answer.status_code
