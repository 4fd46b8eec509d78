"""Sums that are integers: their error, their ranges, and what happens beyond them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fiberpo_megatron.fibration import build_objective, exact, slices
from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.objective import Objective
from fiberpo_megatron.fibration.rule import Chunk, GatedChunk, Gating
from fiberpo_megatron.fibration.runs import RunSlice
from tests.fibration.oracle import random_case
from tests.fibration.ranks import run_ranks

RANGES = (exact.WEIGHT, exact.COUNT, exact.Range.covering(20.0), exact.Range.covering(1e3 * math.exp(20.0)))


def node_sums(values: list[Tensor | None], ids: Tensor, share: Tensor | None, *, soft: bool = True) -> Tensor:
    """The sums [C, nodes, P] of token values over nodes, in one chunk."""
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (ids.diff() != 0).nonzero().squeeze(1) + 1])
    lengths = torch.diff(starts, append=torch.tensor([ids.shape[0]]))
    nodes, partitions = int(ids.max()) + 1, 1 if share is None else share.shape[1]
    held = NodeMap((("trajectory",),), {"trajectory": nodes}, None, ids[starts], share, soft, partitions, {})
    limbs = exact.Limbs(RANGES[: len(values)], (nodes, partitions), torch.device("cpu"))
    held.sum_into(limbs, values, slice(0, ids.shape[0]), RunSlice(ids.shape[0], lengths, 0, starts.shape[0]))
    assert not bool(limbs.overflow)
    return exact.decode(limbs.to_send(), limbs.ranges)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [3, 100])
@pytest.mark.parametrize("membership", ["none", "soft", "slots", "hard"])
def test_the_error_is_below_1e_11_of_the_absolute_terms(dtype: torch.dtype, length: int, membership: str) -> None:
    """Weights from 1e-9 to 1, log ratios up to 80 and adjoint terms up to 1e3 e^20 beside tiny ones."""
    draw = torch.Generator().manual_seed(length)
    size = 12 * length
    uniform = torch.rand(5, size, generator=draw, dtype=torch.float64)
    mu = (10.0 ** (-9.0 * uniform[0])).to(dtype)
    x = (80.0 * 10.0 ** (-7.0 * uniform[1])).to(dtype)
    terms = mu * (1e3 * 10.0 ** (-6.0 * uniform[2]) * (20.0 * (2.0 * uniform[3] - 1.0)).exp()).to(dtype)
    terms[::2] *= -1.0
    ids = torch.arange(12).repeat_interleave(length)
    share = None
    if membership != "none":
        share = torch.randint(0, 9, (size, 3), generator=draw).double() + torch.tensor([1.0, 0.0, 0.0])
        share = (share / share.sum(1, keepdim=True)).to(dtype)
    if membership == "slots":  # 8 slots a token: shares that need no second part
        share = torch.nn.functional.one_hot(torch.randint(0, 3, (size, 8), generator=draw), 3).sum(1).to(dtype) / 8
    values: list[Tensor | None] = [mu, None, mu * x, terms]
    found = node_sums(values, ids, share, soft=membership != "hard")
    kernel = torch.ones(size, 1) if share is None else share
    if membership == "hard":
        kernel = torch.nn.functional.one_hot(share.argmax(1), 3)
    rows = [[1.0] * size if value is None else value.tolist() for value in values]
    for row, value in enumerate(rows):
        for p in range(kernel.shape[1]):
            for node in range(12):
                at = range(node * length, (node + 1) * length)
                products = [Fraction(value[i]) * Fraction(float(kernel[i, p])) for i in at]
                error = abs(Fraction(float(found[row, node, p])) - sum(products))
                assert error <= Fraction(1e-11) * sum(map(abs, products))


@pytest.mark.parametrize("membership", ["none", "soft", "slots", "hard"])
def test_long_runs_and_single_tokens_give_the_same_bits(membership: str) -> None:
    """Tokens of long runs are added and given node values by blocks, shuffled ones each on its own."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.arange(9).repeat_interleave(torch.tensor([1, 63, 64, 65, 130, 257, 2, 300, 191]))
    size, partitions = ids.shape[0], 1 if membership == "none" else 8
    x = 10.0 ** (-7.0 * torch.rand(size, generator=draw)) * torch.randn(size, generator=draw)
    x[::5], x[1::50] = 0.0, 1e-42  # zeros, and numbers below the normal ones
    share = None
    if membership != "none":
        share = torch.softmax(torch.randn(size, partitions, generator=draw), 1)
    if membership == "slots":
        share = torch.nn.functional.one_hot(torch.randint(0, 8, (size, 8), generator=draw), 8).sum(1).float() / 8
    table = torch.randn(2, 9, partitions, generator=draw)

    def found(order: Tensor) -> tuple[Tensor, Tensor, RunSlice]:
        values: list[Tensor | None] = [x.abs()[order], None, x[order], -0.0 * x[order]]
        own = None if share is None else share[order]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), (ids[order].diff() != 0).nonzero().squeeze(1) + 1])
        lengths = torch.diff(starts, append=torch.tensor([size]))
        nodes, runs = ids[order][starts], RunSlice(size, lengths, 0, starts.shape[0])
        held = NodeMap((("trajectory",),), {"trajectory": 9}, None, nodes, own, membership != "hard", partitions, {})
        sums = node_sums(values, ids[order], own, soft=membership != "hard")
        return sums, torch.stack(held.gather(table, slice(0, size), runs)), runs

    order = torch.randperm(size, generator=draw)
    sums, given, runs = found(torch.arange(size))
    shuffled, given_shuffled, single = found(order)
    assert runs.long_on_cpu and not single.long_on_cpu
    assert torch.equal(sums, shuffled)
    assert torch.equal(given[:, order], given_shuffled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 3.0, 30.0])
