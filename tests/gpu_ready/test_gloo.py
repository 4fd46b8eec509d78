"""Training steps and a publication in real groups of gloo, with every collective checked as NCCL would.

The tensors of a group that would be NCCL's are on the device, those of a group of gloo on the host, and all ranks of a
group make the same calls with the same shapes, types, roots and numbers of rows.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fiberpo_megatron.certify.processes import collect_ranks, run_ranks
from tests.gpu_ready.strict_run import Steps, publication, save_and_load, training_steps
from tests.gpu_ready.test_devices import PER_PASS, counted, forward_passes
from tests.variations import varied
from tools.checked_collectives import Call, Collectives, disagreements, recorded_collectives
from tools.strict_devices import put_on_device, strict_devices

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU needs no stand-in")

LAYOUTS = {
    "TP2 EP2": Steps(parallel={"tensor": 2, "expert": 2}),
    "PP2": Steps(parallel={"pipeline": 2}),
    "PP2 VPP2": Steps(layers=4, parallel={"pipeline": 2, "virtual_pipeline": 2}),
    "CP2 EP2": Steps(parallel={"context": 2, "expert": 2}),
    "DP2 EP2": Steps(parallel={"data": 2, "expert": 2}, replay="rollout"),
    "latent TP2": Steps(model="latent", parallel={"tensor": 2}),
    "dense DP2": Steps(model="dense", objective="fiberpo", replay="none", parallel={"data": 2}),
    "TP2 PP2": Steps(parallel={"tensor": 2, "pipeline": 2}),
}


def ranks_of(case: Steps) -> int:
    """The number of processes of a layout."""
    count = 1
    for name in ("tensor", "pipeline", "context", "data"):
        count *= case.parallel.get(name, 1)
    return count


WAITS = {
    "TP2 EP2": (10, 0),
    "PP2": (12, 7),
    "PP2 VPP2": (13, 15),
    "CP2 EP2": (10, 0),
    "DP2 EP2": (10, 0),
    "latent TP2": (10, 0),
    "dense DP2": (9, 0),
    "TP2 PP2": (12, 7),
}
"""Most waits of the host on any rank: in a step, and for each micro-batch of it beside those of layers with experts.
A stage tells the next one the shape of what it sends: the sender copies it to the device and the receiver reads it.
Both then wait for the device, and once more for the message where messages go in batches (no virtual pipeline)."""


@pytest.mark.parametrize("grown", varied(["", "layers", "micro_batches"], [""]))
@pytest.mark.parametrize("name", varied(LAYOUTS, ["TP2 EP2", "PP2"]))
def test_training_steps(name: str, grown: str):
    """All ranks agree, and wait for the device no more often than `WAITS` and the layers with experts say."""
    case = replace(LAYOUTS[name], steps=1)
    case = replace(case, **{grown: 2 * getattr(case, grown)}) if grown else case
    found = run_ranks(ranks_of(case), training_steps, case, timeout_s=250)
    calls = {rank: calls for rank, ((_, calls),) in enumerate(found)}
    assert disagreements(calls) == []
    of_step, of_micro_batch = WAITS[name]
    experts = 0 if case.model == "dense" else case.layers - case.hf_config.get("first_k_dense_replace", 0)
    of_layers = forward_passes(case) * PER_PASS * experts // case.parallel.get("pipeline", 1)
    most = of_step + case.micro_batches * of_micro_batch + of_layers
    for rank, ((asked, _),) in enumerate(found):
        waits = counted(asked.waits)
        table = "\n".join(f"{count:5d} {place}" for place, count in sorted(waits.items()))
        print(f"rank {rank}: {sum(waits.values())} waits, at most {most}\n{table}")
        assert sum(waits.values()) <= most, table
    backends = Counter(call.backend for made in calls.values() for call in made)
    assert backends["nccl"] > 10
    assert backends["gloo"] > 1


@pytest.mark.parametrize("name", varied(["TP2 EP2", "PP2", "DP2 EP2"], ["TP2 EP2"]))
def test_publications(name: str, tmp_path: Path):
    case = LAYOUTS[name]
    calls = dict(enumerate(run_ranks(ranks_of(case), publication, case, tmp_path, timeout_s=250)))
    assert disagreements(calls) == []
    assert any(call.backend == "nccl" for call in calls[0])


@pytest.mark.parametrize("name", varied(["TP2 EP2", "PP2", "DP2 EP2"], ["TP2 EP2"]))
def test_checkpoints(name: str, tmp_path: Path):
    case = replace(LAYOUTS[name], steps=1)
    calls = dict(enumerate(run_ranks(ranks_of(case), save_and_load, case, tmp_path, timeout_s=250)))
    assert disagreements(calls) == []
    assert all(any(call.backend == "gloo" for call in made) for made in calls.values())


def wrong(fault: str) -> list[Call]:
    """On each of two ranks: collectives of which one does not fit."""
    rank = dist_rank()
    with recorded_collectives(Collectives()) as record, strict_devices(record):
        dist.init_process_group("nccl", store=_store(), rank=rank, world_size=2)
        numbers = torch.ones(4, device="cuda")
        dist.all_reduce(numbers.cpu() if fault == "a tensor of the host" else numbers)
        host = dist.new_group(backend="gloo")
        dist.all_reduce(numbers if fault == "a tensor of the device" else numbers.cpu(), group=host)
        return record.calls


def dist_rank() -> int:
    """This process's rank, from the launcher's variables."""
    import os

    return int(os.environ["RANK"])


def _store() -> dist.Store:
    import datetime

    from fiberpo_megatron.rendezvous import ranks_store

    return dist.PrefixStore("wrong", ranks_store(datetime.timedelta(seconds=60)))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("a tensor of the host", "a tensor of the host in a group of nccl (ranks [0, 1])"),
        ("a tensor of the device", "a tensor of the device in a group of gloo (ranks [0, 1])"),
        ("none", None),
    ],
)
def test_tensors_on_the_wrong_side_are_found(fault: str, message: str | None):
    outcomes = collect_ranks(2, wrong, fault, timeout_s=60)
    for outcome in outcomes:
        assert outcome.error is None if message is None else message in (outcome.error or "")
    if message is None:
        assert disagreements({outcome.rank: outcome.value for outcome in outcomes}) == []


def a_call(name: str = "allreduce_", shape: tuple[int, ...] = (4,), kind: str = "float32", **numbers: object) -> Call:
    """One call of a group of the ranks 3 and 5."""
    return Call(name, "7", (3, 5), "nccl", {"tensors": ((shape, kind),)}, numbers, "here")


def exchange(inputs: list[int], outputs: list[int]) -> Call:
    """An all-to-all with so many rows to and from each rank."""
    tensors = {"input": (((sum(inputs), 8), "float32"),), "output": (((sum(outputs), 8), "float32"),)}
    splits = {"input_split_sizes": inputs, "output_split_sizes": outputs}
    return Call("alltoall_base_", "7", (3, 5), "nccl", tensors, splits, "here")


FIT: dict[str, tuple[list[Call], list[Call]]] = {
    "equal": ([a_call(), a_call(shape=(2,))], [a_call(), a_call(shape=(2,))]),
    "sent and received": ([a_call("send", dst=1, tag=0)], [a_call("recv_", src=0, tag=0)]),
    "rows": ([exchange([1, 2], [1, 5])], [exchange([5, 0], [2, 0])]),
}
DIFFER: dict[str, tuple[list[Call], list[Call]]] = {
    "order": ([a_call(), a_call("broadcast_")], [a_call("broadcast_"), a_call()]),
    "shape": ([a_call()], [a_call(shape=(5,))]),
    "type": ([a_call()], [a_call(kind="bfloat16")]),
    "root": ([a_call("broadcast_", root_rank=0)], [a_call("broadcast_", root_rank=1)]),
    "one call more": ([a_call(), a_call()], [a_call()]),
    "nobody else": ([a_call()], []),
    "rows": ([exchange([1, 2], [1, 5])], [exchange([4, 0], [2, 0])]),
    "message": ([a_call("send", dst=1, tag=0)], [a_call("recv_", (3,), src=0, tag=0)]),
    "no message": ([a_call("send", dst=1, tag=0)], [a_call("recv_", src=1, tag=0)]),
}


@pytest.mark.parametrize("name", list(FIT))
def test_ranks_that_agree(name: str):
    assert disagreements(dict(zip((3, 5), FIT[name]))) == []


@pytest.mark.parametrize("name", list(DIFFER))
def test_ranks_that_disagree_are_found(name: str):
    (problem,) = disagreements(dict(zip((3, 5), DIFFER[name])))
    assert problem.startswith("group 7")


def test_a_tag_lives_as_long_as_its_storage():
    tensor = put_on_device(torch.ones(2))
    with strict_devices():
        assert tensor.view(1, 2).is_cuda
        assert not torch.ones(2).is_cuda
