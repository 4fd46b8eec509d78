"""One rank of a large job in this process: its groups are real objects, and nobody else is there.

Torch's "fake" backend answers every collective at once. `FakeCollectives` fills in what ranks that hold the same would
have sent, so that a training step of a narrow model runs to its end and its collectives can be compared between ranks.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fiberpo_megatron.mcore.settings import ParallelConfig
from fiberpo_megatron.planning.states import Position, StateBytes
from tests.gpu_ready.strict_run import LENGTH, Steps, train
from tools.checked_collectives import Call, Collectives, disagreements, recorded_collectives

META = torch.device("meta")


@dataclass(frozen=True)
class Job:
    """A model and the layout of its ranks."""

    hf_config: Mapping[str, Any]
    parallel: ParallelConfig
    world_size: int
    narrow: bool = False
    """Whether the model has all its experts, but hardly any width and two layers in each pipeline stage."""
    objective: str = "fiberpo-expert"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the config's [model]."""

    @property
    def model(self) -> dict[str, Any]:
        """Contents of config.json."""
        if not self.narrow:
            return dict(self.hf_config)
        sizes = {**NARROW, "num_hidden_layers": 2 * self.parallel.pipeline}
        return {**self.hf_config, **{key: size for key, size in sizes.items() if key in self.hf_config}}

    @property
    def ranks(self) -> list[int]:
        """Global ranks that stand for all: the first of every pipeline stage, the neighbours of rank 0 in every other
        group, and the last one."""
        sizes = self.parallel
        per_stage = self.world_size // sizes.pipeline
        stages = [stage * per_stage for stage in range(sizes.pipeline)]
        expert_tensor = sizes.expert_tensor or 1
        dense, experts = (1, sizes.tensor, sizes.tensor * sizes.context), (expert_tensor, expert_tensor * sizes.expert)
        neighbours = [*dense, *experts]
        return sorted({*stages, *(rank for rank in neighbours if rank < per_stage), self.world_size - 1})


NARROW = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 8,
    "vocab_size": 64,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Place:
    """Where a rank stands: Megatron's order is tensor, context, data, pipeline, and for experts tensor, expert, data,
    pipeline."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int
    expert_data: int

    @classmethod
    def of(cls, rank: int, sizes: ParallelConfig, world_size: int) -> "Place":
        """The place of a global rank."""
        per_stage = world_size // sizes.pipeline
        pipeline, inside = divmod(rank, per_stage)
        outer, tensor = divmod(inside, sizes.tensor)
        data, context = divmod(outer, sizes.context)
        expert_tensor = sizes.expert_tensor or 1
        expert_data, expert = divmod(inside // expert_tensor, sizes.expert)
        return cls(tensor, context, data, pipeline, expert, expert_data)


class FakeCollectives(Collectives):
    """Lets every rank have sent what this one sends."""

    row = 0
    """Positions of a row on this rank, which the stage before announces."""
    hidden = 0

    def perform(self, func: Any, args: Any, kwargs: Any, call: Call, given: dict[str, Any]) -> Any:
        """Run the operation on the fake backend, then fill in what arrives."""
        if call.name == "alltoall_base_":  # nobody sends as many rows as this rank awaits
            out, splits = given["output"], given["output_split_sizes"]
            args = (out, torch.zeros_like(out), args[2], splits, splits, *args[5:])
        done = func(*args, **kwargs)
        with torch.no_grad():
            self._receive(call, given)
        return done

    def _receive(self, call: Call, given: dict[str, Any]) -> None:
        me, size = call.ranks.index(dist.get_rank()), len(call.ranks)
        if call.name == "allgather_":
            (mine,) = given["input_tensors"]
            for at, out in enumerate(given["output_tensors"][0]):
                out.copy_(mine)
                if at != me and mine.dim() == 2 and mine.is_floating_point():
                    # Experts of positions: the last one of a row is nobody's, and stands for a token of another rank.
                    out[(mine == 0).all(1)] = 1
        elif call.name == "_allgather_base_":
            given["output_tensor"].view(size, -1).copy_(given["input_tensor"].reshape(1, -1).expand(size, -1).clone())
        elif call.name == "_reduce_scatter_base_":
            given["output_tensor"].copy_(given["input_tensor"].chunk(size)[me].clone())
        elif call.name == "alltoall_base_":
            given["output"].zero_()
        elif call.name == "recv_":
            (tensor,) = given["tensors"]
            shape = tensor.dtype == torch.int64 and tensor.numel() == 3
            tensor.copy_(tensor.new_tensor([self.row, 1, self.hidden])) if shape else tensor.zero_()


class _Interception(TorchDispatchMode):
    def __init__(self, record: Collectives) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            return self.record.run(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_rank(job: Job, rank: int, config: Any) -> Iterator[tuple[Any, FakeCollectives]]:
    """Start the layout of one rank and yield it with the record of its collectives."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from fiberpo_megatron.mcore.parallel import layout as layouts

    def axes(layout: Any) -> list[list[int]]:
        places = [Place.of(r, job.parallel, job.world_size) for r in range(job.world_size)]
        return [[at.tensor, at.context, at.data, at.pipeline] for at in places]

    record = FakeCollectives(check_devices=False)
    record.row = 2 * length_of(job) // (job.parallel.context * job.parallel.tensor)
    record.hidden = int(job.model["hidden_size"])
    environment = {"WORLD_SIZE": str(job.world_size), "RANK": str(rank), "LOCAL_RANK": str(rank % 8)}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(mock.patch.object(layouts, "ranks_store", lambda timeout: FakeStore()))
        stack.enter_context(mock.patch.object(layouts.ParallelLayout, "_everyones_axes", axes))
        stack.enter_context(recorded_collectives(record, backend="fake"))
        stack.enter_context(_Interception(record))
        layout = layouts.start_layout(job.model, config.parallel, config.run)
        try:
            yield layout, record
        finally:
            layouts.stop_layout()


