"""Terms that a run adds: distillation, the off-policy mask, right answers, truncated responses; in the gate and in the
loop. Each is compared with finite differences in float64 and between cuts into micro-batches and ranks."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fiberpo_megatron.certify.batch import draw_problem
from fiberpo_megatron.config import ConfigError
from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.planning.reductions import gate_bytes
from fiberpo_megatron.rollout.dump import DumpError
from fiberpo_megatron.trainer.batch import MiniBatch, mini_batches, without_truncated
from fiberpo_megatron.trainer.loop import Training, train
from fiberpo_megatron.trainer.optimise import ObjectiveGate
from fiberpo_megatron.trainer.preflight import _check_advantages, _check_scoring
from fiberpo_megatron.trainer.settings import AlgorithmConfig, BatchConfig
from fiberpo_megatron.trainer.terms import StepStart, Terms, build_terms
from fiberpo_megatron.types import RolloutBatch, TokenScores, concatenated_response_tokens
from tests.trainer.test_loop import Memory, toy_config, training
from tests.trainer.test_stored import run_in
from tests.trainer.toy import VOCABULARY, FakeEngine, FirstToken, SingleLayout, generator

TEACHER = {"teacher": "http://teacher:1", "coefficient": 0.7, "reward_weight": 0.5, "clip": 0.4}
SETTINGS: dict[str, dict[str, Any]] = {
    "distillation": {"distillation": TEACHER},
    "off_policy_mask": {"off_policy_mask": {"delta": 0.02}},
    "supervised": {"supervised": {"coefficient": 0.3}},
    "nothing": {},
    "all": {
        "distillation": TEACHER,
        "off_policy_mask": {"delta": 0.02},
        "supervised": {"coefficient": 0.3},
        "kl": {"coefficient": 0.1, "servers": "http://reference:1"},
    },
}


def terms_of(name: str) -> Terms:
    return build_terms(AlgorithmConfig.model_validate(SETTINGS[name]))


class Step:
    """Trajectories with everything that the terms read, and the log-probs of all tokens in float64."""

    def __init__(self, longest: int = 6) -> None:
        random = np.random.default_rng(0)
        problem = draw_problem(random, groups=3, samples=4, longest=longest, domains=2, partitions=2)
        count, total = len(problem.rollouts.lengths), len(problem.rollouts.tokens)
        self.old = -2.0 * random.random(total).astype(np.float32)
        scores = {
            name: np.where(problem.rollouts.response_mask, -2.0 * random.random(total), np.nan).astype(np.float32)
            for name in ("teacher_log_probs", "reference_log_probs")
        }
        scores["teacher_log_probs"][np.flatnonzero(problem.rollouts.response_mask)[3]] = np.nan
        self.rollouts = replace(
            problem.rollouts,
            correct=random.random(count) < 0.4,
            truncated=random.random(count) < 0.3,
            rollout_log_probs=(self.old + 0.5 * random.normal(size=total)).astype(np.float32),
            **scores,
        )
        self.advantages = problem.advantages
        self.now = self.old.astype(np.float64) + problem.log_ratio

    def part(self, layout: Any, budget: int = 10**4, weighting: str = "token-mean") -> MiniBatch:
        (part,) = mini_batches(
            self.rollouts,
            self.advantages,
            batch=BatchConfig(micro_batch_tokens=budget, oversized="own_micro_batch"),
            weighting=weighting,
            domains=2,
            layout=layout,
            version=0,
        )
        return part

    def gate(self, terms: Terms, part: MiniBatch, layout: Any, objective: str, reduce: Any) -> ObjectiveGate:
        tokens = concatenated_response_tokens(part.micro_batches)
        old = torch.from_numpy(self.old)[tokens]
        scores = [TokenScores(old, torch.zeros(len(old)))]
        prepared = terms.prepare(StepStart([part], scores, self.rollouts, layout))
        self.prepared = prepared
        return ObjectiveGate(build_objective(objective, kernels=False), prepared.parts[0], old, reduce, terms=terms)


def whole(
    step: Step, name: str, objective: str = "grpo", now: Tensor | None = None
) -> tuple[Tensor, Mapping[str, float]]:
    """The gradient of all response tokens in their order, from one call of one process, and its metrics."""
    layout = SingleLayout()
    part = step.part(layout)
    gate = step.gate(terms_of(name), part, layout, objective, layout.sum_over_tokens)
    tokens = concatenated_response_tokens(part.micro_batches)
    log_probs = (torch.from_numpy(step.now) if now is None else now)[tokens]
    found = gate(log_probs, slice(0, len(tokens)))
    gradient = torch.zeros(len(step.old), dtype=torch.float64)
    gradient[tokens] = found.gradient.double()
    return gradient, dict(found.metrics) | dict(step.prepared.metrics)


def written_out(step: Step, name: str, now: Tensor) -> Tensor:
    """J of grpo with token means and the terms, from their formulas, one trajectory at a time."""
    on = SETTINGS[name]
    rollouts, old = step.rollouts, torch.from_numpy(step.old).double()
    mask = torch.from_numpy(rollouts.response_mask)
    rollout, teacher, reference = (
        torch.from_numpy(getattr(rollouts, f"{of}_log_probs")).double() for of in ("rollout", "teacher", "reference")
    )
    total, correct = float(mask.sum()), 0.0
    value = torch.zeros((), dtype=torch.float64)
    likelihood = torch.zeros((), dtype=torch.float64)
    for one, (begin, end) in enumerate(zip(rollouts.offsets[:-1], rollouts.offsets[1:])):
        own = torch.arange(begin, end)[mask[begin:end]]
        advantages = torch.full((len(own),), float(step.advantages[one]), dtype=torch.float64)
        if "distillation" in on:
            difference = (teacher[own] - old[own]).clamp(-0.4, 0.4).nan_to_num(0.0)
            advantages = (0.5 * advantages + 0.7 * difference).float().double()
        ratio = (now[own] - old[own]).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        if "off_policy_mask" in on and float((rollout[own] - now[own]).mean()) > 0.02:
            surrogate = surrogate * (advantages >= 0)
        value = value + surrogate.sum() / total
        if "kl" in on:
            d = now[own] - reference[own]
            value = value - 0.1 * (ratio * (torch.expm1(-d) + d)).sum() / total
        if rollouts.correct[one]:
            likelihood, correct = likelihood + now[own].sum(), correct + len(own)
    return value + (0.3 * likelihood / correct if "supervised" in on else 0.0)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_gradients_are_finite_differences_of_the_formulas(name: str):
    step, h = Step(), 1e-6
    found, _ = whole(step, name)
    now = torch.from_numpy(step.now)
    for token in np.flatnonzero(step.rollouts.response_mask):
        above, below = now.clone(), now.clone()
        above[token] += h
        below[token] -= h
        slope = (written_out(step, name, above) - written_out(step, name, below)) / (2 * h)
        if "kl" in SETTINGS[name]:  # "unbiased" has the gradient of the ratio as well, which is not its derivative
            d = now[token] - float(step.rollouts.reference_log_probs[token])
            ratio = (now[token] - float(step.old[token])).exp()
            k3 = torch.expm1(-d) + d
            slope = slope + 0.1 * ratio * (k3 - torch.expm1(-d) - d) / int(step.rollouts.response_mask.sum())
        assert abs(float(slope) - float(found[token])) < 1e-6, token
    assert (found != whole(step, name, "reinforce")[0]).any(), "something is clipped"


class CutLayout(SingleLayout):
    """One of data x context ranks; sums meet in a barrier between threads."""

    def __init__(
        self, data_rank: int, data_size: int, context_rank: int, context_size: int, meeting: "Meeting"
    ) -> None:
        self.data_rank, self.data_size = data_rank, data_size
        self.context_rank, self.context_size = context_rank, context_size
        self.sequence_multiple = 2 * context_size if context_size > 1 else 1
        self.meeting, self.place = meeting, data_rank * context_size + context_rank

    def sum_over_tokens(self, x: Tensor) -> Tensor:
        return self.meeting.sum(self.place, x)


class Meeting:
    def __init__(self, size: int) -> None:
        self.barrier, self.given = threading.Barrier(size, timeout=20), [torch.zeros(0)] * size

    def sum(self, place: int, x: Tensor) -> Tensor:
        self.given[place] = x.clone()
        self.barrier.wait()
        total = torch.stack(self.given).sum(0)
        self.barrier.wait()
        return total


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("objective", ["grpo", "fiberpo-domain"])
@pytest.mark.parametrize(("data", "context", "budget"), [(1, 1, 40), (2, 2, 64)])
def test_layouts_and_micro_batches_do_not_matter(name: str, objective: str, data: int, context: int, budget: int):
    step = Step(longest=20)
    now = torch.from_numpy(step.now).float()
    wanted, metrics = whole(step, name, objective, now)
    meeting = Meeting(data * context)
    gradient = torch.full((len(step.old),), torch.nan, dtype=torch.float64)
    gradient[~torch.from_numpy(step.rollouts.response_mask)] = 0.0

    def rank(place: int) -> Mapping[str, float]:
        layout = CutLayout(place // context, data, place % context, context, meeting)
        part = step.part(layout, budget)
        own = Step(longest=20)  # `gate` keeps what was prepared
        gate = own.gate(terms_of(name), part, layout, objective, layout.sum_over_tokens)
        tokens = concatenated_response_tokens(part.micro_batches)
        found = gate(now[tokens], slice(0, len(tokens)))
        gradient[tokens] = found.gradient.double()
        return {**found.metrics, **own.prepared.metrics}

    with ThreadPoolExecutor(data * context) as pool:
        records = list(pool.map(rank, range(data * context)))
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-7 * float(wanted.abs().max()))
    for record in records:
        for key in (key for key in metrics if key.startswith(("distillation", "off_policy", "supervised", "kl"))):
            assert record[key] == pytest.approx(metrics[key], rel=1e-12), key


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_single_pass_gives_the_same(name: str):
    """grpo's gates see a token alone: one call for each micro-batch, without a reduction."""
    step, layout = Step(), SingleLayout()
    now = torch.from_numpy(step.now).float()
    wanted, metrics = whole(step, name, "grpo", now)
    part = step.part(layout, 24)
    assert len(part.micro_batches) > 2
    gate = step.gate(terms_of(name), part, layout, "grpo", None)
    assert not gate.terms.spans_micro_batches
    begin = 0
    for micro in part.micro_batches:
        tokens = micro.response_tokens
        found = gate(now[tokens], slice(begin, begin + len(tokens)))
        torch.testing.assert_close(found.gradient.double(), wanted[tokens], rtol=1e-7, atol=0)
        begin += len(tokens)
    single = gate.metrics(layout.sum_over_tokens)
    for key in (key for key in single if key.startswith(("off_policy", "supervised"))):
        assert single[key] == pytest.approx(metrics[key], rel=1e-12)


