"""Training steps of the real code in which tensors are tagged as the host's or the device's."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from fiberpo_megatron.certify.batch import VERSION
from fiberpo_megatron.certify.models import MODELS
from fiberpo_megatron.certify.training_step import TEMPERATURE
from fiberpo_megatron.mcore.cpu.packed import Bucket
from fiberpo_megatron.types import RolloutBatch
from tools.checked_collectives import Call, recorded_collectives
from tools.strict_devices import DEVICE, Found, host_copy, on_device, put_on_device, strict_devices

LENGTH = 16
"""Tokens of a trajectory."""


@dataclass(frozen=True)
class Steps:
    """What is run: a model, a layout, and how much of it."""

    model: str = "moe"
    """Key of `certify.models.MODELS`."""
    layers: int = 2
    objective: str = "fiberpo-expert"
    replay: str = "old"
    """`algorithm.routing_replay`."""
    micro_batches: int = 2
    """Rows of equal size of every data-parallel rank."""
    mini_batches: int = 1
    length: int = LENGTH
    """Tokens of a trajectory, two of which make a row."""
    steps: int = 2
    """Training steps; the first one is not counted, because it makes what later ones keep."""
    parallel: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the config's [model]."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Values in place of those of config.json; what the model does not have is left out."""

    @property
    def hf_config(self) -> dict[str, Any]:
        """Contents of config.json."""
        model = MODELS[self.model]
        return {**model, **{k: v for k, v in self.sizes.items() if k in model}, "num_hidden_layers": self.layers}

    @property
    def config(self) -> Any:
        """The run's config."""
        from fiberpo_megatron.config.schema import Config

        return Config.model_validate(
            {
                "run": {"seed": 3, "distributed_timeout_s": 120.0},
                "model": {"path": ".", "random_init": True, "dtype": "bfloat16", **self.options},
                "parallel": {"distributed_optimizer": True, **self.parallel},
                "algorithm": {"routing_replay": self.replay},
            }
        )


