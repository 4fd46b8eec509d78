"""Saving and resuming: Megatron's distributed checkpoints, written so that a crash loses no earlier one.

A checkpoint is written into a hidden sibling folder, synced, described by checkpoint.json and only then
renamed. What bears its final name is complete; an interrupted or failed save leaves earlier ones as they are.
"""

import errno
import json
import shutil
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from fiberpo_megatron.mcore.architecture import read_architecture
from fiberpo_megatron.mcore.checkpoint_folders import (
    CheckpointError,
    Description,
    describe,
    latest,
    packages,
    partial_folder,
    prune,
    sizes,
    step_folder,
    step_of,
)
from fiberpo_megatron.mcore.checkpoint_state import (
    random_state,
    restore_random_state,
    restore_state,
    sharded_state,
)
from fiberpo_megatron.mcore.layout import ParallelLayout
from fiberpo_megatron.mcore.weights_files import sync_path, sync_tree

__all__ = ["CheckpointError", "describe", "latest", "load", "prune", "save", "step_folder"]


class CheckpointedPolicy(Protocol):
    """What is saved."""

    layout: ParallelLayout
    hf_config: Mapping[str, Any]
    models: list[Any]
    optimizer: Any
    scheduler: Any


def save(policy: CheckpointedPolicy, folder: str | Path, state: Mapping[str, object]) -> None:
    """Write model, optimizer, schedule, every rank's random state and the caller's JSON-able `state`.

    Every rank calls it, on a file system that all share. A folder of that name is replaced. Raises
    RuntimeError on every rank, naming folder and cause, when a file cannot be written; earlier ones are
    untouched.
    """
    layout = policy.layout
    folder = Path(folder)
    partial = partial_folder(folder)
    stages = _Stages(layout, folder)
    stages.run(lambda: _fresh(partial), only_first=True)
    sharded = sharded_state(policy, is_loading=False)
    sharded["random_state"] = random_state(layout.rank, layout.world_size, with_data=True)
    tensors, common = save_preprocess(sharded)
    stages.run(lambda: TorchCommonSaveStrategy("torch", 1).save_common(common, partial), only_first=True)
    stages.run(lambda: _write_tensors(tensors, partial, layout))
    stages.run(lambda: _finish(policy, partial, folder, state), only_first=True)


class _Stages:
    """Runs the parts of a save so that a failure on one rank stops all of them at the same place."""

    def __init__(self, layout: ParallelLayout, folder: Path) -> None:
        self._layout = layout
        self._folder = folder

    def run(self, part: Callable[[], None], only_first: bool = False) -> None:
        """Run `part` (on rank 0 only, if asked); raise RuntimeError on every rank when it failed on one."""
        error = None
        if self._layout.rank == 0 or not only_first:
            try:
                part()
            except (Exception, CheckpointException) as caught:  # torch's is a BaseException
                error = _cause(caught, self._folder)
        try:
            self._layout.agree(error, f"saving the checkpoint {self._folder} (earlier ones are untouched)")
        except RuntimeError:
            if self._layout.rank == 0:
                shutil.rmtree(partial_folder(self._folder), ignore_errors=True)
            raise


def _cause(error: BaseException, folder: Path) -> str:
    """The first failure inside torch's collective exceptions, with the space left when the disk is full."""
    inner = error
    if isinstance(error, CheckpointException) and error.failures:
        inner = next(iter(error.failures.values()))[0]
    text = f"{type(inner).__name__}: {textwrap.shorten(str(inner), 300)}"
    full = isinstance(inner, OSError) and inner.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in text:
        free = shutil.disk_usage(folder.parent).free / 2**20
        text += f" ({free:.0f} MiB are free there; make room or lower checkpoint.keep)"
    return text


def _fresh(partial: Path) -> None:
    """An empty folder to write into."""
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _write_tensors(tensors: dict[str, Any], partial: Path, layout: ParallelLayout) -> None:
    """One file a rank, written by this process and synced.

    Megatron's own strategy forks writer processes and a queue manager: seconds for a small model, not allowed
    in daemonic processes, and a hang where psutil is missing. The format is the same.
    """
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    torch_checkpoint.save(
        mcore_to_pyt_state_dict(by_key, False),
        storage_writer=torch_checkpoint.FileSystemWriter(partial, thread_count=1, sync_files=True),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        process_group=layout.host_group,
    )


def _finish(policy: CheckpointedPolicy, partial: Path, folder: Path, state: Mapping[str, object]) -> None:
    """Describe, sync and rename."""
    save_config(CheckpointingConfig("torch_dist", 1), str(partial))
    sync_tree(partial)
    Description(
        step=step_of(folder),
        layout=_dimensions(policy.layout),
        model=_model_fields(policy),
        packages=packages(),
        state=state,
        files=sizes(partial),
    ).write(partial)
    sync_path(partial)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
    sync_path(folder.parent)


def load(policy: CheckpointedPolicy, folder: str | Path) -> dict[str, object]:
    """Read a checkpoint written under any layout into the policy; returns the caller's state.

    Every rank calls it. Random states are restored only when the layout is the one that wrote them. Raises
    CheckpointError on every rank when the checkpoint is missing, incomplete, damaged or of another model; the
    policy is unchanged unless the damage is met while tensors are read.
    """
    layout = policy.layout
    folder = Path(folder)
    description: Description | None = None
    error = None
    try:
        description = describe(folder)
        _check_model(description, policy, folder)
    except CheckpointError as caught:
        error = str(caught)
    _agree(layout, error, folder)
    assert description is not None
    same_layout = dict(description.layout) == _dimensions(layout)
    wanted = sharded_state(policy, is_loading=True)
    if same_layout:
        wanted["random_state"] = random_state(layout.rank, layout.world_size, with_data=False)
    try:
        loaded = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
        restore_state(policy, loaded)
    except (Exception, CheckpointException) as caught:  # a damaged file raises many types
        error = f"{_cause(caught, folder)}; the checkpoint is damaged or of another model, take an earlier one"
    _agree(layout, error, folder)
    if same_layout:
        restore_random_state(loaded["random_state"])
    return dict(description.state)


def _agree(layout: ParallelLayout, error: str | None, folder: Path) -> None:
    layout.agree(error, f"loading the checkpoint {folder}", raises=CheckpointError)


def _dimensions(layout: ParallelLayout) -> dict[str, int]:
    """Ranks along every dimension."""
    parallel = layout.parallel
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
    return {**{name: getattr(parallel, name) for name in names}, "data": layout.data_size}


def _model_fields(policy: CheckpointedPolicy) -> dict[str, object]:
    """What decides the tensors of a checkpoint: architecture, precision, kind of optimizer."""
    # Through JSON, as a description that is read back: it has lists for tuples.
    fields: dict[str, object] = json.loads(json.dumps(asdict(read_architecture(policy.hf_config))))
    for free in ("initializer_range", "max_positions"):
        fields.pop(free)
    fields["dtype"] = str(next(policy.models[0].parameters()).dtype).removeprefix("torch.")
    fields["distributed_optimizer"] = policy.layout.parallel.distributed_optimizer
    return fields


def _check_model(description: Description, policy: CheckpointedPolicy, folder: Path) -> None:
    ours = _model_fields(policy)
    differing = [
        f"{key} {description.model.get(key)} (this run: {ours.get(key)})"
        for key in sorted(ours.keys() | description.model.keys())
        if description.model.get(key) != ours.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{folder} was written for another model: {', '.join(differing)}; resume with the config that "
            "wrote it, or start in another run folder"
        )
