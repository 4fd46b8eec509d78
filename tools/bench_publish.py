"""Time every way of publishing weights beside its floor: the same bytes over the same link with nothing else.

    OMP_NUM_THREADS=1 .venv/bin/python tools/bench_publish.py --mib 1024 --engines 2

The link is memory that processes share (ipc), gloo's broadcast over the loopback device (distributed), or files (disk).
Its speed is measured with as many readers as there are engines, in rounds of the same size: the writer fills a round
while the readers take the one before, or any file that is complete. The engines are stand-ins
(tools/bench_publish_engine.py) that copy every tensor as a model's loader does, or with --real SGLang servers. Where
torch sees a GPU, weights and engines lie on the first one, and the floor of ipc is that of copies on it; an empty
CUDA_VISIBLE_DEVICES keeps everything in host memory.

The last line is a JSON object with `ratio`, the time of a way over its floor; `bitwise`, whether every stand-in holds
exactly the bytes that were published; and on a GPU `growth`, the bytes that torch's allocator in the trainer, and the
whole device, have in use after the last publication beyond those after the first. The exit code is 1 when the bytes
differ, or when the trainer's allocator did not get its buffers back.
"""

import argparse
import json
import multiprocessing
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_publish_engine import checksum
from torch import Tensor

from fiberpo_megatron.engines.addresses import free_ports
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.servers import engines as real_engines
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.interfaces import LocalShard, NamedShape
from fiberpo_megatron.weight_sync.base import PublisherContext
from fiberpo_megatron.weight_sync.disk import DiskPublisher
from fiberpo_megatron.weight_sync.distributed import DistributedPublisher
from fiberpo_megatron.weight_sync.ipc import IpcPublisher
from fiberpo_megatron.weight_sync.rounds import RoundPublisher

MIB = 2**20
ENGINE = Path(__file__).parent / "bench_publish_engine.py"
WAYS = ("ipc", "distributed", "disk")
HIDDEN, INNER, HEADS, HEAD_DIM, VOCABULARY = 1024, 3072, 16, 64, 16384
DEADLINE_S = 300.0
IN_A_ROW = 3
"""Times that a floor is measured, and weights are published, one after the other. In a run both find memory that was in
use a moment ago: the step has just written the weights, and the engines have just read theirs. Memory that rests for
some seconds can be slow at its next use, on a virtual machine most of all."""