def test_slices_have_few_bits_and_add_up_to_the_rounded_values(dtype: torch.dtype, spread: float) -> None:
    draw = torch.Generator().manual_seed(5)
    values = (torch.randn(200, generator=draw) * 10.0 ** (-spread * torch.rand(200, generator=draw))).to(dtype)
    values[::7] = 0.0
    unit, bits = -90, 20
    cut = slices.cut(values, unit, 1e3, bits)
    assert cut is not None
    parts = torch.empty(len(cut.units), 200, dtype=torch.float64)
    cut.write(parts)
    for part, own in zip(parts.tolist(), cut.units, strict=True):
        units = [Fraction(value) / Fraction(2) ** own for value in part]
        assert all(it.denominator == 1 and abs(it) <= 1 << bits for it in units)
    for value, column in zip(values.tolist(), parts.t().tolist(), strict=True):
        assert sum(map(Fraction, column)) == round(Fraction(value) / Fraction(2) ** unit) * Fraction(2) ** unit
    assert slices.cut(values, unit, float(values.abs().max()), bits) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), max_size=30), st.randoms(use_true_random=False))
def test_sums_by_index_do_not_depend_on_the_order(values: list[float], random) -> None:
    """They are the exact sums, rounded within two units in the last place, of terms rounded to the range's unit."""
    it = exact.Range.covering(1e6)
    index = [random.randrange(3) for _ in values]
    found = exact.sum_by_index(torch.tensor([values], dtype=torch.float64), torch.tensor(index).long(), 3, (it,))
    shuffled = list(zip(values, index, strict=True))
    random.shuffle(shuffled)
    again = torch.tensor([[value for value, _ in shuffled]], dtype=torch.float64)
    assert torch.equal(found, exact.sum_by_index(again, torch.tensor([at for _, at in shuffled]).long(), 3, (it,)))
    unit = Fraction(2) ** it.unit
    for node in range(3):
        true = sum(round(Fraction(value) / unit) * unit for value, at in zip(values, index, strict=True) if at == node)
        assert abs(Fraction(float(found[0, node])) - true) <= 2 * Fraction(math.ulp(float(true)))


