"""This module answers what the page asks for: runs, panels, curves, one step, alarms and engines, all as JSON."""

import hashlib
import json
import secrets
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fiberpo_megatron.telemetry.alarms import ALARMS_FILE, read_alarms
from fiberpo_megatron.telemetry.engine_states import ENGINES_FILE, read_engine_states
from fiberpo_megatron.telemetry.metrics import describe, steps_done
from fiberpo_megatron.telemetry.panels import panel_sections
from fiberpo_megatron.watch.curves import Window, curve
from fiberpo_megatron.watch.following import FollowedRun
from fiberpo_megatron.watch.inside import Outside, inside
from fiberpo_megatron.watch.phases import phases
from fiberpo_megatron.watch.state import StateWatcher, planned_steps
from fiberpo_megatron.watch.summary import figures

MOST_CURVES = 400
"""Curves that one request may ask for."""
LARGEST_FILE = 1 << 26
"""Bytes of a config, of alarms and of engine states that are read; a larger file is refused."""
_START = secrets.token_hex(4)
"""Tells answers of this server from those of one that ran before at the same address."""


class Refused(ValueError):
    """The request asks for something that does not exist; the message is shown to whoever asked."""


def routes(runs: Mapping[str, FollowedRun]) -> list[Route]:
    """Return the addresses below api/ for the followed run of each key."""
    views = Views(runs)
    return [
        Route("/api/runs", answer(views.runs)),
        Route("/api/panels", answer(views.panels)),
        Route("/api/curves", answer(views.curves)),
        Route("/api/step", answer(views.step)),
        Route("/api/phases", answer(views.phases)),
        Route("/api/summary", answer(views.summary)),
        Route("/api/config", answer(views.config)),
        Route("/api/alarms", answer(views.alarms)),
        Route("/api/engines", answer(views.engines)),
    ]