def model(mib: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return the config.json and random weights of a dense Qwen3 of about `mib` MiB."""
    generator = torch.Generator(device).manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj.weight": (HEADS // 2 * HEAD_DIM, HIDDEN),
        "self_attn.v_proj.weight": (HEADS // 2 * HEAD_DIM, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "self_attn.q_norm.weight": (HEAD_DIM,),
        "self_attn.k_norm.weight": (HEAD_DIM,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
    }
    bytes_of_layer = sum(torch.Size(shape).numel() for shape in of_layer.values()) * dtype.itemsize
    layers = max(1, (mib * MIB - 2 * VOCABULARY * HIDDEN * dtype.itemsize) // bytes_of_layer)
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    config: dict[str, object] = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2, "head_dim": HEAD_DIM, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512, "rope_theta": 1e4, "tie_word_embeddings": False, "bos_token_id": 0,
        "eos_token_id": 1, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    drawn: dict[str, Any] = {"generator": generator, "dtype": dtype, "device": device}
    return config, {name: torch.rand(shape, **drawn) for name, shape in shapes.items()}


class Source:
    """Gives tensors out as the weight source of a policy on one rank does: views of its parameters, without a copy."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def rounds(self, limit: int) -> list[list[list[NamedShape]]]:
        found: list[list[list[NamedShape]]] = []
        size = limit
        for name, tensor in self.tensors.items():
            if size + tensor.nbytes > limit:
                found.append([[]])
                size = 0
            found[-1][0].append(NamedShape(name, tuple(tensor.shape), tensor.dtype))
            size += tensor.nbytes
        return found

    def share(self, limit: int) -> Iterator[list[tuple[str, Tensor]]]:
        for ((*shapes,),) in self.rounds(limit):
            yield [(one.name, self.tensors[one.name]) for one in shapes]

    def full(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())

    def local(self) -> Iterator[LocalShard]:
        for name, tensor in self.tensors.items():
            yield LocalShard(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())


# The floor


def _link_process(
    way: str, index: int, readers: int, sizes: list[int], folder: str, barrier: Any, written: Sequence[Any], report: Any
) -> None:
    """Take part in moving rounds of these sizes over a link: process 0 writes, the others read.

    No process waits for longer than the link demands. A broadcast waits for all; two buffers that take turns are
    filled in step with those who read them; files are read as soon as they are written, which `written` counts for
    each reader.
    """
    torch.set_num_threads(1)
    own = [torch.ones(size, dtype=torch.uint8) for size in sizes]
    group: Any = None
    slots: list[Tensor] = []
    if way == "distributed":
        store = dist.FileStore(f"{folder}/store", readers + 1)
        group = dist.ProcessGroupGloo(store, index, readers + 1, timedelta(seconds=DEADLINE_S))
    if way == "ipc":
        slots = [torch.from_file(f"{folder}/{i}", True, max(sizes), dtype=torch.uint8) for i in range(2)]
    took = []
    for _ in range(IN_A_ROW):
        if way == "disk" and index == 0:  # as a publisher does: new files, when those from before have gone
            for old in Path(folder).glob("round-*"):
                old.unlink()
        barrier.wait(DEADLINE_S)
        began = time.perf_counter()
        for number in range(len(sizes) + (way == "ipc")):
            at = number - 1 if index and way == "ipc" else number
            if index and way == "disk" and not written[index - 1].acquire(timeout=DEADLINE_S):
                raise TimeoutError(f"round {number} was not written within {DEADLINE_S:.0f} s")
            if 0 <= at < len(sizes):
                _move(way, index, own[at], slots, group, at, folder)
            if way == "ipc":
                barrier.wait(DEADLINE_S)
            if not index and way == "disk":
                for one in written:
                    one.release()
        barrier.wait(DEADLINE_S)
        took.append(time.perf_counter() - began)
    if index == 0:
        report.put(min(took))


def _move(way: str, index: int, own: Tensor, slots: list[Tensor], group: Any, number: int, folder: str) -> None:
    if way == "distributed":
        options = dist.BroadcastOptions()
        options.rootRank = 0
        group.broadcast([own], options).wait()
    elif way == "ipc":
        slot = slots[number % 2][: len(own)]
        (slot.copy_(own) if index == 0 else own.copy_(slot))
    elif index == 0:
        with open(f"{folder}/round-{number}", "wb", buffering=0) as file:
            file.write(own.numpy())
    else:
        with open(f"{folder}/round-{number}", "rb", buffering=0) as file:
            file.readinto(own.numpy())


def floor(way: str, readers: int, sizes: list[int], folder: str) -> float:
    """Return the least seconds of `IN_A_ROW` attempts in which the bytes of all rounds pass over the link of a way."""
    # Its children need not import torch. They are not children of this process: after a fork, its next write to each of
    # its own pages would cost a page fault, so that a publication after it would be slower than in a training run.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench_publish"])
    barrier, report = context.Barrier(readers + 1), context.Queue()
    written = [context.Semaphore(0) for _ in range(readers)]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if way == "ipc" else folder) as place:
        for slot in range(2):
            os.truncate(os.open(f"{place}/{slot}", os.O_CREAT | os.O_RDWR), max(sizes))
        processes = [
            context.Process(
                target=_link_process, args=(way, i, readers, sizes, place, barrier, written, report), daemon=True
            )
            for i in range(readers + 1)
        ]
        for process in processes:
            process.start()
        took = _reported(report, processes)
        for process in processes:
            process.join(DEADLINE_S)
    return took


