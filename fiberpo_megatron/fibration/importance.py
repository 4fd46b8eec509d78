"""Weigh tokens that another distribution sampled than the one that the objective's ratio starts from.

A token i was sampled with probability mu_i, which its engine recorded; pi_old is the policy before the first optimiser
step, as the trainer computes it. y_i = log pi_old(a_i) - log mu_i holds staleness (older weights sampled the token) and
mismatch (engine and trainer compute the same weights differently). The weight w_i = F(y_i) multiplies the token's
weight in the objective, and not its advantage: it is a change of measure, after which every mean of the objective is
one under pi_old. `docs/rollouts.md` says what is exact in that, and what is a choice.

`token` is truncated importance sampling (Ionides 2008, Journal of Computational and Graphical Statistics 17(2),
equation 3), `icepop` the masking of Ring-1T (arXiv:2510.18855), the ratio of `sequence` that of GSPO (arXiv:2507.18071,
equation 7); `levels` is this project's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fiberpo_megatron.fibration.collective import Reduce, fused_sum
from fiberpo_megatron.fibration.exact import Limbs, Range
from fiberpo_megatron.fibration.levels import TRAJECTORY_KEY

METHODS = ("off", "token", "icepop", "sequence", "sequence-mask", "levels")
"""What `importance_weights` computes."""
VERSION_KEY = "version"
ENGINE_KEY = "engine"
LARGEST = 1e4
"""Nats below which |y| must be; beyond it a log-prob is broken."""
_Y = Range.covering(LARGEST, -80)
"""The range of sums of y. Its unit is 2^-91, of which every float32 number from 2^-68 on is a multiple."""
_NEEDS = {"sequence": (TRAJECTORY_KEY,), "sequence-mask": (TRAJECTORY_KEY,), "levels": (TRAJECTORY_KEY, VERSION_KEY)}


@dataclass(frozen=True)
class LevelBounds:
    """Holds the bounds of the method "levels", in nats per token. None takes log(cap) for a clip, log(high) for a
    mask."""

    token: float | None = None
    """Clip of a token's residual, y_i - m_tv."""
    trajectory: float | None = None
    """Clip of the residual of what one version sampled of a trajectory, m_tv - m_v."""
    version: float | None = None
    """Clip of a version's mean, m_v."""
    mask_trajectory: float | None = None
    """|m_tv - m_v| above which the node's tokens have weight 0."""
    mask_version: float | None = None
    """|m_v| above which the version's tokens have weight 0."""
    mask_engine: float | None = None
    """|m_e| above which the engine's tokens have weight 0; an engine's mean changes no weight otherwise."""


@dataclass(frozen=True)
class ImportanceWeights:
    """Holds the weights of this rank's tokens, and figures over all ranks."""

    weights: Tensor
    """float64 [n] w, 0 where a token is masked."""
    metrics: dict[str, float]
    """`importance/weight` (mean of w over all tokens), `importance/masked_share` (tokens with w = 0) and
    `importance/effective_sample_size` ((sum w)^2 / (n sum w^2), in 0..1); each also with /lag/NUMBER and /engine/NUMBER
    where the keys "version" and "engine" are there."""
    kept: Tensor | None
    """int64 [counts["trajectory"]] tokens with w > 0 of each trajectory, over all ranks; None without that key."""