def test_the_planner_counts_the_masks_reduction():
    step, sent = Step(), []
    part = step.part(SingleLayout())

    def reduce(x: Tensor) -> Tensor:
        sent.append(x.nbytes)
        return x

    gate = step.gate(terms_of("off_policy_mask"), part, SingleLayout(), "fiberpo", reduce)
    gate(torch.from_numpy(step.now)[concatenated_response_tokens(part.micro_batches)], slice(0, len(part.weights)))
    batch = {"prompts": 3, "samples_per_prompt": 4}
    planned = gate_bytes(toy_config(batch=batch, algorithm={**SETTINGS["off_policy_mask"], "preset": "paper"}))
    assert tuple(sent[: len(planned)]) == planned and planned[0] == 16 * 12
    assert sent[len(planned) :] == [2 * 8], "the two metrics of the mask"


def test_metrics_say_what_the_terms_did():
    step = Step()
    _, metrics = whole(step, "all")
    mask = step.rollouts.response_mask
    teacher = step.rollouts.teacher_log_probs[mask].astype(np.float64)
    known = ~np.isnan(teacher)
    divergence = step.old[mask].astype(np.float64)[known] - teacher[known]
    assert metrics["distillation/reverse_kl"] == pytest.approx(divergence.mean(), rel=1e-9)
    assert metrics["distillation/clipped_share"] == pytest.approx((np.abs(divergence) > 0.4).mean())
    assert metrics["distillation/unknown_share"] == pytest.approx(1 / mask.sum())
    correct = np.repeat(step.rollouts.correct, step.rollouts.lengths)[mask]
    assert metrics["supervised/token_share"] == pytest.approx(correct.mean())
    assert metrics["supervised/log_prob"] == pytest.approx(step.now[mask][correct].mean(), rel=1e-9)
    assert 0.0 < metrics["off_policy_mask/weight_share"] < 1.0


