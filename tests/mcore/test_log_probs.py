"""The chunked log-prob function against torch's log_softmax, and its gradient against finite differences."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fiberpo_megatron.mcore import weight_gradient
from fiberpo_megatron.mcore.log_probs import VocabShard, response_log_probs
from fiberpo_megatron.mcore.weight_gradient import MainGradient, add_product

ALONE = VocabShard(start=0, group=None, size=1)


def inputs(
    rows: int = 11, hidden: int = 6, vocab: int = 9
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, 1, hidden, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([0, 2, 3, 7, 10])
    labels = torch.tensor([8, 0, 3, 3, 5])
    return states, weight, labels, positions


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_value_and_gradient(chunk: int, temperature: float):
    states, weight, labels, positions = inputs()
    weights = torch.linspace(-1, 2, 5, dtype=torch.float64)
    rows = (states[positions, 0] @ weight.t() / temperature).log_softmax(-1)
    wanted = rows[torch.arange(5), labels]
    wanted_gradient = torch.autograd.grad((weights * wanted).sum(), (states, weight))
    found, entropy = response_log_probs(
        states, weight, labels, positions, temperature=temperature, shard=ALONE, chunk=chunk
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, -(rows.exp() * rows).sum(-1), rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad((weights * found).sum(), (states, weight)), wanted_gradient):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_gradient_of_the_entropy(chunk: int, temperature: float):
    """Beside that of the log-probs, and alone, against torch's log_softmax."""
    states, weight, labels, positions = inputs()
    weights, bonus = torch.linspace(-1, 2, 5, dtype=torch.float64), torch.linspace(0.5, -1, 5, dtype=torch.float64)
    rows = (states[positions, 0] @ weight.t() / temperature).log_softmax(-1)
    log_probs, entropies = rows[torch.arange(5), labels], -(rows.exp() * rows).sum(-1)
    found, entropy = response_log_probs(
        states, weight, labels, positions, temperature=temperature, shard=ALONE, chunk=chunk
    )
    for scale in (1.0, 0.0):
        value = (bonus * entropy).sum() + (scale * (weights * found).sum() if scale else 0.0)
        wanted = (bonus * entropies).sum() + scale * (weights * log_probs).sum()
        both = (torch.autograd.grad(it, (states, weight), retain_graph=True) for it in (value, wanted))
        for one, other in zip(*both):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences():
    states, weight, labels, positions = inputs(rows=11)

    def scores(states: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return response_log_probs(states, weight, labels, positions, temperature=0.8, shard=ALONE, chunk=3)

    assert torch.autograd.gradcheck(scores, (states, weight))


def test_no_response_token_still_has_a_gradient():
    states, weight, _, _ = inputs()
    none = torch.empty(0, dtype=torch.int64)
    found, entropy = response_log_probs(states, weight, none, none, temperature=1.0, shard=ALONE, chunk=4)
    assert found.shape == entropy.shape == (0,)
    for gradient in torch.autograd.grad(found.sum(), (states, weight)):
        assert gradient.abs().sum() == 0


def test_large_logits_do_not_overflow():
    states, weight, labels, positions = inputs()
    found, entropy = response_log_probs(
        1e4 * states.float(), weight.float(), labels, positions, temperature=1.0, shard=ALONE, chunk=2
    )
    assert found.isfinite().all() and entropy.isfinite().all()


def test_bfloat16_comes_back_as_float32():
    states, weight, labels, positions = inputs()
    found, _ = response_log_probs(
        states.bfloat16(), weight.bfloat16(), labels, positions, temperature=1.0, shard=ALONE, chunk=2
    )
    assert found.dtype is torch.float32


class Fresh(TorchDispatchMode):
    """Bytes of the largest storage that an operation makes, in the forward or in the backward pass; views, and what is
    written in place, do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {v.untyped_storage()._cdata for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in given:
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("bonus", [False, True], ids=["log-probs", "entropy too"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_of_logits(dtype: torch.dtype, bonus: bool):
    """Forward and backward: not [tokens, vocabulary] in float32, nor in the model's type."""
    tokens, hidden, vocabulary, chunk = 512, 4, 1000, 32
    for size, wanted in ((chunk, chunk), (tokens, tokens)):
        states = torch.randn(tokens, 1, hidden).to(dtype).requires_grad_()
        weight = torch.randn(vocabulary, hidden).to(dtype).requires_grad_()
        labels = torch.randint(vocabulary, (tokens,))
        with Fresh() as largest:
            found, entropy = response_log_probs(
                states, weight, labels, torch.arange(tokens), temperature=1.0, shard=ALONE, chunk=size
            )
            value = found.sum() + entropy.sum() if bonus else found.sum()
            value.backward()
        assert states.grad is not None and weight.grad is not None
        assert largest.bytes == 4 * wanted * vocabulary


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("chunk", "products"), [(5, 3), (3, 2 * 3 + 1), (1, 5 * 3 + 4)])
def test_the_last_chunk_is_computed_once(chunk: int, products: int):
    """Forward, and the backward pass's gradients of rows and weight: only earlier chunks are computed again."""
    states, weight, labels, positions = inputs()
    with Products() as found:
        log_probs, _ = response_log_probs(
            states, weight, labels, positions, temperature=0.8, shard=ALONE, chunk=chunk, entropy_values=False
        )
        log_probs.sum().backward()
    assert found.count == products


