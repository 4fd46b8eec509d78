"""Find runs of equal ids: packed tokens sum and gather by run, in chunks that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fiberpo_megatron.fibration.tokens import TokenBatch

CPU_CHUNK = 1 << 17
"""Tokens per chunk on a CPU: each float32 temporary is 512 KiB."""
GPU_CHUNK = 1 << 20
"""Tokens per chunk on a GPU: so many slices of a term still add up exactly (`slices.float_slice_bits`)."""

BLOCK = 64
"""Tokens that are worked on at once where runs are long, whether they belong to one run or to several."""
LONG_RUN = BLOCK
"""Mean tokens per run from which blocks of tokens, or a loop over runs, pay off on a CPU."""


@dataclass(frozen=True)
class Runs:
    """Holds the maximal stretches of tokens with equal ids of every key, cut at chunk boundaries.

    In a packed batch there are about as many runs as trajectories, so everything about ids is
    decided on runs; tokens in any other order are right too, only with more runs.
    """

    size: int
    """Tokens of the batch."""
    chunk: int
    """Tokens per chunk; the last one may hold fewer."""
    starts: Tensor
    """[R] first token of each run."""
    lengths: Tensor
    """[R] tokens per run."""
    ids: dict[str, Tensor]
    """Per key, the id of each run, int64 [R]."""

    @cached_property
    def chunks(self) -> list[tuple[int, int, int, int]]:
        """Return, per chunk: first token, end token, first run, end run."""
        firsts = list(range(0, self.size, self.chunk))
        run_at = torch.searchsorted(self.starts, self.starts.new_tensor(firsts)).tolist()
        ends, run_ends = [*firsts[1:], self.size], [*run_at[1:], self.starts.shape[0]]
        return list(zip(firsts, ends, run_at, run_ends, strict=True)) if firsts else []

    @cached_property
    def slices(self) -> list[RunSlice]:
        """Return the runs of each chunk, made once for all passes."""
        return [RunSlice(end - start, self.lengths[at:stop], at, stop) for start, end, at, stop in self.chunks]


def find_runs(batch: TokenBatch, keys: tuple[str, ...]) -> Runs:
    """Return the runs of the batch over `keys`; ids are taken from the first token of each run."""
    size, device = batch.size, batch.log_ratio.device
    chunk = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    half = chunk // 2 if batch.expert_share is not None else chunk
    if size == 0:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return Runs(size, chunk, none, none, dict.fromkeys(keys, none))
    if not keys:
        starts = torch.arange(0, size, half, device=device)
        return Runs(size, half, starts, torch.diff(starts, append=starts.new_tensor([size])), {})
    cut = torch.zeros(size, dtype=torch.bool, device=device)
    cut[::half] = True
    for key in keys:
        ids = batch.ids[key]
        cut[1:] |= ids[1:] != ids[:-1]
    starts = _places(cut)
    if device.type != "cpu" or size < LONG_RUN * starts.shape[0]:  # with experts, tensors [n, P]
        chunk = half
    lengths = torch.diff(starts, append=starts.new_tensor([size]))
    return Runs(size, chunk, starts, lengths, {key: batch.ids[key].index_select(0, starts).long() for key in keys})


def _places(marked: Tensor) -> Tensor:
    """The places of n flags that are set, int64 [k]. Where they are few, it is faster to look at eight at a time."""
    whole = marked.shape[0] // 8 * 8
    words = marked[:whole].view(torch.int64).nonzero()
    near = (words * 8 + torch.arange(8, device=marked.device)).view(-1)
    rest = torch.arange(whole, marked.shape[0], device=marked.device)
    near = torch.cat([near, rest])
    return near[marked[near]]


@dataclass(frozen=True)
class RunSlice:
    """Holds the runs of one chunk: n tokens in r runs, which are runs first..end of the batch."""

    tokens: int
    lengths: Tensor
    first: int
    end: int

    @property
    def rows(self) -> slice:
        """Return where these runs are among the batch's."""
        return slice(self.first, self.end)

    @cached_property
    def run_of_token(self) -> Tensor:
        """Return the run of each token within the slice, int32 [n]: it stays for all passes."""
        index = torch.arange(self.end - self.first, dtype=torch.int32, device=self.lengths.device)
        return torch.repeat_interleave(index, self.lengths, output_size=self.tokens)

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Return the token range of each run within the slice."""
        ends = self.lengths.cumsum(0).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    @property
    def long_on_cpu(self) -> bool:
        """Return whether work on blocks of tokens, or a loop over runs, costs less than passes token by token."""
        return self.lengths.device.type == "cpu" and self.tokens >= LONG_RUN * (self.end - self.first)

    @cached_property
    def last(self) -> Tensor:
        """Return the last token of each run within the slice, int64 [r]."""
        return self.lengths.cumsum(0) - 1

    @cached_property
    def longest(self) -> int:
        """Return the tokens of the longest run."""
        return int(self.lengths.max())

    def sums(self, values: Tensor) -> Tensor:
        """Return the sums of float64 [n] or [n, C] values over each run: [r] or [r, C].

        They are exact where every sum of consecutive values is, as those of slices of `slices.float_slice_bits` are.
        """
        ends = values.cumsum(0).index_select(0, self.last)
        return torch.diff(ends, dim=0, prepend=torch.zeros_like(ends[:1]))

    def float_sums(self, values: Tensor) -> Tensor:
        """Return the float64 sums of [n] or [n, C] values over each run, rounded: [r] or [r, C]."""
        return torch.segment_reduce(values.double(), "sum", lengths=self.lengths, axis=0, unsafe=True)

    def spread(self, per_run: Tensor) -> Tensor:
        """Return [r] or [r, C] values handed to their tokens: [n] or [n, C]."""
        if per_run.dim() > 1 or not self.long_on_cpu:
            return per_run.index_select(0, self.run_of_token)
        first, others, run_of_others = self.blocks
        out = per_run.new_empty(self.tokens)
        out[: first.shape[0] * BLOCK].view(-1, BLOCK).copy_(per_run.index_select(0, first).unsqueeze(1))
        return out.index_copy_(0, others, per_run.index_select(0, run_of_others))

    @cached_property
    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return how long runs fall into whole blocks of tokens.

        The run in which each block begins, [b]; the tokens that are not of that run, or behind the last block, [a]; and
        the runs of these tokens, [a].
        """
        end = self.tokens // BLOCK * BLOCK
        whole, rest = self.run_of_token[:end].view(-1, BLOCK), self.run_of_token[end:]
        first = whole[:, 0].contiguous()
        cut = (first != whole[:, -1]).nonzero()
        of_cut = whole.index_select(0, cut.squeeze(1))
        at = (of_cut != of_cut[:, :1]).view(-1).nonzero().squeeze(1)
        tokens = (cut * BLOCK + torch.arange(BLOCK)).view(-1).index_select(0, at)
        others = torch.cat([tokens, torch.arange(end, self.tokens)])
        return first, others, torch.cat([of_cut.view(-1).index_select(0, at), rest])


def iterate(runs: Runs) -> Iterator[tuple[slice, RunSlice]]:
    """Yield the chunks of the batch with their runs."""
    for (start, end, _, _), its_runs in zip(runs.chunks, runs.slices, strict=True):
        yield slice(start, end), its_runs
