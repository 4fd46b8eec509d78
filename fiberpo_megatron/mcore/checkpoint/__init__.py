"""This package saves and resumes with Megatron's distributed checkpoints, written so that a crash loses no earlier one.

`save.py` writes; `folders.py` decides whether a folder is complete and undamaged, and `owners.py` whether others could
have written it; `reading.py` and `metadata.py` read it without executing anything.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from fiberpo_megatron.mcore.checkpoint.folders import (
    CheckpointError,
    DamagedCheckpoint,
    Description,
    best,
    complete_steps,
    damaged_files,
    describe,
    latest,
    packages,
    prune,
    step_folder,
    step_of,
)
from fiberpo_megatron.mcore.checkpoint.owners import untrusted
from fiberpo_megatron.mcore.checkpoint.reading import Contents, TensorStrategy, read_contents
from fiberpo_megatron.mcore.checkpoint.save import Saving, cause
from fiberpo_megatron.mcore.checkpoint.state import (
    random_state,
    restore_random_state,
    restore_state,
    sharded_state,
)
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.optimizers import Optimizer, optimizer_name
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout
from fiberpo_megatron.mcore.versions import load_checkpoint

__all__ = [
    "CheckpointError",
    "DamagedCheckpoint",
    "Saving",
    "begin_save",
    "best",
    "complete_steps",
    "describe",
    "latest",
    "load",
    "prune",
    "save",
    "step_folder",
]


class CheckpointedPolicy(Protocol):
    """Declares what a checkpoint saves."""

    layout: ParallelLayout
    hf_config: Mapping[str, Any]
    models: list[Any]
    optimizer: Any
    optimizer_kind: Optimizer
    scheduler: Any


def save(policy: CheckpointedPolicy, folder: str | Path, state: Mapping[str, object]) -> None:
    """Write model, optimizer, schedule, every rank's random state and the caller's JSON-able `state`.

    Every rank calls this, on a file system that all share. A folder of that name is replaced. Raises RuntimeError on
    every rank, naming folder and cause, when a file cannot be written; earlier checkpoints are untouched.
    """
    begin_save(policy, folder, state, background=False).finish()


def begin_save(
    policy: CheckpointedPolicy, folder: str | Path, state: Mapping[str, object], *, background: bool = True
) -> Saving:
    """Begin to write what `save` writes; a thread writes copies of the tensors, and training may go on until
    `finish`."""
    folder = Path(folder)

    def described(files: Mapping[str, Any]) -> Description:
        return Description(
            step=step_of(folder),
            layout=_dimensions(policy.layout),
            model=_model_fields(policy),
            packages=packages(),
            state=state,
            files=files,
        )

    return Saving(policy, folder, described, background=background)


def load(policy: CheckpointedPolicy, folder: str | Path, *, trust_others: bool = False) -> dict[str, object]:
    """Read a checkpoint written under any layout into the policy; return the caller's state.

    Every rank calls this. Random states are restored only when the layout is the one that wrote them. Nothing in the
    files is executed. Raises on every rank, before the policy is changed: DamagedCheckpoint when files are missing or
    not as they were written; CheckpointError when it is of another model, when its description or common state is not
    what a save writes, or when another user could have written it and `trust_others` is false. Raises CheckpointError
    as well, after the policy may have been changed, for tensors that cannot be read.
    """
    layout = policy.layout
    folder = Path(folder)
    description = _whole(layout, folder)
    error = None
    try:
        error = untrusted(folder) if layout.rank == 0 and not trust_others else None
    except OSError as caught:
        error = str(caught)
    _agree(layout, error, folder)
    _agree(layout, _other_model(description, policy, folder), folder)
    contents = _contents(layout, folder, description)
    same_layout = dict(description.layout) == _dimensions(layout)
    wanted = sharded_state(policy, is_loading=True)
    if same_layout:
        wanted["random_state"] = random_state(layout.rank, layout.world_size)
    try:
        loaded = load_checkpoint(
            wanted,
            str(folder),
            common=contents.common,
            tensors=TensorStrategy(contents),
            strict=StrictHandling.RAISE_UNEXPECTED,
        )
        restore_state(policy, loaded)
        if same_layout:
            restore_random_state(loaded["random_state"])
    except (Exception, CheckpointException) as caught:  # a damaged file raises many types
        error = f"{cause(caught, folder)}; the checkpoint is of another model or version; use an earlier one"
    _agree(layout, error, folder)
    return dict(description.state)


def _contents(layout: ParallelLayout, folder: Path, description: Description) -> Contents:
    """Return what a checkpoint holds beside its tensors; every rank reads it."""
    error = None
    try:
        contents = read_contents(folder, description.files)
    except (CheckpointError, OSError) as caught:
        error = str(caught)
    _agree(layout, error, folder)
    return contents


def _whole(layout: ParallelLayout, folder: Path) -> Description:
    """Return the description of a checkpoint whose files all have their checksums.

    Rank 0 looks at the folder, so that not every rank asks the file system about every file. The ranks share the
    reading.
    """
    error = text = None
    try:
        text = describe(folder).text() if layout.rank == 0 else None
    except (DamagedCheckpoint, OSError) as caught:
        error = str(caught)
    _agree(layout, error, folder, raises=DamagedCheckpoint)
    description = Description.of_text(layout.share_text(text))
    try:
        error = damaged_files(folder, description, part=layout.rank, parts=layout.world_size)
    except OSError as caught:
        error = str(caught)
    _agree(layout, error, folder, raises=DamagedCheckpoint)
    return description


def _agree(
    layout: ParallelLayout, error: str | None, folder: Path, raises: type[CheckpointError] = CheckpointError
) -> None:
    layout.agree(error, f"loading the checkpoint {folder}", raises=raises)


def _dimensions(layout: ParallelLayout) -> dict[str, int]:
    """Return the number of ranks along every dimension."""
    parallel = layout.parallel
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
    return {**{name: getattr(parallel, name) for name in names}, "data": layout.data_size}


def _model_fields(policy: CheckpointedPolicy) -> dict[str, object]:
    """Return what decides the tensors of a checkpoint: architecture, precision, kind of optimizer."""
    # Converted through JSON, because a description that is read back has lists for tuples.
    described: dict[str, object] = json.loads(json.dumps(asdict(read_architecture(policy.hf_config))))
    fields = dict(_flat(described))
    for free in ("initializer_range", "max_positions"):
        fields.pop(free)
    fields["dtype"] = str(next(policy.models[0].parameters()).dtype).removeprefix("torch.")
    fields["distributed_optimizer"] = policy.layout.parallel.distributed_optimizer
    fields["optimizer"] = optimizer_name(policy.optimizer_kind)
    return fields


def _flat(fields: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield nested fields by dotted name, so that a message names exactly the field that differs."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _other_model(description: Description, policy: CheckpointedPolicy, folder: Path) -> str | None:
    ours = _model_fields(policy)
    theirs = {"optimizer": "adam", **description.model}  # earlier versions had no other, and did not record it
    differing = [
        f"{key} {theirs.get(key)} (this run: {ours.get(key)})"
        for key in sorted(ours.keys() | theirs.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if not differing:
        return None
    return (
        f"{folder} was written for another model: {', '.join(differing)}; resume with the config that "
        "wrote it, or start in another run folder"
    )