def test_masked_tokens_are_in_no_gate_of_a_trajectory_level():
    """A trajectory that is masked whole has no part in the nodes that it belongs to: the rest is as without it."""
    step = Step()
    step.rollouts = replace(step.rollouts, rollout_log_probs=step.old.copy())
    far = 6
    begin, end = step.rollouts.offsets[far : far + 2]
    step.advantages = np.abs(step.advantages)
    step.advantages[far] = -1.0
    step.rollouts.rollout_log_probs[begin:end] += 3.0
    step.now = step.old + 0.3 * (step.now - step.old)
    masked, metrics = whole(step, "off_policy_mask", "fiberpo-domain")
    assert 0.0 < metrics["off_policy_mask/weight_share"] < 0.5
    assert not masked[begin:end].any()
    moved = torch.from_numpy(step.now).clone()
    moved[begin:end] -= 1.0
    again, _ = whole(step, "off_policy_mask", "fiberpo-domain", moved)
    assert torch.equal(masked, again), "how far a masked token has moved does not matter to others"
    step.rollouts.rollout_log_probs[begin:end] = step.old[begin:end] - 9.0
    seen, _ = whole(step, "off_policy_mask", "fiberpo-domain", moved)
    assert not torch.equal(masked, seen), "an unmasked one does"


