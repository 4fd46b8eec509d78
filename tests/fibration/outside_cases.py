"""Every objective and advantage that verl or TRL has too, against their own code.

Run by test_outside.py in a process of its own with the two packages on the path. Both compute a loss on padded
tensors; its gradient by autograd is compared with our closed form on flat tokens, in float64.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fiberpo_megatron.fibration import build_objective, objective_class
from fiberpo_megatron.terms.off_policy import drift_sums, off_policy_factor
from fiberpo_megatron.trainer.advantages import RLOO, BatchStandardised, GroupMean
from fiberpo_megatron.trainer.batch import token_weights
from fiberpo_megatron.types import RolloutBatch
from tests.fibration.outside import losses

core_algos, ActorConfig, GRPOTrainer = losses()

LENGTHS = torch.tensor([7, 1, 4, 6, 3, 7, 2, 5])
LONGEST = 9.0
"""What Dr.GRPO divides by."""


class Problem:
    """Holds eight padded responses; log-probs move by up to a few tenths."""

    def __init__(self, seed: int, spread: float = 0.4, of_tokens: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)
        shape = (len(LENGTHS), int(LENGTHS.max()))
        self.mask = (torch.arange(shape[1]) < LENGTHS.unsqueeze(1)).double()
        self.old = -0.4 - 3 * torch.rand(shape, generator=draw, dtype=torch.float64)
        moved = spread * torch.randn(shape, generator=draw, dtype=torch.float64).clamp(-3, 3)
        self.now = torch.minimum(self.old + moved, torch.full_like(moved, -0.05)).requires_grad_()
        advantages = torch.randn(shape, generator=draw, dtype=torch.float64)
        self.advantages = advantages if of_tokens else advantages[:, :1].expand(shape)

    def ours(self, name: str, weighting: str | None = None, **options: Any) -> Tensor:
        """Return our coefficients, padded with zeros."""
        held = self.mask.bool()
        row = torch.arange(len(LENGTHS)).unsqueeze(1).expand_as(self.mask)[held]
        mu = token_weights(LENGTHS.numpy(), weighting or objective_class(name).weighting, LONGEST)
        out = build_objective(name, **options)(
            (self.now - self.old)[held],
            self.advantages[held],
            torch.from_numpy(mu)[row],
            keys={"trajectory": row},
            old_log_probs=self.old[held],
        )
        return torch.zeros_like(self.mask).masked_scatter(held, out.gradient)

    def compare(self, loss: Tensor, coefficients: Tensor) -> None:
        """Compare -dL/dlogp; verl divides by lengths + 1e-8."""
        (gradient,) = torch.autograd.grad(loss, self.now)
        assert coefficients.abs().max() > 0
        torch.testing.assert_close(-gradient, coefficients, rtol=1e-7, atol=1e-15)


AGGREGATED = {
    "seq-mean": "seq-mean-token-mean",
    "token-mean": "token-mean",
    "seq-sum": "seq-mean-token-sum",
    "constant": "seq-mean-token-sum-norm",
}
WIDE = 1e6


@pytest.mark.parametrize(
    ("name", "options", "theirs", "settings"),
    [
        ("ppo", {}, "vanilla", {}),
        ("grpo", {"epsilon": 0.1}, "vanilla", {"low": 0.1, "high": 0.1}),
        ("grpo", {"dual_clip": 1.5}, "vanilla", {"clip_ratio_c": 1.5}),
        ("dapo", {}, "vanilla", {"low": 0.2, "high": 0.28}),
        ("drgrpo", {}, "vanilla", {}),
        ("reinforce++", {}, "vanilla", {}),
        ("rloo", {}, "vanilla", {"low": 1.0, "high": WIDE}),
        ("cispo", {}, "cispo", {"low": 1.0, "high": 4.0}),
        ("cispo", {"epsilon": {"low": 0.2, "high": 0.3}}, "cispo", {"low": 0.2, "high": 0.3}),
        ("gspo", {}, "gspo", {"low": 3e-4, "high": 4e-4}),
        ("gspo", {"epsilon": {"low": 0.1, "high": 0.2}}, "gspo", {"low": 0.1, "high": 0.2}),
        ("sapo", {}, "sapo", {}),
        ("sapo", {"tau_positive": 2.0, "tau_negative": 3.0}, "sapo", {"tau_pos": 2.0, "tau_neg": 3.0}),
        ("gmpo", {}, "geo_mean", {"low": 0.4, "high": 0.4}),
        ("gmpo", {"epsilon": {"low": 0.2, "high": 0.3}}, "geo_mean", {"low": 0.2, "high": 0.3}),
        ("dppo", {}, "dppo_tv", {"low": 0.15, "high": 0.15}),
        (
            "dppo",
            {"epsilon": {"low": 0.03, "high": 0.05}, "truncation": 1.2},
            "dppo_tv",
            {"low": 0.03, "high": 0.05, "clip_ratio_c": 1.2},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_objectives_of_verl(name: str, options: dict, theirs: str, settings: dict, seed: int) -> None:
    problem = Problem(seed)
    weighting = objective_class(name).weighting
    config = ActorConfig(
        strategy="megatron",
        rollout_n=4,
        use_dynamic_bsz=True,
        clip_ratio_low=settings.get("low", 0.2),
        clip_ratio_high=settings.get("high", 0.2),
        clip_ratio_c=settings.get("clip_ratio_c", WIDE),
        tau_pos=settings.get("tau_pos", 1.0),
        tau_neg=settings.get("tau_neg", 1.05),
        global_batch_info={"loss_scale_factor": LONGEST} if weighting == "constant" else {},
    )
    loss, _ = core_algos.get_policy_loss_fn(theirs)(
        problem.old, problem.now, problem.advantages, problem.mask, AGGREGATED[weighting], config
    )
    problem.compare(loss, problem.ours(name, **options))


@pytest.mark.parametrize("name", ["gspo", "grpo", "sapo", "cispo", "dppo"])
def test_advantages_of_tokens_in_verl(name: str) -> None:
    problem = Problem(7, of_tokens=True)
    theirs = {"grpo": "vanilla", "dppo": "dppo_tv"}.get(name, name)
    config = ActorConfig(
        strategy="megatron",
        rollout_n=4,
        use_dynamic_bsz=True,
        clip_ratio_low=0.1,
        clip_ratio_high=0.1,
        clip_ratio_c=WIDE,
    )
    loss, _ = core_algos.get_policy_loss_fn(theirs)(
        problem.old, problem.now, problem.advantages, problem.mask, "seq-mean-token-mean", config
    )
    options = {} if name == "sapo" else {"epsilon": 0.1}
    problem.compare(loss, problem.ours(name, "seq-mean", **options))


@pytest.mark.parametrize(
    ("name", "options", "settings"),
    [
        ("grpo", {}, {"loss_type": "grpo"}),
        ("dapo", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
        ("drgrpo", {}, {"loss_type": "dr_grpo"}),
        ("cispo", {}, {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("sapo", {}, {"loss_type": "sapo"}),
        ("gspo", {"epsilon": 0.1}, {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_objectives_of_trl(name: str, options: dict, settings: dict, seed: int) -> None:
    problem = Problem(seed)
    width = settings.get("epsilon", 0.2)
    trainer = SimpleNamespace(
        loss_type=settings["loss_type"],
        importance_sampling_level=settings.get("importance_sampling_level", "token"),
        epsilon_low=width,
        epsilon_high=settings.get("epsilon_high", width),
        args=SimpleNamespace(delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05),
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        max_completion_length=LONGEST,
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (problem.now, torch.zeros_like(problem.old), None),
    )
    ids = torch.zeros(problem.mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": problem.mask,
        "advantages": problem.advantages[:, 0],
        "old_per_token_logps": problem.old,
        "num_items_in_batch": problem.mask.sum(),
    }
    problem.compare(GRPOTrainer._compute_loss(trainer, None, inputs), problem.ours(name, **options))


@pytest.mark.parametrize("seed", range(5))
def test_the_off_policy_mask_of_trl(seed: int) -> None:
    """The sequence mask of DeepSeek-V3.2, from the engine's log-probs."""
    problem, delta = Problem(seed), 0.05
    held = problem.mask.bool()
    row = torch.arange(len(LENGTHS)).unsqueeze(1).expand_as(problem.mask)[held]
    now, rollout = problem.now.detach(), problem.old
    sums = drift_sums(rollout[held], now[held], row, len(LENGTHS))
    factor = off_policy_factor(sums, row, problem.advantages[held], delta)
    theirs = GRPOTrainer.get_off_policy_mask(problem.advantages[:, :1], now, rollout, problem.mask, delta)
    assert torch.equal(factor, theirs.expand_as(problem.mask)[held])
    assert 0 < factor.sum() < len(factor)