def groups(layout: Any) -> dict[str, list[int]]:
    """The global ranks of this rank's groups, as Megatron and the layout have them."""
    from megatron.core import parallel_state as state

    found = {
        "tensor": layout.tensor_group,
        "pipeline": layout.pipeline_group,
        "token": layout.token_group,
        "context": state.get_context_parallel_group(),
        "data": state.get_data_parallel_group(),
        "expert": state.get_expert_model_parallel_group(),
        "expert data": state.get_expert_data_parallel_group(),
        "replica": layout._replica_group,
    }
    return {name: sorted(dist.get_process_group_ranks(group)) for name, group in found.items()}


def expected_groups(rank: int, sizes: ParallelConfig, world_size: int) -> dict[str, list[int]]:
    """The same from the places of all ranks alone: a group holds those that differ in nothing but what it is for."""
    places = [Place.of(r, sizes, world_size) for r in range(world_size)]
    mine, width = places[rank], sizes.expert_tensor or 1

    def equal(*names: str) -> list[int]:
        return [r for r, at in enumerate(places) if all(getattr(at, n) == getattr(mine, n) for n in names)]

    def of_experts(*names: str) -> list[int]:
        return [r for r in equal("pipeline", *names) if r % width == rank % width]

    return {
        "tensor": equal("context", "data", "pipeline"),
        "pipeline": equal("tensor", "context", "data"),
        "token": equal("tensor", "pipeline"),
        "context": equal("tensor", "data", "pipeline"),
        "data": equal("tensor", "context", "pipeline"),
        "expert": of_experts("expert_data"),
        "expert data": of_experts("expert"),
        "replica": equal("data"),
    }


def job_config(job: Job) -> Any:
    """The config of a run in this layout."""
    return Steps(parallel=job.parallel.model_dump()).config


