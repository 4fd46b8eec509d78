"""Importance weights of a training step: what the objective gets, over layouts, in dumps, and with nothing left."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fiberpo_megatron.certify.batch import draw_problem
from fiberpo_megatron.certify.replay import replay, table
from fiberpo_megatron.config import Config
from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.trainer.batch import MiniBatch, mini_batches, token_weights
from fiberpo_megatron.trainer.importance import Weighing, weighed
from fiberpo_megatron.trainer.importance_settings import ImportanceConfig, MismatchConfig
from fiberpo_megatron.trainer.loop import train
from fiberpo_megatron.trainer.optimise import ObjectiveGate
from fiberpo_megatron.trainer.plugin_checks import recorded
from fiberpo_megatron.trainer.settings import BatchConfig
from fiberpo_megatron.trainer.step_file import StepFile
from fiberpo_megatron.trainer.term_checks import term_advice
from fiberpo_megatron.types import TokenScores, concatenated_response_tokens
from tests.trainer.test_loop import toy_config, training
from tests.trainer.test_masks_and_distillation import CutLayout, Meeting
from tests.trainer.test_step_dump import dumped
from tests.trainer.test_token_records import recorded as records_of_a_run
from tests.trainer.toy import FakeEngine, SingleLayout

VERSION = 9
UNLIMITED = MismatchConfig(warn=0, mask=0)
METHODS = ("off", "token", "icepop", "sequence", "sequence-mask", "levels")


class Step:
    """Trajectories, some with branches, of several versions and engines."""

    def __init__(self, spread: float = 0.5) -> None:
        random = np.random.default_rng(3)
        problem = draw_problem(random, groups=3, samples=4, longest=9, domains=2, partitions=2, branches=True)
        total = len(problem.rollouts.tokens)
        self.old = -2.0 * random.random(total).astype(np.float32)
        self.rollouts = replace(
            problem.rollouts,
            rollout_log_probs=(self.old + spread * random.normal(size=total)).astype(np.float32),
            weight_versions=VERSION - random.integers(0, 3, total),
        )
        self.advantages = problem.advantages

    def part(self, layout: Any, budget: int = 10**4, weighting: str = "seq-mean") -> MiniBatch:
        (part,) = mini_batches(
            self.rollouts,
            self.advantages,
            batch=BatchConfig(micro_batch_tokens=budget, oversized="own_micro_batch"),
            weighting=weighting,
            normaliser=7.0,
            domains=2,
            layout=layout,
            version=VERSION,
        )
        return part

    def weighed(
        self,
        part: MiniBatch,
        layout: Any,
        method: Any,
        weighting: str = "seq-mean",
        mismatch: MismatchConfig = UNLIMITED,
        **settings: Any,
    ) -> tuple[MiniBatch, dict[str, float]]:
        old = torch.from_numpy(self.old)[concatenated_response_tokens(part.micro_batches)]
        config = ImportanceConfig(method=method, **settings)
        how = Weighing(VERSION, method, config, mismatch, weighting, 7.0, self.rollouts)
        (found,), metrics = weighed(layout, [part], [TokenScores(old, torch.zeros(len(old)))], how)
        return found, metrics


def scattered(step: Step, parts: Sequence[MiniBatch]) -> Tensor:
    """The weights of all tokens in the batch's order, nan at those that no part has."""
    found = torch.full((len(step.old),), torch.nan, dtype=torch.float64)
    for part in parts:
        found[concatenated_response_tokens(part.micro_batches)] = part.weights
    return found[torch.from_numpy(step.rollouts.response_mask)]


def test_off_changes_nothing():
    step, layout = Step(), SingleLayout()
    part = step.part(layout)
    found, metrics = step.weighed(part, layout, "off")
    assert found is part and not any(name.startswith("importance") for name in metrics)


