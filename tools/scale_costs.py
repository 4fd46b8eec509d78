"""This tool measures what grows with the number of ranks, or with the tokens of a batch, on one rank.

    OMP_NUM_THREADS=1 .venv/bin/python tools/scale_costs.py --ranks 32 128 1024 --tokens 64e6 [--write]

It needs one machine without GPUs and about 12 bytes of memory for each token times ten. A rank of a large run is
simulated: process groups of torch's fake backend for the start, a communicator that hands back what this rank sent for
the exchanges, simulated engines for the calls to all of them. Real Gloo groups of 2 to 32 ranks (threads) give the time
of a message and the traffic of a rendezvous. `--write` puts the tables into docs/scaling.md; the numbers of another
machine differ.
"""

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from math import ceil, log2
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fiberpo_megatron.mcore.parallel import exchange  # noqa: E402
from fiberpo_megatron.planning.show import table  # noqa: E402
from fiberpo_megatron.types import RolloutBatch  # noqa: E402

PAGE = ROOT / "docs/scaling.md"
BEGIN, END = "<!-- measured: tools/scale_costs.py -->", "<!-- end of measured -->"
RING = (4, 8, 16, 32)
MEAN_TOKENS, SAMPLES = 4096, 16


class Memory:
    """Measures how far a block raises the memory of this process (`peak`, bytes), and its CPU time (`seconds`)."""

    def __enter__(self) -> "Memory":
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        self._before, self._began = _status("VmRSS"), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self._began
        self.peak = max(0, _status("VmHWM") - self._before)


def _status(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


# Start


def start(ranks: int) -> dict[str, float]:
    """Build the process groups of a layout of `ranks` ranks as rank 0 with the fake backend; count them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from fiberpo_megatron.config.schema import RunConfig
    from fiberpo_megatron.mcore.parallel import layout as module
    from fiberpo_megatron.mcore.settings import ParallelConfig

    parallel = ParallelConfig(tensor=2, pipeline=2, expert=8)
    made = {"all": 0, "ours": 0}
    new_group = dist.new_group

    def counted(*arguments: Any, **options: Any) -> Any:
        made["all"] += 1
        made["ours"] += "parallel/layout.py" in sys._getframe(1).f_code.co_filename
        return new_group(*arguments, **{**options, "backend": "fake"})

    def axes(self: Any) -> list[list[int]]:
        tensor, data = self.tensor_size, self.data_size
        return [[r % tensor, 0, r // tensor % data, r // (tensor * data)] for r in range(ranks)]

    hf_config = json.loads((ROOT / "examples/planning/qwen3_30b_a3b/config.json").read_text())
    os.environ["WORLD_SIZE"] = str(ranks)
    began = time.process_time()
    with (
        patch.object(dist, "new_group", counted),
        patch.object(module.ParallelLayout, "_everyones_axes", axes),
        patch.object(dist, "HashStore", FakeStore),
        patch.object(dist, "init_process_group", _fake_start(dist.init_process_group)),
    ):
        module.start_layout(hf_config, parallel, RunConfig(folder=Path("unused")))
    return {"groups": made["all"], "ours": made["ours"], "seconds": time.process_time() - began}


def _fake_start(real: Callable[..., None]) -> Callable[..., None]:
    def begin(backend: str, *, store: Any, rank: int, world_size: int, timeout: timedelta) -> None:
        real("fake", store=store, rank=rank, world_size=world_size)

    return begin


def store() -> dict[str, float]:
    """Return how many operations a second the rendezvous store of one process answers to one other."""
    opened = dist.TCPStore("127.0.0.1", 0, 1, True)
    began, count = time.perf_counter(), 5000
    for _ in range(count):
        opened.add("key", 1)
    return {"rate": count / (time.perf_counter() - began)}


# Gloo


class CountingStore(dist.Store):  # type: ignore[misc]
    """Is a store of one process that counts calls and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}
        self.calls = self.bytes = 0
        self._changed = threading.Condition()

    def set(self, key: str, value: Any) -> None:
        with self._changed:
            self.calls += 1
            self.values[key] = value.encode() if isinstance(value, str) else bytes(value)
            self.bytes += len(self.values[key])
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            self.calls += 1
            self._changed.wait_for(lambda: key in self.values, 60)
            self.bytes += len(self.values[key])
            return self.values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        with self._changed:
            self.calls += 1
            self._changed.wait_for(lambda: all(key in self.values for key in keys), 60)


