"""Terms of an objective in the training loop: gradients by finite differences, steering, state, metrics, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fiberpo_megatron.certify.batch import draw_problem
from fiberpo_megatron.config import Config
from fiberpo_megatron.data.packing import PackingEfficiency
from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.trainer.batch import MiniBatch
from fiberpo_megatron.trainer.loop import learn, train
from fiberpo_megatron.trainer.optimise import ObjectiveGate
from fiberpo_megatron.trainer.settings import AlgorithmConfig
from fiberpo_megatron.trainer.term_checks import term_advice
from fiberpo_megatron.trainer.terms import StepStart, Terms, build_terms
from fiberpo_megatron.types import TokenScores
from tests.trainer.test_loop import training
from tests.trainer.toy import SingleLayout, TablePolicy

TERMS: dict[str, dict[str, Any]] = {
    "k1": {"kl": {"coefficient": 0.3, "estimator": "k1"}},
    "k2": {"kl": {"coefficient": 0.3, "estimator": "k2"}},
    "k3": {"kl": {"coefficient": 0.3, "estimator": "k3"}},
    "unbiased": {"kl": {"coefficient": 0.3}},
    "k1 in the reward": {"kl": {"coefficient": 0.3, "estimator": "k1", "where": "reward"}},
    "entropy": {"entropy": {"coefficient": 0.2}},
    "all": {
        "kl": {"coefficient": 0.3},
        "entropy": {"coefficient": 0.2},
        "distillation": {"teacher": "http://127.0.0.1:1", "reward_weight": 1.0},
        "supervised": {"coefficient": 0.1},
    },
}


class TokenTable:
    """A policy of one row of logits for each of a problem's response tokens, in float64, with what its terms read."""

    def __init__(self, terms: Terms, vocabulary: int = 5) -> None:
        random = np.random.default_rng(3)
        problem = draw_problem(random, groups=2, samples=3, longest=6, domains=2, partitions=2, vocabulary=vocabulary)
        tokens = problem.tokens("token-mean", torch.float64)
        count = len(tokens)
        self.logits = torch.from_numpy(random.normal(size=(count, vocabulary)))
        self.labels = torch.from_numpy(random.integers(0, vocabulary, count))
        log_probs, entropy = self.scores(self.logits)
        self.old = log_probs - tokens.log_ratio
        others = torch.from_numpy(random.normal(scale=0.3, size=(2, count)))
        part = MiniBatch(
            micro_batches=[_Rows(torch.from_numpy(np.flatnonzero(problem.rollouts.response_mask)))],  # type: ignore[list-item]
            packing=PackingEfficiency(1.0, 0.0, 1),
            advantages=tokens.advantages.double(),
            weights=tokens.weights,
            keys=dict(tokens.keys),
            counts=dict(tokens.counts),
            labels=dict(tokens.labels),
            rollout_log_probs=self.old,
            reference_log_probs=log_probs + others[0],
            teacher_log_probs=log_probs + others[1],
        )
        rollouts = replace(problem.rollouts, correct=np.arange(6) % 2 == 0)
        self.terms = terms
        self.part = part
        if terms:
            start = StepStart([part], [TokenScores(self.old, entropy)], rollouts, SingleLayout())
            (self.part,) = terms.prepare(start).parts

    def scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        rows = logits.log_softmax(-1)
        return rows.gather(1, self.labels[:, None])[:, 0], -(rows.exp() * rows).sum(-1)

    def call(self, objective: str, logits: Tensor) -> tuple[float, Tensor]:
        """Return J with its terms, and its gradient in the logits."""
        gate = ObjectiveGate(build_objective(objective), self.part, self.old, lambda x: x, terms=self.terms, kept=[])
        leaf = logits.clone().requires_grad_()
        log_probs, entropy = self.scores(leaf)
        found = gate(log_probs.detach(), slice(0, len(log_probs)))
        linear = (found.gradient * log_probs).sum()
        assert gate.kept is not None
        value = float(gate.kept[0].output.value) - found.metrics.get("kl/loss", 0.0)
        value += 0.1 * found.metrics.get("supervised/log_prob", 0.0)
        if found.entropy is not None:
            linear = linear + (found.entropy * entropy).sum()
            value += float((found.entropy * entropy).sum().detach())
        (gradient,) = torch.autograd.grad(linear, leaf)
        return value, gradient


class _Rows:
    def __init__(self, tokens: Tensor) -> None:
        self.response_tokens = tokens


@pytest.mark.parametrize("objective", ["fiberpo-domain", "grpo"])
@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_is_that_of_objective_and_terms(objective: str, name: str):
    """Central differences in float64 along drawn directions. Which tokens a clip holds does not change on the way."""
    table = TokenTable(build_terms(AlgorithmConfig(**TERMS[name])))
    _, gradient = table.call(objective, table.logits)
    random = torch.Generator().manual_seed(0)
    scale = gradient.norm()
    for _ in range(4):
        direction = torch.randn(table.logits.shape, generator=random, dtype=torch.float64)
        h = 1e-6 / direction.norm()
        above, below = (table.call(objective, table.logits + sign * h * direction)[0] for sign in (1, -1))
        found, wanted = (above - below) / (2 * float(h)), float((gradient * direction).sum())
        assert abs(found - wanted) < 1e-6 * float(scale * direction.norm()), (found, wanted)


