"""What an optimiser step costs beside its passes, and what it does with a gradient that is not finite."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.optimizers import build
from fiberpo_megatron.mcore.parallel.layout import start_layout
from fiberpo_megatron.mcore.policy import MegatronPolicy, build_policy
from tests.distributed.parity import MODELS, TEMPERATURE, coupled_gate, make_batch, make_config, micro_batches_for
from tests.distributed.test_routing import fill, foreign_routes
from tests.mcore.test_log_probs import Fresh


def prepared(kind: str = "moe", **sections: Any) -> tuple[MegatronPolicy, list[Any], Any]:
    """A policy, three micro-batches, and a gate that sees all of their tokens."""
    config = make_config(**sections)
    layout = start_layout(MODELS[kind], config.parallel, config.run)
    batch = make_batch()
    micro_batches = micro_batches_for(batch, layout, 72)
    policy = build_policy(config, MODELS[kind], layout)
    return policy, micro_batches, coupled_gate(micro_batches, len(batch.tokens), layout)


def gradients(policy: MegatronPolicy) -> Tensor:
    buffers = [b for chunk in policy.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
    return torch.cat([buffer.grad_data for buffer in buffers])


RECOMPUTED: dict[str, Any] = {
    "full": {"recompute": "full"},
    "selective": {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm", "moe"]},
}


def two_passes(kept: int, recompute: str) -> tuple[int, Tensor, list[float]]:
    """(forward passes of the model, gradients, norms of two steps), with routes that are not the router's own"""
    sections: dict[str, Any] = {"batch": {"kept_forwards": max(1, kept)}, "algorithm": {"routing_replay": "old"}}
    policy, micro_batches, gate = prepared(model=RECOMPUTED[recompute], **sections)
    assert policy._kept_forwards == max(1, kept)
    policy._kept_forwards = kept
    fill(policy, micro_batches, foreign_routes(len(make_batch().tokens)))
    passes: list[int] = []
    policy.models[0].register_forward_hook(lambda *_: passes.append(1))
    policy.accumulate(micro_batches, gate, TEMPERATURE)
    found = len(passes), gradients(policy)
    return *found, [policy.step(micro_batches, gate, TEMPERATURE).gradient_norm for _ in range(2)]


@pytest.mark.parametrize(("recompute", "wanted_passes"), [("full", {1: 5, 8: 3}), ("selective", {2: 4})])
def test_the_second_pass_goes_on_with_micro_batches_of_the_first(recompute: str, wanted_passes: dict[int, int]):
    ((more, wanted, wanted_norms),) = run_ranks(1, two_passes, 0, recompute)
    assert more == 6
    for kept, passes in wanted_passes.items():
        ((found, gradient, norms),) = run_ranks(1, two_passes, kept, recompute)
        assert found == passes
        assert torch.equal(gradient, wanted) and norms == wanted_norms


def fresh_steps(keep: bool, replay: str, recompute: str, reference: bool) -> tuple[list[int], list[Tensor], bool]:
    """(forward passes of log-probs and of the step on them, for two steps; old log-probs and gradients; whether
    activations are still there). A pass with reference weights comes before, as in training."""
    options = RECOMPUTED.get(recompute, {})
    sections: dict[str, Any] = {"batch": {"kept_forwards": 2}, "algorithm": {"routing_replay": replay}}
    policy, micro_batches, gate = prepared(model=options, **sections)
    routing: Any = {"none": "off", "old": "record", "rollout": "replay"}[replay]
    if replay == "rollout":
        fill(policy, micro_batches, foreign_routes(len(make_batch().tokens)))
    if reference:
        policy.keep_reference(None)
    passes: list[int] = []
    policy.models[0].register_forward_hook(lambda *_: passes.append(1))
    counts, found = [], []
    for _ in range(2):
        if replay == "old":
            policy.routing.clear()
        if reference:
            with policy.reference():
                theirs = policy.log_probs(micro_batches, TEMPERATURE)
            assert theirs is not None
            found.append(theirs.log_probs)
        scores = policy.log_probs(micro_batches, TEMPERATURE, routing=routing, keep=keep)
        assert scores is not None
        step = policy.step(micro_batches, gate, TEMPERATURE, log_probs=scores.log_probs)
        assert step.kept_forwards == (2 if keep else 0)
        counts.append(len(passes))
        found += [scores.log_probs, scores.entropy, gradients(policy).clone()]
    return counts, found, bool(policy.schedule._kept)


