"""This looks into the folder of a step that is being generated, from outside the run."""

from pathlib import Path

from fiberpo_megatron.rollout.finished import _ORIGIN, _SEGMENT, _records
from fiberpo_megatron.rollout.segment_records import HEAD_BYTES, Place, place_of


def finished_indices(folder: Path) -> set[int]:
    """Return the indices of the prompts whose groups the folder holds, whatever run wrote them."""
    found: set[int] = set()
    for path in folder.glob("rank_*"):
        with path.open("rb") as file:
            found |= {record.prompt for record in _records(file)} - {_ORIGIN, _SEGMENT}
    return found


def segment_places(folder: Path) -> list[Place]:
    """Return which segments of responses the folder holds, each as often as it was kept."""
    found = []
    for path in folder.glob("rank_*"):
        with path.open("rb") as file:
            for record in _records(file):
                if record.prompt == _SEGMENT:
                    file.seek(record.begin)
                    found.append(place_of(file.read(HEAD_BYTES)))
    return found