@pytest.mark.parametrize("weighting", ["seq-mean", "token-mean", "seq-sum", "constant"])
def test_mu_is_counted_again_without_masked_tokens(weighting: str):
    """Branches count to their trajectory; one trajectory loses all of its tokens, others some."""
    step, layout = Step(), SingleLayout()
    gone = step.rollouts.trajectories == 2
    step.rollouts.rollout_log_probs[np.repeat(gone, step.rollouts.lengths)] -= 9.0
    part = step.part(layout, weighting=weighting)
    found, metrics = step.weighed(part, layout, "icepop", weighting)
    w = found.importance
    assert w is not None
    trajectory = part.keys["trajectory"]
    kept = {int(one): int(((trajectory == one) & (w > 0)).sum()) for one in trajectory.unique()}
    alive = {one: count for one, count in kept.items() if count}
    assert 2 not in alive and len(alive) == len(kept) - 1 and sum(alive.values()) < (trajectory != 2).sum()
    for token, one in enumerate(trajectory.tolist()):
        mu = 0.0
        if one in alive:
            mu = {
                "seq-mean": 1 / (len(alive) * alive[one]),
                "token-mean": 1 / sum(alive.values()),
                "seq-sum": 1 / len(alive),
                "constant": 1 / (len(alive) * 7.0),
            }[weighting]
        assert float(found.weights[token]) == pytest.approx(mu * float(w[token]), rel=1e-14), token
    assert metrics["importance/masked_share"] == pytest.approx(float((w == 0).double().mean()))
    if weighting.endswith("mean"):
        uniform = found.weights[w > 0] / w[w > 0]
        assert float(uniform.sum()) == pytest.approx(1.0), "mu' sums to 1, mu' w need not"