def _reported(report: Any, processes: Sequence[Any]) -> float:
    """Return what process 0 reports. Raises RuntimeError when a process ends without it, or DEADLINE_S have passed."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        with suppress(queue.Empty):
            return float(report.get(timeout=0.2))
        if any(process.exitcode for process in processes):
            break
    ended = [process.exitcode for process in processes]
    raise RuntimeError(f"the floor was not measured: its processes have the exit codes {ended} (None: still running)")


# The ways


@contextmanager
def stand_ins(count: int) -> Iterator[list[EngineAddress]]:
    """Start stand-ins and yield their addresses."""
    ports = free_ports(count, "127.0.0.1")
    places = [tempfile.TemporaryDirectory() for _ in ports]  # each keeps its copy of the weights in its own
    processes = [
        subprocess.Popen([sys.executable, str(ENGINE), str(port)], env={**os.environ, "TMPDIR": place.name})
        for port, place in zip(ports, places, strict=True)
    ]
    try:
        addresses = [EngineAddress(f"http://127.0.0.1:{port}") for port in ports]
        deadline = time.monotonic() + DEADLINE_S
        with EnginePool(addresses, timeout_s=5) as pool:
            while any(isinstance(found, str) for found in pool.on_all(_answers)):
                if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                    raise RuntimeError("a stand-in for an engine did not start; its message stands above")
                time.sleep(0.5)
        yield addresses
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for place in places:
            place.cleanup()


async def _answers(client: Any) -> str | None:
    try:
        await client.model_info(5)
    except Exception as error:
        return str(error)
    return None


def publisher(way: str, context: PublisherContext, round_mib: int, folder: Path) -> RoundPublisher:
    """Return the publisher of a way, with rounds of the same size for all."""
    if way == "ipc":
        return IpcPublisher(context, bucket_mib=round_mib)
    if way == "distributed":
        return DistributedPublisher(context, bucket_mib=round_mib)
    return DiskPublisher(context, folder, round_mib * MIB, delta=way == "delta")


def changed(tensors: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return tensors of which `share` of the elements differ."""
    found = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in found.values():
        tensor.view(-1)[:: max(1, round(1 / share))] += 1
    return found


def chosen_ways(asked: list[str] | None, gpu: bool) -> list[str]:
    """Return the ways to time. Raises ValueError for `distributed` on a GPU: NCCL takes one rank for each GPU, and the
    engines of this tool are on the trainer's own."""
    if gpu and "distributed" in (asked or ()):
        raise ValueError(
            "--ways distributed: trainer and engines of this tool share one GPU, and NCCL refuses two ranks on one; "
            "leave it out, or empty CUDA_VISIBLE_DEVICES to time gloo in host memory"
        )
    return asked or [way for way in (*WAYS, "delta") if not (gpu and way == "distributed")]


def in_use() -> list[int]:
    """Return the bytes that torch's allocator has given out in this process, and those in use on the whole GPU."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return [torch.cuda.memory_allocated(), total - free]


def parsed(arguments: Sequence[str] | None, gpu: bool) -> argparse.Namespace:
    """Return the parsed command line, with the ways that can be timed on a GPU or without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the weights")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--round-mib", type=int, default=256, help="size of a round; weight_sync.bucket_mib by default")
    parser.add_argument(
        "--attempts",
        type=int,
        default=6,
        help=f"floors of each way, and {IN_A_ROW} publications after each; the fastest counts",
    )
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, "delta"), help="default: all that can run here")
    parser.add_argument("--real", action="store_true", help="start SGLang servers instead of stand-ins")
    parser.add_argument("--changed", type=float, default=0.02, help="share of elements that change for `delta`")
    parser.add_argument("--folder", type=Path, default=None, help="where `disk` and its floor write")
    options = parser.parse_args(arguments)
    try:
        options.ways = chosen_ways(options.ways, gpu)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    options = parsed(arguments, gpu)
    dtype, device = (torch.bfloat16, torch.device("cuda", 0)) if gpu else (torch.float32, torch.device("cpu"))
    config, tensors = model(options.mib, dtype, device)
    total = sum(tensor.nbytes for tensor in tensors.values())
    what = torch.cuda.get_device_name() if gpu else "CPU"
    kind = "SGLang servers" if options.real else "stand-ins for engines"
    print(f"{total / MIB:.0f} MiB in {len(tensors)} tensors to {options.engines} {kind} on {what}")
    result: dict[str, Any] = {"bytes": total, "engines": options.engines, "real": options.real, "device": what}
    result |= {name: {} for name in ("seconds", "floor", "ratio", "rounds", "check_seconds", "bitwise", "growth")}
    with tempfile.TemporaryDirectory(dir=options.folder) as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text(json.dumps(config))
        if options.real:
            settings = EngineConfig(
                count=options.engines, start_timeout_s=600, colocated=gpu, memory_fraction=0.9 / (options.engines + 1)
            )
            kwargs: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "gpu": gpu}
            addresses = stack.enter_context(real_engines(settings, folder / "model", folder / "logs", **kwargs))
        else:
            addresses = stack.enter_context(stand_ins(options.engines))
        pool = stack.enter_context(EnginePool(addresses, timeout_s=60))
        for way in options.ways:
            context = PublisherContext(pool, folder / "model", 0, 1, folder / f"run-{way}", DEADLINE_S)
            with closing(publisher(way, context, options.round_mib, folder / way)) as made:
                _time(way, made, tensors, options, result, folder, gpu)
    print(json.dumps(result))
    faults = faults_of(result)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def faults_of(result: dict[str, Any]) -> list[str]:
    """Return what is wrong with the publications of a result, in words; nothing of it is a matter of speed."""
    found = [
        f"{way}: an engine holds other bytes than those that were published, so that no figure of this run counts"
        for way, equal in result["bitwise"].items()
        if not equal
    ]
    return found + [
        f"{way}: torch's allocator has {trainer} bytes more in use after the last publication than after the first; "
        "an engine keeps a buffer open, or none has opened it"
        for way, (trainer, _) in result["growth"].items()
        if trainer > 0
    ]