def test_a_mini_batch_without_a_right_answer_gets_no_supervised_term():
    step = Step()
    step.rollouts = replace(step.rollouts, correct=np.zeros(len(step.rollouts.lengths), bool))
    with_term, metrics = whole(step, "supervised")
    assert metrics["supervised/token_share"] == metrics["supervised/log_prob"] == 0.0
    assert torch.equal(with_term, whole(step, "nothing")[0])


def test_a_teacher_that_scored_nothing_is_an_error():
    step = Step()
    silent = np.full(len(step.old), np.nan, np.float32)
    step.rollouts = replace(step.rollouts, teacher_log_probs=silent)
    with pytest.raises(ValueError, match=r"gave no log-prob of any of the step's \d+ response tokens"):
        whole(step, "distillation")
    step.rollouts = replace(step.rollouts, teacher_log_probs=silent[:0])
    with pytest.raises(ValueError, match=r"have no teacher_log_probs, which algorithm\.distillation needs"):
        whole(step, "distillation")


def test_an_unscored_token_has_no_divergence_from_a_served_reference():
    step = Step()
    token = int(np.flatnonzero(step.rollouts.response_mask)[5])
    step.rollouts.reference_log_probs[token] = np.nan
    at_old = torch.from_numpy(step.old).double()
    found, metrics = whole(step, "all", now=at_old)
    assert torch.isfinite(found).all() and np.isfinite(metrics["kl/mean"])


# Truncated responses


def test_left_out_trajectories_are_as_if_they_had_not_been_sampled():
    step = Step()
    kept = ~step.rollouts.truncated
    assert 0 < kept.sum() < len(kept)
    rollouts, advantages, metrics = without_truncated(step.rollouts, step.advantages)
    assert metrics == {
        "truncated/left_out_share": 1.0 - kept.mean(),
        "truncated/steps_without_training": 0.0,
    }
    np.testing.assert_array_equal(advantages, step.advantages[kept])
    tokens = np.repeat(kept, step.rollouts.lengths)
    np.testing.assert_array_equal(rollouts.tokens, step.rollouts.tokens[tokens])
    part = replace_step(step, rollouts, advantages).part(SingleLayout(), weighting="seq-mean")
    assert part.weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    lengths = rollouts.response_lengths
    trajectory = np.searchsorted(
        rollouts.offsets, concatenated_response_tokens(part.micro_batches).numpy(), side="right"
    )
    np.testing.assert_allclose(part.weights.numpy(), 1.0 / (kept.sum() * lengths[trajectory - 1]))


