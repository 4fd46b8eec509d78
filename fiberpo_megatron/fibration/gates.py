"""Compute the gates on the nodes of a tree and their adjoints (arXiv:2604.03044, equation 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fiberpo_megatron.fibration.exact import sum_by_index
from fiberpo_megatron.fibration.tree import ADJOINT, NodeTree

PLUS, MINUS = 0, 1


def gate(residual: Tensor, budget: Tensor | float, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return g(D, C, k) and its derivative in D: pass-through, rollback with slope -k, then zero.

    Equation 4 of arXiv:2604.03044. Continuous and odd: g is C at |D| = C and 0 from (1 + 1/k) C on.
    All arguments broadcast; at a kink the derivative is that of the inner branch.
    """
    size = residual.abs()
    passed = size <= budget
    rolled = (size < (1.0 + 1.0 / tokens) * budget) & ~passed
    rollback = residual.sign() * ((tokens + 1.0) * budget) - tokens * residual
    value = torch.where(passed, residual, torch.where(rolled, rollback, torch.zeros_like(residual)))
    slope = torch.where(passed, torch.ones_like(residual), torch.where(rolled, -tokens.expand_as(residual), 0.0))
    return value, slope


@dataclass(frozen=True)
class GatedLevel:
    """Holds the gate results of one level: slopes of both channels [2, n] and log base weights [n]."""

    slope: Tensor
    log_weight: Tensor


@dataclass(frozen=True)
class GatedTree:
    """Holds the gate results of every level and each finest node's summed log base weight [F]."""

    tree: NodeTree
    levels: tuple[GatedLevel, ...]
    log_weight: Tensor


def gate_tree(tree: NodeTree, k_max: float | None = None) -> GatedTree:
    """Return residual, gate and base weight at every level.

    Residual D_n = S_n - S_parent(n) (S_n at the coarsest level); log w_n = g(D+) - g(D-): equation 3 of
    arXiv:2604.03044 with the hierarchy of arXiv:2603.08239. The gate of a node has k = min(k_n, `k_max`).
    """
    gated = []
    total = tree.levels[0].mass.new_zeros(tree.index.shape[0])
    for nodes in tree.levels:
        residual, above = nodes.aggregate, nodes.level.parent
        if nodes.parent is not None and above is not None:
            residual = residual - tree.levels[above].aggregate.index_select(1, nodes.parent)
        tokens = nodes.tokens if k_max is None else nodes.tokens.clamp(max=k_max)
        value, slope = gate(residual, nodes.budget, tokens)
        log_weight = value[PLUS] - value[MINUS]
        gated.append(GatedLevel(slope, log_weight))
        nodes.add_to(total, log_weight)
    return GatedTree(tree, tuple(gated), total)


def received_by_level(gated: GatedTree, weight: Tensor, clipped: Tensor) -> list[Tensor]:
    """Return what each token receives through the aggregates of each level, per channel and node: [2, n] per level.

    `weight` [F] is W_n = sum_i w_i K(i, n) with w_i = mu_i A_i G_i; `clipped` [2, F] is the part of W_n
    whose fiber clip stops the gradient of channel c. A token of sign channel c adds
    mu_j K(j, n) times row c to its gradient, for every level.

    With B_l the adjoint at level l, B_1 = (g'_1 - 1) W_1 + X and B_{l+1} = (g'_{l+1} - 1) W_{l+1} +
    sum over children, in all branches of a tree, of (1 - g'_l) W_l (+ X where it is the finest level of a branch): the
    same as collecting the fiber (-W + X), each node's own gate (g' W) and its children's (-g' W), in a form that is
    exactly zero while nothing is active.
    Both channels read the same because S- enters log G with the opposite sign, as does x in x-.
    """
    tree, received = gated.tree, []
    handed_up = [clipped.new_zeros((2, nodes.mass.shape[0])) for nodes in tree.levels]
    for leaves in tree.leaves:
        handed_up[leaves.level].index_add_(1, leaves.node, clipped.index_select(1, leaves.finest))
    for nodes, level, handed in zip(tree.levels, gated.levels, handed_up, strict=True):
        lost = (1.0 - level.slope) * nodes.total(weight.unsqueeze(0))
        received.append((handed - lost) / nodes.mass)
        if nodes.parent is not None and nodes.level.parent is not None:
            above = handed_up[nodes.level.parent]
            above += sum_by_index(lost, nodes.parent, above.shape[1], (ADJOINT, ADJOINT))
    return received


def spread(gated: GatedTree, level: int, values: Tensor) -> Tensor:
    """Return the values of one level's nodes, [2, n], at each of its finest nodes, [2, F]; 0 at those of others."""
    out = values.new_zeros((values.shape[0], gated.tree.index.shape[0]))
    gated.tree.levels[level].add_to(out, values)
    return out


def adjoint(gated: GatedTree, received: Sequence[Tensor]) -> Tensor:
    """Return what tokens receive through all levels (`received_by_level`), per channel and finest node: [2, F]."""
    total = torch.zeros((2, gated.tree.index.shape[0]), dtype=torch.float64, device=gated.tree.index.device)
    for nodes, values in zip(gated.tree.levels, received, strict=True):
        nodes.add_to(total, values)
    return total
