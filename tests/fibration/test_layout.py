"""The same bits for any cut over ranks and any order of tokens, with two reductions of node sums."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fiberpo_megatron.fibration import ObjectiveOutput, build_objective, exact
from fiberpo_megatron.fibration.runs import RunSlice
from tests.fibration.oracle import Case, random_case
from tests.fibration.ranks import Collective, joined, run_ranks
from tests.fibration.registered import NAMES, tight

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def cut(case: Case, ranks: int, seed: int, *, trajectories_whole: bool) -> list[Tensor]:
    """Token indices per rank: by trajectory (data parallel) or token by token (context parallel)."""
    draw = torch.Generator().manual_seed(seed)
    owner_of = torch.randint(0, ranks, (1 + int(case.ids["trajectory"].max()),), generator=draw)
    owner = owner_of[case.ids["trajectory"]]
    if not trajectories_whole:
        owner = torch.randint(0, ranks, case.x.shape, generator=draw)
    return [(owner == rank).nonzero().squeeze(1) for rank in range(ranks)]


def counts_of(case: Case) -> dict[str, int]:
    return {key: int(ids.max()) + 1 for key, ids in case.ids.items()}


@pytest.mark.parametrize("given_counts", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_any_cut_gives_the_same_coefficients(name: str, whole: bool, given_counts: bool) -> None:
    case = random_case(1, trajectories=9)
    objective = tight(name)
    alone = case.call(objective)
    parts = cut(case, 4, seed=3, trajectories_whole=whole)
    outputs, collective = run_ranks(
        objective, case, parts, in_place=whole, counts=counts_of(case) if given_counts else None
    )
    assert collective.calls == [2] * 4
    assert_same_bits(alone, outputs, parts)
    assert sum(float(out.value) for out in outputs) == pytest.approx(float(alone.value), rel=1e-10, abs=1e-14)


def assert_same_bits(alone: ObjectiveOutput, outputs: Sequence[ObjectiveOutput], parts: Sequence[Tensor]) -> None:
    for name in ("gradient", "gated_ratio"):
        assert torch.equal(joined(outputs, parts, name), getattr(alone, name)), name
    for out in outputs:
        assert out.metrics == alone.metrics


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.sampled_from(NAMES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_random_cuts(seed: int, ranks: int, name: str, soft: bool, whole: bool, dtype: torch.dtype) -> None:
    """Cuts, orders of tokens, and repeated calls; trajectories are long or short, weights differ by nine orders."""
    case = random_case(seed, longest=200 if seed % 3 == 0 else 7)
    draw = torch.Generator().manual_seed(seed)
    spread = 10.0 ** (-9.0 * torch.rand(case.x.shape, generator=draw, dtype=torch.float64))
    case.weights = case.weights * spread
    if seed % 4:  # routed slots, of all tokens or of half of them, so that ranks may cut shares differently
        slots = torch.randint(0, case.share.shape[1], (case.x.shape[0], 4), generator=draw)
        by_slots = torch.nn.functional.one_hot(slots, case.share.shape[1]).sum(1).double() / 4
        half = (torch.arange(case.x.shape[0]) < case.x.shape[0] // 2).unsqueeze(1)
        case.share = by_slots if seed % 4 == 1 else torch.where(half, by_slots, case.share)
    for field in ("x", "advantages", "weights", "share", "old"):
        setattr(case, field, getattr(case, field).to(dtype))
    objective = tight(name, soft=soft)
    alone = case.call(objective)
    order = torch.randperm(case.x.shape[0], generator=draw)
    assert_same_bits(alone, [case.call(objective, order)], [order])
    parts = cut(case, ranks, seed + 1, trajectories_whole=whole)
    outputs, _ = run_ranks(objective, case, parts, counts=counts_of(case))
    assert_same_bits(alone, outputs, parts)
    again, _ = run_ranks(objective, case, parts, counts=counts_of(case))
    assert [float(out.value) for out in again] == [float(out.value) for out in outputs]


def test_a_sum_in_float64_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of bits sees a reduction that adds floats in the order of the tokens."""

    def in_order(limbs: exact.Limbs, row: int, index: Tensor, values: Tensor) -> None:
        table = limbs.rows(row)[0]
        floats = limbs.__dict__.setdefault("floats", {}).setdefault(row, torch.zeros(table.shape, dtype=torch.float64))
        floats.index_add_(0, index, values)

    def runs_in_order(limbs: exact.Limbs, row: int, index: Tensor, values: Tensor, runs: RunSlice) -> None:
        in_order(limbs, row, index, runs.float_sums(values).unsqueeze(1))

    def send(limbs: exact.Limbs) -> Tensor:
        for row, floats in limbs.__dict__.get("floats", {}).items():
            limbs._add(row, torch.arange(floats.shape[0]), floats)
        return whole(limbs)

    whole = exact.Limbs.to_send
    monkeypatch.setattr(exact.Limbs, "add", in_order)
    monkeypatch.setattr(exact.Limbs, "add_runs", runs_in_order)
    monkeypatch.setattr(exact.Limbs, "to_send", send)
    different = 0
    for seed in range(5):
        case = random_case(seed, trajectories=9, longest=200)
        order = torch.randperm(case.x.shape[0], generator=torch.Generator().manual_seed(1))
        straight, shuffled = case.call(tight("fiberpo-domain")), case.call(tight("fiberpo-domain"), order)
        different += not torch.equal(shuffled.gradient, straight.gradient[order])
    assert different


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_rank_and_a_rank_without_some_node(name: str) -> None:
    case = random_case(2)
    first = (case.ids["trajectory"] == 0).nonzero().squeeze(1)
    rest = (case.ids["trajectory"] != 0).nonzero().squeeze(1)
    parts = [torch.zeros(0, dtype=torch.long), first, rest, torch.zeros(0, dtype=torch.long)]
    objective = tight(name)
    outputs, collective = run_ranks(objective, case, parts)
    alone = case.call(objective)
    assert collective.calls == [2] * 4
    assert outputs[0].gradient.shape == (0,) and float(outputs[0].value) == 0.0
    assert_same_bits(alone, outputs, parts)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_anywhere(name: str) -> None:
    case = random_case(2)
    empty = torch.zeros(0, dtype=torch.long)
    outputs, _ = run_ranks(tight(name), case, [empty, empty], counts=counts_of(case))
    assert all(value == value for value in outputs[0].metrics.as_dict().values())
    assert case.call(tight(name), empty).gradient.shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_calls_without_metrics(name: str) -> None:
    """Two reductions for objectives with aggregates, one where no gradient passes through them, else none."""
    case = random_case(4)
    parts = cut(case, 2, 0, trajectories_whole=True)
    outputs, collective = run_ranks(tight(name), case, parts, metrics=False)
    objective = tight(name)
    assert collective.calls == [(objective.node_terms > 0) + (objective.adjoint_terms > 0)] * 2
    assert outputs[0].metrics is None
    assert torch.equal(joined(outputs, parts, "gradient"), case.call(tight(name)).gradient)


