"""Optimizers from outside the package: same weights in every sharding, exact resuming, memory that can be parked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.mcore.checkpoint.folders import CheckpointError
from fiberpo_megatron.mcore.optimizers import TorchOptimizer, check_optimizer, make_optimizer
from fiberpo_megatron.mcore.optimizers.settings import OptimizerConfig
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout
from fiberpo_megatron.mcore.policy import MegatronPolicy, build_policy
from fiberpo_megatron.plugins import PluginError
from tests.distributed.parity import (
    MODELS,
    TEMPERATURE,
    assemble,
    fixed_gate,
    global_shards,
    make_batch,
    make_config,
    micro_batches_for,
    pieces,
)
from tests.planning.layouts import next_layout

MOMENTUM = {"use": "tests.distributed.optimizers:Momentum", "options": {"decay": 0.8}}
MUON = {"use": "tests.distributed.optimizers:Muon"}
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str, bool]] = [
    # model, optimizer, [parallel], type of the parameters, CPU offload
    ("moe", MOMENTUM, {"distributed_optimizer": True}, "float32", False),
    ("moe", MOMENTUM, {"distributed_optimizer": False}, "float32", True),
    ("moe tied", MOMENTUM, {"expert": 2, "distributed_optimizer": True}, "bfloat16", True),
    ("moe", MOMENTUM, {"expert": 2, "distributed_optimizer": False}, "bfloat16", False),
    ("moe tied", MOMENTUM, {"pipeline": 2, "distributed_optimizer": True}, "float32", False),
    ("moe tied", {"use": "adam"}, {"pipeline": 2, "distributed_optimizer": True}, "float32", False),
    ("moe", MUON, {"expert": 2, "distributed_optimizer": False}, "bfloat16", True),
]


def configured(kind: dict[str, Any], parallel: dict[str, Any], dtype: str, offload: bool) -> Config:
    settings = {"learning_rate": 0.5, "weight_decay": 0.01, "schedule": "linear", "warmup_steps": 2, "clip_grad": 0.03}
    optimizer = OptimizerConfig.model_validate({**settings, "kind": kind, "cpu_offload": offload})
    config = make_config(parallel=parallel, model={"dtype": dtype})
    return config.model_copy(update={"optimizer": optimizer})


def start(config: Config, layout: ParallelLayout, model: str) -> tuple[MegatronPolicy, Any]:
    """A fresh policy, and what takes one step."""
    policy = build_policy(config, MODELS[model], layout, total_steps=10)
    batch = make_batch()
    micro_batches = micro_batches_for(batch, layout, 64)
    gate = fixed_gate(micro_batches, len(batch.tokens))
    return policy, lambda: policy.step(micro_batches, gate, TEMPERATURE).learning_rate


def train_and_resume(folder: Path) -> list[tuple[list[Any], list[Any], list[Any], int]]:
    """For each case this rank's parameters before training, after three steps, and after three steps that were
    interrupted after the second, and the matrices that the torch optimizers saw whole."""
    found = []
    for number, (model, kind, parallel, dtype, offload) in enumerate(CASES):
        config = configured(kind, parallel, dtype, offload)
        layout = next_layout(MODELS[model], config)
        policy, step = start(config, layout, model)
        before = [(k, s, o, data.copy()) for k, s, o, data in pieces(global_shards(policy.models))]
        step(), step()
        policy.release_memory()
        assert policy.memory.device_bytes() == 0
        policy.restore_memory()
        policy.save(str(folder / f"step-{number:08d}"), {})
        step()
        matrices = sum(getattr(part.optimizer, "matrices", 0) for part in policy.optimizer.chained_optimizers)
        other, step_again = start(config, layout, model)
        step_again()
        other.load(str(folder / f"step-{number:08d}"))
        step_again()
        after, again = (pieces(global_shards(p.models)) for p in (policy, other))
        found.append((before, after, again, matrices))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(2, train_and_resume, tmp_path_factory.mktemp("checkpoints"), timeout_s=300)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_resumed_run_takes_the_same_step_bit_by_bit(number: int, ranks: list[Any]) -> None:
    for rank in ranks:
        before, after, again, _ = rank[number]
        moved = 0
        for (key, _, _, start_value), (_, _, _, ours), (_, _, _, theirs) in zip(before, after, again, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=key)
            moved += int((ours != start_value).sum())
        assert moved > 100, "training moves the weights"


def test_shards_of_parameters_are_updated_as_whole_ones_are(ranks: list[Any]) -> None:
    """Cases 0 and 1 differ in nothing but the sharding of the optimizer (and in where its state waits)."""
    sharded, whole = (assemble(rank[number][1] for rank in ranks) for number in (0, 1))
    for key in whole:
        np.testing.assert_allclose(sharded[key], whole[key], rtol=0, atol=1e-6, err_msg=key)  # float32 rounding


def test_whole_matrices_reach_an_optimizer_that_needs_them(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank[-1][3] > 10


def test_whole_matrices_are_refused_where_a_layout_cuts_them() -> None:
    def muon(**parallel: Any) -> Config:
        return make_config(optimizer={"kind": MUON, "eps": None}, parallel=parallel)

    check_optimizer(muon(distributed_optimizer=False, pipeline=2, expert=2))
    with pytest.raises(PluginError, match=r"parallel.distributed_optimizer = true cuts .*:Muon updates whole matrices"):
        check_optimizer(muon(distributed_optimizer=True))
    with pytest.raises(PluginError, match=r"parallel.tensor = 2 cuts matrices over 2 ranks, .*Muon"):
        check_optimizer(muon(distributed_optimizer=False, tensor=2))


def load_as(kind: dict[str, Any], folder: Path) -> str:
    config = configured(kind, {}, "float32", False)
    layout = next_layout(MODELS["moe"], config)
    policy, _ = start(configured({"use": "adam"}, {}, "float32", False), layout, "moe")
    policy.save(str(folder), {})
    other, _ = start(config, layout, "moe")
    try:
        other.load(str(folder))
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    [told] = run_ranks(1, load_as, MOMENTUM, tmp_path / "step-00000001")
    assert "optimizer adam (this run: tests.distributed.optimizers:Momentum)" in told
    assert "resume with the config that wrote it" in told


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("lion", r'optimizer.kind = "lion" is neither a short name nor an import path; known short names: adam'),
        ({"use": "adam", "options": {"beta": 0.5}}, r"does not take the option 'beta'; did you mean 'beta"),
        ({"use": "adam", "options": {"beta1": 1.5}}, r"beta1 = 1.5 must be at least 0 and less than 1"),
        ({"use": MOMENTUM["use"], "options": {"decay": 1.0}}, r"Momentum does not accept .* decay = 1.0 must be"),
        ("tests.distributed.optimizers:_Muon", r"_Muon lacks the method build\(\)"),
    ],
)
def test_what_is_wrong_is_said_before_a_run_starts(kind: Any, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        check_optimizer(make_config(optimizer={"kind": kind, "eps": None}))


def test_adams_own_settings() -> None:
    adam: Any = make_optimizer(OptimizerConfig())
    assert (adam.beta1, adam.beta2, adam.eps) == (0.9, 0.95, 1e-8)
    kind = {"use": "adam", "options": {"eps": 1e-6}}
    adam = make_optimizer(OptimizerConfig.model_validate({"beta2": 0.98, "kind": kind}))
    assert (adam.beta1, adam.beta2, adam.eps) == (0.9, 0.98, 1e-6)
    with pytest.raises(ValueError, match="optimizer.eps = 1e-06 and optimizer.kind.options.eps = 1e-07 set the same"):
        OptimizerConfig.model_validate({"eps": 1e-6, "kind": {"use": "adam", "options": {"eps": 1e-7}}})
    with pytest.raises(ValueError, match=r"optimizer.beta1 = 0.5 is a setting of Adam, .*Muon.*kind.options.beta1"):
        OptimizerConfig.model_validate({"beta1": 0.5, "kind": MUON["use"]})


class Forgetful(TorchOptimizer):
    """Keeps state that it does not name."""

    def torch_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=0.9)

    def fresh_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}


class Misshapen(Forgetful):
    def fresh_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"rows": torch.zeros(parameter.shape[0])}


class Overlapping(Forgetful):
    def fresh_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"s": torch.zeros_like(parameter)}


def test_state_that_a_checkpoint_could_not_hold_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    parameter.grad = torch.ones(2, 3)
    forgetful = Forgetful()
    optimizer = forgetful.torch_optimizer([{"params": [parameter], "lr": 0.1}])
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"Forgetful: .*holds \['momentum_buffer'\], but fresh_state\(\) names \[\]"):
        forgetful.create_state(optimizer)
    fresh = forgetful.torch_optimizer([{"params": [parameter], "lr": 0.1}])
    with pytest.raises(
        RuntimeError, match=r"returned 'rows' of shape \(2,\); it must have the parameter's shape \(2, 3\)"
    ):
        Misshapen().create_state(fresh)
    with pytest.raises(RuntimeError, match="uses the name 's', which Megatron-Core's checkpoints need"):
        Overlapping().create_state(fresh)
