"""Branches of a trajectory: token sequences that share its key, length, weight and advantage, however they are packed.

The table of the toy policy knows the previous token alone, so that the sequences of a trajectory one behind the other
in a single row (`per_trajectory`) must give what they give as branches.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fiberpo_megatron.certify.batch import draw_problem
from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.telemetry.token_log import TOKENS, read_tokens
from fiberpo_megatron.trainer.advantages import BatchStandardised, GroupMean, LeaveOneOut, estimate
from fiberpo_megatron.trainer.batch import MiniBatch, mini_batches, token_keys, without_truncated
from fiberpo_megatron.trainer.loop import learn, rollout_summary
from fiberpo_megatron.trainer.optimise import optimise
from fiberpo_megatron.trainer.settings import AlgorithmConfig, BatchConfig
from fiberpo_megatron.trainer.states import state_ids
from fiberpo_megatron.trainer.step_dump import FOLDER, StepDumps
from fiberpo_megatron.trainer.step_file import StepFile
from fiberpo_megatron.trainer.step_routing import StepRouting
from fiberpo_megatron.trainer.terms import build_terms
from fiberpo_megatron.types import RolloutBatch, concatenated_response_tokens
from tests.trainer.test_loop import training
from tests.trainer.test_masks_and_distillation import CutLayout, Meeting
from tests.trainer.test_token_records import records_of
from tests.trainer.toy import VOCABULARY, SingleLayout, TablePolicy
from tests.variations import varied

OBJECTIVES = ("fiberpo", "fiberpo-domain", "fiberpo-expert", "grpo", "gspo", "apc", "apc-trajectory")
SINGLE_PASS = ("fiberpo", "grpo", "gspo", "apc-trajectory")
"""Objectives whose levels lie inside a trajectory."""
TERMS = {
    "kl": {"coefficient": 0.2},
    "entropy": {"coefficient": 0.1},
    "off_policy_mask": {"delta": 0.02},
    "supervised": {"coefficient": 0.3},
}
OF_LAYOUT = (
    "micro_batches",
    "load_imbalance",
    "useful_token_share",
    "extra_forwards",
    "gate/reduce_bytes",
    "branches/",
)
"""Metrics about how a batch was packed and passed."""


@dataclass(frozen=True)
class Given:
    rollouts: RolloutBatch
    advantages: NDArray[np.float32]

    def joined(self) -> "Given":
        """The same tokens with one row for each trajectory."""
        first = np.unique(self.rollouts.trajectories, return_index=True)[1]
        return Given(self.rollouts.per_trajectory(), self.advantages[first])


@pytest.fixture(scope="module")
def given() -> Given:
    """Four groups of two trajectories; the first one of each group has three sequences."""
    random = np.random.default_rng(3)
    problem = draw_problem(
        random, groups=4, samples=4, longest=14, domains=2, partitions=2, vocabulary=VOCABULARY, branches=True
    )
    rollouts = problem.rollouts
    right = (random.random(len(rollouts.lengths)) < 0.5)[rollouts.trajectories]
    noise = -2.0 * random.random(len(rollouts.tokens))
    rollouts = replace(
        rollouts,
        correct=right,
        rewards=right.astype(np.float32),
        rollout_log_probs=np.where(rollouts.response_mask, noise, 0).astype(np.float32),
    )
    assert rollouts.sequences.tolist() == [3, 1] * 4
    return Given(rollouts, problem.advantages)


class Ranks(CutLayout):
    """One of several data- or context-parallel ranks that are threads."""

    def max_over_tokens(self, x: Tensor) -> Tensor:
        rows = torch.zeros(len(self.meeting.given), *x.shape, dtype=x.dtype)
        rows[self.place] = x
        return self.sum_over_tokens(rows).amax(0)


class SharedTable(TablePolicy):
    """A policy whose ranks add up their gradients, as data-parallel ranks do."""

    def step(self, *args: Any, **options: Any) -> Any:
        before = self.table.detach().clone()
        outcome = super().step(*args, **options)
        moved = self.layout.sum_over_tokens(self.table.detach() - before)
        with torch.no_grad():
            self.table.copy_(before + moved)
        return replace(outcome, gradient_norm=moved.norm().item() / self.learning_rate)


def parts_of(given: Given, objective: Any, layout: Any, budget: int) -> list[MiniBatch]:
    return mini_batches(
        given.rollouts,
        given.advantages,
        batch=BatchConfig(micro_batch_tokens=budget, oversized="own_micro_batch", mini_batches=2),
        weighting=objective.weighting,
        domains=2,
        layout=layout,
        version=6,
        states="state" in objective.keys,
    )


def trained(
    given: Given,
    name: str,
    budget: int = 10**4,
    layout: Any = None,
    terms: Mapping[str, Any] | None = None,
    **hide: int,
) -> tuple[Tensor, dict[str, float]]:
    """The table after two epochs over two mini-batches, and the metrics; `split` hides that branches were cut."""
    objective = build_objective(name, kernels=False)
    algorithm = AlgorithmConfig.model_validate({"expert_partitions": 2, **(terms or {})})
    policy = SharedTable(2.0)
    policy.layout = layout or SingleLayout()
    with torch.no_grad():
        policy.table.copy_(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)))
    parts = parts_of(given, objective, policy.layout, budget)
    parts = [replace(part, packing=replace(part.packing, **hide)) for part in parts]
    metrics = optimise(
        policy,
        objective,
        parts,
        StepRouting(policy, algorithm, objective.uses_experts, given.rollouts),
        epochs=2,
        temperature=1.0,
        timers=PhaseTimers(),
        terms=build_terms(algorithm),
    )
    return policy.table.detach(), metrics


def assert_same(found: tuple[Tensor, Mapping[str, float]], wanted: tuple[Tensor, Mapping[str, float]]) -> None:
    """Tables are sums of float32 gradients in another order."""
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=2e-6 * float(wanted[0].abs().max()))
    for name, value in wanted[1].items():
        if not name.startswith(OF_LAYOUT):
            assert found[1][name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


@pytest.mark.parametrize("name", varied(OBJECTIVES, ("fiberpo", "fiberpo-expert", "gspo", "apc")))
def test_branches_count_as_the_same_tokens_in_one_row_and_in_several(given: Given, name: str):
    whole, cut = trained(given, name), trained(given, name, budget=16)
    passes = 0 if name in SINGLE_PASS else 3
    assert whole[1]["extra_forwards"] == passes and "branches/split" not in whole[1]
    assert cut[1]["extra_forwards"] == 3 and cut[1]["branches/split"] > 0, "all but the first step take two passes"
    assert_same(cut, whole)
    if not name.startswith("apc"):  # the states of a row that holds all branches are other ones
        assert_same(whole, trained(given.joined(), name))


@pytest.mark.parametrize("name", ["fiberpo", "gspo"])
def test_a_single_pass_over_cut_branches_would_be_wrong(given: Given, name: str):
    right, wrong = trained(given, name), trained(given, name, budget=16, split=0)
    assert wrong[1]["extra_forwards"] == 0
    assert float((wrong[0] - right[0]).abs().max()) > 1e-3 * float(right[0].abs().max())


LAYOUTS = {"DP2": (2, 1, 16), "DP3": (3, 1, 64), "DP2 CP2": (2, 2, 32)}
"""Data- and context-parallel ranks, and positions of a row."""
ON_RANKS = {f"{name} {layout}": (name, layout, {}) for layout in LAYOUTS for name in OBJECTIVES} | {
    f"fiberpo {layout} with terms": ("fiberpo", layout, TERMS) for layout in LAYOUTS
}


@pytest.mark.parametrize("case", varied(ON_RANKS, ("fiberpo DP2", "apc DP3", "fiberpo DP2 CP2 with terms")))
def test_ranks_and_terms_do_not_matter(given: Given, case: str):
    name, layout_name, terms = ON_RANKS[case]
    data, context, budget = LAYOUTS[layout_name]
    meeting = Meeting(data * context)

    def rank(place: int) -> tuple[Tensor, dict[str, float]]:
        layout = Ranks(place // context, data, place % context, context, meeting)
        return trained(given, name, budget, layout, terms)

    with ThreadPoolExecutor(data * context) as pool:
        found = list(pool.map(rank, range(data * context)))
    wanted = trained(given, name, terms=terms)
    assert len({one[1]["extra_forwards"] for one in found}) == 1, "all ranks decide alike"
    for one in found:
        assert torch.equal(one[0], found[0][0])
        assert_same(one, wanted)


def small() -> RolloutBatch:
    """Trajectory 0: `5 | 1 2` and `5 1 | 3 ~ 4` (~: the environment); trajectory 1: `5 | 1`; another group: `6 | 7`."""
    return RolloutBatch.filled(
        tokens=[5, 1, 2, 5, 1, 3, 0, 4, 5, 1, 6, 7],
        response_mask=[0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1],
        lengths=[3, 5, 2, 2],
        trajectories=[0, 0, 1, 2],
        groups=[0, 0, 0, 1],
        rewards=[1, 1, 0, 0.5],
        correct=[1, 1, 0, 1],
        domains=[0, 0, 0, 1],
    )


def test_a_trajectory_by_hand():
    """It has four response tokens: weight 1/(3 x 4) each, and S is their mean."""
    rollouts = small()
    (part,) = mini_batches(
        rollouts,
        np.array([0.5, 0.5, -0.5, 0.0], np.float32),
        batch=BatchConfig(micro_batch_tokens=64),
        weighting="seq-mean",
        domains=2,
        layout=SingleLayout(),
        version=0,
        states=True,
    )
    assert concatenated_response_tokens(part.micro_batches).tolist() == [1, 2, 5, 7, 9, 11]
    assert part.weights.tolist() == pytest.approx([1 / 12] * 4 + [1 / 3] * 2)
    assert part.keys["trajectory"].tolist() == [0, 0, 0, 0, 1, 2] and part.counts["trajectory"] == 3
    assert part.keys["turn"].tolist() == [0, 0, 1, 2, 3, 4] and part.counts["turn"] == 5
    assert part.labels["turn"].tolist() == [0, 1, 2, 0, 0], "turns are counted through all branches"
    assert part.keys["prompt_group"].tolist() == [0, 0, 0, 0, 0, 1]
    assert part.keys["state"].tolist() == [0, 1, 1, -1, 0, -1], "the branch goes on from `5 1`, as its first sequence"
    assert part.advantages.tolist() == [0.5] * 4 + [-0.5, 0.0] and part.packing.split == 0
    x = torch.tensor([0.1, -0.2, 0.4, 0.3, 0.0, 0.0])
    output = build_objective("fiberpo", kernels=False)(
        x, part.advantages, part.weights, keys=part.keys, counts=part.counts, labels=part.labels
    )
    assert output.trace is not None
    level = output.trace.explain(torch.tensor([2])).levels[0]
    assert level.aggregate[:, 0].tolist() == pytest.approx([0.8 / 4, 0.2 / 4])


def test_states_follow_the_context_of_a_branch():
    """A branch that rewrites its prompt shares no state, one that continues shares those of the same tokens."""
    rollouts = RolloutBatch.filled(
        tokens=[5, 1, 2, 5, 1, 2, 9, 1, 2, 9, 1, 2],
        response_mask=[0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1],
        lengths=[3, 3, 3, 3],
        trajectories=[0, 0, 0, 0],
        groups=[0, 0, 0, 0],
    )
    ids, count = state_ids(rollouts, 0, 4)
    assert ids.tolist() == [-1, -1, 0, -1, -1, 0, -1, -1, 1, -1, -1, 1] and count == 2
    apart = replace(rollouts, trajectories=np.arange(4))
    assert state_ids(apart, 0, 4)[1] == 0, "`5 | 1` and `5 1 |` are two states of two trajectories"


def test_keys_of_a_later_mini_batch_begin_at_zero(given: Given):
    rollouts = given.rollouts
    keys = token_keys(rollouts, 4, 8, 2)
    assert keys["trajectory"][1] == keys["prompt_group"][1] + 1 == 2
    inside = np.arange(rollouts.offsets[4], rollouts.offsets[8])
    assert np.unique(keys["trajectory"][0][inside]).tolist() == [0, 1]


def test_advantages_count_a_trajectory_once():
    rollouts = small()
    assert estimate(GroupMean(normalise_std=False), rollouts).tolist() == [0.5, 0.5, -0.5, 0]
    assert estimate(LeaveOneOut(normalise_std=False), rollouts).tolist() == [1, 1, -1, 0]
    rewards, lengths = np.array([1, 0, 0.5]), np.array([4, 1, 1])
    mean = (rewards * lengths).sum() / 6
    deviations = rewards - mean
    std = np.sqrt((lengths * deviations**2).sum() / 5 + 1e-8)
    assert estimate(BatchStandardised(), rollouts).tolist() == pytest.approx((deviations / std)[[0, 0, 1, 2]], rel=1e-6)

    def of_trajectories(rollouts: RolloutBatch) -> NDArray[np.float32]:
        assert rollouts.response_lengths.tolist() == [4, 1, 1] and rollouts.turns.tolist() == [3, 1, 1]
        return np.array([7, 8, 9], np.float32)

    assert estimate(of_trajectories, rollouts).tolist() == [7, 7, 8, 9]
    with pytest.raises(ValueError, match="for 3 trajectories"):
        estimate(lambda rollouts: np.zeros(4, np.float32), rollouts)


def test_a_cut_branch_leaves_out_the_trajectory():
    truncated = np.array([True, True, False, False])
    rollouts, advantages, metrics = without_truncated(replace(small(), truncated=truncated), np.arange(4.0))
    assert rollouts.tokens.tolist() == [5, 1, 6, 7] and advantages.tolist() == [2, 3]
    assert rollouts.trajectories.tolist() == rollouts.groups.tolist() == [0, 1]
    assert metrics["truncated/left_out_share"] == pytest.approx(1 / 3)


def test_metrics_are_of_trajectories():
    summary = rollout_summary(small(), ["a", "b"])
    assert summary["reward/mean"] == 0.5 and summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["response_length/mean"] == 2 and summary["response_length/max"] == 4
    assert summary["turns/mean"] == pytest.approx(5 / 3) and summary["accuracy/a"] == 0.5
    assert summary["branches/mean"] == pytest.approx(4 / 3) and summary["branches/max"] == 2
    assert not any(name.startswith("branches") for name in rollout_summary(small().per_trajectory(), ["a", "b"]))


def test_a_training_step_with_records_and_dump(given: Given, tmp_path: Path):
    run, _ = training("fiberpo", batch={"prompts": 4, "samples_per_prompt": 2, "epochs": 2, "micro_batch_tokens": 20})
    run = replace(run, records=records_of(tmp_path, samples=8), dumps=StepDumps(tmp_path, [0], "fiberpo"))
    metrics = learn(run, given.rollouts, 0)
    assert metrics["branches/mean"] == 2 and metrics["branches/split"] > 0 and metrics["extra_forwards"] == 1
    file = StepFile(tmp_path / FOLDER / "step-00000000.safetensors")
    assert file.tensor("rollouts/trajectories").tolist() == given.rollouts.trajectories.tolist()
    dumped = file.step(1, run.objective)
    assert not dumped.single_pass
    records, problems = read_tokens(TOKENS.path(tmp_path, 0))
    assert not problems and [record["trajectory"] for record in records] == list(range(8))
    assert [len(record.get("branches", [])) for record in records] == [2, 0] * 4
    place = {int(token): at for at, token in enumerate(dumped.token_index)}
    offsets, whole = given.rollouts.offsets, given.rollouts.per_trajectory()
    for record in records:
        first = int(whole.offsets[record["trajectory"]]) + record["prompt_tokens"]
        begins = [begin + first for begin in record.get("branches", [])]
        assert set(begins) <= set(offsets.tolist())
        tokens = record["tokens"]
        for at, (sampled, found) in enumerate(zip(tokens["sampled"], tokens["coefficient"][1], strict=True)):
            assert sampled == given.rollouts.response_mask[first + at]
            assert (found is None) == (not sampled)
            if sampled:
                assert found == pytest.approx(float(dumped.coefficients[place[first + at]]), rel=1e-7)
        assert len(record["levels"][0]["nodes"]) == 1, "all branches have one node"