def answer(view: Callable[[Request], Any]) -> Callable[[Request], Response]:
    """Return an endpoint that sends what `view` returns as JSON; Starlette runs it in a thread of its own.

    The answer has a fingerprint (ETag): a browser that asks again for the same content gets 304 and no body.
    """

    def endpoint(request: Request) -> Response:
        try:
            found = view(request)
        except (Refused, Outside) as error:
            return JSONResponse({"error": str(error)}, 404)
        body = json.dumps(found, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")
        tag = f'"{_START}-{hashlib.blake2b(body, digest_size=10).hexdigest()}"'
        headers = {"etag": tag, "cache-control": "private, no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type="application/json", headers=headers)

    return endpoint


class Views:
    """Answers the requests of the page."""

    def __init__(self, runs: Mapping[str, FollowedRun]) -> None:
        self._runs = runs
        self._watchers = {key: StateWatcher(run) for key, run in runs.items()}
        self._config, self._open_alarms = _Cached(_config, "config.toml"), _Cached(_open_alarms, ALARMS_FILE)

    def runs(self, _: Request) -> Any:
        """Return what is known of each run, for the head of the page."""
        return [self._about(key, run) for key, run in self._runs.items()]

    def _about(self, key: str, run: FollowedRun) -> dict[str, Any]:
        with run.lock:
            kinds = {
                kind: {
                    "records": len(table),
                    "first": steps_done(kind, int(table.steps[0])),
                    "last": steps_done(kind, int(table.steps[-1])),
                }
                for kind, table in run.tables.items()
                if len(table)
            }
        config, _ = self._config.of(run)
        planned = planned_steps(config, "train" if "train" in kinds or "sft" not in kinds else "sft")
        alarms = self._open_alarms.of(run)
        return {
            "key": key,
            "name": run.folder.resolve().name,
            "folder": str(run.folder),
            "version": run.version,
            "read": round(run.progress.share, 3),
            "problem": run.problem,
            "odd_lines": run.odd_lines,
            "kinds": kinds,
            "planned_steps": planned,
            "state": asdict(self._watchers[key].state(planned)),
            "alarms": alarms,
        }

    def panels(self, request: Request) -> Any:
        """Return the sections of panels for all metrics of the runs that are named."""
        names: dict[Any, dict[str, None]] = {}
        for run in self._chosen(request):
            with run.lock:
                for kind, table in run.tables.items():
                    names.setdefault(kind, {}).update(dict.fromkeys(table.names))
        return [asdict(section) for section in panel_sections({kind: list(found) for kind, found in names.items()})]

    def curves(self, request: Request) -> Any:
        """Return the points of each curve of each run: {run: [curve, ...]}."""
        query = request.query_params
        asked = query.getlist("curve")
        runs = self._chosen(request)
        if len(asked) * len(runs) > MOST_CURVES:
            raise Refused(f"{len(asked)} curves of {len(runs)} runs are more than {MOST_CURVES}")
        wanted = [_curve(text) for text in asked]
        window = Window(
            begin=_whole(query.get("from"), None),
            end=_whole(query.get("to"), None),
            points=min(5000, max(20, _whole(query.get("points"), None) or 600)),
            smooth=max(0, _whole(query.get("smooth"), None) or 0),
            stack=query.get("form") == "stack",
        )
        return {key: [curve(run, one, window) for one in wanted] for key, run in zip(query.getlist("run"), runs)}

    def step(self, request: Request) -> Any:
        """Return the numbers of one step, by default of the last one: {step, previous, next, values, units}."""
        run = self._chosen(request)[0]
        kind = request.query_params.get("kind", "train")
        wanted = _whole(request.query_params.get("step"), None)
        with run.lock:
            table = run.tables.get(kind)
            if table is None or not len(table):
                raise Refused(f"the run has no records of kind {kind} yet")
            steps = table.steps
            if wanted is None:
                place = len(steps) - 1
            else:
                place = min(len(steps) - 1, int(np.searchsorted(steps, wanted - steps_done(kind, 0))))
            values = table.row(int(steps[place])) or {}
            done = [
                steps_done(kind, int(steps[at])) for at in (place, max(0, place - 1), min(len(steps) - 1, place + 1))
            ]
            ends = [steps_done(kind, int(steps[0])), steps_done(kind, int(steps[-1]))]
        return {
            "step": done[0],
            "previous": done[1],
            "next": done[2],
            "first": ends[0],
            "last": ends[1],
            "values": values,
            "titles": {name: describe(name).title for name in values},
            "units": {name: describe(name).unit for name in values},
        }

    def phases(self, request: Request) -> Any:
        """Return the seconds of the phases of one step, or their mean over the steps before it (over=N)."""
        run, query = self._chosen(request)[0], request.query_params
        found = phases(
            run, self._config.of(run)[0], _whole(query.get("step"), None), _whole(query.get("over"), None) or 1
        )
        if found is None:
            raise Refused("the run has no records of training steps yet")
        return found

    def summary(self, request: Request) -> Any:
        """Return the headline figures of a run."""
        key = request.query_params.get("run", "")
        run = self._chosen(request)[0]
        about = self._about(key, run)
        running = about["state"]["name"] in ("running", "quiet")
        return [asdict(figure) for figure in figures(run, about["planned_steps"], running)]

    def config(self, request: Request) -> Any:
        """Return the resolved config of a run."""
        config, problem = self._config.of(self._chosen(request)[0])
        return {"config": json.loads(json.dumps(config, default=str)), "problem": problem}

    def alarms(self, request: Request) -> Any:
        """Return all events of a run's alarms."""
        return [
            asdict(alarm) | {"done": alarm.done} for alarm in _read(self._chosen(request)[0], ALARMS_FILE, read_alarms)
        ]

    def engines(self, request: Request) -> Any:
        """Return the last known states of a run's engines, or null."""
        states = _read(self._chosen(request)[0], ENGINES_FILE, read_engine_states)
        return None if states is None else asdict(states)

    def _chosen(self, request: Request) -> list[FollowedRun]:
        keys = request.query_params.getlist("run")
        if not keys:
            raise Refused("the address names no run (run=KEY)")
        for key in keys:
            if key not in self._runs:
                raise Refused(f"there is no run {key!r}; the runs are {', '.join(self._runs)}")
        return [self._runs[key] for key in keys]


class _Cached:
    """Keeps what was found in a file of a run folder until the file changes: the page asks every two seconds."""

    def __init__(self, find: Callable[[FollowedRun], Any], name: str) -> None:
        self._find, self._name = find, name
        self._found: dict[Path, tuple[tuple[int, ...], Any]] = {}

    def of(self, run: FollowedRun) -> Any:
        """Return what `find` returns for a run."""
        try:
            state = inside(run.folder, self._name).stat()
            signature: tuple[int, ...] = (state.st_ino, state.st_size, state.st_mtime_ns)
        except (OSError, Outside):
            signature = ()
        kept = self._found.get(run.folder)
        if kept is None or kept[0] != signature:
            kept = self._found[run.folder] = (signature, self._find(run))
        return kept[1]


def _curve(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    texts = found if isinstance(found, dict) else {}
    if not all(isinstance(texts.get(name), str) for name in ("kind", "metric")):
        raise Refused(f"a curve is an object with kind and metric, this is {text[:80]!r}")
    return texts


def _whole(text: str | None, default: int | None) -> int | None:
    if text is None or text == "":
        return default
    try:
        return max(-(10**15), min(10**15, int(float(text))))
    except (ValueError, OverflowError) as error:
        raise Refused(f"{text[:40]!r} is no number") from error


def _read(run: FollowedRun, name: str, read: Callable[[Path], Any]) -> Any:
    """Return what `read` finds in a file of the run's folder."""
    path = inside(run.folder, name)
    try:
        if path.is_file() and path.stat().st_size > LARGEST_FILE:
            raise Refused(f"{name} has more than {LARGEST_FILE} bytes")
        return read(run.folder.resolve())
    except (OSError, ValueError) as error:
        raise Refused(f"{name} cannot be read ({error})") from error


def _config(run: FollowedRun) -> tuple[dict[str, Any], str]:
    """Return the resolved config, empty if there is none, and what is wrong with it."""
    try:
        path = inside(run.folder, "config.toml")
        if not path.is_file():
            return {}, "config.toml does not exist"
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE)
        return tomllib.loads(text.decode()), ""
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"config.toml cannot be read ({type(error).__name__}: {error})"


def _open_alarms(run: FollowedRun) -> int:
    """Return the number of alarms that are raised now."""
    try:
        raised = {alarm.rule: alarm.state == "raised" for alarm in _read(run, ALARMS_FILE, read_alarms)}
    except (Refused, Outside):
        return 0
    return sum(raised.values())
