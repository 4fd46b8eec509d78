"""This module reads the trajectories of a run folder: their texts in rollouts/, and what is known of their tokens in
tokens/."""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from fiberpo_megatron.telemetry.rollout_log import EVALUATIONS, ROLLOUTS
from fiberpo_megatron.telemetry.step_files import StepFiles
from fiberpo_megatron.telemetry.token_log import TOKENS, read_tokens
from fiberpo_megatron.watch.inside import Outside, inside

Kind = Literal["train", "eval"]
MOST_LINES = 4096
"""Trajectories of a file that are read."""
LARGEST_FILE = 256 << 20
"""Bytes of a file of texts that is read."""
FILES_KEPT = 12
"""Files whose contents are remembered."""


@dataclass(frozen=True)
class Stored:
    """Holds one trajectory of a step, as far as its files say something."""

    kind: Kind
    step: int
    """Number of the training step, or the number of steps done before an evaluation."""
    trajectory: int
    text: Mapping[str, Any]
    """The line of its text; empty without one."""
    tokens: Mapping[str, Any]
    """The line of its tokens; empty without one."""

    def of(self, name: str, default: Any = None) -> Any:
        """Return an entry of either line."""
        return self.text.get(name, self.tokens.get(name, default))


class TrajectoryFiles:
    """Reads the trajectories of one run folder; what was read last is remembered until its file changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: OrderedDict[Path, tuple[tuple[int, int], list[dict[str, Any]], list[str]]] = OrderedDict()
        self._lock = Lock()

    def steps(self) -> dict[str, Any]:
        """Return which steps and evaluations have files, and sentences about what is odd in the folders."""
        problems: list[str] = []
        texts, tokens, evaluations = (self._stored(files, problems) for files in (ROLLOUTS, TOKENS, EVALUATIONS))
        return {
            "train": [[step, step in tokens] for step in sorted(texts | tokens)],
            "eval": sorted(evaluations),
            "problems": problems,
        }

    def read(self, kind: Kind, step: int, *, tokens: bool = True) -> tuple[list[Stored], list[str]]:
        """Return the trajectories of a step in their order, and sentences about damaged files.

        Without `tokens` the records of tokens are only read where the step has no texts.
        """
        files = EVALUATIONS if kind == "eval" else ROLLOUTS
        texts, problems = self._records(files, step)
        known: dict[int, dict[str, Any]] = {}
        if kind == "train" and (tokens or not texts):
            found, more = self._records(TOKENS, step)
            problems = [*problems, *more]
            known = {record["trajectory"]: record for record in found}
        of_text: dict[int, dict[str, Any]] = {}
        for place, record in enumerate(texts):  # files of earlier versions do not number their trajectories
            number = record.get("trajectory", place)
            of_text[number if isinstance(number, int) else place] = record
        stored = []
        for number in sorted(of_text.keys() | known.keys()):
            text, token = of_text.get(number, {}), known.get(number, {})
            if text and token and _token_ids(text) != token.get("tokens", {}).get("id"):
                problems = [*problems, f"tokens/ of step {step}: trajectory {number} is not that of rollouts/"]
                token = {}
            stored.append(Stored(kind, step, number, text, token))
        return stored, problems

    def _stored(self, files: StepFiles, problems: list[str]) -> set[int]:
        try:
            inside(self.folder, files.folder)
            return {step for step, _ in files.stored(self.folder)[0]}
        except (OSError, Outside) as error:
            problems.append(f"{files.folder}/ cannot be read ({type(error).__name__}: {error})")
            return set()

    def _records(self, files: StepFiles, step: int) -> tuple[list[dict[str, Any]], list[str]]:
        path = files.path(self.folder, step)
        try:
            path = inside(self.folder, files.folder, path.name)
            facts = os.stat(path)
        except FileNotFoundError:
            return [], []
        except (OSError, Outside) as error:
            return [], [f"{files.folder}/{path.name} cannot be read ({type(error).__name__}: {error})"]
        state = facts.st_mtime_ns, facts.st_size
        with self._lock:
            remembered = self._known.get(path)
            if remembered is not None and remembered[0] == state:
                self._known.move_to_end(path)
                return remembered[1], remembered[2]
        records, problems = read_tokens(path) if files is TOKENS else _read_texts(path, facts.st_size)
        whole = [record for record in records if _is_finite(record) and _has_columns(record)]
        if len(whole) < len(records):
            problems.append(f"{files.folder}/{path.name}: a line holds something that no run writes")
        with self._lock:
            self._known[path] = state, whole, problems
            while len(self._known) > FILES_KEPT:
                self._known.popitem(last=False)
        return whole, problems


def _read_texts(path: Path, size: int) -> tuple[list[dict[str, Any]], list[str]]:
    name = f"rollouts/{path.name}"
    if size > LARGEST_FILE:
        return [], [f"{name} has {size >> 20} MiB, more than the {LARGEST_FILE >> 20} MiB that are read"]
    records: list[dict[str, Any]] = []
    odd: list[int] = []
    try:
        with path.open("rb") as file:
            for number, line in zip(range(1, MOST_LINES + 1), file):
                try:
                    record = json.loads(line.decode(errors="replace")) if line.strip() else {}
                except (ValueError, RecursionError):
                    record = None
                if isinstance(record, dict):
                    records += [record] if record else []
                else:
                    odd.append(number)
    except OSError as error:
        return records, [f"{name} cannot be read ({type(error).__name__}: {error})"]
    return records, [f"{name}: {len(odd)} lines are no trajectories, the first is line {odd[0]}"] if odd else []


def sequences(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the token sequences of a record of rollouts/: the trajectory's own, then its branches."""
    branches = text.get("branches")
    return [text, *(one for one in branches if isinstance(one, dict))] if isinstance(branches, list) else [text]


def _token_ids(text: Mapping[str, Any]) -> list[Any] | None:
    """The tokens behind the first prompt, as tokens/ has them; None if the record has none."""
    own, *branches = sequences(text)
    parts = [own.get("token_ids"), *(branch.get(name) for branch in branches for name in ("prompt_ids", "token_ids"))]
    known = [part for part in parts if isinstance(part, list)]
    return [token for part in known for token in part] if len(known) == len(parts) else None


def _has_columns(record: Mapping[str, Any]) -> bool:
    """Return whether the tokens of a record are lists by name, and its coefficients lists of lists."""
    columns = record.get("tokens", {})
    if not isinstance(columns, dict) or not all(isinstance(values, list) for values in columns.values()):
        return False
    return all(isinstance(row, list) for row in columns.get("coefficient", []))


def _is_finite(record: Mapping[str, Any]) -> bool:
    """Return whether JSON can hold the record; Python reads NaN, and 1e999 as infinity."""
    try:
        json.dumps(record, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True
