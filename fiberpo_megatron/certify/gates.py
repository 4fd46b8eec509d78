"""This module tries an objective on one batch in many orders, cuts and micro-batches, and demands equal bits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fiberpo_megatron.certify.checks import Check, Result, check_results
from fiberpo_megatron.certify.compare import difference
from fiberpo_megatron.certify.ranks import in_order, run_ranks
from fiberpo_megatron.fibration import Objective
from fiberpo_megatron.fibration.levels import TRAJECTORY_KEY
from fiberpo_megatron.trainer.step_file import Tokens

PART = "The gates alone, ranks as threads of one process"
SHARES = "The shares of J"
SHARE_TOLERANCE = 1e-9
"""The ranks' shares of J are float64 sums in the order of their tokens; the terms are in the dtype of the log ratio."""


def check_gates(objective: Objective, tokens: Tokens, subject: str, seed: int) -> Iterator[Check]:
    """Yield a check for each order, cut and size of micro-batches; the tokens in one call are the reference."""
    wanted = Result.of(tokens.call(objective))

    def check(what: str, found: Result) -> Check:
        return check_results(PART, what, subject, found, wanted)

    yield check("the same call again", Result.of(tokens.call(objective)))
    bare = tokens.call(objective, metrics=False)
    yield check("without metrics", Result.of(bare))
    for what, order in orders(tokens, seed):
        out = Result.of(tokens.take(order).call(objective))
        back = Result(in_order([out.gradient], [order]), in_order([out.gated_ratio], [order]), out.metrics)
        yield check(what, back)
    for what, parts in cuts(tokens, seed):
        yield check(what, cut_result(objective, tokens, parts, seed))
    if not objective.spans_micro_batches:
        for size in (1, 3, 16):
            yield check(
                f"micro-batches of {size} trajectories, without a reduction", _micro_batches(objective, tokens, size)
            )
    yield from _shares(objective, tokens, subject, seed)


def cut_result(objective: Objective, tokens: Tokens, parts: list[Tensor], seed: int) -> Result:
    """Return what the ranks give that hold `parts` of the tokens. Metrics are those of a rank whose differ, if any."""
    outs = run_ranks(objective, tokens, parts, seed=seed)
    metrics = [out.metrics.as_dict() for out in outs if out.metrics is not None]
    other = next((of_rank for of_rank in metrics if repr(of_rank) != repr(metrics[0])), metrics[0])
    return Result(
        in_order([out.gradient for out in outs], parts), in_order([out.gated_ratio for out in outs], parts), other
    )


def orders(tokens: Tokens, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield permutations of the tokens, which are on the host, with a name each."""
    size = len(tokens)
    generator = torch.Generator().manual_seed(seed)
    yield "tokens in reverse order", torch.arange(size).flip(0)
    yield "tokens sorted by log ratio", tokens.log_ratio.argsort(stable=True)
    if TRAJECTORY_KEY in tokens.keys:
        place = _places(tokens.keys[TRAJECTORY_KEY])
        yield "one token of each trajectory in turn", place.argsort(stable=True)
    for number in range(3):
        yield f"tokens in random order {number + 1}", torch.randperm(size, generator=generator)


def cuts(tokens: Tokens, seed: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the tokens of each rank, int64 [n] per rank, with a name for the cut. The tokens are on the host."""
    size = len(tokens)
    generator = torch.Generator().manual_seed(seed)
    if TRAJECTORY_KEY in tokens.keys:
        ids = tokens.keys[TRAJECTORY_KEY]
        count = int(ids.max()) + 1
        place, lengths = _places(ids), torch.bincount(ids, minlength=count)[ids]
        for ranks in (2, 3, 8):
            owner = torch.randint(ranks, (count,), generator=generator)[ids]
            yield f"{ranks} data-parallel ranks, whole trajectories", _parts(owner, ranks)
        for data, context in ((1, 2), (1, 4), (2, 2)):
            chunk = place * (2 * context) // lengths
            zigzag = torch.minimum(chunk, 2 * context - 1 - chunk)
            owner = torch.randint(data, (count,), generator=generator)[ids] * context + zigzag
            name = f"{data} data- x {context} context-parallel ranks, zigzag chunks"
            yield name, _parts(owner, data * context)
    for ranks in (5, 16):
        yield f"{ranks} ranks, tokens at random", _parts(torch.randint(ranks, (size,), generator=generator), ranks)
    nothing = torch.arange(0)
    yield "3 ranks, of which one holds all tokens", [nothing, torch.arange(size), nothing]


def _parts(owner: Tensor, ranks: int) -> list[Tensor]:
    return [(owner == rank).nonzero()[:, 0] for rank in range(ranks)]


def _places(ids: Tensor) -> Tensor:
    """The place of each token among those of equal id."""
    order = ids.argsort(stable=True)
    counts = torch.bincount(ids)
    starts = torch.cumsum(counts, 0) - counts
    places = torch.empty_like(ids)
    places[order] = torch.arange(len(ids)) - starts[ids[order]]
    return places


def _micro_batches(objective: Objective, tokens: Tokens, size: int) -> Result:
    """One call for every `size` trajectories, as the single-pass way makes them."""
    batch = tokens.keys[TRAJECTORY_KEY] // size if TRAJECTORY_KEY in tokens.keys else torch.zeros(len(tokens)).long()
    parts = [part for part in _parts(batch, int(batch.max()) + 1) if len(part)]
    outs = [tokens.take(part).call(objective, metrics=False) for part in parts]
    return Result(in_order([out.gradient for out in outs], parts), in_order([out.gated_ratio for out in outs], parts))


def _shares(objective: Objective, tokens: Tokens, subject: str, seed: int) -> Iterator[Check]:
    """The ranks' shares of J have equal bits where the cut is equal, and they sum to J."""
    what, parts = next(cuts(tokens, seed))
    first, second = (run_ranks(objective, tokens, parts, seed=seed + number) for number in range(2))
    values = [torch.stack([out.value for out in outs]) for outs in (first, second)]
    yield Check(SHARES, f"{what}, twice", subject, {"value": difference(values[1], values[0])})
    metrics = first[0].metrics
    assert metrics is not None, "the call was asked for metrics"
    # J may be small beside its terms, so that its rounding is compared with the sum of their absolute values
    ratio = in_order([out.gated_ratio for out in first], parts).double()
    terms = float((tokens.weights.double() * tokens.advantages.double()).abs() @ ratio)
    total = torch.tensor([float(values[0].sum()), terms], dtype=torch.float64)
    wanted = torch.tensor([metrics.value, terms], dtype=torch.float64)
    tolerance = SHARE_TOLERANCE if tokens.log_ratio.dtype == torch.float64 else 1e-6
    yield Check(SHARES, "the sum over ranks beside J", subject, {"value": difference(total, wanted)}, tolerance)