def _time(
    way: str,
    made: RoundPublisher,
    tensors: dict[str, Tensor],
    options: argparse.Namespace,
    result: dict[str, Any],
    folder: Path,
    gpu: bool,
) -> None:
    source, carried, checks, used, floors = Source(tensors), [], [], [], []
    for attempt in range(options.attempts + 1):  # the first one connects, and is not counted
        if way != "delta" and attempt:  # in turn with the publications: other work comes and goes
            floors.append(_floor(way, made, options, folder, gpu))
        if way == "delta" and attempt:
            source = Source(changed(source.tensors, options.changed))
        for repeat in range(1 if way == "delta" or not attempt else IN_A_ROW):
            made.publish(source, f"{attempt}.{repeat}")
            if gpu:
                used.append(in_use())
            if attempt:
                carried.append(made.seconds["all" if way == "delta" else "carried"])
                checks.append(made.seconds["all"] - made.seconds["carried"])
    seconds = min(carried)
    result["seconds"][way] = round(seconds, 4)
    if not options.real:  # SGLang's checksum is one of its own
        result["bitwise"][way] = set(made.checksums) == {checksum(source.tensors)}
    if way == "delta":  # each attempt makes new weights on the GPU, so that its use says nothing about buffers
        written = sum(path.stat().st_size for path in (folder / way).rglob("*.safetensors"))
        result["delta_share"] = round(written / result["bytes"], 4)
        print(f"{way:12} {seconds:6.2f} s, and {result['delta_share']:.1%} of the bytes were written")
        return
    if gpu:
        result["growth"][way] = [last - first for first, last in zip(used[0], used[-1], strict=True)]
    result["check_seconds"][way] = round(min(checks), 3)
    result["rounds"][way] = len(made.plan)
    least = min(floors)
    result["floor"][way] = round(least, 5)
    result["ratio"][way] = round(seconds / least, 3)
    rate = result["bytes"] / 1e9
    print(
        f"{way:12} {seconds:8.4f} s ({rate / seconds:.1f} GB/s to each engine), floor {least:8.4f} s "
        f"({rate / least:.1f} GB/s), ratio {seconds / least:.2f}, "
        f"{(seconds - least) / len(made.plan) * 1e3:.1f} ms more a round than the floor; "
        f"comparing the engines' checksums took {min(checks):.2f} s more"
    )


def _floor(way: str, made: RoundPublisher, options: argparse.Namespace, folder: Path, gpu: bool) -> float:
    sizes = [sum(bucket.nbytes for bucket in this.buckets) for this in made.plan]
    if gpu and way == "ipc":
        return floor_on_gpu(sizes, options.engines)
    return floor(way, options.engines, sizes, str(folder))


def floor_on_gpu(sizes: list[int], engines: int) -> float:
    """Return the least seconds of three attempts in which a GPU moves rounds of these sizes: each byte once into a
    buffer, and once out of it for every engine, since all are on this GPU and share its memory's bandwidth."""
    weights = torch.ones(max(sizes), dtype=torch.uint8, device="cuda")
    buffer = torch.empty_like(weights)
    held = [torch.empty_like(weights) for _ in range(engines)]
    took = []
    for _ in range(4):  # the first one lets the clocks of the GPU rise
        torch.cuda.synchronize()
        began = time.perf_counter()
        for size in sizes:
            buffer[:size].copy_(weights[:size])
            for own in held:
                own[:size].copy_(buffer[:size])
        torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return min(took[1:])


if __name__ == "__main__":
    sys.exit(main())