def production_case(tokens: int) -> Case:
    """1,024 trajectories, 64 groups, 6 domains, 8 partitions."""
    trajectory = torch.arange(tokens) * 1024 // tokens
    share = torch.full((tokens, 8), 1 / 8, dtype=torch.float64)
    group = trajectory // 16
    first = torch.cat([torch.ones(1, dtype=torch.bool), trajectory[1:] != trajectory[:-1]])
    state = torch.where(first, group, -1)  # what `apc` sends grows with the states that were sampled repeatedly
    return Case(
        torch.zeros(tokens, dtype=torch.float64),
        torch.ones(tokens, dtype=torch.float64),
        torch.full((tokens,), 1 / tokens, dtype=torch.float64),
        {"turn": trajectory, "trajectory": trajectory, "prompt_group": group, "domain": group % 6, "state": state},
        share,
        old=torch.full((tokens,), -1.0, dtype=torch.float64),
    )


@pytest.mark.parametrize("given_counts", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_traffic(name: str, given_counts: bool) -> None:
    """Under 2 MB per call, whatever the number of tokens."""
    traffic = []
    for tokens in (2048, 8192):
        case = production_case(tokens)
        collective = Collective(1)
        case.call(
            build_objective(name),
            reduce=collective.reduce_of(0),
            counts=counts_of(case) if given_counts else None,
        )
        assert len(collective.sizes) == 2
        traffic.append(sum(collective.sizes))
    assert traffic[0] == traffic[1] < 2_000_000


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_tokens_does_not_matter(name: str) -> None:
    case = random_case(8, trajectories=9)
    order = torch.randperm(case.x.shape[0], generator=torch.Generator().manual_seed(1))
    straight, shuffled = case.call(tight(name)), case.call(tight(name), order)
    assert_same_bits(straight, [shuffled], [order])


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_of_whole_trajectories(name: str) -> None:
    """Their calls add up to one call, without a reduction, exactly where the objective says so."""
    case = random_case(9, trajectories=9)
    objective = tight(name)
    parts = cut(case, 3, 2, trajectories_whole=True)
    outputs = [case.call(objective, part, metrics=False) for part in parts]
    alone = case.call(objective).gradient
    apart = joined(outputs, parts, "gradient")
    assert torch.allclose(apart, alone, rtol=1e-10, atol=1e-15) is not objective.spans_micro_batches


def test_nesting_violated_across_ranks_is_seen_by_all() -> None:
    """Each rank's ids nest, together they do not: every rank raises after the same reduction."""
    case = random_case(3)
    trajectory = case.ids["trajectory"]
    at = (trajectory == trajectory.bincount().argmax()).nonzero().squeeze(1)
    case.ids["prompt_group"] = case.ids["prompt_group"].clone()
    case.ids["prompt_group"][at[0]] = 1 + case.ids["prompt_group"].max()
    rest = torch.arange(case.x.shape[0])
    parts = [at[:1], rest[~torch.isin(rest, at[:1])]]
    objective = tight("fiberpo-domain")
    collective = Collective(2)
    messages = []
    for_rank = [collective.reduce_of(rank) for rank in range(2)]

    def call(rank: int) -> None:
        try:
            case.call(objective, parts[rank], reduce=for_rank[rank])
        except ValueError as error:
            messages.append(str(error))

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(messages) == 2 and messages[0] == messages[1]
    node = int(trajectory[at[0]])
    assert f"level 'trajectory' is not nested in level 'prompt_group': node (trajectory {node})" in messages[0]


def test_local_errors_come_before_the_first_reduction() -> None:
    case = random_case(3)
    case.weights[0] = -1.0
    collective = Collective(1)
    with pytest.raises(ValueError, match="negative"):
        case.call(tight("fiberpo-expert"), reduce=collective.reduce_of(0))
    assert collective.calls == [0]


def test_reduce_on_one_rank_changes_nothing() -> None:
    case = random_case(6)
    objective = tight("fiberpo-expert-global")
    alone, reduced = case.call(objective), case.call(objective, reduce=lambda tensor: tensor)
    assert torch.equal(alone.gradient, reduced.gradient)


@pytest.mark.parametrize("name", ["fiberpo-expert", "apc-trajectory"])
def test_sums_in_float64_are_a_choice(name: str) -> None:
    """They agree with exact ones within rounding, in any cut, and depend on the order of tokens."""
    case = random_case(1, trajectories=9, longest=200)
    exactly, rounded = tight(name), replace(tight(name), exact_sums=False)
    expected = case.call(exactly)
    parts = cut(case, 3, seed=3, trajectories_whole=False)
    outputs, _ = run_ranks(rounded, case, parts, counts=counts_of(case))
    torch.testing.assert_close(joined(outputs, parts, "gradient"), expected.gradient, rtol=1e-10, atol=1e-15)
    assert outputs[0].metrics.as_dict() == pytest.approx(expected.metrics.as_dict(), rel=1e-10, abs=1e-12)
    found = []
    for seed in range(6):
        order = torch.randperm(case.x.shape[0], generator=torch.Generator().manual_seed(seed))
        found.append(joined([case.call(rounded, order)], [order], "gradient"))
    assert not all(torch.equal(found[0], other) for other in found)
