"""This module has the servers of a run on this machine, with successors for those that die, or those whose addresses
are given."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fiberpo_megatron.closeable import Closeable
from fiberpo_megatron.engines.addresses import free_ports
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.command import Server
from fiberpo_megatron.engines.process import (
    EngineProcess,
    check_reachable,
    check_startable,
    start_server,
    stop_all,
)
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.engines.temporary import remove_leftovers
from fiberpo_megatron.subprocesses import exit_text


@dataclass(frozen=True)
class Offer:
    """It is a place for an engine, with the server that is in it now."""

    place: str
    """Names the place, whichever server is in it."""
    address: EngineAddress | None
    """None while no server answers there."""
    generation: int = 0
    """How often another server has taken the place."""
    detail: str = ""
    """Why there is no server, in one sentence."""
    starting: bool = False
    """Whether a server is starting there."""


class GivenServers(Closeable):
    """These are servers whose addresses are given; they run whatever this process does.

    Raises EngineUnreachable for an address without a server.
    """

    def __init__(self, addresses: Sequence[EngineAddress]) -> None:
        for address in addresses:
            check_reachable(address)
        self.addresses = list(addresses)

    def offers(self) -> list[Offer]:
        """Return all of them. A server that was started again at its address is noticed by its weights."""
        return [Offer(address.url, address) for address in self.addresses]

    def replace(self, place: str, generation: int, why: str) -> None:
        """Do nothing: whoever started a server may start it again."""

    def close(self) -> None:
        """Leave them running."""


class StartedServers(Closeable):
    """These are servers that this process starts, and stops with `close`; see `engines` for the arguments.

    A server that dies, or that `replace` gives up, is started again `config.restarts` times, on another port, so that
    nothing that knows the old address reaches it. Use it from one thread that outlives the servers: the kernel ends
    them with it.
    """

    def __init__(self, servers: Sequence[Server], config: EngineConfig, folder: Path, api_key: str | None) -> None:
        self._servers, self._config, self._folder, self._api_key = list(servers), config, folder, api_key
        self._details = [""] * len(servers)
        self._generations = [0] * len(servers)
        self._deadlines = [0.0] * len(servers)
        """Until when a server that was started again has to be healthy (`time.monotonic`); 0 once it is."""
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers()
        self._processes: list[EngineProcess | None] = []
        try:
            for number in range(len(servers)):
                self._processes.append(self._start(number))
            deadline = time.monotonic() + config.start_timeout_s
            for process in self._processes:
                assert process is not None
                process.wait_until_healthy(deadline)
        except BaseException:
            self.close()
            raise

    @property
    def addresses(self) -> list[EngineAddress]:
        """Return the servers' addresses."""
        return [process.address for process in self._processes if process is not None]

    def offers(self) -> list[Offer]:
        """Return the places of all servers. A server that has died is started again here, and is offered once it is
        healthy, by a later call."""
        return [self._offer(number) for number in range(len(self._servers))]

    def replace(self, place: str, generation: int, why: str) -> None:
        """Stop the server in a place, if it is still that of `generation`, and start it again."""
        if self._generations[int(place)] == generation:
            self._again(int(place), why)

    def close(self) -> None:
        """Stop all servers; idempotent."""
        processes, self._processes = self._processes, []
        stop_all([process for process in processes if process is not None])

    def _offer(self, number: int) -> Offer:
        process = self._processes[number]
        if process is not None and process.process.poll() is not None:
            self._again(number, "its process ended")
            process = self._processes[number]
        if process is None:
            return self._starting(number)
        if self._deadlines[number]:
            if not process.is_healthy():
                if time.monotonic() > self._deadlines[number]:
                    late = f"it was not healthy {self._config.start_timeout_s:g} s after it was started again"
                    self._again(number, late)
                return self._starting(number)
            self._deadlines[number] = 0.0
        return Offer(str(number), process.address, self._generations[number], self._details[number])

    def _starting(self, number: int) -> Offer:
        """The place of a server that does not serve yet, or never will."""
        again = self._processes[number] is not None
        return Offer(str(number), None, self._generations[number], self._details[number], starting=again)

    def _again(self, number: int, why: str) -> None:
        process, self._processes[number] = self._processes[number], None
        if process is not None:
            if (code := process.process.poll()) is not None:
                why = f"its process ended with {exit_text(code)}"
            stop_all([process])
        self._details[number] = why
        if self._generations[number] == self._config.restarts:
            self._details[number] = f"{why}; it has been started again {self._config.restarts} times already"
            return
        self._generations[number] += 1
        server = self._servers[number]
        port, internal = free_ports(2, server.host)
        self._servers[number] = replace(server, port=port, internal_port=internal)
        try:
            self._processes[number] = self._start(number)
        except OSError as error:
            self._details[number] = f"{why}; it could not be started again: {error}"
            return
        self._deadlines[number] = time.monotonic() + self._config.start_timeout_s

    def _start(self, number: int) -> EngineProcess:
        """Start the server in a place. Its log stands beside those of the servers before it."""
        generation = self._generations[number]
        name = f"engine_{number}_restart_{generation}.log" if generation else f"engine_{number}.log"
        return start_server(self._servers[number], self._config, self._folder / name, self._api_key)


Servers = GivenServers | StartedServers
"""Where the engines of a run come from."""


def make_servers(
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
) -> Servers:
    """Return healthy servers: those of `config.urls`, or fresh ones. Close them when done.

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
        return GivenServers([EngineAddress(url.rstrip("/"), api_key=api_key) for url in config.urls])
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
    return StartedServers(servers, config, folder, api_key)


@contextmanager
def engines(config: EngineConfig, model: Path, folder: Path, **options: Any) -> Iterator[list[EngineAddress]]:
    """Yield the addresses of healthy engines; those that were started here are stopped at the end, whatever ends the
    block. See `make_servers` for the arguments and the errors."""
    with make_servers(config, model, folder, **options) as servers:
        yield servers.addresses