def importance_weights(
    y: Tensor,
    method: str,
    *,
    cap: float = 2.0,
    low: float = 0.5,
    high: float = 5.0,
    keys: Mapping[str, Tensor] | None = None,
    counts: Mapping[str, int] | None = None,
    labels: Mapping[str, Tensor] | None = None,
    levels: LevelBounds | None = None,
    masked: Tensor | None = None,
    reduce: Reduce | None = None,
) -> ImportanceWeights:
    """Return the weight w of each token under pi_old.

        off            1
        token          min(e^y, cap)
        icepop         e^y where low <= e^y <= high, else 0
        sequence       min(e^m, cap) with m the mean of y over all tokens of the trajectory
        sequence-mask  1 where low <= e^m <= high, else 0
        levels         log w = clip(y - m_tv, +-a) + clip(m_tv - m_v, +-b) + clip(m_v, +-c), and 0 in masked nodes, with
                       m_tv the mean over the trajectory's tokens of one version and m_v that over the version

    Sums over tokens are exact (`fibration/exact.py`): in any order, and cut over any ranks, w has the same bits.

    Args:
        y: [n] log pi_old - log mu of this rank's tokens, in nats.
        method: one of `METHODS`.
        cap: largest weight, at least 1; `math.inf` for none.
        low, high: bounds of a ratio, around 1.
        keys: int64 [n] by name, dense ids of all ranks: "trajectory" for sequence, sequence-mask and levels, "version"
            for levels. "version" and "engine" give metrics too.
        counts: number of ids of each key over all ranks; needed with `reduce`.
        labels: int64 [counts[key]] of "version" its lag and of "engine" its number, by which metrics name an id; -1 is
            called "unknown". Without them the ids do.
        levels: bounds of "levels".
        masked: bool [n] tokens that get weight 0 whatever the method says; they stay in its means.
        reduce: sums a flat float64 tensor over the ranks. It is called once, and once more by the methods that have
            means.

    Raises ValueError, on every rank alike, for a method or bounds that do not exist, for missing keys, and where a
    value of y or a weight is not finite.
    """
    _check(method, cap, low, high)
    keys = {} if keys is None else {name: ids.to(y.device).long() for name, ids in keys.items()}
    for key in _NEEDS.get(method, ()):
        if key not in keys:
            raise ValueError(f"method {method!r} takes means by keys[{key!r}], which is missing; pass int64 [n] ids")
    sizes = {name: _size(name, ids, counts, shared=reduce is not None) for name, ids in keys.items()}
    y = y.detach().double()
    if method == "off":
        weights = torch.ones_like(y)
    elif method == "token":
        weights = y.exp().clamp(max=cap)
    elif method == "icepop":
        weights = y.exp().masked_fill(~_inside(y.exp(), low, high), 0.0)
    elif method == "levels":
        weights = _by_levels(y, keys, sizes, levels or LevelBounds(), cap, high, reduce)
    else:
        trajectory = keys[TRAJECTORY_KEY]
        (mean,) = _means(y, [(trajectory, sizes[TRAJECTORY_KEY])], reduce)
        ratio = mean[trajectory].exp()
        weights = ratio.clamp(max=cap) if method == "sequence" else _inside(ratio, low, high).double()
    if masked is not None:
        weights = weights.masked_fill(masked.to(y.device), 0.0)
    return _with_metrics(weights, y, keys, sizes, labels or {}, reduce)


def _check(method: str, cap: float, low: float, high: float) -> None:
    if method not in METHODS:
        raise ValueError(f"importance method is {method!r}; choose one of {', '.join(METHODS)}")
    if not cap >= 1.0:
        raise ValueError(f"cap is {cap}; a weight on-policy is 1, so that cap must be at least 1 (math.inf for none)")
    if not 0.0 <= low <= 1.0 <= high:
        raise ValueError(f"low is {low} and high is {high}; a ratio on-policy is 1: choose 0 <= low <= 1 <= high")


def _size(name: str, ids: Tensor, counts: Mapping[str, int] | None, *, shared: bool) -> int:
    """Return the number of ids of a key over all ranks."""
    if counts is not None and name in counts:
        return counts[name]
    if shared:
        raise ValueError(f"counts[{name!r}] is missing; ranks that share sums must pass the number of ids of each key")
    return int(ids.max()) + 1 if len(ids) else 0


def _inside(ratio: Tensor, low: float, high: float) -> Tensor:
    return (ratio >= low) & (ratio <= high)


def _means(y: Tensor, nodes: Sequence[tuple[Tensor, int]], reduce: Reduce | None) -> list[Tensor]:
    """Return the means of y by node over all ranks, for each (ids [n], number of nodes); 0 in a node without tokens.

    All tables travel in one reduction.
    """
    starts = list(itertools.accumulate((size for _, size in nodes), initial=0))
    sums = Limbs([_Y], (starts[-1],), y.device)
    count = torch.zeros(starts[-1], dtype=torch.float64, device=y.device)
    for (ids, _), start in zip(nodes, starts):
        sums.add(0, ids + start, y)
        count.index_add_(0, ids + start, torch.ones_like(y))
    tables = fused_sum({"sums": sums.to_send(), "count": count}, reduce)
    means = sums.decode(tables["sums"])[0] / tables["count"].clamp(min=1.0)
    return list(means.split([size for _, size in nodes]))


