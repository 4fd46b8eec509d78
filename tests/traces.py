"""Reads traces in Chrome's trace event format, and refuses what the format does not have."""

import gzip
import json
from pathlib import Path
from typing import Any

PHASES = set("BEXibnesftPNODMVvRc")
"""https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU: the types of events ("ph")."""


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the events of a trace after checking what every event of the format needs."""
    trace = json.loads(gzip.decompress(path.read_bytes()))
    events: list[dict[str, Any]] = trace["traceEvents"]
    for event in events:
        assert isinstance(event["name"], str) and event["ph"] in PHASES
        assert {"pid", "tid"} <= event.keys() or event["ph"] == "M"
        if event["ph"] != "M":
            assert isinstance(event["ts"], int | float) and event["ts"] >= 0
        if event["ph"] == "X":
            assert isinstance(event["dur"], int | float) and event["dur"] >= 0
    return events


def named(events: list[dict[str, Any]]) -> list[str]:
    """Return the names of what our own code marked, in the order of their beginnings."""
    marked = [event for event in events if event["ph"] == "X" and event.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(marked, key=lambda event: event["ts"])]
