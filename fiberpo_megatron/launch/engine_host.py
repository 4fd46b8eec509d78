"""An engine host runs the engines of one machine of a job: it starts, registers and watches them until the job ends."""

import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from fiberpo_megatron.config import Config
from fiberpo_megatron.engines.addresses import local_address
from fiberpo_megatron.engines.errors import EngineError, EngineStartError
from fiberpo_megatron.engines.libraries import check_nccl
from fiberpo_megatron.engines.registry import Registry
from fiberpo_megatron.engines.servers import Offer, Servers, make_servers
from fiberpo_megatron.engines.sizing import sized_engine
from fiberpo_megatron.printable import printable

WATCH_S = 5.0


class _Ended(Exception):
    """Says that the job needs no engines any more."""


def serve(config: Config, folder: Path, host: str, clients: list[str], first_gpu: int) -> int:
    """Run `rollout.engine.count` servers until SIGUSR1 or SIGTERM; return the exit code.

    A server that dies, or that the run asks to replace, is started again, and registered once it is healthy.
    `folder` is the registry. `host` is this machine's name in it. `clients` are names or addresses of the machines
    whose ranks use the servers; they decide on which address the servers listen.
    """
    registry = Registry(folder)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _end)
    on_gpus = torch.cuda.is_available()
    engine, reasons = sized_engine(config, on_gpus)
    for reason in reasons:
        print(f"{host}: {reason}", flush=True)
    try:
        if on_gpus:  # here and not where the ranks are: interpreters are compared on the machine that has both
            check_nccl(config)
        with make_servers(
            engine.model_copy(update={"urls": []}),
            config.model.path,
            folder.parent / f"engines_{host}",
            dtype=config.model.dtype,
            seed=config.run.seed,
            host=local_address(clients),
            first_gpu=first_gpu,
            routed_experts=config.needs_rollout_routing,
            api_key=registry.key(),
        ) as servers:
            _watch(registry, host, servers)
    except _Ended:
        with suppress(OSError):
            registry.leave(host)
        return 0
    except (EngineError, OSError, ValueError) as error:
        registry.fail(host, str(error))
        print(printable(f"fiberpo: engines of {host}: {error}", keep="\n\t"), file=sys.stderr)
        return 1


def _watch(registry: Registry, host: str, servers: Servers) -> NoReturn:
    """Keep the registry true for as long as the servers are wanted."""
    registered: list[Offer] = []
    while True:
        for place, (generation, why) in registry.replacements(host).items():
            servers.replace(place, generation, why)
        offers = servers.offers()
        if offers != registered:
            registry.register(host, offers)
            registered = offers
            for offer in offers:
                said = offer.address.url if offer.address else f"engine {offer.place}: {offer.detail}"
                print(printable(f"{host}: {said}"), flush=True)
        if not any(offer.address is not None or offer.starting for offer in offers):
            raise EngineStartError(f"of {host}", "; ".join(o.detail for o in offers), "See their logs")
        time.sleep(WATCH_S)


def _end(number: int, frame: FrameType | None) -> None:
    for other in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)  # one signal is enough: the servers are being stopped
    raise _Ended
