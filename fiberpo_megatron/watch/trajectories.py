"""This module serves the trajectories and token records of runs to the page."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.routing import Route

from fiberpo_megatron.watch.api import Refused, answer
from fiberpo_megatron.watch.trajectory_files import Kind, Stored, TrajectoryFiles, sequences

MOST_ROWS = 500
"""Trajectories that one answer lists."""
SEARCH_S = 3.0
"""Seconds after which a search through all steps answers with what it has found."""
EXCERPT = 240
"""Characters of a text in a list."""


def routes(folders: Mapping[str, Path]) -> list[Route]:
    """Return the addresses below api/trajectories/ for the run folder of each key."""
    views = Views({key: TrajectoryFiles(folder) for key, folder in folders.items()})
    return [
        Route("/api/trajectories/steps", answer(views.steps)),
        Route("/api/trajectories/find", answer(views.find)),
        Route("/api/trajectories/one", answer(views.one)),
        Route("/api/trajectories/compare", answer(views.compare)),
    ]


@dataclass(frozen=True)
class Filter:
    """Says which trajectories are wanted; None lets all pass."""

    text: str
    """What prompt, response, answer or id contain, in lower case."""
    domain: str | None
    truncated: bool | None
    correct: bool | None
    reward: tuple[float, float]
    length: tuple[float, float]
    lag: tuple[float, float]

    @classmethod
    def of(cls, query: QueryParams) -> Self:
        """Return the filter of a request. Raises Refused for a bound that is no number."""
        return cls(
            text=query.get("q", "").strip().lower(),
            domain=query.get("domain") or None,
            truncated=_choice(query.get("truncated")),
            correct=_choice(query.get("correct")),
            reward=_bounds(query, "reward"),
            length=_bounds(query, "length"),
            lag=_bounds(query, "lag"),
        )

    def passes(self, one: Stored, row: Mapping[str, Any]) -> bool:
        """Return whether a trajectory, with its row of the list, is wanted."""
        if self.domain is not None and row["domain"] != self.domain:
            return False
        for name, choice in (("truncated", self.truncated), ("correct", self.correct)):
            if choice is not None and row[name] is not choice:
                return False
        for name in ("reward", "length", "lag"):
            low, high = getattr(self, name)
            if (low, high) != _ALL and not (row[name] is not None and low <= row[name] <= high):
                return False
        return not self.text or any(self.text in text.lower() for text in _texts(one))


_ALL = (float("-inf"), float("inf"))


class Views:
    """Answers the requests of the view."""

    def __init__(self, runs: Mapping[str, TrajectoryFiles]) -> None:
        self._runs = runs

    def steps(self, request: Request) -> Any:
        """Return which steps of a run have trajectories."""
        return self._run(request.query_params, "run").steps()

    def find(self, request: Request) -> Any:
        """Return the rows of a step's trajectories that pass a filter, or of all steps', the newest first."""
        query = request.query_params
        run, kind, wanted = self._run(query, "run"), _kind(query), Filter.of(query)
        if query.get("step"):
            stored, problems = run.read(kind, _whole(query, "step"))
            rows = [(one, _row(one)) for one in stored]
            domains = sorted({row["domain"] for _, row in rows if row["domain"] is not None})
            found = [row for one, row in rows if wanted.passes(one, row)][:MOST_ROWS]
            return {"rows": found, "of": len(rows), "domains": domains, "problems": problems, "searched": 1, "left": 0}
        return self._search(run, kind, wanted)

    def _search(self, run: TrajectoryFiles, kind: Kind, wanted: Filter) -> Any:
        listed = run.steps()
        steps = listed["eval"] if kind == "eval" else [step for step, _ in listed["train"]]
        rows: list[dict[str, Any]] = []
        domains: set[str] = set()
        count, searched, deadline = 0, 0, time.monotonic() + SEARCH_S
        for step in reversed(steps):
            if len(rows) >= MOST_ROWS or time.monotonic() > deadline:
                break
            stored, _ = run.read(kind, step, tokens=False)
            for one in stored:
                row = _row(one)
                domains |= {row["domain"]} if row["domain"] is not None else set()
                rows += [row] if wanted.passes(one, row) else []
            count, searched = count + len(stored), searched + 1
        return {
            "rows": rows[:MOST_ROWS],
            "of": count,
            "domains": sorted(domains),
            "problems": listed["problems"],
            "searched": searched,
            "left": len(steps) - searched,
        }

    def one(self, request: Request) -> Any:
        """Return everything that is known of one trajectory."""
        query = request.query_params
        step, number = _whole(query, "step"), _whole(query, "trajectory")
        stored, problems = self._run(query, "run").read(_kind(query), step)
        for one in stored:
            if one.trajectory == number:
                return {"row": _row(one), "text": one.text, "tokens": one.tokens or None, "problems": problems}
        raise Refused(f"step {step} has no trajectory {number}; it may have been deleted meanwhile")

    def compare(self, request: Request) -> Any:
        """Return the answers of two evaluations to the same prompts: [{prompt, left, right}, ...]."""
        query = request.query_params
        sides = [
            self._run(query, f"{side}_run").read("eval", _whole(query, f"{side}_step")) for side in ("left", "right")
        ]
        left, right = ({_prompt_of(one): one for one in stored} for stored, _ in sides)
        pairs = [
            {
                "prompt": str(one.of("prompt", "")),
                "domain": _text(one.of("domain")),
                "index": one.of("index"),
                "answer": one.of("answer"),
                "left": _answer_of(one),
                "right": _answer_of(right[key]),
            }
            for key, one in left.items()
            if key in right
        ]
        alone = len(left) + len(right) - 2 * len(pairs)
        return {"pairs": pairs, "alone": alone, "problems": [text for _, problems in sides for text in problems]}

    def _run(self, query: QueryParams, name: str) -> TrajectoryFiles:
        key = query.get(name, "")
        if key not in self._runs:
            raise Refused(f"there is no run {key!r}")
        return self._runs[key]


def _row(one: Stored) -> dict[str, Any]:
    """What a list shows of a trajectory."""
    versions = _versions(one)
    known = one.tokens.get("tokens", {})
    return {
        "kind": one.kind,
        "step": one.step,
        "trajectory": one.trajectory,
        "domain": _text(one.of("domain")),
        "id": _text(one.of("id")),
        "reward": _number(one.of("reward")),
        "correct": bool(one.of("correct")),
        "truncated": _is_truncated(one),
        "failure": _text(one.text.get("failure")),
        "length": _length(one),
        "lag": one.step - min(versions) if versions and one.kind == "train" else None,
        "prompt": _excerpt(one.of("prompt", "")),
        "response": _excerpt(one.text.get("response") or "".join(map(str, known.get("text") or []))),
        "recorded": bool(one.tokens),
        "stopped": _stopped_share(known),
    }


def _stopped_share(known: Mapping[str, Any]) -> float | None:
    """The share of the sampled tokens whose last coefficient is zero; None when none is known."""
    epochs = known.get("coefficient") or []
    values = [value for value in (epochs[-1] if epochs else []) if isinstance(value, int | float)]
    return round(sum(value == 0 for value in values) / len(values), 4) if values else None


def _versions(one: Stored) -> list[int]:
    spans = one.text.get("weight_versions")
    if isinstance(spans, list):
        texts = [span[0] for span in spans if isinstance(span, list) and span]
        return [int(text) for text in texts if isinstance(text, str) and text.isdecimal() and len(text) < 12]
    versions = one.tokens.get("tokens", {}).get("weight_version") or []
    return [version for version in versions if isinstance(version, int) and version >= 0]


def _is_truncated(one: Stored) -> bool:
    cut = any(sequence.get("finish_reason") == "length" for sequence in sequences(one.text))
    return cut or one.tokens.get("truncated") is True


def _length(one: Stored) -> int:
    """Tokens behind the prompts, of all branches."""
    known = [ids for ids in (sequence.get("token_ids") for sequence in sequences(one.text)) if isinstance(ids, list)]
    if any(known):
        return sum(map(len, known))
    ids = one.tokens.get("tokens", {}).get("id")
    return len(ids) if isinstance(ids, list) else 0


def _texts(one: Stored) -> Sequence[str]:
    known = one.tokens.get("tokens", {}).get("text") if not one.text else None
    answered = one.text.get("response") or "".join(map(str, known or []))
    return [str(value) for value in (one.of("prompt", ""), answered, one.of("answer", ""), one.of("id", ""))]


def _prompt_of(one: Stored) -> tuple[str, str]:
    """What two evaluations have in common where they ask the same."""
    return str(one.of("domain")), str(one.of("index", one.of("id")))


def _answer_of(one: Stored) -> dict[str, Any]:
    row = _row(one)
    names = ("step", "trajectory", "reward", "correct", "truncated", "length")
    return {name: row[name] for name in names} | {"response": str(one.text.get("response", ""))}


def _excerpt(text: Any) -> str:
    whole = str(text)
    return whole if len(whole) <= EXCERPT else whole[:EXCERPT] + "…"


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _kind(query: QueryParams) -> Kind:
    return "eval" if query.get("kind") == "eval" else "train"


def _choice(text: str | None) -> bool | None:
    return {"yes": True, "no": False}.get(text or "")


def _bounds(query: QueryParams, name: str) -> tuple[float, float]:
    try:
        low, high = (float(query.get(f"{name}_{end}") or other) for end, other in (("min", "-inf"), ("max", "inf")))
    except ValueError:
        raise Refused(f"the bounds of {name} are no numbers") from None
    return low, high


def _whole(query: QueryParams, name: str) -> int:
    text = query.get(name, "")
    if not text.isdecimal() or len(text) > 12:
        raise Refused(f"{name} = {text!r} is no number of a {name}")
    return int(text)