def test_the_entropy_has_its_gradient_without_its_value():
    found = []
    for values in (True, False):
        states, weight, labels, positions = inputs()
        log_probs, entropy = response_log_probs(
            states, weight, labels, positions, temperature=0.8, shard=ALONE, chunk=2, entropy_values=values
        )
        assert entropy.any() == values
        (log_probs.sum() + 0.3 * entropy.sum()).backward()
        found.append((states.grad, weight.grad))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_main_gradient_grows_without_a_tensor_of_its_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Two micro-batches are added to what is there; rows that pad the vocabulary are left alone."""
    monkeypatch.setattr(weight_gradient, "SLICE_BYTES", 4000)
    tokens, hidden, vocabulary, padding = 24, 200, 300, 4
    states = torch.randn(tokens, 1, hidden).to(dtype).requires_grad_()
    weight = torch.nn.Parameter((torch.randn(vocabulary + padding, hidden) / 8).to(dtype))
    labels, positions = torch.randint(vocabulary, (tokens,)), torch.arange(tokens)
    options: Any = {"temperature": 0.7, "shard": ALONE, "chunk": 10, "entropy_values": False}
    wanted, _ = response_log_probs(states, weight[:vocabulary], labels, positions, **options)
    wanted.sum().backward()
    assert weight.grad is not None
    expected, weight.grad = weight.grad.float(), None
    weight.main_grad = torch.ones(weight.shape)
    main = MainGradient(weight, vocabulary, only_use=True)
    with Fresh() as largest:
        for _ in range(2):
            found, _ = response_log_probs(states, weight[:vocabulary], labels, positions, main_gradient=main, **options)
            found.sum().backward()
    assert torch.equal(weight.main_grad[vocabulary:], torch.ones(padding, hidden)), "padding has no gradient"
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]  # that type's rounding of a gradient of order 1
    torch.testing.assert_close(weight.main_grad, 1 + 2 * expected, rtol=tolerance, atol=tolerance)
    assert largest.bytes < weight.main_grad[:vocabulary].nbytes, "nothing has the size of the float32 gradient"
    assert weight.grad is not None and weight.grad.untyped_storage().nbytes() <= 4, "Megatron's hook gets one element"


def test_apex_adds_inside_its_product(monkeypatch: pytest.MonkeyPatch):
    """Its kernel takes (input, gradient of the output, main gradient), and is for CUDA tensors alone."""

    class Apex:
        calls = 0

        @classmethod
        def wgrad_gemm_accum_fp32(cls, rows: torch.Tensor, gradient: torch.Tensor, total: torch.Tensor) -> None:
            cls.calls += 1
            total += gradient.float().t() @ rows.float()

    class OnDevice(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(weight_gradient, "fused_kernel", lambda: Apex)
    left, right = torch.randn(6, 9).bfloat16(), torch.randn(6, 4).bfloat16()
    total = torch.zeros(9, 4)
    add_product(total.as_subclass(OnDevice), left, right)
    assert Apex.calls == 1
    torch.testing.assert_close(total, left.float().t() @ right.float())