def gloo(ranks: int, lazy: bool) -> dict[str, float]:
    """Connect a real Gloo group of threads and time its messages; the seconds are the least of several tries."""
    sys.setswitchinterval(1e-5)  # real ranks are processes, which need not wait for an interpreter
    kind: Any = dist.ProcessGroupGloo
    store, barrier = CountingStore(), threading.Barrier(ranks)
    times: dict[str, list[float]] = {"ring": [], "tree": []}

    def rank(number: int) -> None:
        options = kind._Options()
        options._timeout = timedelta(seconds=60)
        options._devices = [kind.create_device(hostname="127.0.0.1", lazy_init=lazy)]
        group = kind(store, number, ranks, options)

        def ring() -> None:
            group.allreduce([torch.tensor([1])]).wait()

        def tree() -> None:
            reached = 1
            while reached < ranks:
                sending = group.send([torch.tensor([1])], (number + reached) % ranks, 1)
                group.recv([torch.tensor([1])], (number - reached) % ranks, 1).wait()
                sending.wait()
                reached *= 2

        for _ in range(8):
            for name, work in (("ring", ring), ("tree", tree)):
                barrier.wait()
                began = time.perf_counter()
                work()
                barrier.wait()
                if number == 0:
                    times[name].append(time.perf_counter() - began)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"calls": store.calls, "bytes": store.bytes, **{name: min(tries) for name, tries in times.items()}}


# Rollouts and mini-batches


def batch_of(tokens: int, multiple: int = 1) -> RolloutBatch:
    """Return a batch of about so many tokens without routing, of a multiple of so many groups."""
    groups = max(1, round(tokens / (MEAN_TOKENS * SAMPLES * multiple))) * multiple
    count = groups * SAMPLES
    lengths = np.full(count, MEAN_TOKENS)
    lengths[::2] += MEAN_TOKENS // 4
    lengths[1::2] -= MEAN_TOKENS // 4
    mask = np.ones(int(lengths.sum()), bool)
    starts = np.cumsum(lengths) - lengths
    for position in range(256):
        mask[starts + position] = False
    return RolloutBatch.filled(
        tokens=np.ones(len(mask), np.int64),
        response_mask=mask,
        lengths=lengths,
        groups=np.arange(count) // SAMPLES,
        weight_versions=mask - np.int64(1),
        engines=mask - np.int16(1),
    )


