"""This module serves the trajectories and token records of runs to the page."""

from collections.abc import Mapping
from pathlib import Path

from starlette.routing import Route


def routes(folders: Mapping[str, Path]) -> list[Route]:
    """Return the addresses below api/trajectories/ for the run folder of each key."""
    return []
