"""This module knows the files of a run folder of which one step has one, such as rollouts/step_000012.jsonl."""

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepFiles:
    """These are the files of one kind in one folder of a run."""

    folder: str
    """Name of the folder in the run folder."""
    kind: str
    """First part of a file's name."""
    suffix: str

    def path(self, run_folder: Path, step: int) -> Path:
        """Return the file of one step."""
        return run_folder / self.folder / f"{self.kind}_{step:06d}{self.suffix}"

    def stored(self, run_folder: Path) -> tuple[list[tuple[int, Path]], list[str]]:
        """Return (step, file) of all steps that have a file, ascending, and the names of everything else in the folder.

        Names that begin with a dot are ignored: a file has such a name while it is being written. Raises OSError.
        """
        folder, name = run_folder / self.folder, re.compile(f"{self.kind}_([0-9]{{6,12}}){re.escape(self.suffix)}")
        found, odd = [], []
        for entry in os.scandir(folder) if folder.is_dir() else ():
            match = name.fullmatch(entry.name)
            if match is not None and entry.is_file():
                found.append((int(match[1]), folder / entry.name))
            elif not entry.name.startswith("."):
                odd.append(entry.name)
        return sorted(found), sorted(odd)

    def prune(self, run_folder: Path, keep: int) -> None:
        """Delete files until at most `keep` (2 or more) are left.

        The newest half stays. Of the older steps those stay that are multiples of a power of two, the smallest with
        which they fit: a selection over the whole run, step 0 included, so that people can see how it began.
        """
        files, _ = self.stored(run_folder)
        if len(files) <= keep:
            return
        old = files[: len(files) - (keep - keep // 2)]
        stride = 1
        while sum(step % stride == 0 for step, _ in old) > keep // 2:
            stride *= 2
        for step, path in old:
            if step % stride:
                path.unlink(missing_ok=True)


def spread(count: int, total: int) -> list[int]:
    """Return `count` places spread evenly over `total`, or all of fewer; ascending."""
    count = min(count, total)
    return [i * total // count for i in range(count)]