def test_limbs_of_many_ranks_add_up_exactly() -> None:
    """8,192 times the largest lower limb is below 2^53, and negative sums carry through all limbs."""
    it = exact.Range.covering(1.0)
    assert 8192 * exact.MASK < 1 << 53
    limbs = exact.Limbs((it,), (2,), torch.device("cpu"))
    limbs.add(0, torch.tensor([0, 1]), torch.tensor([-(2.0**it.unit), 1.0], dtype=torch.float64))
    sent = limbs.to_send()
    assert bool((sent[1:] >= 0).all())
    found = exact.decode(sent * 8192, (it,))
    assert found.tolist() == [[-8192 * 2.0**it.unit, 8192.0]]


def test_totals_are_exact() -> None:
    it = exact.Range.covering(1e3)
    totals = exact.Totals((it,), torch.device("cpu"))
    values = torch.tensor([1e3, 1e-20, -1e3, 3e-9], dtype=torch.float64)
    totals.add(0, values)
    unit = Fraction(2) ** it.unit
    true = float(sum(round(Fraction(value) / unit) * unit for value in values.tolist()))
    assert totals.values(0) == true == exact.decode_totals(totals.to_send(), (it,))[0]


def test_totals_of_float32_are_exact() -> None:
    """Zeros of both signs and numbers below the normal ones are no reason to stop after one slice."""
    it = exact.Range.covering(1e3, -160)
    for values in ([1.0, 2.0**-20, 0.0, -0.0, -3.0], [1e3, 1e-42, 0.0, -1e3], [7.0, 2.0**-60, -7.0], [0.0, -0.0], []):
        totals = exact.Totals((it,), torch.device("cpu"))
        terms = torch.tensor(values)
        totals.add(0, terms)
        assert totals.values(0) == float(sum(Fraction(value) for value in terms.tolist()))


@dataclass(frozen=True)
class Huge(Objective):
    """Sums a term of its own, which one token can make as large as it likes."""

    factor: float = 1.0
    base_keys = ("trajectory",)
    node_terms = 1

    def terms(self, chunk: Chunk) -> tuple[Tensor | None, ...]:
        return (chunk.log_ratio * self.factor,)

    def prepare(self, nodes, sums, parents, like) -> Gating:
        return _Plain()


class _Plain(Gating):
    node_values = torch.zeros(0, 1, 1)

    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        return GatedChunk(chunk.ratio, chunk.weights * chunk.advantages * chunk.ratio)


@pytest.mark.parametrize("factor", [1e40, math.inf])
def test_a_sum_beyond_its_range_raises_on_every_rank(factor: float) -> None:
    """Only rank 0 holds such a term: log ratios of the other are zero."""
    case = random_case(1, trajectories=4)
    half = case.x.shape[0] // 2
    case.x[half:] = 0.0
    case.x[:half] += 0.1
    parts = [torch.arange(half), torch.arange(half, case.x.shape[0])]
    objective = Huge(factor=1.0)
    run_ranks(objective, case, parts)
    object.__setattr__(objective, "factor", factor)  # the constructor refuses infinity
    errors = []
    for rank in range(2):
        swapped = parts if rank == 0 else parts[::-1]
        with pytest.raises(ValueError, match="is beyond what it can hold or not finite") as caught:
            run_ranks(objective, case, swapped)
        errors.append(str(caught.value))
    assert "'Huge'" in errors[0] and errors[0] == errors[1]


@pytest.mark.parametrize("metrics", [True, False])
def test_a_value_beyond_its_range_is_no_silent_number(metrics: bool) -> None:
    """J and the sums of the metrics are held in ranges as well."""
    case = random_case(1, trajectories=4)
    case.advantages = case.advantages + 1e60
    with pytest.raises(ValueError, match="is beyond what it can hold or not finite"):
        case.call(build_objective("reinforce"), metrics=metrics)
    with pytest.raises(ValueError, match="is beyond what it can hold or not finite"):
        parts = [torch.arange(3), torch.arange(3, case.x.shape[0])]
        run_ranks(build_objective("reinforce"), case, parts, metrics=metrics)


def test_weights_beyond_the_range_are_named() -> None:
    case = random_case(1, trajectories=4)
    case.weights = case.weights * 1e12
    with pytest.raises(ValueError, match=r"check the weights \(mu is at most 1"):
        case.call(build_objective("fiberpo"))