GROUPS = np.array([0, 0, 0, 0, 1, 1, 1, 2])
"""The last response is alone with its prompt; verl leaves its reward as it is, so that the tests leave it out."""


@pytest.mark.parametrize(
    ("estimator", "theirs", "options"),
    [
        (GroupMean(), "grpo", {}),
        (GroupMean(normalise_std=False), "grpo", {"norm_adv_by_std_in_grpo": False}),
        (RLOO(), "rloo", {}),
        (BatchStandardised(), "reinforce_plus_plus", {}),
        (BatchStandardised(baseline="group-mean"), "reinforce_plus_plus_baseline", {}),
    ],
    ids=str,
)
def test_advantages_of_verl(estimator: Any, theirs: str, options: dict) -> None:
    count = 7
    lengths, mask = LENGTHS[:count].numpy(), Problem(0).mask[:count]
    rewards = np.random.default_rng(3).normal(size=count).astype(np.float32)
    of_tokens = torch.zeros_like(mask)
    of_tokens[torch.arange(count), torch.from_numpy(lengths) - 1] = torch.from_numpy(rewards).double()
    config = SimpleNamespace(gamma=1.0)
    arguments = {"token_level_rewards": of_tokens, "response_mask": mask, "config": config, **options}
    if theirs != "reinforce_plus_plus":
        arguments["index"] = GROUPS[:count]
    expected, _ = core_algos.get_adv_estimator_fn(theirs)(**arguments)
    total = int(lengths.sum())
    rollouts = RolloutBatch.filled(
        tokens=np.zeros(total), response_mask=np.ones(total), lengths=lengths, rewards=rewards, groups=GROUPS[:count]
    )
    found = torch.from_numpy(estimator(rollouts)).double().unsqueeze(1) * mask
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
