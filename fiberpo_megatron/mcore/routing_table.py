"""This module keeps the experts of many tokens in host memory, in one or two bytes for each layer and slot."""

import numpy as np
import torch
from torch import Tensor

from fiberpo_megatron.types import expert_dtype


class RoutingTable:
    """Holds the experts that this rank knows: one row for each of its tokens, with the MoE layers of its stage.

    Rows come in blocks, one for each micro-batch that was recorded or one for all that an engine returned. Where there
    is a GPU the blocks are pinned, so that copies do not make the host wait.
    """

    def __init__(self, experts: int, layers: int, top_k: int, device: torch.device) -> None:
        self.dtype = torch.from_numpy(np.zeros(0, expert_dtype(experts))).dtype
        self._row = (layers, top_k)
        self._device = device
        self._blocks: list[tuple[Tensor, Tensor]] = []
        self._indexed = 0
        self._tokens = self._slots = torch.empty(0, dtype=torch.int64)
        self._starts = torch.zeros(1, dtype=torch.int64)

    def __len__(self) -> int:
        """Return the number of rows, those of padding included."""
        return sum(len(tokens) for tokens, _ in self._blocks)

    @property
    def nbytes(self) -> int:
        """Return the bytes of host memory that the rows take, without the index of their tokens."""
        return sum(experts.nbytes for _, experts in self._blocks)

    def empty(self, rows: int, *, on_host: bool = True) -> Tensor:
        """Return [rows, layers, top_k] of the table's type with arbitrary content, on the host or on the device."""
        if on_host:
            pinned = self._device.type == "cuda"
            return torch.empty(rows, *self._row, dtype=self.dtype, pin_memory=pinned)
        return torch.empty(rows, *self._row, dtype=self.dtype, device=self._device)

    def add(self, tokens: Tensor, experts: Tensor) -> None:
        """Take the experts [m, layers, top_k] of the flat tokens [m], which are -1 at padding.

        A token that is known already gets the new ones. Experts on the device are copied without waiting.
        """
        if experts.device.type != "cpu" or experts.dtype != self.dtype:
            held = self.empty(len(experts))
            held.copy_(experts, non_blocking=True)
            experts = held
        self._blocks.append((tokens, experts))

    def find(self, tokens: Tensor) -> Tensor:
        """Return int64 [m], the row of each flat token; -1 for tokens that are not in the table."""
        self._index()
        if not len(self._tokens):
            return torch.full((len(tokens),), -1)
        tokens = tokens.long()
        at = torch.searchsorted(self._tokens, tokens).clamp(max=len(self._tokens) - 1)
        return torch.where(self._tokens[at] == tokens, self._slots[at], -1)

    def rows(self, slots: Tensor) -> Tensor:
        """Return [m, layers, top_k] on the host: the experts in rows that `find` named, arbitrary ones for -1."""
        self._index()
        found = self.empty(len(slots))
        if not len(self):
            return found.zero_()
        slots = slots.clamp(min=0)
        block = torch.searchsorted(self._starts, slots, right=True) - 1
        numbers = block.unique().tolist()
        if len(numbers) == 1:  # the usual case: the micro-batch was recorded as a whole
            return torch.index_select(self._blocks[numbers[0]][1], 0, slots - self._starts[block], out=found)
        for number in numbers:
            inside = (block == number).nonzero().squeeze(1)
            found[inside] = self._blocks[number][1][slots[inside] - self._starts[number]]
        return found

    def _index(self) -> None:
        """Sort the tokens, if rows have come since the last time; wait until their copies have arrived."""
        if self._indexed == len(self._blocks):
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # once a training step
        lengths = torch.tensor([0, *(len(tokens) for tokens, _ in self._blocks)])
        self._starts = lengths.cumsum(0)[:-1]
        tokens, order = torch.cat([tokens for tokens, _ in self._blocks]).long().sort(stable=True)
        last = torch.ones(len(tokens), dtype=torch.bool)
        last[:-1] = tokens[1:] != tokens[:-1]
        last &= tokens >= 0
        self._tokens, self._slots = tokens[last], order[last]
        self._indexed = len(self._blocks)
