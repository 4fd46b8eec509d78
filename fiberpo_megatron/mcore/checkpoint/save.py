"""This module writes a checkpoint, either at once or in a thread while the training goes on.

Tensors go into a hidden sibling folder, one file per rank that has any to write; then rank 0 describes, syncs and
renames it. A folder with
the final name is therefore complete; an interrupted or failed save leaves earlier ones as they are.
"""

import copy
import errno
import json
import shutil
import textwrap
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException

from fiberpo_megatron import durable
from fiberpo_megatron.mcore.checkpoint.folders import Description, FileMark, mark, mark_all, partial_folder
from fiberpo_megatron.mcore.checkpoint.owners import keep_to_owner
from fiberpo_megatron.mcore.checkpoint.state import random_states, sharded_state
from fiberpo_megatron.mcore.parallel import exchange
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout
from fiberpo_megatron.mcore.versions import save_common

Marks = dict[str, FileMark]
Describe = Callable[[Mapping[str, FileMark]], Description]


class Saving:
    """Represents a checkpoint that is being written; every rank makes one, and later calls `finish`.

    In the background the tensors are first copied to the host; what is saved is the state at the moment of the call.
    Raises RuntimeError on every rank, naming folder and cause, when a file cannot be written.
    """

    def __init__(self, policy: Any, folder: Path, describe: Describe, *, background: bool) -> None:
        self._layout: ParallelLayout = policy.layout
        self._folder = folder
        self._describe = describe
        partial = partial_folder(folder)
        self._run(lambda: _fresh(partial), only_first=True)
        sharded = sharded_state(policy, is_loading=False)
        sharded |= random_states(self._layout.host_group)
        tensors, common = save_preprocess(sharded)
        self._run(lambda: save_common(common, str(partial)), only_first=True)
        if background:
            tensors = _copied(tensors)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
        state = mcore_to_pyt_state_dict(by_key, False)
        group = self._layout.writers(bool(state), background)
        if background and state:
            executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._written = executor.submit(_write_tensors, state, partial, group)
            executor.shutdown(wait=False)
        else:
            self._written = Future()
            try:
                self._written.set_result(_write_tensors(state, partial, group) if state else {})
            except (Exception, CheckpointException) as error:  # torch's exception is a BaseException
                self._written.set_exception(error)

    def written(self) -> bool:
        """Return whether every rank has written its part, so that `finish` does not wait. Every rank calls this."""
        return not self._layout.any_rank(not self._written.done())

    def finish(self) -> None:
        """Wait until all is written, and give the checkpoint its name. Every rank calls this."""
        marks: Marks = {}
        self._run(lambda: marks.update(self._written.result()))
        for message in exchange.gather_bytes(exchange.text_to_bytes(json.dumps(marks)), self._layout.host_group):
            marks |= {name: FileMark(*values) for name, values in json.loads(exchange.bytes_to_text(message)).items()}
        self._run(lambda: self._name(marks), only_first=True)

    def _name(self, marks: Marks) -> None:
        """Describe, sync and rename the folder."""
        partial, folder = partial_folder(self._folder), self._folder
        save_config(CheckpointingConfig("torch_dist", 1), str(partial))
        durable.sync_tree(partial)
        self._describe(mark_all(partial, known=marks)).write(partial)
        keep_to_owner(partial)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            durable.rename(folder, old)
            durable.rename(partial, folder)
            durable.remove_tree(old)
        else:
            durable.rename(partial, folder)

    def _run(self, part: Callable[[], None], only_first: bool = False) -> None:
        """Run `part` (on rank 0 only, if asked); raise RuntimeError on every rank when it failed on one."""
        error = None
        if self._layout.rank == 0 or not only_first:
            try:
                part()
            except (Exception, CheckpointException) as caught:
                error = cause(caught, self._folder)
        try:
            self._layout.agree(error, f"saving the checkpoint {self._folder} (earlier ones are untouched)")
        except RuntimeError:
            if self._layout.rank == 0:
                shutil.rmtree(partial_folder(self._folder), ignore_errors=True)
            raise


def cause(error: BaseException, folder: Path) -> str:
    """Return the first failure inside torch's collective exceptions; the text says so when the disk is full."""
    inner = error
    if isinstance(error, CheckpointException) and error.failures:
        inner = next(iter(error.failures.values()))[0]
    text = f"{type(inner).__name__}: {textwrap.shorten(str(inner), 300)}"
    full = isinstance(inner, OSError) and inner.errno in (errno.ENOSPC, errno.EDQUOT)
    free = shutil.disk_usage(folder.parent).free / 2**20
    if full or free < 1:  # torch's file writer replaces the error number
        text += f" (the disk is full: {free:.0f} MiB are free; make room or lower checkpoint.keep)"
    return text


def _fresh(partial: Path) -> None:
    """Make an empty folder to write into."""
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _copied(part: Any) -> Any:
    """Return a sharded state dict on the host, whose data no later step changes. Replicas, which other ranks write,
    stay as they are."""
    if isinstance(part, dict):
        return {key: _copied(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return type(part)(_copied(value) for value in part)
    if isinstance(part, ShardedTensor | ShardedObject) and not is_main_replica(part.replica_id):
        return part
    if isinstance(part, ShardedTensor):
        copied = copy.copy(part)
        copied.data = None if part.data is None else part.data.detach().to("cpu", copy=True)
        return copied
    if isinstance(part, ShardedObject):
        copied = copy.copy(part)
        copied.data = copy.deepcopy(part.data)
        return copied
    return part


def _write_tensors(state: dict[str, Any], partial: Path, group: Any) -> Marks:
    """Write this rank's file of the group's in this process and sync it; return its mark.

    torch sends the description of every tensor through the group's first rank. Ranks whose tensors are all replicas of
    others' are therefore not in the group: a checkpoint has as many files as ranks with tensors that no other writes.

    Megatron's own strategy forks writer processes and a queue manager, which takes seconds for a small model, is not
    allowed in daemonic processes, and hangs if psutil is missing. The format is the same.
    """
    torch_checkpoint.save(
        state,
        storage_writer=torch_checkpoint.FileSystemWriter(partial, thread_count=1, sync_files=True),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        process_group=group,
    )
    return {path.name: mark(path) for path in partial.glob(f"__{dist.get_rank(group)}_*")}