def with_causal_mask(bucket: Bucket) -> Bucket:
    """Return the bucket with the mask of causal attention. Torch makes one itself where values are narrower than keys
    (latent attention), on the host, because the modes that tag tensors do not see what an operation makes inside."""
    queries, keys = (len(rows) // bucket.sequences for rows in (bucket.queries, bucket.keys))
    mask = torch.ones(queries, keys, dtype=torch.bool).tril().expand(bucket.sequences, 1, queries, keys)
    return replace(bucket, mask=mask.contiguous())


@contextmanager
def device_platform() -> Iterator[None]:
    """Let `activate` return the CPU platform, with a device that calls itself a GPU and groups that call themselves
    NCCL's."""
    from fiberpo_megatron.mcore import platform
    from fiberpo_megatron.mcore.cpu import cpu_platform, patches
    from fiberpo_megatron.mcore.cpu.packed import PackedRow

    class TaggedRow(PackedRow):
        """The indices of the CPU platform's attention, which has no counterpart on a GPU, are on the device."""

        @property
        def layout(self) -> Any:
            buckets, place = super().layout
            buckets = [bucket if bucket.mask is not None else with_causal_mask(bucket) for bucket in buckets]
            for bucket in buckets:
                for tensor in (bucket.queries, bucket.keys, bucket.mask):
                    assert tensor is not None
                    put_on_device(tensor)
            return buckets, put_on_device(place)

        @property
        def thd(self) -> Any:
            packed = super().thd
            put_on_device(packed.cu_seqlens_q)
            return packed

    class TaggedPlatform(cpu_platform.CpuPlatform):
        backend = "nccl"
        device = DEVICE

        def packed_sequences(self, cu_seqlens: Any, *arguments: Any) -> Any:
            return TaggedRow(host_copy(cu_seqlens), *arguments)

    platform.activate.cache_clear()
    with mock.patch.object(cpu_platform, "CpuPlatform", TaggedPlatform):
        platform.activate()
    patches.leave_out("dispatcher_splits")  # the split sizes come from a device after all
    yield


def training_steps(*cases: Steps) -> list[tuple[Found, list[Call]]]:
    """Run each case on this rank, all in the first one's layout.

    Return what the last step of each asked of the device, and the collectives of all its steps.
    """
    with device_platform(), recorded_collectives() as record, strict_devices(record) as found:
        from fiberpo_megatron.mcore.parallel.layout import start_layout
        from fiberpo_megatron.mcore.policy import build_policy

        first = cases[0]
        layout = start_layout(first.hf_config, first.config.parallel, first.config.run)
        results = []
        for case in cases:
            begin = len(record.calls)
            policy = build_policy(case.config, case.hf_config, layout)
            for _ in range(case.steps):
                found.waits.clear()
                found.uploads.clear()
                found.operations = 0
                train(case, case.config, layout, policy)
            results.append(
                (replace(found, waits=found.waits.copy(), uploads=found.uploads.copy()), record.calls[begin:])
            )
        return results


def publication(case: Steps, folder: Path) -> list[Call]:
    """Give the weights out in full and in parts, and write them as a Hugging Face folder; return the collectives."""
    with device_platform(), recorded_collectives() as record, strict_devices(record):
        from fiberpo_megatron.mcore.parallel.layout import start_layout
        from fiberpo_megatron.mcore.policy import build_policy
        from fiberpo_megatron.mcore.weights import save_hf

        layout = start_layout(case.hf_config, case.config.parallel, case.config.run)
        weights = build_policy(case.config, case.hf_config, layout).weights
        if layout.rank == 0:
            source = folder / "config"
            source.mkdir()
            (source / "config.json").write_text(json.dumps(case.hf_config))
            save_hf(weights.full(), folder / "out", source)
        else:
            assert sum(tensor.numel() for _, tensor in weights.full()) == 0
        for shard in weights.local():
            assert on_device(shard.tensor)
        return record.calls


def save_and_load(case: Steps, folder: Path) -> list[Call]:
    """Write a checkpoint after a step and read it into another policy, which must then hold the same weights; return
    the collectives of both."""
    with device_platform(), recorded_collectives() as record, strict_devices(record):
        from fiberpo_megatron.mcore import checkpoint
        from fiberpo_megatron.mcore.parallel.layout import start_layout
        from fiberpo_megatron.mcore.policy import build_policy

        layout = start_layout(case.hf_config, case.config.parallel, case.config.run)
        saved, loaded = (build_policy(case.config, case.hf_config, layout) for _ in range(2))
        train(case, case.config, layout, saved)
        begin = len(record.calls)
        where = checkpoint.step_folder(folder, case.steps)
        saved.save(str(where), {"step": case.steps})
        assert loaded.load(str(where)) == {"step": case.steps}
        calls = record.calls[begin:]
        for one, other in zip(saved.models, loaded.models, strict=True):
            for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
                assert on_device(theirs) and bool((mine == theirs).all())
        return calls


def train(case: Steps, config: Any, layout: Any, policy: Any) -> None:
    """Take one training step as `trainer.loop.learn` does, from rollouts to the optimiser's last step."""
    from fiberpo_megatron.fibration import build_objective
    from fiberpo_megatron.telemetry.timers import PhaseTimers
    from fiberpo_megatron.trainer.batch import mini_batches
    from fiberpo_megatron.trainer.optimise import optimise
    from fiberpo_megatron.trainer.settings import BatchConfig
    from fiberpo_megatron.trainer.step_routing import StepRouting

    rollouts = equal_rollouts(2 * case.micro_batches * case.mini_batches * layout.data_size, case.length)
    if case.replay == "rollout":
        experts = np.random.default_rng(1).permuted(
            np.tile(np.arange(8), (len(rollouts.tokens), case.layers, 1)), axis=2
        )
        numbers = np.arange(len(rollouts.tokens))
        own = numbers // (len(numbers) // layout.data_size) == layout.data_rank  # every leader brings its share
        read = numbers % case.length != case.length - 1  # no engine has read the last token of a sequence
        held = numbers[own & read & layout.is_leader]
        rollouts = replace(
            rollouts,
            routing_rows=numbers.astype(np.int32),
            held_rows=held,
            routed_experts=experts[held, :, :2].astype(np.uint8),
        )
    objective = build_objective(case.objective)
    parts = mini_batches(
        rollouts,
        np.random.default_rng(2).normal(size=len(rollouts.lengths)).astype(np.float32),
        batch=BatchConfig(micro_batch_tokens=2 * case.length, mini_batches=case.mini_batches),
        weighting=objective.weighting,
        domains=2,
        layout=layout,
        version=VERSION,
    )
    optimise(
        policy,
        objective,
        parts,
        StepRouting(policy, config.algorithm, objective.uses_experts, rollouts),
        epochs=1,
        temperature=TEMPERATURE,
        timers=PhaseTimers(),
    )


def equal_rollouts(count: int, length: int) -> RolloutBatch:
    """Trajectories of so many tokens, two of each prompt, so that every row holds two of them."""
    random = np.random.default_rng(0)
    return RolloutBatch.filled(
        tokens=random.integers(0, 61, count * length),
        response_mask=np.tile(np.arange(length) >= 4, count),
        rollout_log_probs=np.full(count * length, -4.0, dtype=np.float32),
        lengths=np.full(count, length),
        rewards=random.random(count).astype(np.float32),
        correct=np.zeros(count, dtype=bool),
        groups=np.arange(count) // 2,
        domains=np.zeros(count, dtype=np.int64),
        truncated=np.zeros(count, dtype=bool),
    )
