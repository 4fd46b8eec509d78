"""Find the finest node that a token belongs to; here are the two operations that cost a pass over tokens.

`NodeMap` sums token values into finest nodes with the membership kernel K and hands node values back
to tokens with the same kernel. A finest node is (base node, expert partition): the base node is given
by the finest level's keys without the expert, the partition by the routing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fiberpo_megatron.fibration.budgets import OTHERS
from fiberpo_megatron.fibration.exact import (
    SHARE_UNIT,
    FloatSums,
    Limbs,
    NodeSums,
    Prefixes,
    float_slice_bits,
    magic,
    rounded,
    slice_bits,
    slices,
)
from fiberpo_megatron.fibration.levels import Choice, level_name
from fiberpo_megatron.fibration.runs import BLOCK, CPU_CHUNK, GPU_CHUNK, RunSlice
from fiberpo_megatron.fibration.tokens import LONE, TokenBatch, table_size

if TYPE_CHECKING:
    from fiberpo_megatron.fibration.rule import Rule

MAX_TABLE_NODES = 1 << 24

COARSE_SHARE_UNIT = -23
"""Exponent of the unit of a share's larger part; the smaller part, at most half a unit, has that of `SHARE_UNIT`."""
SHARE_BITS = 25
"""Bits of either part, with its sign."""
SLOT_UNIT = -8
"""Exponent of the unit of shares that need no second part: those of 2, 4, 8, ... routed slots a token."""
SLOT_BITS = 9
"""Bits of such a share."""
NATIVE_PRODUCT = 400
"""Products of matrices with fewer multiplications than this are computed by torch itself, one after the other, so that
the bits of one do not depend on how many there are; larger ones go to a library."""


