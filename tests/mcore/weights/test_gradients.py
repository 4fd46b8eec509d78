"""Reading the gradients as global tensors leaves the model as it was: it goes on training."""

import torch

from fiberpo_megatron.certify.models import MODELS
from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.certify.training_step import TEMPERATURE, Case, _mini_batch, pieces
from fiberpo_megatron.types import Coefficients
from tools.layout_parity import make_problem


def twice(dtype: str, model: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], bool]:
    """Return the gradient of one pass, that of the same pass after it was read, and whether parameters are the same."""
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy
    from fiberpo_megatron.mcore.weights.global_tensors import gradient_shards, gradients_as_data

    case = Case(MODELS[model], ("grpo", {}), make_problem(0, 2), {}, 4096, dtype=dtype)
    config = case.config({})
    layout = start_layout(case.model, config.parallel, config.run)
    policy = build_policy(config, case.model, layout)
    batches = _mini_batch(case, layout, case.micro_batch_tokens).micro_batches
    before = {name: (id(one), one.dtype) for chunk in policy.models for name, one in chunk.named_parameters()}

    def gradient() -> dict[str, torch.Tensor]:
        policy.accumulate(batches, lambda now, _: Coefficients(torch.ones_like(now)), TEMPERATURE, single_pass=True)
        found = pieces(gradient_shards(policy.models))
        return {f"{key} {offset}": torch.from_numpy(values) for key, _, offset, values in found}

    first, second = gradient(), gradient()
    try:
        with gradients_as_data(policy.models):
            raise ValueError
    except ValueError:
        pass
    after = {name: (id(one), one.dtype) for chunk in policy.models for name, one in chunk.named_parameters()}
    return first, second, before == after


def check(model: str) -> None:
    ((first, second, same),) = run_ranks(1, twice, "bfloat16", model)
    assert same and first.keys() == second.keys() and len(first) > 30
    for name, gradient in first.items():
        assert bool(gradient.any()), name
        assert torch.equal(second[name], gradient), name


def test_a_pass_in_bfloat16_after_the_gradient_was_read_gives_it_again():
    """Float32 gradients as the data of bfloat16 parameters made torch drop the hooks that add to them."""
    check("dense")


def test_so_it_does_with_experts():
    check("moe")
