"""This module is the only way in which the server reaches a file: by a path that stays inside a run folder."""

from pathlib import Path


class Outside(ValueError):
    """This error says that a path leads out of the run folder, by its words or through a symbolic link."""


def inside(folder: Path, *parts: str) -> Path:
    """Return the path `parts` of a run folder with all links followed; what it names need not exist.

    Raises Outside where the path leads out of the folder: by "..", as an absolute path, or through a symbolic link.
    Links that stay in the folder are followed. The check holds for what the folder contains at this moment; whoever can
    write into a run folder could as well write other contents into its files.
    """
    if any("\0" in part for part in parts):
        raise Outside("a path has no zero bytes")
    root = folder.resolve()
    path = root.joinpath(*parts).resolve()
    if not path.is_relative_to(root):
        raise Outside(f"{'/'.join(parts)} leads out of the run folder")
    return path
