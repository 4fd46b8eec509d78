"""The chunked log-probs on a real GPU against float64: values, gradients, and what is added to the main gradient."""

import pytest
import torch

from fiberpo_megatron.mcore.log_probs import VocabShard, response_log_probs
from fiberpo_megatron.mcore.weight_gradient import MainGradient

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

TOKENS, HIDDEN, VOCABULARY, RESPONSES = 2048, 1024, 32003, 1500
ALONE = VocabShard(start=0, group=None, size=1)
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-9}
"""Half a unit in the last place, relative."""


@pytest.mark.parametrize("entropy", [False, True], ids=["log-probs", "entropy too"])
@pytest.mark.parametrize("chunk", [256, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype, chunk: int, entropy: bool) -> None:
    """The factors are rounded once, to `dtype`; logits and their gradient are rounded to it on the way."""
    draw = torch.Generator("cuda").manual_seed(0)
    states = torch.randn(TOKENS, 1, HIDDEN, generator=draw, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=draw, device="cuda") * 0.06).to(dtype).requires_grad_()
    positions = torch.randperm(TOKENS, generator=draw, device="cuda")[:RESPONSES].to(torch.int32)
    labels = torch.randint(VOCABULARY, (RESPONSES,), generator=draw, device="cuda", dtype=torch.int32)
    slope = torch.randn(RESPONSES, generator=draw, device="cuda")
    bonus = 0.1 * torch.randn(RESPONSES, generator=draw, device="cuda")
    weight.main_grad = torch.full((VOCABULARY, HIDDEN), 0.5, device="cuda")  # type: ignore[attr-defined]
    found, found_entropy = response_log_probs(
        states,
        weight,
        labels,
        positions,
        temperature=0.8,
        shard=ALONE,
        chunk=chunk,
        main_gradient=MainGradient(weight, VOCABULARY, only_use=True),
    )
    loss = -(slope * found).sum() - ((bonus * found_entropy).sum() if entropy else 0.0)
    loss.backward()
    assert weight.grad_added_to_main_grad and weight.grad.abs().sum() == 0  # type: ignore[attr-defined, union-attr]

    exact_states, exact_weight = (x.detach().double().requires_grad_() for x in (states, weight))
    log_probs = (exact_states[positions.long(), 0] @ exact_weight.t() / 0.8).log_softmax(-1)
    wanted = log_probs.gather(1, labels.long()[:, None])[:, 0]
    wanted_entropy = -(log_probs.exp() * log_probs).sum(-1)
    exact = -(slope * wanted).sum() - ((bonus * wanted_entropy).sum() if entropy else 0.0)
    exact.backward()
    assert found.dtype is found_entropy.dtype is torch.float32
    largest = 12 / 0.8  # logits are normal with deviation 1.9; none of them is beyond
    unit = ROUNDING[dtype]
    # a float32 product of HIDDEN terms is rounded HIDDEN times at worst, and the square root of that as a rule
    of_logits = largest * (unit + 2**-24 * HIDDEN**0.5)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2 * of_logits)
    torch.testing.assert_close(found_entropy.double(), wanted_entropy, rtol=0, atol=2 * of_logits)
    for name, one, other in (
        ("states", states.grad, exact_states.grad),
        ("weight", weight.main_grad - 0.5, exact_weight.grad),  # type: ignore[attr-defined]
    ):
        assert one is not None and other is not None
        error = float((one.double() - other).norm() / other.norm())
        print(f"{name}: relative error {error:.1e}, {dtype}, chunks of {chunk}")
        # in norm: errors of logits cancel, their gradient is rounded, and so is the result; 1 to 1.5 units were seen
        assert error < 4 * (unit + 2**-24 * HIDDEN**0.5), name