@dataclass(frozen=True)
class NodeMap:
    """Holds the finest nodes of this rank's tokens.

    The base nodes of each branch of a tree stand one after the other; without a tree there is one branch.
    """

    branches: tuple[tuple[str, ...], ...]
    """Per branch the keys of its base nodes, most significant first."""
    sizes: dict[str, int]
    """Number of ids per key, also of the keys only coarser levels name."""
    branch_of_run: Tensor | None
    """Branch of each run, int64 [R]; None without a tree."""
    base_of_run: Tensor
    """Base node of each run, int64 [R]."""
    share: Tensor | None
    """omega [N, P]; None without experts."""
    soft: bool
    partitions: int
    labels: Mapping[str, Tensor]
    """Per key, the number that each id has in budgets, where it is not the id itself; int64 [sizes[key]]."""
    expert_nodes: Tensor | None = None
    """The base nodes of the branches with experts, int64; None if all have some."""

    @property
    def base_nodes(self) -> int:
        return self.first_nodes[-1]

    @cached_property
    def first_nodes(self) -> list[int]:
        """Return the first base node of each branch, and the number of all."""
        return first_nodes(self.branches, self.sizes)

    def check_size(self) -> None:
        if self.base_nodes * self.partitions > MAX_TABLE_NODES:
            keys = max(self.branches, key=lambda keys: math.prod(self.sizes[key] for key in keys))
            raise ValueError(
                f"level {level_name(keys)!r} needs a table of {self.base_nodes} x {self.partitions} nodes "
                f"(limit {MAX_TABLE_NODES}); give its nodes one dense key of their own, or pass the exact "
                f"counts of {list(keys)} (they are {[self.sizes[key] for key in keys]} now)"
            )

    def kernel(self, tokens: slice) -> Tensor | None:
        """Return K(i, p) of a chunk, [n, P]: omega when soft, one-hot at its first maximum when hard."""
        if self.share is None:
            return None
        share = self.share[tokens]
        if self.soft:
            return share
        partition = share.argmax(dim=1)  # the first of equal maxima: the lowest p wins a tie
        return torch.zeros_like(share).scatter_(1, partition.unsqueeze(1), 1.0)

    def sum_into(self, sums: NodeSums, values: Sequence[Tensor | None], tokens: slice, runs: RunSlice) -> None:
        """Add sum_i K(i, n) value_i to C sums over [base_nodes, P], for C token values [n].

        None stands for ones, whose sum without experts is the length of the run.
        """
        base = self.base_of_run[runs.first : runs.end]
        kernel = self.kernel(tokens)
        if isinstance(sums, FloatSums):
            _sum_floats(sums.table, base, values, kernel, runs)
            return
        if kernel is None:
            for row, value in enumerate(values):
                if value is None:
                    sums.add(row, base, runs.lengths.double().unsqueeze(1))
                else:
                    sums.add_runs(row, base, value, runs)
            return
        shares, share_bits = self._share_parts(kernel)
        if runs.long_on_cpu:
            bits = min(54 - BLOCK.bit_length(), slice_bits(runs.longest)) - share_bits
            _add_products(sums, base, _cut(sums, values, bits, runs), shares, runs)
            return
        for row, part, _ in _cut(sums, values, float_slice_bits(kernel) - share_bits, runs):
            for share, _ in shares:
                sums.add(row, base, runs.sums(share * part.unsqueeze(1)))

    @cached_property
    def _by_slots(self) -> bool:
        """Whether all shares are multiples of 2^`SLOT_UNIT`: those of slots whose number is a power of two."""
        return self._multiples_of(SLOT_UNIT)

    @cached_property
    def _needs_rounding(self) -> bool:
        """Whether a share is no multiple of 2^`SHARE_UNIT`. The shares of counts in float32 all are."""
        return not self._multiples_of(SHARE_UNIT)

    def _multiples_of(self, unit: int) -> bool:
        assert self.share is not None
        parts = self.share.split(GPU_CHUNK if self.share.is_cuda else CPU_CHUNK // 4)
        return not any(float((part * 2.0**-unit).frac_().max()) for part in parts)

    def _share_parts(self, kernel: Tensor) -> tuple[list[tuple[Tensor, int]], int]:
        """K as parts [n, P] that add up to it, to a unit of 2^`SHARE_UNIT`, each with its unit, and the bits of a
        part."""
        if not self.soft:
            return [(kernel, 0)], 0
        if self._by_slots:
            return [(kernel, SLOT_UNIT)], SLOT_BITS
        if self._needs_rounding:
            kernel = rounded(kernel.double(), SHARE_UNIT)
        coarse = (kernel + 1.0).sub_(1.0) if kernel.dtype == torch.float32 else rounded(kernel, COARSE_SHARE_UNIT)
        return [(coarse, COARSE_SHARE_UNIT), (kernel - coarse, SHARE_UNIT)], SHARE_BITS

    def gather(self, table: Tensor, tokens: slice, runs: RunSlice) -> list[Tensor]:
        """Return sum_n K(i, n) table[c, n] for each token of the chunk and each c of [C, base_nodes, P]."""
        base = self.base_of_run[runs.first : runs.end]
        kernel = self.kernel(tokens)
        if kernel is None:
            return [runs.spread(row.view(-1).index_select(0, base)) for row in table]
        if table.shape[0] * table.shape[2] < NATIVE_PRODUCT and not kernel.is_cuda:
            return list(_products(table.transpose(0, 1).index_select(0, base), kernel.to(table.dtype), runs))
        # No large matrix product: in one, a token's bits could depend on how many tokens there are.
        return [runs.spread(row.index_select(0, base)).mul_(kernel).sum(1) for row in table]


def _products(rows: Tensor, kernel: Tensor, runs: RunSlice) -> Tensor:
    """The products of each run's rows [r, C, P] with the shares [n, P] of its tokens: [C, n].

    Blocks of tokens in one run are multiplied at once, as many as torch itself still multiplies one after the other.
    """
    (_, values, partitions), tokens = rows.shape, runs.tokens
    block = (NATIVE_PRODUCT - 1) // (values * partitions) if runs.long_on_cpu else 1
    count = tokens // block
    found = rows.new_empty(values, tokens)
    first, last = (runs.run_of_token[at : count * block : block] for at in (0, block - 1))
    whole = kernel[: count * block].view(count, block, partitions).transpose(1, 2)
    out = found[:, : count * block].unflatten(1, (count, block)).transpose(0, 1)
    torch.bmm(rows.index_select(0, first), whole, out=out)
    cut = ((first != last).nonzero() * block + torch.arange(block)).view(-1)
    alone = torch.cat([cut, torch.arange(count * block, tokens)])
    of_token, shares = rows.index_select(0, runs.run_of_token[alone]), kernel.index_select(0, alone)
    return found.index_copy_(1, alone, torch.bmm(of_token, shares.unsqueeze(2)).squeeze(2).t())


def _sum_floats(
    table: Tensor, base: Tensor, values: Sequence[Tensor | None], kernel: Tensor | None, runs: RunSlice
) -> None:
    """Add to table [C, base_nodes, P] in float64."""
    if kernel is None:
        for row, value in zip(table, values, strict=True):
            row.view(-1).index_add_(0, base, runs.lengths.double() if value is None else runs.float_sums(value))
    elif runs.long_on_cpu:
        rows = [torch.ones_like(kernel[:, 0]) if value is None else value for value in values]
        stacked, wide = torch.stack(rows).double(), kernel.double()
        products = [stacked[:, start:end] @ wide[start:end] for start, end in runs.bounds]
        table.index_add_(1, base, torch.stack(products, dim=1))
    else:
        for row, value in zip(table, values, strict=True):
            row.index_add_(0, base, runs.float_sums(kernel if value is None else kernel * value.unsqueeze(1)))


def _cut(sums: Limbs, values: Sequence[Tensor | None], bits: int, runs: RunSlice) -> list[tuple[int, Tensor, int]]:
    """Cut token values [n], before shares multiply them, into slices: the row, the slice in float64, its unit.

    Where a value is beyond its range, it flags that, and the row has no slice.
    """
    found = []
    for row, (value, it) in enumerate(zip(values, sums.ranges, strict=True)):
        if value is None:
            found.append((row, torch.ones(runs.tokens, dtype=torch.float64, device=runs.lengths.device), 0))
            continue
        parts = slices(value, it.shared_unit, it.limit, bits)
        if parts is None:
            sums.flag()
            continue
        found.extend((row, part - magic(unit), unit) for part, unit in parts)
    return found


def _add_products(
    sums: Limbs,
    base: Tensor,
    found: Sequence[tuple[int, Tensor, int]],
    shares: Sequence[tuple[Tensor, int]],
    runs: RunSlice,
) -> None:
    """Add the sums over each run of slices [n] times parts of shares [n, P], both with the exponents of their units.

    All blocks of tokens are multiplied at once, whatever runs they hold; then those in which a run ends, up to its end.
    A block's product is exact in float64, because its slices and shares have few enough bits (`sum_into`).
    """
    if not found:
        return
    count = -(-runs.tokens // BLOCK)
    # Rows of a matrix that are a power of two apart share cache lines, which makes products three times slower.
    left = torch.empty(len(found), count * BLOCK + 8, dtype=torch.float64)
    left[:, runs.tokens :] = 0.0
    torch.stack([part for _, part, _ in found], out=left[:, : runs.tokens])
    rows = left[:, : count * BLOCK].unflatten(1, (count, BLOCK)).transpose(0, 1)
    at, up_to_end = runs.last // BLOCK, torch.arange(BLOCK) <= (runs.last % BLOCK).view(-1, 1, 1)
    ends = rows.index_select(0, at).mul_(up_to_end)
    for share, share_unit in shares:
        wide = torch.empty(count * BLOCK, share.shape[1], dtype=torch.float64)
        wide[: runs.tokens], wide[runs.tokens :] = share, 0.0
        wide = wide.view(count, BLOCK, -1)
        scale = torch.tensor([[2.0 ** -(unit + share_unit)] for _, _, unit in found], dtype=torch.float64)
        whole = torch.bmm(rows, wide).mul_(scale).long()
        prefixes = (whole.cumsum(0).sub_(whole)).index_select(0, at)
        prefixes += torch.bmm(ends, wide.index_select(0, at)).mul_(scale).long()
        for place, (row, _, unit) in enumerate(found):
            sums.add_prefixes(row, Prefixes(base, prefixes[:, place], runs.lengths, 0, unit + share_unit))


def make_node_map(
    rule: Rule,
    batch: TokenBatch,
    ids: Mapping[str, Tensor],
    sizes: dict[str, int],
    starts: Tensor,
    base: Tensor | None = None,
) -> NodeMap:
    """Return the finest nodes and the one of every run.

    Args:
        rule: the objective.
        batch: this rank's tokens.
        ids: per key the id of each run, int64 [R], of which all lie within `sizes`.
        sizes: number of ids per key.
        starts: first token of each run, int64 [R].
        base: the base node of each run where a caller knows it; not used in a tree.

    Raises:
        ValueError: a table that is too large, or an id for which a tree has no branch.
    """
    labels = {key: _label_of_ids(label, sizes[key]) for key, label in batch.labels.items() if key in sizes}
    keys = tuple(branch.base_keys for branch in rule.branches)
    choice, branch, share, expert_nodes = rule.branch_choice, None, batch.expert_share, None
    if base is None or choice is not None:
        bases = [combine_ids(ids, base_keys, sizes, like=starts) for base_keys in keys]
        base = bases[0]
    if choice is not None:
        first = first_nodes(keys, sizes)
        branch = _branch_of_run(choice, ids, sizes, labels)
        base = torch.stack(bases).gather(0, branch.unsqueeze(0)).squeeze(0) + branch.new_tensor(first)[branch]
        has_experts = [it.uses_experts for it in rule.branches]
        if share is not None and not all(has_experts):
            # A token of a branch without experts belongs to one node alone, whatever its routing.
            routed = torch.tensor(has_experts, device=share.device)[branch]
            lengths = torch.diff(starts, append=starts.new_tensor([batch.size]))
            whole = torch.zeros_like(share[:1]).index_fill_(1, branch.new_zeros(1), 1.0)
            share = torch.where(routed.repeat_interleave(lengths).unsqueeze(1), share, whole)
            ranges = zip(itertools.pairwise(first), has_experts, strict=True)
            expert_nodes = torch.cat([torch.arange(*ends) for ends, has in ranges if has])
    nodes = NodeMap(keys, sizes, branch, base, share, rule.soft, batch.partitions, labels, expert_nodes)
    nodes.check_size()
    return nodes


def first_nodes(branches: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> list[int]:
    """Return the first base node of each branch, and the number of all."""
    return list(itertools.accumulate((math.prod(sizes[key] for key in keys) for keys in branches), initial=0))


def parent_ids(rule: Rule, nodes: NodeMap, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, per key that only coarser levels name, the id that each run [R] reports; 0 in branches without it."""
    if nodes.branch_of_run is None:
        return {key: ids[key] for key in rule.parent_keys}
    found = {}
    for key in rule.parent_keys:
        named = nodes.branch_of_run.new_tensor([int(key in branch.parent_keys) for branch in rule.branches])
        found[key] = ids[key] * named[nodes.branch_of_run]
    return found


def _branch_of_run(
    choice: Choice, ids: Mapping[str, Tensor], sizes: Mapping[str, int], labels: Mapping[str, Tensor]
) -> Tensor:
    size, label = sizes[choice.key], labels.get(choice.key)
    of_id = torch.full((size,), -1 if choice.others is None else choice.others)
    for number, at in choice.of_id.items():
        of_id[slice(number, number + 1) if label is None else label == number] = at
    branch = of_id.to(ids[choice.key].device)[ids[choice.key]]
    if bool((branch < 0).any()):
        bad = int(ids[choice.key][branch < 0][0])
        raise ValueError(
            f"levels by {choice.key!r} has no chain for {choice.key} {bad if label is None else int(label[bad])}; add "
            f"one, or {OTHERS!r} for all others"
        )
    return branch


def _label_of_ids(label: Tensor, size: int) -> Tensor:
    """A key's labels on the host, for `size` ids: a table is larger than the ids where ranks share it."""
    found = torch.full((size,), -1)
    known = label[:size].cpu()
    found[: known.shape[0]] = known
    return found


def combine_ids(ids: Mapping[str, Tensor], keys: Sequence[str], sizes: Mapping[str, int], *, like: Tensor) -> Tensor:
    """Return one index from several ids, the first key most significant; zeros when there are no keys."""
    index = torch.zeros_like(like)
    for key in keys:
        index = index * sizes[key] + ids[key]
    return index


def checked_size(name: str, ends: tuple[int, int], batch: TokenBatch, *, shared: bool) -> int:
    """Return the number of ids of a key whose smallest and largest id here are `ends` ((0, -1) without tokens)."""
    low, high = ends
    size = table_size(name, high, batch.counts, shared=shared)
    if low < 0 or high >= size:
        bad = low if low < 0 else high
        at = int((batch.ids[name] == bad).nonzero()[0])
        lone = name == batch.lone_key  # its ids from the number of nodes on were moved up by one
        raise ValueError(
            f"keys[{name!r}][{at}] is {bad - (lone and bad > 0)}, outside 0..{size - 1 - lone}; ids must be global, "
            f"dense and below counts[{name!r}]" + (f", or {LONE} for a token alone in its node" if lone else "")
        )
    return size


def id_range(ids: Tensor) -> tuple[int, int]:
    """Return the smallest and largest id; (0, -1) without any."""
    if ids.numel() == 0:
        return 0, -1
    low, high = torch.aminmax(ids)
    return int(low), int(high)