def gather(ranks: int, tokens: int) -> dict[str, float]:
    """Do a leader's part of `gather_rollouts`: every leader has an equal share, and messages arrive at once."""
    from fiberpo_megatron.mcore.parallel.layout import ParallelLayout

    leaders = max(1, ranks // 4)
    share = batch_of(tokens // leaders)

    def received(message: torch.Tensor, group: Any) -> list[torch.Tensor]:
        return [message.clone() for _ in range(leaders)]

    rank: Any = SimpleNamespace(is_leader=True, data_rank=0, _leaders=[0], _leader_group=None, _replica_group=None)
    with (
        patch.object(exchange, "all_gather_bytes", received),
        patch.object(exchange, "broadcast_bytes", lambda message, *_: message),
        Memory() as used,
    ):
        joined = ParallelLayout.gather_rollouts(rank, share)
    held = sum(array.nbytes for array in (joined.tokens, joined.response_mask, joined.rollout_log_probs))
    held += joined.weight_versions.nbytes + joined.engines.nbytes
    return {"seconds": used.seconds, "peak": used.peak, "held": held}


def pack(ranks: int, tokens: int) -> dict[str, float]:
    """Cut a batch into eight mini-batches as one of `ranks` data-parallel ranks."""
    from fiberpo_megatron.trainer.batch import mini_batches
    from fiberpo_megatron.trainer.loop import rollout_summary
    from fiberpo_megatron.trainer.settings import BatchConfig

    whole = batch_of(tokens, multiple=8)  # eight mini-batches of whole groups
    count = len(whole.lengths)
    layout: Any = SimpleNamespace(
        data_rank=0, data_size=ranks // 4, context_rank=0, context_size=1, sequence_multiple=1, micro_batch_multiple=1
    )
    batch = BatchConfig(
        prompts=count // SAMPLES, samples_per_prompt=SAMPLES, mini_batches=8, micro_batch_tokens=8 * MEAN_TOKENS
    )
    advantages = np.zeros(count, np.float32)
    with Memory() as packing:
        mini_batches(whole, advantages, batch=batch, weighting="seq-mean", domains=1, layout=layout, version=1)
    with Memory() as metrics:
        rollout_summary(whole, ["task"])
    return {
        "seconds": packing.seconds,
        "peak": packing.peak,
        "metrics_seconds": metrics.seconds,
        "metrics_peak": metrics.peak,
    }


# Metrics, checkpoints, engines


def metrics(ranks: int) -> dict[str, float]:
    """Join the counts of the environments of all leaders on one rank."""
    counts = {f"environment/task_{i}/{name}": 1.0 for i in range(4) for name in ("errors", "restarts", "late")}
    text = exchange.text_to_bytes(json.dumps(counts))
    parts = [text] * ranks
    with (
        patch.object(exchange, "gather_bytes", lambda message, group: parts),
        patch.object(exchange, "broadcast_bytes", lambda message, *_: message),
        patch.object(exchange.dist, "get_global_rank", lambda group, rank: rank),
        Memory() as used,
    ):
        exchange.all_gather_json(counts, None)
    return {"seconds": used.seconds, "bytes": len(text) * ranks}


def files(count: int) -> dict[str, float]:
    """Describe, look through and delete a checkpoint of `count` files on this machine's disk."""
    from fiberpo_megatron.mcore.checkpoint import folders
    from fiberpo_megatron.mcore.checkpoint.owners import keep_to_owner, untrusted

    with tempfile.TemporaryDirectory() as temporary:
        folder = folders.step_folder(temporary, 1)
        folder.mkdir()
        for rank in range(count):
            (folder / f"__{rank}_0.distcp").write_bytes(b"x" * 64)
        began = time.perf_counter()
        folders.durable.sync_tree(folder)
        folders.Description(1, {}, {}, {}, {}, folders.mark_all(folder)).write(folder)
        keep_to_owner(folder)
        saved = time.perf_counter() - began
        began = time.perf_counter()
        folders.describe(folder)
        untrusted(folder)
        size = (folder / folders.DESCRIPTION).stat().st_size
        return {"save_seconds": saved, "describe_seconds": time.perf_counter() - began, "bytes": size}


def random_state_bytes() -> int:
    """Return the bytes of one rank's random generators in a checkpoint."""
    from fiberpo_megatron.mcore.checkpoint.state import _generators

    file = io.BytesIO()
    torch.save(_generators(), file)
    return len(file.getvalue())


def plan_item_bytes() -> float:
    """Return the bytes that one tensor takes in the plan that a writing rank sends to the first of them."""
    from torch.distributed.checkpoint.planner_helpers import _create_write_items

    items = [
        _create_write_items(f"decoder.layers.{i}.mlp.experts.linear_fc1", torch.zeros(4, 4))[0] for i in range(500)
    ]
    return len(pickle.dumps(items)) / len(items)


def engines(count: int) -> dict[str, float]:
    """Pause, ask and resume `count` simulated engines as a publication does."""
    from fiberpo_megatron.engines.client import EngineAddress, EngineClient
    from tests.engines.fake_server import FakeServers

    async def work() -> float:
        servers = FakeServers()
        clients = [
            EngineClient(EngineAddress(f"http://127.0.0.1:{20000 + index}"), 60.0, transport=servers)
            for index in range(count)
        ]
        began = time.perf_counter()
        for call in ("pause", "model_info", "resume"):
            arguments = ("retract",) if call == "pause" else ()
            await asyncio.gather(*(getattr(client, call)(*arguments) for client in clients))
        return time.perf_counter() - began

    return {"seconds": asyncio.run(work())}


RESULTS: dict[str, dict[str, float]] = {}
"""What was measured before, by name and numbers (`--results`)."""


def _in_process(name: str, *numbers: float) -> dict[str, float]:
    """Return what a function of this module measures in a process of its own."""
    key = " ".join([name, *map(str, numbers)])
    if key not in RESULTS:
        RESULTS[key] = _measured(name, *numbers)
        if results_file is not None:
            results_file.write_text(json.dumps(RESULTS, indent=1))
    return RESULTS[key]


results_file: Path | None = None


def _measured(name: str, *numbers: float) -> dict[str, float]:
    """Return what a function of this module measures in a process of its own, whose memory is not another's."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, name, numbers))
    process.start()
    sender.close()
    try:
        found: dict[str, float] = receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"measuring {name} {numbers} failed; its error is above") from error
    process.join(60)
    return found


def _send(sender: Any, name: str, numbers: Sequence[float]) -> None:
    sender.send(ONE[name](*map(int, numbers)))


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value:.2f} s" if value < 100 else f"{value:,.0f} s"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def measure(ranks: Sequence[int], tokens: int) -> str:
    """Return the tables of all measurements."""
    rate = _in_process("store")["rate"]
    rings = {n: _in_process("gloo", n, 0) for n in RING}
    lazy = {n: _in_process("gloo", n, 1) for n in RING}
    hop = rings[4]["ring"] / (2 * 3)
    message = rings[4]["tree"] / 2
    rows: list[list[str]] = []

    def row(what: str, each: Callable[[int], str]) -> None:
        rows.append([what, *(each(n) for n in ranks)])

    starts = {n: _in_process("start", n) for n in ranks}
    row("start: process groups made, ours among them", lambda n: f"{starts[n]['groups']:.0f}, {starts[n]['ours']:.0f}")
    row("start: Python on one rank", lambda n: _seconds(starts[n]["seconds"]))
    row(
        "start: operations of the rendezvous store for groups",
        lambda n: f"{starts[n]['groups'] * n * 4:,.0f} ({_seconds(starts[n]['groups'] * n * 4 / rate)})",
    )
    entry = rings[RING[-1]]["bytes"] / RING[-1] ** 2 - 8 * RING[-1]
    row("start: bytes that connecting all pairs reads from the store", lambda n: _bytes(n * n * (entry + 8 * n)))
    per_rank = lazy[RING[-1]]["bytes"] / RING[-1] / log2(RING[-1])
    row(
        "start: the same when pairs connect as they speak (from 128 ranks on)", lambda n: _bytes(n * per_rank * log2(n))
    )
    row("agreement of all ranks, ring (before)", lambda n: _seconds(2 * (n - 1) * hop))
    row("agreement of all ranks, now", lambda n: _seconds(ceil(log2(n)) * message))
    joined = {n: _in_process("metrics", n) for n in ranks}
    row(
        "counts of all environments: bytes, Python",
        lambda n: f"{_bytes(joined[n]['bytes'])}, {_seconds(joined[n]['seconds'])}",
    )
    row("heartbeats: operations of the store a second", lambda n: f"{n * 3 / 5:,.0f} of {rate:,.0f}")
    looked = {n: _in_process("files", n) for n in ranks}
    row(
        "checkpoint of a file for each rank: describe and sync, look through",
        lambda n: f"{_seconds(looked[n]['save_seconds'])}, {_seconds(looked[n]['describe_seconds'])}",
    )
    state = random_state_bytes()
    row("checkpoint: random generators on rank 0", lambda n: _bytes(n * state))
    item = plan_item_bytes()
    row(
        "checkpoint: plans on the first writer, 5,000 tensors a rank, all ranks writing",
        lambda n: _bytes(5000 * item * n),
    )
    asked = {n: _in_process("engines", n // 8) for n in ranks}
    row("three calls to all engines (one for 8 ranks)", lambda n: _seconds(asked[n]["seconds"]))
    for count, sizes in ((4_000_000, ranks[:-1]), (tokens, ranks[-1:])):  # a large batch belongs to many ranks
        text = f"{count / 1e6:.0f}M tokens"
        gathered = {n: _in_process("gather", n, count) for n in sizes}
        packed = {n: _in_process("pack", n, count) for n in sizes}
        for what, each in (
            ("`gather_rollouts` on a leader, CPU", lambda n, g=gathered: _seconds(g[n]["seconds"])),
            ("its peak memory", lambda n, g=gathered: _bytes(g[n]["peak"])),
            ("what every rank holds afterwards", lambda n, g=gathered: _bytes(g[n]["held"])),
            ("keys and packing of 8 mini-batches, CPU", lambda n, p=packed: _seconds(p[n]["seconds"])),
            ("their peak memory", lambda n, p=packed: _bytes(p[n]["peak"])),
            ("metrics of the batch, CPU", lambda n, p=packed: _seconds(p[n]["metrics_seconds"])),
            ("their peak memory", lambda n, p=packed: _bytes(p[n]["metrics_peak"])),
        ):
            row(f"{text}: {what}", lambda n, f=each, s=sizes: f(n) if n in s else "")
    slopes = [
        [
            str(n),
            f"{rings[n]['calls']:,.0f}, {_bytes(rings[n]['bytes'])}",
            f"{lazy[n]['calls']:,.0f}, {_bytes(lazy[n]['bytes'])}",
            _seconds(rings[n]["ring"]),
            _seconds(rings[n]["tree"]),
        ]
        for n in RING
    ]
    headings = ("Gloo ranks (threads)", "store: all pairs", "store: as they speak", "ring all-reduce", "agreement")
    names = ("what", *(f"{n:,} ranks" for n in ranks))
    return f"{table(names, rows)}\n\n{table(headings, slopes)}"


ONE: dict[str, Callable[..., dict[str, float]]] = {
    "start": start,
    "store": store,
    "gloo": lambda ranks, lazy: gloo(ranks, bool(lazy)),
    "gather": gather,
    "pack": pack,
    "metrics": metrics,
    "files": files,
    "engines": engines,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128, 1024])
    parser.add_argument("--tokens", type=float, default=64e6, help="tokens of the large batch")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="keep results there, and measure only what is missing"
    )
    parser.add_argument("--one", nargs="+", metavar="NAME", help="measure one thing: its name and numbers; prints JSON")
    options = parser.parse_args()
    if options.one:
        name, *numbers = options.one
        print(json.dumps(ONE[name](*(int(float(number)) for number in numbers))))
        return 0
    global results_file
    results_file = options.results
    if results_file is not None and results_file.is_file():
        RESULTS.update(json.loads(results_file.read_text()))
    text = measure(options.ranks, int(options.tokens))
    print(text)
    if options.write:
        head, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
