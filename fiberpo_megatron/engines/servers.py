"""This module starts SGLang servers on this machine and stops them, or checks those whose addresses are given."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from fiberpo_megatron.engines.addresses import free_ports, is_free
from fiberpo_megatron.engines.api_key import key_pipe
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.command import Server, interpreter, server_command, server_environment, sglang_version
from fiberpo_megatron.engines.errors import EngineRefused, EngineStartError, EngineUnreachable
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.engines.temporary import TemporaryFolder, make_temporary, remove_leftovers

POLL_S = 0.1
CHECK_TIMEOUT_S = 30.0
ONE_TOKEN = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
LAUNCHER = Path(__file__).with_name("launcher.py")


@contextmanager
def engines(
    config: EngineConfig,
    model: Path,
    folder: Path,
    *,
    dtype: str,
    seed: int = 0,
    host: str = "127.0.0.1",
    first_gpu: int = 0,
    gpu: bool | None = None,
    routed_experts: bool = False,
    deterministic: bool | None = None,
    api_key: str | None = None,
) -> Iterator[list[EngineAddress]]:
    """Yield healthy engines; those that were started here are stopped at the end, whatever ends the block.

    `model`: Hugging Face folder; without safetensors the weights are random until the first publication. `folder`: gets
    engine_<i>.log. `dtype`: used if `engine.dtype` is auto. `host`: address to bind, which all ranks must reach.
    `first_gpu`: server i takes `engine.tensor` GPUs from first_gpu + i * engine.tensor. `gpu` unset: whether torch sees
    one. `deterministic` (unset: without a GPU): obey per-request seeds. `api_key`: without it the servers refuse
    requests; unset, everybody who reaches them can use them.

    Call this from a thread that outlives the engines. Raises EngineStartError (busy port, missing sglang, exit or no
    health before `engine.start_timeout_s`, with the log's tail), and EngineUnreachable for a given address without a
    server.
    """
    if config.urls:
        addresses = [EngineAddress(url.rstrip("/"), api_key=api_key) for url in config.urls]
        for address in addresses:
            check_reachable(address)
        yield addresses
        return
    gpu = torch.cuda.is_available() if gpu is None else gpu
    check_startable(config, model, host)
    ports = free_ports(2 * config.count, host)
    if config.port is not None:
        ports[: config.count] = range(config.port, config.port + config.count)
    servers = [
        Server(
            model=model,
            dtype=dtype if config.dtype == "auto" else config.dtype,
            host=host,
            port=ports[i],
            internal_port=ports[config.count + i],
            seed=seed + i,
            gpu=gpu,
            first_gpu=first_gpu + i * config.tensor,
            routed_experts=routed_experts,
            deterministic=not gpu if deterministic is None else deterministic,
        )
        for i in range(config.count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers()
    started: list[EngineProcess] = []
    try:
        for i, server in enumerate(servers):
            started.append(start_server(server, config, folder / f"engine_{i}.log", api_key))
        deadline = time.monotonic() + config.start_timeout_s
        for process in started:
            process.wait_until_healthy(deadline)
        yield [process.address for process in started]
    finally:
        stop_all(started)


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
                        f"the server process ended with {_exit_text(code)} while starting",
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


def _exit_text(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
