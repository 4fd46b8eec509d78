"""This module holds each objective's arithmetic on one block of tokens, as device functions.

They compute in Triton what an objective's `terms`, `gate` and `finish` compute in torch, in the same order of
operations:
  terms(x, mu, counted)                -> what the first reduction sums per finest node
  gate(x, a, mu, values, OPTIONS)      -> G, direct gradient, whether the own clip is free, what the second one sums
  finish(x, a, mu, values, more, OPTIONS) -> the gradient that reaches tokens through aggregates
x, a, mu are [BLOCK], x clamped. `values` are the node values that a token receives: those of gates in the fibred
objectives, the first reduction's float64 sums in the others. In `finish` they are those of the adjoints, with the sums
in `more`. Constants come in as OPTIONS and get the tokens' dtype by `tl.full`, because Triton would round a bare float
to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from fiberpo_megatron.fibration.fiber import UNBOUNDED

_UNBOUNDED = tl.constexpr(UNBOUNDED)


@triton.jit
def _fiber_terms(x, mu, counted):
    return mu, counted.to(x.dtype), tl.maximum(x, 0.0) * mu, -(tl.minimum(x, 0.0) * mu)


@triton.jit
def _fiber_clip(value, a, OPTIONS: tl.constexpr):
    gain = tl.full((), OPTIONS[0], value.dtype)
    loss = tl.full((), OPTIONS[1], value.dtype)
    bound = tl.where(a > 0, gain, loss)
    upper = bound
    if OPTIONS[2] is not None and not OPTIONS[4]:
        upper = tl.where(a < 0, _UNBOUNDED, bound)
    return tl.minimum(tl.maximum(value, -bound), upper)


@triton.jit
def _fiber_gate(x, a, mu, values, OPTIONS: tl.constexpr):
    s_plus, s_minus, log_weight = values
    positive = x >= 0
    own = tl.where(positive, x - s_plus, x + s_minus)
    other = tl.where(positive, -s_minus, s_plus)
    own_clipped = _fiber_clip(own, a, OPTIONS)
    other_clipped = _fiber_clip(other, a, OPTIONS)
    own_free = own_clipped == own
    other_free = other_clipped == other
    log_ratio = own_clipped - other_clipped + log_weight
    ratio = tl.exp(log_ratio)
    scale = mu * a
    weight = scale * ratio
    gradient = tl.where(own_free, weight, 0.0)
    free = own_free
    if OPTIONS[4]:
        raw = tl.exp(x)
        on_raw = ((a > 0) & (x < log_ratio)) | ((a < 0) & (x > log_ratio))
        ratio = tl.where(on_raw, raw, ratio)
        gradient = tl.where(on_raw, scale * raw, gradient)
        free = free | on_raw
        weight = tl.where(on_raw, 0.0, weight)
        if OPTIONS[2] is not None:
            bounded = (a < 0) & (tl.maximum(x, log_ratio) > tl.full((), OPTIONS[5], x.dtype))
            ratio = tl.where(bounded, tl.full((), OPTIONS[2], x.dtype), ratio)
            gradient = tl.where(bounded, 0.0, gradient)
            free = free & ~bounded
            weight = tl.where(bounded, 0.0, weight)
    elif OPTIONS[2] is not None or OPTIONS[3]:
        raw = tl.exp(x)
        on_raw = x != x
        raw_gated = raw
        if OPTIONS[2] is not None:
            on_raw = (a < 0) & (x > 0)
            raw_gated = tl.where(on_raw, tl.minimum(raw, tl.full((), OPTIONS[2], x.dtype)), raw)
        if OPTIONS[3]:
            on_raw = on_raw | ((a > 0) & (x < 0))
        raw_free = raw_gated == raw
        ratio = tl.where(on_raw, raw_gated, ratio)
        gradient = tl.where(on_raw, tl.where(raw_free, scale * raw, 0.0), gradient)
        free = tl.where(on_raw, raw_free, free)
        weight = tl.where(on_raw, 0.0, weight)
    stopped_plus = tl.where(tl.where(positive, own_free, other_free), 0.0, weight)
    stopped_minus = tl.where(tl.where(positive, other_free, own_free), 0.0, weight)
    return ratio, gradient, free, (weight, stopped_plus, stopped_minus)


@triton.jit
def _fiber_finish(x, a, mu, values, more, OPTIONS: tl.constexpr):
    return tl.where(x >= 0, values[0], values[1]) * mu


@triton.jit
def no_terms(x, mu, counted):
    """Sum nothing: the `terms` of an objective without node sums."""
    return ()


@triton.jit
def no_finish(x, a, mu, values, more, OPTIONS: tl.constexpr):
    """Return zero: the `finish` of an objective without node sums."""
    return tl.zeros_like(x)


@triton.jit
def _pessimistic_clip(ratio, a, OPTIONS: tl.constexpr):
    below = tl.maximum(ratio, tl.full((), 1.0 - OPTIONS[1], ratio.dtype))
    if OPTIONS[2] is not None:
        below = tl.minimum(below, tl.full((), OPTIONS[2], ratio.dtype))
    return tl.where(a >= 0, tl.minimum(ratio, tl.full((), 1.0 + OPTIONS[0], ratio.dtype)), below)


@triton.jit
def _ppo_gate(x, a, mu, values, OPTIONS: tl.constexpr):
    raw = tl.exp(x)
    ratio = _pessimistic_clip(raw, a, OPTIONS)
    free = ratio == raw
    return ratio, tl.where(free, mu * a * ratio, 0.0), free, ()


@triton.jit
def _cispo_gate(x, a, mu, values, OPTIONS: tl.constexpr):
    raw = tl.exp(x)
    ratio = tl.minimum(tl.maximum(raw, tl.full((), 1.0 - OPTIONS[1], x.dtype)), tl.full((), 1.0 + OPTIONS[0], x.dtype))
    return ratio, mu * a * ratio, ratio == raw, ()


@triton.jit
def _reinforce_gate(x, a, mu, values, OPTIONS: tl.constexpr):
    ratio = tl.exp(x)
    return ratio, mu * a * ratio, x == x, ()


@triton.jit
def _gspo_terms(x, mu, counted):
    return counted.to(x.dtype), tl.where(counted, x, 0.0)


@triton.jit
def _gspo_gate(x, a, mu, values, OPTIONS: tl.constexpr):
    tokens, total = values
    raw = tl.exp(total / tl.maximum(tokens, 1.0)).to(x.dtype)
    ratio = _pessimistic_clip(raw, a, OPTIONS)
    free = ratio == raw
    return ratio, tl.where(free, mu * a * ratio, 0.0), free, ()


@triton.jit
def _sapo_gate(x, a, mu, values, OPTIONS: tl.constexpr):
    ratio = tl.exp(x)
    tau = tl.where(a > 0, tl.full((), OPTIONS[0], x.dtype), tl.full((), OPTIONS[1], x.dtype))
    passed = 1 / (1 + tl.exp(-tau * (ratio - 1)))
    return 1 + 4 / tau * (passed - 0.5), mu * a * (4 * passed * (1 - passed)) * ratio, x == x, ()


@triton.jit
def _expm1(x):
    """Return exp(x) - 1 without cancellation (Kahan): the errors of exp and of its log cancel."""
    u = tl.exp(x)
    log = tl.log(u)
    return tl.where(log == 0, x, (u - 1.0) * (x / tl.where(log == 0, 1.0, log)))


@triton.jit
def _sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def _apc_terms(x, mu, counted):
    return counted.to(x.dtype), tl.where(counted, tl.abs(_expm1(x)), 0.0)


@triton.jit
def _apc_slack(sums, like, OPTIONS: tl.constexpr):
    return (sums[0] * tl.full((), OPTIONS[0], tl.float64) - sums[1]).to(like.dtype)


@triton.jit
def _apc_pushed(change, a, mu, slack):
    return tl.where((tl.abs(change) + slack > 0) & (slack < 0), mu * a * _sign(change), 0.0)


@triton.jit
def _apc_gate(x, a, mu, values, OPTIONS: tl.constexpr):
    change, slack = _expm1(x), _apc_slack(values, x, OPTIONS)
    size = tl.abs(change)
    free = slack >= 0
    reach = tl.maximum(size + slack, 0.0)
    if OPTIONS[1]:  # the slack of lone tokens' node is not a number
        lone = slack != slack
        bound = tl.minimum(size, tl.full((), OPTIONS[0], x.dtype))
        free, reach = tl.where(lone, bound == size, free), tl.where(lone, bound, reach)
    raw = tl.exp(x)
    ratio = tl.where(free, raw, reach * _sign(change) + 1.0)
    return ratio, tl.where(free, raw * mu * a, 0.0), free, (_apc_pushed(change, a, mu, slack),)


@triton.jit
def _apc_finish(x, a, mu, values, more, OPTIONS: tl.constexpr):
    change, slack = _expm1(x), _apc_slack(more, x, OPTIONS)
    others = values[0].to(x.dtype) - _apc_pushed(change, a, mu, slack)
    return tl.where(mu > 0, -others * tl.exp(x) * _sign(change), 0.0)


@dataclass(frozen=True)
class Formulas:
    """Holds the device functions of one objective; its class attribute `kernel` names this object by import path."""

    terms: Any
    gate: Any
    finish: Any
    options: Callable[[Any], tuple[float | bool | None, ...]]
    """Returns the constants that the functions read as OPTIONS, from the objective."""


def _fiber_options(it: Any) -> tuple[float | bool | None, ...]:
    bound = None if it.dual_clip is None else math.log(it.dual_clip)
    return (*it.bounds, it.dual_clip, it.unclip_positive, it.pessimistic, bound)


FIBER = Formulas(_fiber_terms, _fiber_gate, _fiber_finish, _fiber_options)
PPO = Formulas(no_terms, _ppo_gate, no_finish, lambda it: (*it.bounds, it.dual_clip))
CISPO = Formulas(no_terms, _cispo_gate, no_finish, lambda it: it.bounds)
REINFORCE = Formulas(no_terms, _reinforce_gate, no_finish, lambda it: ())
APC = Formulas(_apc_terms, _apc_gate, _apc_finish, lambda it: (it.delta, it.lone_nodes))
GSPO = Formulas(_gspo_terms, _gspo_gate, no_finish, lambda it: (*it.bounds, None))
SAPO = Formulas(no_terms, _sapo_gate, no_finish, lambda it: (it.tau_positive, it.tau_negative))
