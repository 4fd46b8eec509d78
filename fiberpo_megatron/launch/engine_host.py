"""An engine host runs the engines of one machine of a job: it starts, registers and watches them until the job ends."""

import signal
import sys
import time
from pathlib import Path
from types import FrameType

import torch

from fiberpo_megatron.config import Config
from fiberpo_megatron.engines.addresses import local_address
from fiberpo_megatron.engines.errors import EngineError
from fiberpo_megatron.engines.registry import Registry
from fiberpo_megatron.engines.servers import check_reachable, engines
from fiberpo_megatron.engines.sizing import sized_engine
from fiberpo_megatron.printable import printable

WATCH_S = 5.0


class _Ended(Exception):
    """Says that the job needs no engines any more."""


def serve(config: Config, folder: Path, host: str, clients: list[str], first_gpu: int) -> int:
    """Run `rollout.engine.count` servers until SIGUSR1 or SIGTERM; return the exit code.

    `folder` is the registry. `host` is this machine's name in it. `clients` are names or addresses of the machines
    whose ranks use the servers; they decide on which address the servers listen.
    """
    registry = Registry(folder)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _end)
    engine, reasons = sized_engine(config, torch.cuda.is_available())
    for reason in reasons:
        print(f"{host}: {reason}", flush=True)
    try:
        with engines(
            engine.model_copy(update={"urls": []}),
            config.model.path,
            folder.parent / f"engines_{host}",
            dtype=config.model.dtype,
            seed=config.run.seed,
            host=local_address(clients),
            first_gpu=first_gpu,
            routed_experts=config.needs_rollout_routing,
            api_key=registry.key(),
        ) as addresses:
            registry.register(host, addresses)
            print(f"{host}: {', '.join(address.url for address in addresses)}", flush=True)
            while True:
                time.sleep(WATCH_S)
                for address in addresses:
                    check_reachable(address)
    except _Ended:
        return 0
    except (EngineError, OSError, ValueError) as error:
        registry.fail(host, str(error))
        print(printable(f"fiberpo: engines of {host}: {error}", keep="\n\t"), file=sys.stderr)
        return 1


def _end(number: int, frame: FrameType | None) -> None:
    for other in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)  # one signal is enough: the servers are being stopped
    raise _Ended