def sizes_of_ranks(job: Job, ranks: Sequence[int]) -> dict[int, tuple[Position, StateBytes, dict[str, list[int]]]]:
    """Build model, buffers and optimizer of each rank without memory; return position, bytes and groups."""
    from fiberpo_megatron.mcore.families import read_architecture
    from fiberpo_megatron.mcore.model import build_model
    from fiberpo_megatron.mcore.policy import MegatronPolicy

    config = job_config(job)
    found = {}
    for rank in ranks:
        with on_meta(), fake_rank(job, rank, config) as (layout, _):
            models = build_model(read_architecture(job.model), config.model, layout)
            policy = MegatronPolicy(models, job.model, layout, config, total_steps=10)
            kind, optimizer, chunks = policy.optimizer_kind, policy.optimizer, policy.chunks
            parts = getattr(optimizer, "chained_optimizers", [optimizer])
            shards = [s for part in parts for group in part.shard_fp32_from_float16_groups for s in group]
            buffers = [buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
            at = Place.of(rank, job.parallel, job.world_size)
            position = Position(at.pipeline, at.data * job.parallel.context + at.context, at.expert_data)
            measured = StateBytes(
                parameters=_bytes(p for model in models for p in model.parameters()),
                gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
                optimizer=sum(shard.nbytes + kind.state_bytes(tuple(shard.shape)) for shard in shards),
            )
            found[rank] = position, measured, groups(layout)
    return found


def _bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    storages = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@contextmanager
def on_meta() -> Iterator[None]:
    """Let the platform's device be the one that has shapes and no memory."""
    from fiberpo_megatron.mcore.cpu import patches
    from fiberpo_megatron.mcore.platform import activate

    platform = activate()
    stock = torch.Tensor.type

    def type_(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        answer = stock(tensor, *args, **options)
        return (
            answer.replace("torch.meta.", "torch.").replace("cuda.meta.", "cuda.")
            if isinstance(answer, str)
            else answer
        )

    stand_in = patches._CudaToCpu.__torch_function__

    def to_meta(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and patches._is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": META}
        return stand_in(mode, func, types, args, kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(type(platform), "device", META))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: META))
        stack.enter_context(mock.patch.object(torch.Tensor, "type", type_))
        stack.enter_context(mock.patch.object(patches._CudaToCpu, "__torch_function__", to_meta))
        yield


def length_of(job: Job) -> int:
    """The tokens of a trajectory, so many that every context-parallel rank has response tokens among them."""
    return max(LENGTH, 4 * job.parallel.context)


@dataclass(frozen=True)
class Order:
    """Holds what the collectives of some ranks are like."""

    problems: list[str]
    """What the ranks disagree about."""
    calls: dict[int, int]
    """How many collectives and messages each rank made."""
    used: set[str]
    """Kinds of groups, as in `groups`, in which a rank made any."""
    compared: set[str]
    """Those of which two ranks were compared: where one call of one rank is left out, they disagree."""


def order_of_ranks(job: Job, ranks: Sequence[int]) -> Order:
    """Take a training step on each rank and compare their collectives."""
    from fiberpo_megatron.mcore.policy import build_policy

    case = Steps(
        objective=job.objective,
        replay="none",
        parallel=job.parallel.model_dump(),
        options=job.options,
        length=length_of(job),
    )
    calls: dict[int, list[Call]] = {}
    kinds: dict[int, dict[tuple[int, ...], list[str]]] = {}
    for rank in ranks:
        with fake_rank(job, rank, case.config) as (layout, record):
            policy = build_policy(case.config, job.model, layout)
            train(case, case.config, layout, policy)
            calls[rank], kinds[rank] = record.calls, defaultdict(list)
            for kind, members in groups(layout).items():
                kinds[rank][tuple(members)].append(kind)
    used, compared = set(), set()
    for rank, made in calls.items():
        for group, members in {call.group: tuple(sorted(call.ranks)) for call in made if len(call.ranks) > 1}.items():
            found = set(kinds[rank].get(members, ()))
            used |= found
            if not found <= compared:
                inside = {other: [call for call in theirs if call.group == group] for other, theirs in calls.items()}
                inside[rank].pop()
                compared |= found if disagreements(inside, complete=False) else set()
    return Order(disagreements(calls, complete=False), {r: len(made) for r, made in calls.items()}, used, compared)


def model_file(name: str) -> Path:
    """The config.json of a model that the planner knows."""
    import fiberpo_megatron.planning as planning

    return Path(planning.__file__).parent / "data" / "models" / name / "config.json"