@pytest.mark.parametrize(
    ("replay", "recompute", "reference"),
    [
        ("none", "none", False),
        ("old", "none", True),
        ("old", "selective", False),
        ("rollout", "full", False),
    ],
)
def test_the_first_step_goes_on_from_the_old_log_probs(replay: str, recompute: str, reference: bool):
    ((counts, found, left),) = run_ranks(1, fresh_steps, True, replay, recompute, reference)
    ((more, wanted, _),) = run_ranks(1, fresh_steps, False, replay, recompute, reference)
    theirs = 3 * reference
    assert (counts, more, left) == ([4 + theirs, 8 + 2 * theirs], [6 + theirs, 12 + 2 * theirs], False)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def another_pass_between() -> tuple[list[int], bool]:
    """(forward passes before and after a step that another pass has come before, whether activations are left when
    memory has been released)"""
    policy, micro_batches, gate = prepared(batch={"kept_forwards": 2})
    passes: list[int] = []
    policy.models[0].register_forward_hook(lambda *_: passes.append(1))
    scores = policy.log_probs(micro_batches, TEMPERATURE, keep=True)
    assert scores is not None and policy.schedule._kept
    policy.log_probs(micro_batches[:1], TEMPERATURE)
    counts = [len(passes)]
    policy.accumulate(micro_batches, gate, TEMPERATURE, log_probs=scores.log_probs)
    counts.append(len(passes))
    policy.log_probs(micro_batches, TEMPERATURE, keep=True)
    policy.release_memory()
    return counts, bool(policy.schedule._kept)


def test_nothing_is_kept_beyond_the_next_pass():
    assert run_ranks(1, another_pass_between) == [([4, 7], False)]


def balanced() -> int:
    policy, _, _ = prepared(model={"router_aux_loss": 0.1})
    return policy._kept_forwards


def test_no_pass_is_kept_where_it_would_count_the_load_of_experts():
    assert run_ranks(1, balanced) == [0]


def not_finite(value: float, dtype: str) -> tuple[str, bool, float, str]:
    """(what a step raised after one rank's gradient had gone wrong, whether the weights are untouched, the
    learning rate of the next step, the parameter)"""
    policy, micro_batches, gate = prepared(
        "dense", parallel={"data": 2}, model={"dtype": dtype}, optimizer={"warmup_steps": 4}, trainer={"steps": 100}
    )
    name, parameter = list(policy.models[0].named_parameters())[3]
    handle = parameter.register_hook(lambda gradient: gradient + value * policy.layout.rank)
    before = [weight.detach().clone() for weight in policy.models[0].parameters()]
    try:
        policy.step(micro_batches, gate, TEMPERATURE)
        raised = "nothing"
    except FloatingPointError as error:
        raised = str(error)
    same = all(torch.equal(a, b) for a, b in zip(before, policy.models[0].parameters(), strict=True))
    handle.remove()
    learning_rate = policy.step(micro_batches, gate, TEMPERATURE).learning_rate
    return raised, same, learning_rate, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_moves_nothing(dtype: str):
    for raised, same, learning_rate, name in run_ranks(2, not_finite, float("nan"), dtype):
        assert raised.startswith("the optimizer step (weights unchanged) failed on rank ")
        assert f"the gradient of {name} is not finite" in raised
        assert same and learning_rate == pytest.approx(1e-2 / 4), "the schedule has not moved either"


def test_a_norm_that_overflows_moves_nothing():
    for raised, same, _, _ in run_ranks(2, not_finite, 1e30, "float32"):
        assert "the norm of the gradient is inf: its elements are finite, but their squares overflow" in raised
        assert same


def largest_temporary(value: float) -> tuple[int, int, str]:
    """(bytes of the largest tensor that the check of the gradients makes, bytes of the gradients, what it raised)"""
    build.PIECE = 256
    policy, micro_batches, gate = prepared("dense")
    policy.accumulate(micro_batches, gate, TEMPERATURE)
    policy.models[0].output_layer.weight.main_grad[-1, -1] += value
    with Fresh() as fresh:
        norm = policy.optimizer.begin_step()
        try:
            policy._require_finite(None, norm)
            raised = "nothing"
        except FloatingPointError as error:
            raised = str(error)
    return fresh.bytes, gradients(policy).nbytes, raised


@pytest.mark.parametrize(("value", "wanted"), [(0.0, "nothing"), (float("inf"), "output_layer.weight is not finite")])
def test_the_check_of_the_gradients_takes_no_memory(value: float, wanted: str):
    """Finding the culprit makes temporaries of a piece; that all is well is seen from the norm."""
    ((largest, whole, raised),) = run_ranks(1, largest_temporary, value)
    assert wanted in raised
    assert largest <= 4 * 256 < whole / 100
