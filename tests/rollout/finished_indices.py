"""This looks into the folder of a step that is being generated, from outside the run."""

from pathlib import Path

from fiberpo_megatron.rollout.finished import _ORIGIN, _records


def finished_indices(folder: Path) -> set[int]:
    """Return the indices of the prompts whose groups the folder holds, whatever run wrote them."""
    found: set[int] = set()
    for path in folder.glob("rank_*"):
        with path.open("rb") as file:
            found |= {record.prompt for record in _records(file)} - {_ORIGIN}
    return found