def replace_step(step: Step, rollouts: RolloutBatch, advantages: np.ndarray) -> Step:
    other = Step()
    other.rollouts, other.advantages = rollouts, advantages
    return other


class Cutting(FakeEngine):
    """Cuts the responses to prompts whose token is in `cut` by the length limit."""

    cut: Sequence[int] = ()

    async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **limits: Any) -> list[Any]:
        found = await super().sample(prompt, seeds)
        return [replace(c, finish_reason="length") if prompt[-1] in self.cut else c for c in found]


def cutting(cut: Sequence[int], truncated: str = "leave_out") -> tuple[Training, Memory]:
    engine = Cutting(seed=0)
    engine.cut = cut
    batch = {"prompts": 12, "samples_per_prompt": 4, "mini_batches": 3, "epochs": 2, "micro_batch_tokens": 64}
    return training(engine=engine, batch=batch, evaluation={"prompts": 0}, algorithm={"truncated": truncated})


def test_a_run_trains_on_what_was_not_cut():
    run, memory = cutting(cut=[0, 1, 5])
    train(run)
    assert memory.values("train", "truncated/left_out_share") == [0.25] * 3
    assert memory.values("train", "truncated_share") == [0.25] * 3
    assert min(memory.values("train", "gradient_norm")) > 0.0
    other, _ = cutting(cut=[0, 1, 5], truncated="train")
    train(other)
    assert not torch.equal(run.policy.table, other.policy.table)


def test_a_step_with_nothing_left_takes_no_optimiser_step():
    run, memory = cutting(cut=range(VOCABULARY))
    train(run)
    assert memory.values("train", "truncated/steps_without_training") == [1.0] * 3
    assert not run.policy.table.any() and run.policy.forwards == 3, "publications are verified, and that is all"
    assert "gradient_norm" not in memory.records[-1][2] and memory.saved == [1, 2, 3]


def test_truncated_responses_train_by_default():
    run, memory = cutting(cut=range(VOCABULARY), truncated="train")
    train(run)
    assert min(memory.values("train", "gradient_norm")) > 0.0
    assert "truncated/left_out_share" not in memory.records[0][2]


# Distillation in the loop