def _by_levels(
    y: Tensor,
    keys: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    bounds: LevelBounds,
    cap: float,
    high: float,
    reduce: Reduce | None,
) -> Tensor:
    """Return the weights of the method "levels": residuals of y along (trajectory, version) and version, each clipped,
    and 0 in a node whose residual is beyond its mask. An engine is a node of its own, whose mean masks alone."""
    version, versions = keys[VERSION_KEY], sizes[VERSION_KEY]
    part = keys[TRAJECTORY_KEY] * versions + version
    nodes = [(part, sizes[TRAJECTORY_KEY] * versions), (version, versions)]
    if ENGINE_KEY in keys:
        nodes.append((keys[ENGINE_KEY], sizes[ENGINE_KEY]))
    means = _means(y, nodes, reduce)
    m_tv, m_v = means[0][part], means[1][version]

    def clipped(residual: Tensor, given: float | None) -> Tensor:
        bound = math.log(cap) if given is None else given
        return residual.clamp(min=-bound, max=bound)

    def beyond(residual: Tensor, given: float | None) -> Tensor:
        return residual.abs() > (math.log(high) if given is None else given)

    log_w = clipped(y - m_tv, bounds.token) + clipped(m_tv - m_v, bounds.trajectory) + clipped(m_v, bounds.version)
    masked = beyond(m_tv - m_v, bounds.mask_trajectory) | beyond(m_v, bounds.mask_version)
    if ENGINE_KEY in keys:
        masked |= beyond(means[2][keys[ENGINE_KEY]], bounds.mask_engine)
    return log_w.exp().masked_fill(masked, 0.0)


def _with_metrics(
    weights: Tensor,
    y: Tensor,
    keys: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    labels: Mapping[str, Tensor],
    reduce: Reduce | None,
) -> ImportanceWeights:
    """Add up what the metrics and `kept` need in one reduction, and raise where a value is not finite."""
    values = torch.stack([torch.ones_like(weights), (weights == 0.0).double(), weights, weights.square()], 1)
    bad = ~(y.abs() < LARGEST) | ~torch.isfinite(weights.square())
    groups = [key for key in (VERSION_KEY, ENGINE_KEY) if key in keys]
    tables = {"all": values.sum(0), "bad": bad.sum().double().reshape(1)}
    tables |= {key: values.new_zeros(sizes[key], 4).index_add_(0, keys[key], values) for key in groups}
    if TRAJECTORY_KEY in keys:
        trajectory = values.new_zeros(sizes[TRAJECTORY_KEY])
        tables[TRAJECTORY_KEY] = trajectory.index_add_(0, keys[TRAJECTORY_KEY], (weights > 0.0).double())
    tables = fused_sum(tables, reduce)
    if float(tables["bad"]) > 0:
        raise ValueError(
            f"{int(tables['bad'])} tokens have a log pi_old - log mu that is not below {LARGEST:g} nats, or a weight "
            "that is not finite; the log-probs of the trainer or of an engine are broken, or `cap` is too wide"
        )
    metrics = _figures(tables["all"].tolist(), "")
    for key, title in ((VERSION_KEY, "lag"), (ENGINE_KEY, "engine")):
        if key in groups:
            names = labels[key].tolist() if key in labels else range(sizes[key])
            metrics |= _by_name(tables[key].tolist(), names, title)
    kept = tables.get(TRAJECTORY_KEY)
    return ImportanceWeights(weights, metrics, None if kept is None else kept.round().long())


def _by_name(rows: Sequence[Sequence[float]], names: Iterable[int], title: str) -> dict[str, float]:
    """Return the figures of each name; several ids may have the name -1."""
    found: dict[int, list[float]] = {}
    for name, row in zip(names, rows, strict=True):
        found[name] = [old + new for old, new in zip(found.get(name, [0.0] * 4), row)]
    metrics: dict[str, float] = {}
    for name in sorted(found):
        metrics |= _figures(found[name], f"/{title}/{'unknown' if name < 0 else name}")
    return metrics


def _figures(sums: Sequence[float], end: str) -> dict[str, float]:
    """Return the metrics from (tokens, masked ones, sum of w, sum of w^2); none without tokens."""
    tokens, masked, total, squares = sums
    if not tokens:
        return {}
    return {
        f"importance/weight{end}": total / tokens,
        f"importance/masked_share{end}": masked / tokens,
        f"importance/effective_sample_size{end}": total * total / (tokens * squares) if squares else 0.0,
    }