@pytest.mark.parametrize("name", TERMS)
def test_terms_change_the_gradient(name: str):
    with_terms, without = TokenTable(build_terms(AlgorithmConfig(**TERMS[name]))), TokenTable(Terms())
    gradients = [table.call("grpo", table.logits)[1] for table in (with_terms, without)]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def trained(**sections: Any) -> tuple[Any, Any]:
    batch = {"prompts": 4, "samples_per_prompt": 4, "mini_batches": 2, "epochs": 2, "micro_batch_tokens": 64}
    small = {"batch": batch, "evaluation": {"prompts": 0}, "trainer": {"steps": 4}}
    run, memory = training("grpo", **(small | sections))
    return replace(run, terms=build_terms(run.algorithm)), memory


def test_a_divergence_holds_the_policy_near_the_reference():
    """Twice with the same seed; the reference of the toy policy is the uniform one."""
    divergences = []
    for coefficient in (1e-9, 1.0):
        run, memory = trained(algorithm={"kl": {"coefficient": coefficient}})
        train(run)
        divergences.append(memory.values("train", "kl/mean"))
        assert memory.values("train", "kl/coefficient") == [coefficient] * 4
    assert divergences[0][0] == divergences[1][0] == 0.0  # the first step begins with the reference
    assert divergences[1][-1] < 0.5 * divergences[0][-1]


def test_the_reference_costs_a_pass_a_mini_batch():
    counts = []
    for coefficient in (0.0, 0.1):
        run, memory = trained(algorithm={"kl": {"coefficient": coefficient}})
        train(run)
        counts.append((memory.values("train", "extra_forwards"), run.policy.forwards))
        assert ("seconds/reference" in memory.records[-1][2]) == (coefficient > 0)
    assert counts[1][0] == [count + 2 for count in counts[0][0]] and counts[1][1] == counts[0][1] + 4 * 2


def test_the_first_step_follows_the_pass_that_it_goes_on_from():
    """The reference moves the weights, and so it computes before the pass whose activations are kept."""
    run, _ = trained(algorithm={"kl": {"coefficient": 0.1}}, trainer={"steps": 1})
    policy, passes = run.policy, []
    log_probs, reference, step = policy.log_probs, policy.reference, policy.step

    def noted(name: str, call: Any) -> Any:
        def also(*given: Any, **named: Any) -> Any:
            passes.append(f"{name} kept" if named.get("keep") else name)
            return call(*given, **named)

        return also

    policy.log_probs, policy.step = noted("log-probs", log_probs), noted("step", step)  # type: ignore[method-assign]
    policy.reference = noted("reference", reference)  # type: ignore[method-assign]
    train(run)
    before = passes[passes.index("reference") : passes.index("step")]
    assert before == ["reference", *["log-probs"] * 3, "log-probs kept"]


def test_steered_coefficients_are_kept_in_checkpoints():
    sections = {
        "kl": {"coefficient": 0.1, "target": 1e-3, "horizon": 500.0},
        "entropy": {"target": 100.0, "step": 0.01},
    }
    run, memory = trained(algorithm=sections)
    train(run)
    states = memory.terms
    assert [state["entropy"]["coefficient"] for state in states] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    measured = memory.values("train", "kl/coefficient")
    assert measured[1:] == [state["kl"]["coefficient"] for state in states[:-1]] and len(set(measured)) == 4
    # by hand: 16 trajectories of a horizon of 500, and a divergence of 0
    assert measured[1] == pytest.approx(0.1 * (1 - 0.2 * 16 / 500))
    again = build_terms(AlgorithmConfig(**sections))
    again.restore(states[1])
    assert again.state() == states[1]


def test_an_entropy_that_is_too_high_takes_the_bonus_back():
    run, memory = trained(algorithm={"entropy": {"coefficient": 0.05, "target": 1e-3, "step": 0.03}})
    train(run)
    assert memory.values("train", "entropy_bonus/coefficient") == pytest.approx([0.05, 0.02, 0.0, 0.0])


def test_micro_batches_do_not_matter():
    tables = []
    for budget in (12, 1000):
        run, _ = trained(
            algorithm={"kl": {"coefficient": 0.2}, "entropy": {"coefficient": 0.1}},
            batch={
                "prompts": 12,
                "samples_per_prompt": 8,
                "mini_batches": 2,
                "epochs": 2,
                "micro_batch_tokens": budget,
            },
        )
        run.source.publish(0)
        rollouts = run.source.take(0)
        assert rollouts is not None
        learn(run, rollouts, 0)
        assert isinstance(run.policy, TablePolicy)
        tables.append(run.policy.table.detach())
    assert tables[0].abs().max() > 0.1
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"kl": {"coefficient": 0.1, "where": "reward"}}, r'set algorithm.kl.estimator = "k1"'),
        ({"kl": {"target": 0.1}}, r"algorithm.kl.coefficient by factors, but that is 0"),
    ],
)
def test_settings_that_cannot_work(section: dict[str, Any], problem: str):
    with pytest.raises(ValidationError, match=problem):
        AlgorithmConfig(**section)


def test_what_is_allowed_but_unwise():
    def lines(**kl: Any) -> list[str]:
        return term_advice(Config.model_validate({"model": {"path": Path("x")}, "algorithm": {"kl": kl}}))

    assert lines(coefficient=0.1) == lines(estimator="k1") == []
    assert "zero on average" in lines(coefficient=0.1, estimator="k1")[0]
    assert '"k1" has that one' in lines(coefficient=0.1, estimator="k3", where="reward")[0]
