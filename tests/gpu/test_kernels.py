"""The fused kernels at sizes that Triton's interpreter cannot run, on a real GPU.

The same cases as in the interpreter run on a GPU in `tests/fibration/test_kernels.py`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fiberpo_megatron.fibration import Objective, ObjectiveOutput
from tests.gpu.waits import counted_waits
from tests.variations import varied
from tools.bench_objective import WITH_BASELINE, Packed, make_packed, objective_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

DEVICE, TOKENS, FEW = "cuda", 1 << 20, 1 << 16
SPREAD = 0.3
"""Standard deviation of the log ratios: gates and clips are active for many tokens."""
FLOAT32 = 1e-5
"""Relative error of float32 kernels: some rounded operations of 6e-8 each, and an exponential of arguments up to 2."""
AT_A_KINK = 1e-4
"""Share of tokens whose result may jump, because rounding puts them on the other side of a clip or gate."""


@pytest.fixture(scope="module", autouse=True)
def _memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def drawn(name: str, tokens: int, dtype: torch.dtype = torch.float32) -> Packed:
    batch = make_packed(tokens, experts="expert" in name, scale=SPREAD, device=DEVICE)
    share = None if batch.share is None else batch.share.to(dtype)
    values = (x.to(dtype) for x in (batch.log_ratio, batch.advantages, batch.weights))
    return Packed(*values, batch.keys, share, batch.lengths)


def call(objective: Objective, batch: Packed, **options: Any) -> ObjectiveOutput:
    return objective(
        batch.log_ratio,
        batch.advantages,
        batch.weights,
        keys=batch.keys,
        expert_share=batch.share,
        counts={key: int(ids.max()) + 1 for key, ids in batch.keys.items()},
        **options,
    )


@pytest.mark.parametrize("name", WITH_BASELINE)
def test_float32_kernels_beside_float64_in_torch(name: str) -> None:
    batch = drawn(name, TOKENS)
    found = call(objective_of(name, kernels=True), batch)
    exact = Packed(
        *(x.double() for x in (batch.log_ratio, batch.advantages, batch.weights)),
        batch.keys,
        None if batch.share is None else batch.share.double(),
        batch.lengths,
    )
    wanted = call(objective_of(name, kernels=False), exact)
    for part in ("gated_ratio", "gradient"):
        one, other = getattr(found, part).double(), getattr(wanted, part)
        beyond = (one - other).abs() > FLOAT32 * (other.abs() + other.abs().mean())
        share = float(beyond.double().mean())
        print(f"{part}: {share:.1e} of the tokens differ by more than {FLOAT32}")
        assert share <= AT_A_KINK, part
    assert found.metrics is not None and wanted.metrics is not None
    assert found.metrics.value == pytest.approx(wanted.metrics.value, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", varied(WITH_BASELINE, ["fiberpo", "fiberpo-expert", "gspo", "ppo"]))
def test_kernels_beside_torch_in_the_same_type(name: str, dtype: torch.dtype) -> None:
    batch = drawn(name, FEW, dtype)
    found, wanted = (call(objective_of(name, kernels=kernels), batch) for kernels in (True, False))
    tolerance = FLOAT32 if dtype is torch.float32 else 1e-11
    for part in ("gated_ratio", "gradient"):
        one, other = getattr(found, part), getattr(wanted, part)
        assert one.dtype is other.dtype is dtype
        beyond = (one - other).abs() > tolerance * (other.abs() + other.abs().mean())
        assert float(beyond.double().mean()) <= AT_A_KINK, part


@pytest.mark.parametrize("name", WITH_BASELINE)
def test_bits_do_not_depend_on_the_order_of_tokens_or_on_the_call(name: str) -> None:
    batch, objective = drawn(name, FEW), objective_of(name, kernels=True)
    first, again = call(objective, batch), call(objective, batch)
    order = torch.randperm(len(batch.log_ratio), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    values = (x[order] for x in (batch.log_ratio, batch.advantages, batch.weights))
    keys = {key: ids[order] for key, ids in batch.keys.items()}
    mixed = call(objective, Packed(*values, keys, None if batch.share is None else batch.share[order], batch.lengths))
    for part in ("gated_ratio", "gradient"):
        assert torch.equal(getattr(again, part), getattr(first, part)), part
        assert torch.equal(getattr(mixed, part), getattr(first, part)[order]), part
    assert again.metrics == first.metrics and mixed.metrics == first.metrics


@pytest.mark.parametrize("metrics", [True, False])
@pytest.mark.parametrize("name", WITH_BASELINE)
def test_the_host_waits_at_most_twice(name: str, metrics: bool) -> None:
    batch, objective = drawn(name, 4096), objective_of(name, kernels=True)
    counts = {key: int(ids.max()) + 1 for key, ids in batch.keys.items()}

    def one_call() -> None:
        objective(
            batch.log_ratio,
            batch.advantages,
            batch.weights,
            keys=batch.keys,
            expert_share=batch.share,
            counts=counts,
            metrics=metrics,
        )

    one_call()  # compiles
    with counted_waits() as waits:
        one_call()
    assert 1 <= sum(waits.values()) <= 2, waits


def test_an_unset_choice_takes_the_kernels() -> None:
    batch = drawn("fiberpo", FEW)
    unset = objective_of("fiberpo", kernels=None)
    bits = call(replace(unset, kernels=True), batch).gradient
    assert torch.equal(call(unset, batch).gradient, bits)
