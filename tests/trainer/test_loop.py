"""The whole loop with a toy policy and a fake engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fiberpo_megatron.config import Config
from fiberpo_megatron.data.prompts import Place
from fiberpo_megatron.fibration import OBJECTIVES, build_objective
from fiberpo_megatron.sources.device_sharing import SharedDevices
from fiberpo_megatron.sources.engine import EngineSource
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.trainer.loop import Training, train
from fiberpo_megatron.trainer.plugin_checks import make_advantage
from fiberpo_megatron.types import RolloutGroup
from tests.trainer.toy import (
    CountingPrompts,
    FakeEngine,
    FirstToken,
    NothingStored,
    TablePolicy,
    generator,
    read,
)


@dataclass
class Memory:
    """Recorder and checkpoints that keep everything."""

    records: list[tuple[str, int, dict[str, float]]] = field(default_factory=list)
    samples: list[tuple[int, int]] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    terms: list[dict[str, object]] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, Mapping[str, Any]]]] = field(default_factory=list)
    alarm: str | None = None
    alarm_after: int = 0
    """Records after which the alarm stops the run."""

    def record(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        self.records.append((kind, step, dict(metrics)))

    def rollouts(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        kind: str = "train",
        *,
        places: Sequence[int] | None = None,
        looked_at: Sequence[RolloutGroup] | None = None,
    ) -> None:
        if kind == "train":
            self.samples.append((step, len(groups)))

    def evaluation(self, step: int, sets: Mapping[str, Mapping[str, Any]]) -> None:
        self.evaluations.append((step, dict(sets)))

    def stopping(self) -> str | None:
        return self.alarm if len(self.records) >= self.alarm_after else None

    def save(
        self,
        policy: TablePolicy,
        step: int,
        *,
        prompts: Mapping[str, object],
        measured: Mapping[str, float],
        terms: Mapping[str, object] | None = None,
    ) -> None:
        self.saved.append(step)
        self.terms.append(dict(terms or {}))

    def complete(self, wait: bool) -> int:
        return self.saved[-1] if self.saved else 0

    def values(self, kind: str, name: str) -> list[float]:
        return [metrics[name] for k, _, metrics in self.records if k == kind]


def toy_config(**sections: object) -> Config:
    """Settings of a small run; whole sections can be replaced."""
    batch = {"prompts": 12, "samples_per_prompt": 8, "mini_batches": 2, "epochs": 2, "micro_batch_tokens": 64}
    return Config.model_validate(
        {
            "model": {"path": Path("unused")},
            "environments": [{"name": "addition", "use": "unused:Unused"}],
            "trainer": {"steps": 3},
            "batch": batch,
            "evaluation": {"prompts": 12, "samples_per_prompt": 4, "every_steps": 2},
            **sections,
        }
    )


def training(
    objective: str = "fiberpo", *, engine: FakeEngine | None = None, **sections: object
) -> tuple[Training, Memory]:
    config = toy_config(**sections)
    memory, engine, policy = Memory(), engine or FakeEngine(seed=0), TablePolicy(30.0)
    sets = config.evaluation.sets
    timers, built = PhaseTimers(), build_objective(objective, kernels=config.algorithm.kernels)
    source = EngineSource(
        policy=policy,
        prompts=CountingPrompts(),
        read=read,
        generator=generator(engine, FirstToken()),
        sampler=engine,
        publisher=engine,
        store=NothingStored(),
        recorder=memory,
        timers=timers,
        weight_sync=config.weight_sync,
        seed=config.run.seed,
        prompts_per_step=config.batch.prompts,
        samples_per_prompt=config.batch.samples_per_prompt,
        held_out_prompts=config.evaluation.prompts,
        held_out_samples=config.evaluation.samples_per_prompt,
        sets={one.name: [Place(0, one.split, index) for index in range(one.prompts or 5)] for one in sets},
    )
    run = Training(
        policy,
        source,
        built,
        make_advantage(config, built),
        memory,
        memory,
        timers,
        config.batch,
        config.algorithm,
        config.rollout.temperature,
        config.trainer.steps,
        config.evaluation.every_steps,
        config.checkpoint.every_steps,
        max_response_tokens=3,  # what the fake engine samples
        evaluation_sets=sets,
    )
    return run, memory


def test_kernels_that_cannot_run_here_are_not_replaced_in_silence():
    run, _ = training(algorithm={"kernels": True})
    with pytest.raises(ValueError, match=r"kernels=True: (Triton is|the tensors are on cpu)"):
        train(run)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_the_toy_task(objective: str):
    run, memory = training(objective, trainer={"steps": 25}, algorithm={"expert_partitions": 2})
    train(run)
    accuracy = memory.values("train", "accuracy")
    assert accuracy[0] < 0.3 and accuracy[-1] > 0.7
    assert memory.values("eval", "accuracy")[-1] > 0.7


def test_several_sets_with_their_own_sampling_and_times():
    """Greedy sampling gives equal answers, so that all samples of a prompt are right or all are wrong."""
    sets = [
        {"name": "greedy", "environment": "addition", "prompts": 6, "samples": 4, "pass_at": [4], "temperature": 0.0},
        {"name": "long", "environment": "addition", "split": "train", "max_response_tokens": 7, "every_steps": 0},
    ]
    evaluation = {"prompts": 4, "every_steps": 2, "sets": sets}
    run, memory = training(evaluation=evaluation, trainer={"steps": 3})
    train(run)
    seen = {step: metrics for kind, step, metrics in memory.records if kind == "eval"}
    assert sorted(seen) == [0, 2, 3]
    assert [("long/avg@1" in seen[step], "greedy/avg@4" in seen[step]) for step in (0, 2, 3)] == [
        (True, True), (False, True), (True, True)
    ]  # fmt: skip
    for metrics in seen.values():
        assert metrics["greedy/avg@4"] == metrics["greedy/pass@4"] == metrics["greedy/maj@4"]
        assert metrics["greedy/avg@4/low"] < metrics["greedy/avg@4/high"] and "accuracy" in metrics
    assert seen[0]["long/response_length/mean"] == 7.0 and seen[0]["response_length/mean"] == 3.0
    assert [(step, list(found)) for step, found in memory.evaluations] == [
        (0, ["held_out", "greedy", "long"]), (2, ["held_out", "greedy"]), (3, ["held_out", "greedy", "long"])
    ]  # fmt: skip
    one = memory.evaluations[0][1]["greedy"]["prompts"][0]
    assert len(one["samples"]) == 4 and len({sample["text"] for sample in one["samples"]}) == 1


def test_the_soft_penalty_is_taken_from_rewards_before_advantages():
    run, memory = training(algorithm={"overlong": {"cache_tokens": 2}}, trainer={"steps": 1})
    train(run)
    record = memory.records[1][2]
    assert record["overlong/penalty_mean"] == -1.0, "all responses have 3 tokens, which is the limit"
    assert record["reward/mean"] >= 0.0, "metrics of rewards are the environment's"


def test_what_a_run_records():
    run, memory = training()
    train(run)
    assert [(kind, step) for kind, step, _ in memory.records] == [
        ("eval", 0), ("train", 0), ("train", 1), ("eval", 2), ("train", 2), ("eval", 3)
    ]  # fmt: skip
    assert memory.saved == [1, 2, 3] and memory.samples == [(0, 12), (1, 12), (2, 12)]
    record = memory.records[-2][2]
    for name in ("reward/mean", "entropy", "ratio/mean", "ratio/p99", "ratio/max", "token/clip_share", "gradient_norm",
                 "rollout_diff/mean", "rollout_diff/max", "tokens_per_second", "seconds/train", "seconds/generate",
                 "gate/trajectory/plus/pass", "response_length/mean", "accuracy/counting"):  # fmt: skip
        assert name in record, name
    assert record["rollout_diff/max"] < 1e-5  # the fake engine computes with exactly the published table


def test_extra_forward_is_run_exactly_when_it_brings_something():
    run, memory = training("fiberpo")  # every level inside a trajectory: one pass
    train(run)
    assert memory.values("train", "extra_forwards") == [0, 0, 0]
    run, memory = training("fiberpo-domain")  # 4 optimiser steps, the first on fresh log-probs
    train(run)
    assert memory.values("train", "extra_forwards") == [3, 3, 3]


def test_first_optimiser_step_has_ratio_one():
    run, memory = training(batch={"prompts": 12, "samples_per_prompt": 8})
    train(run)
    assert memory.values("train", "ratio/mean") == [1.0, 1.0, 1.0]
    assert memory.values("train", "token/clip_share") == [0.0, 0.0, 0.0]


def test_resuming_sees_the_same_prompts_as_running_straight():
    whole, memory = training(trainer={"steps": 4})
    train(whole)
    part, after = training(trainer={"steps": 4})
    train(part, start=2)
    assert [step for kind, step, _ in after.records if kind == "train"] == [2, 3]
    assert after.samples == memory.samples[2:]


def test_engine_with_other_weights_stops_the_run_with_both_figures():
    engine = FakeEngine(seed=0)
    run, memory = training(engine=engine)
    engine.corrupt = 3.0
    with pytest.raises(RuntimeError, match=r"(?s)engine 0.*trainer"):
        train(run)
    assert not memory.saved  # no checkpoint of a step whose weights did not arrive


def test_rollouts_of_a_version_that_was_not_published_last_are_refused():
    engine = FakeEngine(seed=0)
    run, _ = training(engine=engine)
    publish = engine.publish
    engine.publish = lambda source, version: publish(source, "stale")
    with pytest.raises(RuntimeError, match=r"sampled with weights \['stale'\], but only \['0'\] may be in it"):
        train(run)


def test_gradient_does_not_depend_on_micro_batches_mini_batch_fixed():
    tables = []
    for budget in (12, 64, 4096):
        torch.manual_seed(0)
        run, _ = training(
            "fiberpo-domain",
            batch={"prompts": 12, "samples_per_prompt": 8, "epochs": 3, "micro_batch_tokens": budget},
        )
        train(run)
        tables.append(run.policy.table.detach().clone())
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], rtol=1e-4, atol=1e-5)  # fp32 sums in another order, 9 steps


@pytest.mark.parametrize("objective", ["fiberpo", "fiberpo-domain", "gspo", "ppo"])
def test_two_reductions_of_node_sums_per_optimiser_step(objective: str):
    """Whatever the passes are, and independent of the number of tokens; the rest are two of metrics a
    training step: one about the rollouts before the first, one about the drift after the last."""
    sizes: dict[int, list[int]] = {}
    for length in (3, 30):
        engine = FakeEngine(seed=0, length=length)
        run, _ = training(
            objective, engine=engine, trainer={"steps": 1}, evaluation={"prompts": 0}, weight_sync={"verify_every": 0}
        )
        sizes[length] = []

        def counted(x: Tensor, log: list[int] = sizes[length]) -> Tensor:
            log.append(x.numel() * x.element_size())
            return x

        run.policy.layout.sum_over_tokens = counted
        train(run)
    steps = 2 * 2  # mini_batches x epochs
    assert len(sizes[3]) == 2 * steps + 2 and sizes[3] == sizes[30]
    assert sum(sizes[3]) / steps < 1_000_000


def test_shared_devices_take_turns_and_change_nothing():
    """Policy and engine refuse to work without their memory; the engine forgets weights that it gave up."""
    alone, wanted = training()
    train(alone)
    engine = FakeEngine(seed=0)
    run, found = training(engine=engine)
    turns = SharedDevices(run.policy)
    turns.attach(engine)
    run.source.devices = turns
    train(run)
    assert torch.equal(run.policy.table, alone.policy.table)
    assert found.values("eval", "accuracy") == wanted.values("eval", "accuracy")
    assert engine.released == [("kv_cache", "weights"), ("kv_cache",)] * 3
    assert run.policy.released
