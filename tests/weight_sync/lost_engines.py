"""Two training ranks that publish to two stand-ins for engines, one of which is lost in the middle."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import torch

from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.servers import Offer
from fiberpo_megatron.rollout import fleet as fleet_module
from fiberpo_megatron.rollout.fleet import Fleet
from fiberpo_megatron.together import together
from fiberpo_megatron.weight_sync import distributed, session
from fiberpo_megatron.weight_sync.distributed import DistributedPublisher
from fiberpo_megatron.weight_sync.ipc import IpcPublisher
from tests.weight_sync.joining import JoiningServers
from tests.weight_sync.sources import Tensors, context

ENGINES = [EngineAddress("http://127.0.0.1:1"), EngineAddress("http://127.0.0.1:2")]
LOST = "127.0.0.1:2"
MIB = 1024**2
TIMEOUT_S = 4.0
WATCHDOG_S = 1.0
"""How long after its scheduler an SGLang server ends."""


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Return six tensors of 4 MiB, more than sockets hold: three rounds with a tensor of each of two ranks."""
    made = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(MIB, generator=made) for i in range(6)}


class Lost(JoiningServers):
    """In a publication the second engine takes part in the first round, and then `fault` happens:

    - dies: its sockets close, and its server ends a second later;
    - its scheduler dies: the server stays and answers nothing;
    - rank 1 loses it: its connection to that rank alone breaks, and it answers nothing;
    - hangs: it answers nothing, and its sockets stay open;
    - refuses: it says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fault = ""
        self.gone = self.silent = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if f"{request.url.host}:{request.url.port}" == LOST:
            if self.gone:
                raise httpx.ConnectError("connection refused")
            if self.silent:
                await asyncio.sleep(3600)
        return await super().handle_async_request(request)

    async def _usual(self, host, path, body):
        if self.fault and host == LOST and path == "/update_weights_from_distributed" and "w0" not in body["names"]:
            if "w1" in body["names"]:
                return await super()._usual(host, path, body)
            if self.fault == "refuses":
                return httpx.Response(400, json={"success": False, "message": "not now"})
            if self.fault == "rank 1 loses it":
                if "w3" not in body["names"]:
                    return await super()._usual(host, path, body)
                del self.groups[host, body["group_name"]]
            elif self.fault != "hangs":
                self.end(host)
            if self.fault == "dies":
                await asyncio.sleep(WATCHDOG_S)
                self.gone = True
                raise httpx.ReadError("connection reset")
            self.silent = True
            await asyncio.sleep(3600)
        return await super()._usual(host, path, body)


class Places:
    def __init__(self) -> None:
        self.found = {address.url: Offer(address.url, address) for address in ENGINES}

    def offers(self) -> list[Offer]:
        return list(self.found.values())

    def replace(self, place: str, generation: int, why: str) -> None:
        return


def publish_and_lose(faults: Sequence[str], checkpoint: Path, model: Path) -> dict[str, Any]:
    """For each fault publish three versions as a run does; it happens in the second. Return what this rank saw,
    and the errors of `_failed_shares`."""
    from fiberpo_megatron.mcore.families import read_hf_config
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from tests.distributed.parity import make_config

    fleet_module.PROBE_S = session.QUICK_S = distributed.QUICK_S = 1.0
    config = make_config(parallel={}, model={"path": checkpoint}, run={"folder": model.parent / "run"})
    layout = start_layout(read_hf_config(checkpoint), config.parallel, config.run)
    return {fault: _publish_and_lose(fault, layout, model) for fault in faults} | {
        "shares": _failed_shares(layout, model)
    }


def _failed_shares(layout: Any, model: Path) -> list[str]:
    """Publish as on GPUs, where ranks broadcast their shares to each other, with gloo's for NCCL's. Rank 1 fails in its
    second round: its export, and then what it exported. Return this rank's errors."""

    class Fails(Tensors):
        what = ""

        def share(self, limit):
            for number, tensors in enumerate(super().share(limit)):
                if layout.rank == 1 and number == 1 and self.what == "export":
                    raise FloatingPointError("the policy's own failure")
                yield tensors[:0] if layout.rank == 1 and number == 1 and self.what == "tensors" else tensors

    errors = []
    torch.cuda.synchronize = lambda device=None: None
    with EnginePool(ENGINES, timeout_s=5, transport=JoiningServers()) as pool:
        made = IpcPublisher(context(pool, model, model.parent, layout.rank, 2, TIMEOUT_S))
        made.device, made.limit = torch.device("cpu"), 8 * MIB
        with closing(made):
            for version, what in enumerate(("", "export", "tensors", "")):
                source = Fails(weights(version).items(), layout.rank, 2)
                source.what = what
                try:
                    made.publish(source, str(version))
                    last = made.plan[-1]
                    flat, begin = made._slots[last.number % 2].bytes, 0
                    for bucket in last.buckets:  # every rank's buffer has the shares of all
                        for name, offset in zip(bucket.names, bucket.offsets, strict=True):
                            held = flat[begin + offset :][: 4 * MIB].view(torch.float32)
                            assert torch.equal(held, weights(version)[name])
                        begin += bucket.padded_bytes
                    errors.append("")
                except Exception as error:
                    errors.append(f"{type(error).__name__}: {error}")
    return errors


def _publish_and_lose(fault: str, layout: Any, model: Path) -> dict[str, Any]:
    servers, places, errors, seconds = Lost(), Places(), list[str](), list[float]()
    with EnginePool(ENGINES, timeout_s=5, transport=servers) as pool:
        fleet = Fleet(layout, pool, places if layout.rank == 0 else None, None)
        made = DistributedPublisher(context(pool, model, model.parent, layout.rank, 2, TIMEOUT_S), backend="gloo")
        made.limit = 8 * MIB

        def publish(version: str) -> None:
            source = Tensors(weights(int(version)).items(), layout.rank, 2)
            with fleet.publication():
                while True:
                    began = time.monotonic()
                    try:
                        with together(layout, f"publishing weights {version}", TIMEOUT_S + 20):
                            made.publish(source, version)
                        break
                    except Exception as error:
                        seconds.append(time.monotonic() - began)
                        errors.append(f"{type(error).__name__}: {error}")
                        if not fleet.goes_on_without(error):
                            raise
                fleet.published(version)
            fleet.verified()

        def holds(version: str, *hosts: str) -> bool:
            if layout.rank:
                return True
            right = weights(int(version))
            return all(_same(servers.held[host], right) and servers.version[host] == version for host in hosts)

        seen: dict[str, Any] = {}
        with closing(made):
            publish("1")
            seen["first"] = holds("1", "127.0.0.1:1", LOST)
            servers.fault = fault
            try:
                publish("2")
                seen["second"] = holds("2", "127.0.0.1:1")
            except Exception:
                seen["second"] = "ended the run"
            places.found.pop(ENGINES[1].url)
            publish("3")
            seen["third"] = holds("3", "127.0.0.1:1")
        left = {host for host, _ in servers.groups}
        return seen | {"errors": errors, "seconds": seconds, "left": left, "engines": pool.numbers}


def _same(held: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return held.keys() == right.keys() and all(torch.equal(held[name], tensor) for name, tensor in right.items())
