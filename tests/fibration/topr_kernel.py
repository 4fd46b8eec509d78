"""TOPR's arithmetic for the fused kernels, as a package of one's own would bring it."""

from dataclasses import dataclass

import triton
import triton.language as tl

from fiberpo_megatron.fibration.kernels.formulas import Formulas, no_finish, no_terms
from tests.fibration import topr


@triton.jit
def _gate(x, a, mu, values, OPTIONS: tl.constexpr):
    ratio = tl.exp(x)
    good = tl.minimum(tl.maximum(ratio, tl.full((), 1.0, x.dtype)), tl.full((), OPTIONS[0], x.dtype))
    gated = tl.where(a > 0, good, tl.minimum(ratio, tl.full((), OPTIONS[1], x.dtype)))
    return gated, mu * a * gated, x == x, ()


FORMULAS = Formulas(no_terms, _gate, no_finish, lambda it: (it.bound_positive, it.bound_negative))


@dataclass(frozen=True)
class FusedTOPR(topr.TOPR):
    """Is TOPR with a kernel."""

    kernel = "tests.fibration.topr_kernel:FORMULAS"