class TableTeacher:
    """A teacher whose next token depends on the last one."""

    def __init__(self, seed: int = 1) -> None:
        random = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(VOCABULARY, VOCABULARY, generator=random).log_softmax(-1)

    async def log_probs(self, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
        before = [prompt[-1], *response[:-1]]
        return self.rows[before, list(response)].numpy()


def distilling(teacher: TableTeacher, folder: Path | None = None, **distillation: Any) -> tuple[Training, Memory]:
    batch = {"prompts": 24, "samples_per_prompt": 4, "mini_batches": 1, "micro_batch_tokens": 1024}
    algorithm = {"distillation": {"teacher": "http://teacher:1", **distillation}, "objective": "reinforce"}
    sections: dict[str, Any] = {"batch": batch, "algorithm": algorithm, "evaluation": {"prompts": 0}}
    sections["trainer"] = {"steps": 8}
    run, memory = training("reinforce", **sections)
    source = replace(run.source, generator=replace(run.source.generator, scorers={"teacher_log_probs": teacher}))
    return replace(run, source=source, terms=build_terms(run.algorithm)), memory


def divergence(policy: Any, teacher: TableTeacher) -> float:
    rows = policy.table.detach().log_softmax(-1)
    return float((rows.exp() * (rows - teacher.rows)).sum(-1).mean())


def test_pure_distillation_brings_the_policy_to_the_teacher():
    teacher = TableTeacher()
    run, memory = distilling(teacher)
    before = divergence(run.policy, teacher)
    train(run)
    measured = memory.values("train", "distillation/reverse_kl")
    assert measured[0] == pytest.approx(before, rel=0.3)
    assert divergence(run.policy, teacher) < 0.3 * before and measured[-1] < 0.4 * measured[0]
    assert memory.values("train", "distillation/unknown_share") == [0.0] * 8


def test_rewards_are_mixed_in_by_their_weight():
    teacher = TableTeacher()
    runs = {weight: distilling(teacher, reward_weight=weight, coefficient=0.01) for weight in (0.0, 4.0)}
    for run, _ in runs.values():
        train(run)
    accuracy = {weight: memory.values("train", "accuracy")[-1] for weight, (_, memory) in runs.items()}
    assert accuracy[4.0] > accuracy[0.0] + 0.2


# What is refused


def test_stored_rollouts_without_scores_are_refused_by_name(tmp_path: Path):
    first, _ = run_in(tmp_path / "a", storage={"dump": True})
    train(first)
    for algorithm, seen in (
        ({"distillation": {"teacher": "http://t:1"}}, r"no teacher_log_probs.*algorithm\.distillation\.teacher"),
        ({"kl": {"coefficient": 0.1, "servers": "http://t:1"}}, r"no reference_log_probs.*algorithm\.kl\.servers"),
    ):
        with pytest.raises(DumpError, match=rf"step_000000\.npz has {seen}"):
            train(run_in(tmp_path / "b", storage={"replay": tmp_path / "a"}, algorithm=algorithm)[0])


def test_stored_rollouts_with_scores_are_replayed_without_a_teacher(tmp_path: Path):
    algorithm = {"distillation": {"teacher": "http://nobody:1"}}
    first, recorded = run_in(tmp_path / "a", storage={"dump": True}, algorithm=algorithm)
    scored = replace(first.source.generator, scorers={"teacher_log_probs": TableTeacher()})
    first = replace(first, source=replace(first.source, generator=scored), terms=build_terms(first.algorithm))
    train(first)
    again, replayed = run_in(tmp_path / "b", storage={"replay": tmp_path / "a"}, algorithm=algorithm)
    again = replace(again, terms=build_terms(again.algorithm))
    train(again)
    assert torch.equal(first.policy.table, again.policy.table)
    for name in ("distillation/reverse_kl", "gradient_norm"):
        assert recorded.values("train", name) == replayed.values("train", name)


def test_rollouts_of_an_interrupted_run_without_scores_are_made_again(tmp_path: Path):
    first, _ = run_in(tmp_path / "a")
    origin = first.source.store._origin(0, [], "0")
    asked, _ = run_in(tmp_path / "b", algorithm={"distillation": {"teacher": "http://t:1"}})
    assert not asked.source.store._can_stand_for(origin, asked.source.store._origin(0, [], "0"))
    moved, _ = run_in(tmp_path / "c", algorithm={"distillation": {"teacher": "http://other:1"}})
    assert moved.source.store._can_stand_for(
        asked.source.store._origin(0, [], "0"), moved.source.store._origin(0, [], "0")
    ), "a teacher that was started again elsewhere gives the same scores"


@pytest.mark.parametrize(
    ("rollout", "algorithm", "message"),
    [
        ({"temperature": 0.7}, {"distillation": {"teacher": "http://t:1"}}, r"temperature = 0\.7: SGLang scores"),
        ({"temperature": 0.7}, {"kl": {"coefficient": 0.1, "servers": "http://t:1"}}, r"algorithm\.kl\.servers"),
        ({"top_p": 0.9}, {"distillation": {"teacher": "http://t:1"}}, r"top_p = 0\.9.*would|top_p = 0\.9"),
    ],
    ids=["teacher", "reference", "top_p"],
)
def test_sampling_that_would_bias_scores_is_refused(rollout: Any, algorithm: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        _check_scoring(toy_config(rollout=rollout, algorithm=algorithm))
    _check_scoring(toy_config(algorithm=algorithm))


def test_pure_distillation_needs_one_trajectory_a_prompt():
    batch = {"prompts": 2, "samples_per_prompt": 1}
    _check_advantages(toy_config(batch=batch, algorithm={"distillation": {"teacher": "http://t:1"}}))
    mixed = {"distillation": {"teacher": "http://t:1", "reward_weight": 1.0}}
    with pytest.raises(ConfigError, match="nothing to compare"):
        _check_advantages(toy_config(batch=batch, algorithm=mixed))


def test_terms_are_off_by_default():
    assert not build_terms(AlgorithmConfig())
    assert not toy_config().scoring_servers


def test_the_toy_generator_has_no_scorers():
    assert not generator(FakeEngine(0), FirstToken()).scorers
