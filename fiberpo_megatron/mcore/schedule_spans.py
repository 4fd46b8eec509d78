"""This module names the passes of Megatron's schedules in a profile: the micro-batches, forward and backward, and what
travels between pipeline stages.

Megatron's schedules start and stop named timers around each of them if the model's config has any. While a profile
runs, this module gives them timers that mark spans; without a profile the config has none, and nothing is done.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.utils import get_model_config

from fiberpo_megatron.spans import marking, span

PASSES = {"forward-compute": "forward", "backward-compute": "backward"}
"""Megatron's timers of a micro-batch's passes."""


@contextmanager
def named_passes(chunks: Sequence[torch.nn.Module], micro_batches: Sequence[int]) -> Iterator[None]:
    """Name the passes of one schedule over the model's chunks, if a profile runs. `micro_batches` are the numbers of
    its micro-batches in their order."""
    if not marking():
        yield
        return
    config = get_model_config(chunks[0])
    before, config.timers = config.timers, _Timers(_order(len(chunks), micro_batches, config))
    try:
        yield
    finally:
        config.timers = before


def _order(chunks: int, micro_batches: Sequence[int], config: object) -> list[tuple[int, int]]:
    """Return (micro-batch, chunk) of every forward pass of this rank, in the order of the schedule."""
    if chunks == 1:
        return [(index, 0) for index in micro_batches]
    group = config.microbatch_group_size_per_vp_stage  # type: ignore[attr-defined]
    return list(get_schedule_table(len(micro_batches), chunks, group))


class _Timers:
    """Takes the place of Megatron's `Timers`: calling it with a name gives what can be started and stopped."""

    def __init__(self, order: Sequence[tuple[int, int]]) -> None:
        self._order = order
        self._chunks = 1 + max((chunk for _, chunk in order), default=0)
        self._begun: Counter[str] = Counter()
        self._open: dict[str, AbstractContextManager[object]] = {}

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer":
        return _Timer(self, name)

    def start(self, name: str) -> None:
        opened = self._open[name] = span(self._label(name))
        opened.__enter__()

    def stop(self, name: str) -> None:
        self._open.pop(name).__exit__(None, None, None)

    def _label(self, name: str) -> str:
        if name not in PASSES:
            return name.replace("-", " ")
        place = self._begun[name]
        self._begun[name] += 1
        micro_batch, chunk = self._order[place % len(self._order)]
        if name == "backward-compute":
            chunk = self._chunks - 1 - chunk  # chunks are passed in the opposite order
        return f"{PASSES[name]} micro-batch {micro_batch}" + (f", chunk {chunk}" if self._chunks > 1 else "")


class _Timer:
    """Is one named timer; see `megatron.core.timers.Timer`."""

    def __init__(self, timers: _Timers, name: str) -> None:
        self._timers, self._name = timers, name

    def start(self, barrier: bool = False) -> None:
        self._timers.start(self._name)

    def stop(self, barrier: bool = False) -> None:
        self._timers.stop(self._name)
