"""This module lets updated parameters travel while other work goes on (`parallel.overlap_param_gather`).

With the distributed optimizer each data-parallel rank updates its shard of every bucket of parameters. After a step all
buckets are sent for at once, those of the first layers first; a layer waits for its own in its next forward pass. All
others that read parameters have to call `finish` first. It only waits: the ranks need not call it together.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor


class ParameterGather:
    """Starts and finishes the gathering of parameters; it does nothing where that does not overlap."""

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._chunks = [chunk for chunk in chunks if chunk.use_forward_hook]
        for chunk in self._chunks:
            chunk.overlap_param_gather_with_optimizer_step = True  # a layer that waits need not send for the next

    def begin(self) -> None:
        """Request the updated parameters. Every rank calls it, after the optimizer's step."""
        self.finish()
        for group in self._groups():
            group.start_param_sync()

    def finish(self) -> None:
        """Wait until all parameters that were sent for are here."""
        for group in self._groups():
            if group.param_gather_handle is not None:
                group.param_gather_handle.wait()
                group.param_gather_handle = None

    def _groups(self) -> Iterator[Any]:
        for chunk in self._chunks:
            yield from reversed(chunk.bucket_groups)  # Megatron fills buckets from the last layer on
            yield from reversed(chunk.expert_parallel_bucket_groups)


def wait_for(chunk: Any, parameter: Tensor) -> None:
    """Wait for a parameter that is read without its module's forward pass, where its gathering overlaps."""
    if getattr(chunk, "use_forward_hook", False) and parameter in chunk.param_to_bucket_group:
        chunk.param_to_bucket_group[parameter].finish_param_sync(skip_next_bucket_dispatch=True)
