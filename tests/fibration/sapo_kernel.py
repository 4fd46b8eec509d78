"""SAPO's arithmetic for the fused kernels, as a package of one's own would bring it."""

from dataclasses import dataclass

import triton
import triton.language as tl

from fiberpo_megatron.fibration.kernels.formulas import Formulas, no_finish, no_terms
from tests.fibration import sapo


@triton.jit
def _gate(x, a, mu, values, OPTIONS: tl.constexpr):
    ratio = tl.exp(x)
    tau = tl.where(a > 0, tl.full((), OPTIONS[0], x.dtype), tl.full((), OPTIONS[1], x.dtype))
    passed = 1 / (1 + tl.exp(-tau * (ratio - 1)))
    gated = 1 + 4 / tau * (passed - 0.5)
    return gated, mu * a * 4 * passed * (1 - passed) * ratio, x == x, ()


FORMULAS = Formulas(no_terms, _gate, no_finish, lambda it: (it.tau_positive, it.tau_negative))


@dataclass(frozen=True)
class FusedSAPO(sapo.SAPO):
    """Is SAPO with a kernel."""

    kernel = "tests.fibration.sapo_kernel:FORMULAS"
