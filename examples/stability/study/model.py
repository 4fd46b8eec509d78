"""This module is a small transformer of which R copies, one a run, are computed at once.

A run is so small that most of its time would go into starting operations; copies share them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from study.tasks import VOCABULARY, Task


@dataclass(frozen=True)
class Shape:
    """Holds the sizes of the model."""

    positions: int
    width: int = 32
    layers: int = 2
    heads: int = 2
    hidden: int = 64
    vocabulary: int = VOCABULARY

    @classmethod
    def of(cls, task: Task) -> Shape:
        """Return the shape that fits a task's prompts and answers."""
        return cls(task.prompt_length + task.answer_length)

    def parameters(self) -> dict[str, tuple[int, int]]:
        """Return the shape of every parameter of one copy."""
        width = self.width
        found = {"tokens": (self.vocabulary, width), "places": (self.positions, width)}
        for layer in range(self.layers):
            found[f"{layer}.qkv"] = (width, 3 * width)
            found[f"{layer}.out"] = (width, width)
            found[f"{layer}.up"] = (width, self.hidden)
            found[f"{layer}.down"] = (self.hidden, width)
        found["head"] = (width, self.vocabulary)
        return found


def initial_parameters(shape: Shape, seed: int) -> Tensor:
    """Return the random parameters [P] of one copy."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, (rows, columns) in shape.parameters().items():
        scale = 0.5 if name in ("tokens", "places") else rows**-0.5
        parts.append(scale * torch.randn(rows * columns, generator=generator))
    return torch.cat(parts)


class Model:
    """Computes next-token logits and samples of R copies; `flat` [R, P] holds their parameters."""

    def __init__(self, shape: Shape, flat: Tensor) -> None:
        self.shape, self.runs = shape, flat.shape[0]
        self.flat = flat.clone()
        self.weights: dict[str, Tensor] = {}
        start = 0
        for name, sizes in shape.parameters().items():
            end = start + math.prod(sizes)
            # Views of `flat`, so that the optimizer steps all parameters at once.
            self.weights[name] = self.flat[:, start:end].view(self.runs, *sizes).requires_grad_(True)
            start = end

    def gradient(self, value: Tensor) -> Tensor:
        """Return the gradient [R, P] of a scalar."""
        parts = torch.autograd.grad(value, list(self.weights.values()))
        return torch.cat([part.reshape(self.runs, -1) for part in parts], 1)

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        runs, _, length = tokens.shape
        offset = self.shape.vocabulary * torch.arange(runs).view(-1, 1, 1)
        table = self.weights["tokens"].reshape(runs * self.shape.vocabulary, -1)
        return F.embedding(tokens + offset, table) + self.weights["places"][:, None, start : start + length]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        runs, rows, length, width = x.shape
        return torch.bmm(x.reshape(runs, rows * length, width), self.weights[name]).view(runs, rows, length, -1)

    def _heads(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        runs, rows, length, width = x.shape
        qkv = self._linear(F.rms_norm(x, (width,)), f"{layer}.qkv")
        q, k, v = qkv.view(runs * rows, length, 3, self.shape.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _mix(self, x: Tensor, mixed: Tensor, layer: int) -> Tensor:
        """Return the layer's output from its input and what the heads mixed."""
        x = x + self._linear(mixed.transpose(1, 2).reshape(x.shape), f"{layer}.out")
        hidden = F.relu(self._linear(F.rms_norm(x, x.shape[-1:]), f"{layer}.up"))
        return x + self._linear(hidden, f"{layer}.down")

    def _head(self, x: Tensor) -> Tensor:
        return self._linear(F.rms_norm(x, x.shape[-1:]), "head")

    def logits(self, tokens: Tensor, first: int) -> Tensor:
        """Return next-token logits [R, B, T - first, V] of tokens [R, B, T], at the positions from `first`."""
        length = tokens.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        x = self._embed(tokens, 0)
        for layer in range(self.shape.layers):
            q, k, v = self._heads(x, layer)
            if layer == self.shape.layers - 1:  # the last layer's output at the prompt's positions has no reader
                x, q, mask = x[:, :, first:], q[:, :, first:], mask[first:]
            x = self._mix(x, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), layer)
        return self._head(x)

    @torch.no_grad()
    def sample(
        self, prompts: Tensor, samples: int, length: int, generators: Sequence[Generator]
    ) -> tuple[Tensor, Tensor]:
        """Return `samples` answers of each prompt [R, B, P], and their log-probs: both [R, B x samples, length].

        Every copy draws from its own generator.
        """
        runs, rows, size = prompts.shape
        total, every = size + length - 1, rows * samples
        # Gumbel noise makes the largest of (log-prob + noise) a sample of the softmax.
        noise = torch.stack(
            [torch.empty(length, every, self.shape.vocabulary).exponential_(generator=g) for g in generators], 1
        ).log_()
        mask = torch.ones(size, size, dtype=torch.bool).tril()
        cache = []
        x = self._embed(prompts, 0)
        for layer in range(self.shape.layers):
            q, k, v = self._heads(x, layer)
            room = torch.empty(2, runs * every, self.shape.heads, total, k.shape[-1])
            room[:, :, :, :size] = torch.stack([k, v]).repeat_interleave(samples, 1)
            cache.append(room)
            x = self._mix(x, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), layer)
        logits = self._head(x[:, :, -1:]).repeat_interleave(samples, 1)
        tokens = torch.empty(runs, every, length, dtype=torch.long)
        log_probs = torch.empty(runs, every, length)
        for step in range(length):
            scores = logits.squeeze(2).log_softmax(-1)
            chosen = (scores - noise[step]).argmax(-1, keepdim=True)
            tokens[:, :, step], log_probs[:, :, step] = chosen.squeeze(2), scores.gather(2, chosen).squeeze(2)
            if step < length - 1:
                logits = self._next(chosen, size + step, cache)
        return tokens, log_probs

    def _next(self, tokens: Tensor, at: int, cache: Sequence[Tensor]) -> Tensor:
        """Return the logits [R, B, 1, V] after one more token a row."""
        x = self._embed(tokens, at)
        for layer, room in enumerate(cache):
            q, k, v = self._heads(x, layer)
            room[0, :, :, at : at + 1], room[1, :, :, at : at + 1] = k, v
            keys, values = room[:, :, :, : at + 1]
            x = self._mix(x, F.scaled_dot_product_attention(q, keys, values), layer)
        return self._head(x)