def test_a_method_without_a_mask_keeps_mu():
    """The weights multiply mu; at the old policy the objective's gradient is mu w A."""
    step, layout = Step(), SingleLayout()
    part = step.part(layout)
    found, _ = step.weighed(part, layout, "token")
    old = torch.from_numpy(step.old)[concatenated_response_tokens(part.micro_batches)]
    gate = ObjectiveGate(build_objective("fiberpo-domain", kernels=False), found, old, layout.sum_over_tokens)
    gradient = gate(old, slice(0, len(old))).gradient
    wanted = found.weights * part.advantages.double()
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-6, atol=0)  # the gradient is float32
    y = torch.from_numpy(step.old - step.rollouts.rollout_log_probs)[concatenated_response_tokens(part.micro_batches)]
    assert torch.allclose(found.weights, part.weights * y.double().exp().clamp(max=2.0), rtol=1e-6)
    lengths = step.rollouts.per_trajectory().response_lengths
    mu = torch.from_numpy(token_weights(lengths, "seq-mean"))[part.keys["trajectory"]]
    assert torch.equal(mu, part.weights), "so that the test above compares with what mini_batches gave"


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize(("data", "context", "budget"), [(1, 1, 24), (2, 1, 24), (2, 2, 40)])
def test_layouts_change_no_bit(method: str, data: int, context: int, budget: int):
    """Data-parallel ranks have other branches of a trajectory, context-parallel ranks other tokens of a sequence."""
    step = Step()
    one, metrics = step.weighed(step.part(SingleLayout()), SingleLayout(), method)
    meeting = Meeting(data * context)

    def rank(place: int) -> tuple[MiniBatch, dict[str, float]]:
        layout = CutLayout(place // context, data, place % context, context, meeting)
        return step.weighed(step.part(layout, budget), layout, method)

    with ThreadPoolExecutor(data * context) as pool:
        found = list(pool.map(rank, range(data * context)))
    assert torch.equal(scattered(step, [part for part, _ in found]), scattered(step, [one]))
    for _, record in found:
        mine = {name: value for name, value in record.items() if name.startswith(("importance", "drift"))}
        assert mine == pytest.approx({name: metrics[name] for name in mine}, rel=1e-12)
        assert {"importance/weight/lag/0", "importance/weight/lag/2", "drift/lag/1"} <= mine.keys()


@pytest.mark.parametrize("objective", ["grpo", "fiberpo", "fiberpo-domain", "gspo", "apc-trajectory", "dppo"])
def test_with_nothing_left_the_gradient_is_zero_and_metrics_are_finite(objective: str):
    step, layout = Step(), SingleLayout()
    step.rollouts.rollout_log_probs[:] = step.old - 8.0
    part, metrics = step.weighed(step.part(layout), layout, "icepop")
    assert metrics["importance/masked_share"] == 1.0 and not part.weights.any()
    tokens = concatenated_response_tokens(part.micro_batches)
    old = torch.from_numpy(step.old)[tokens]
    gate = ObjectiveGate(build_objective(objective, kernels=False), part, old, layout.sum_over_tokens)
    found = gate(old + 0.1 * torch.randn(len(old), generator=torch.Generator().manual_seed(0)), slice(0, len(old)))
    assert not found.gradient.any() and torch.isfinite(found.gradient).all()
    assert all(np.isfinite(value) for value in {**metrics, **found.metrics}.values())


class StaleEngine(FakeEngine):
    """Samples from other logits than those that were published, and records the probabilities that it had."""

    def _one(self, token, change):  # type: ignore[no-untyped-def]
        published, self.table = self.table, self.table + 0.8 * torch.eye(len(self.table))
        try:
            return super()._one(token, change)
        finally:
            self.table = published


@pytest.mark.parametrize("method", ["token", "icepop", "levels"])
def test_a_dump_replays_with_equal_bits(tmp_path: Path, method: str):
    """The file has the weights that the objective got."""
    settings = {"importance": {"method": method, "cap": 1.2} if method != "icepop" else {"method": method, "high": 1.2}}
    path = dumped(tmp_path, engine=StaleEngine(seed=0), algorithm=settings)  # type: ignore[arg-type]
    result = replay(path)
    assert result.bits and result.passed, list(table(result))
    weights = StepFile(path).step(0, result.objective).tokens.weights
    assert len(weights.unique()) > 3, "the weights are not mu alone"


def test_the_records_of_single_tokens_have_the_weights(tmp_path: Path):
    settings = {"importance": {"method": "token", "cap": 1.2}}
    engine: Any = StaleEngine(seed=0)
    for record in records_of_a_run(tmp_path, engine=engine, algorithm=settings):
        y = np.array(record["tokens"]["log_prob"]) - np.array(record["tokens"]["rollout_log_prob"])
        assert record["tokens"]["importance_weight"] == pytest.approx(np.minimum(np.exp(y), 1.2), rel=1e-6)


def test_a_run_records_the_weights_and_trains_with_them():
    tables = []
    for method in ("off", "token"):
        engine = StaleEngine(seed=0)
        importance = {"method": method}
        run, memory = training(
            engine=engine, trainer={"steps": 2}, evaluation={"prompts": 0}, algorithm={"importance": importance}
        )
        train(run)
        tables.append(run.policy.table.detach())  # type: ignore[attr-defined]
        found = [name for name in memory.records[-1][2] if name.startswith("importance/")]
        assert bool(found) == (method == "token")
    assert memory.values("train", "importance/weight")[0] == pytest.approx(1.0, abs=0.1), "E[w] = 1 but for the cap"
    assert all(0.5 < value < 1.0 for value in memory.values("train", "importance/effective_sample_size"))
    assert set(found) >= {"importance/weight/lag/0", "importance/masked_share/engine/0"}
    assert not torch.equal(*tables)


def test_the_method_follows_the_staleness():
    assert ImportanceConfig().method_at(0) == "off" and ImportanceConfig().method_at(2) == "token"
    assert ImportanceConfig(method="levels").method_at(0) == "levels"
    with pytest.raises(ValueError, match='"off" with a staleness of 1: .* choose "token", or leave the method unset'):
        ImportanceConfig(method="off").method_at(1)


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (
            {"importance": {"method": "token", "low": 0.1}},
            'low = 0.1 is read by icepop, sequence-mask, and method = "tok',
        ),
        ({"importance": {"method": "icepop", "cap": 3.0}}, "cap = 3 is read by token, sequence, levels"),
        ({"importance": {"method": "token", "levels": {"token": 0.1}}}, "importance.levels is read by levels"),
        ({"mismatch": {"warn": 0.9}}, "mismatch.warn = 0.9 is above mask = 0.5; set limits that grow"),
        ({"mismatch": {"mask": 0.0, "warn": 2.0, "stop": 1.0}}, "mismatch.warn = 2 is above stop = 1"),
    ],
)
def test_settings_that_cannot_act_are_refused(algorithm: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        toy_config(algorithm=algorithm)
    assert isinstance(toy_config(algorithm={"mismatch": {"warn": 0.0, "mask": 0.0, "stop": 3.0}}), Config)


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 20}])
def test_weights_of_a_part_of_the_distribution_are_refused_and_off_says_its_bias(cut: dict[str, Any]):
    with pytest.raises(
        ValueError, match='algorithm.importance.method = "token": engines give the log-probs of the whole'
    ):
        toy_config(rollout=cut, algorithm={"importance": {"method": "token"}})
    with pytest.raises(ValueError, match="the log-probs of the whole"):
        toy_config(rollout={**cut, "staleness": 1})
    (line,) = term_advice(toy_config(rollout=cut))
    assert "the gradient is biased" in line and term_advice(toy_config()) == []


def test_the_config_of_a_run_has_the_method_that_held():
    for given, staleness, held in ((None, 0, "off"), (None, 2, "token"), ("icepop", 2, "icepop")):
        importance = {} if given is None else {"method": given}
        config = toy_config(rollout={"staleness": staleness}, algorithm={"importance": importance})
        again = recorded(config, [("unused:Unused", None)])
        assert again.algorithm.importance.method == held
        assert recorded(again, [("unused:Unused", None)]) == again
    with pytest.raises(ValueError, match='"off" with a staleness of 1'):
        toy_config(rollout={"staleness": 1}, algorithm={"importance": {"method": "off"}})
