"""This module keeps the whole RolloutBatch of each step on disk, to train on it again without an engine.

<folder>/step_000012.npz          every array of the batch, and what says where it comes from
<folder>/step_000012.routes-00003.npz  the engines' expert routing of one leader's share, where it was asked for
<folder>/step_000013.unfinished/  the groups of a step that is being generated, see rollout/finished.py, and in
                                  refills/ those that take the places of dropped ones
<folder>/index.jsonl              one readable line a step
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from fiberpo_megatron import durable
from fiberpo_megatron.printable import json_line, printable
from fiberpo_megatron.types import Prompt, RolloutBatch, batch_of, expert_dtype, named_arrays

FORMAT = 1
INDEX = "index.jsonl"
_STEP = re.compile(r"step_(\d+)\.npz")
_UNFINISHED = re.compile(r"step_(\d+)\.unfinished")
_ORIGIN, _NAMES, _ROUTES, _FILTERED = "origin", "names", "routes", "filtered"
_HELD = ("held_rows", "routed_experts")
_REQUIRED = {"tokens", "response_mask", "rollout_log_probs", "lengths", "rewards", "correct", "groups", "domains"}
_log = logging.getLogger(__name__)


class DumpError(ValueError):
    """This error says which stored rollouts cannot be used, why, and what to do."""


@dataclass(frozen=True)
class Origin:
    """This says where a step's trajectories come from."""

    step: int
    weights: str
    """Version of the weights that sampled them."""
    prompts: str
    """Digest of the step's prompts, see `prompts_digest`."""
    settings: Mapping[str, Any]
    """Settings that a run must share to train on them, by name; JSON values."""
    run: str
    """Digest of everything that decides the weights of a step: only with the same one are the weights of a version
    that was trained again the same weights."""
    sampling: str = ""
    """Digest of everything but the weights that decides the samples."""
    format: int = FORMAT


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return 16 hex digits that identify the prompts' places and token ids, in order."""
    described = repr([(prompt.domain, prompt.number, prompt.token_ids) for prompt in prompts])
    return blake2b(described.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class RolloutDump:
    """This is a folder of stored steps. One rank writes; reading checks the file's own checksums."""

    folder: Path

    def path(self, step: int) -> Path:
        """Return the file of one step."""
        return self.folder / f"step_{step:06d}.npz"

    def unfinished(self, step: int) -> Path:
        """Return the folder of a step's finished groups while it is being generated."""
        return self.folder / f"step_{step:06d}.unfinished"

    def steps(self) -> list[int]:
        """Return the stored steps, ascending."""
        return self._steps(_STEP)

    def unfinished_steps(self) -> list[int]:
        """Return the steps that have a folder of finished groups, ascending."""
        return self._steps(_UNFINISHED)

    def _steps(self, name: re.Pattern[str]) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(found[1]) for path in self.folder.iterdir() if (found := name.fullmatch(path.name)))

    def write_routes(self, batch: RolloutBatch, origin: Origin, leader: int) -> None:
        """Write the routes that a leader holds. All leaders do, before one of them calls `write`."""
        with durable.explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(batch, name) for name in _HELD}
        with durable.replaced(self._routes(origin.step, leader)) as file:
            np.savez(file, allow_pickle=False, **{_ORIGIN: _described(origin)}, **arrays)

    def read_routes(self, step: int, leader: int, leaders: int) -> dict[str, Any]:
        """Return `held_rows` and `routed_experts`, ascending by row, of a share of the files: every `leaders`th from
        that of `leader` on. It is empty where the step has none. Raises DumpError for a missing or damaged file.
        """
        with self._open(self.path(step)) as file:
            _origin(file)
            count = int(file[_ROUTES]) if _ROUTES in file.files else 0
            origin = file[_ORIGIN].tobytes()
        found = []
        for number in range(leader, count, leaders):
            with self._open(self._routes(step, number)) as file:
                if file[_ORIGIN].tobytes() != origin:
                    raise DumpError(f"{self._routes(step, number)} is of other rollouts; make the dump again")
                if len(file["held_rows"]):  # a leader all of whose trajectories were dropped has none
                    found.append([file[name] for name in _HELD])
        if not found:
            return {}
        return {name: np.concatenate(arrays) for name, arrays in zip(_HELD, zip(*found), strict=True)}

    def _routes(self, step: int, leader: int) -> Path:
        return self.folder / f"step_{step:06d}.routes-{leader:05d}.npz"

    def write(
        self, batch: RolloutBatch, origin: Origin, routes: int = 0, filtered: Mapping[str, Any] | None = None
    ) -> None:
        """Write one step in one move; a file of the same step is replaced, its unfinished groups are deleted.

        `routes` is the number of files with routes, if they are already written; else those that `batch` holds are in
        the step's own file. `filtered`: JSON values about the groups that a filter has looked at.
        """
        with durable.explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        elsewhere = (*_HELD, "routing_rows") if routes else ()
        arrays = {name: array for name, array in named_arrays(batch).items() if name not in elsewhere}
        about = {_ORIGIN: _described(origin)} | ({_ROUTES: np.array(routes)} if routes else {})
        about |= {} if filtered is None else {_FILTERED: _json_bytes(filtered)}
        with durable.replaced(self.path(origin.step)) as file:
            np.savez(file, allow_pickle=False, **about, **_numbered(arrays))
        self._index({origin.step: _summary(batch, origin)})
        durable.remove_tree(self.unfinished(origin.step))

    def origin(self, step: int) -> Origin:
        """Return where a stored step comes from; raises DumpError."""
        with self._open(self.path(step)) as file:
            return _origin(file)

    def filtered(self, step: int) -> dict[str, Any] | None:
        """Return what was written about the groups that a filter has looked at; None if there was no filter."""
        with self._open(self.path(step)) as file:
            found: dict[str, Any] | None = json.loads(file[_FILTERED].tobytes()) if _FILTERED in file.files else None
            return found

    def read(self, step: int) -> RolloutBatch:
        """Return the trajectories of a stored step; raises DumpError when it is missing, damaged or of another
        version. The routes of a step that this version wrote are read by `read_routes`."""
        with self._open(self.path(step)) as file:
            _origin(file)
            stored = _named(file)
            routes = int(stored.pop(_ROUTES, 0))
            known = {fact.name for fact in fields(RolloutBatch)}
            unknown = sorted({name.partition("/")[0] for name in stored} - known)
            missing = sorted(_REQUIRED - stored.keys())
            if unknown or missing:
                raise DumpError(
                    f"{self.path(step)} was written by another version of fiberpo-megatron: it lacks {missing} and has "
                    f"unknown {unknown}; make the dump again"
                )
            if routes:
                stored["routing_rows"] = np.arange(len(stored["tokens"]))
            return batch_of(stored | _earlier_routes(stored))

    def drop(self, before: int) -> None:
        """Delete the steps that come before step `before`, finished or not."""
        self.forget([step for step in (*self.steps(), *self.unfinished_steps()) if step < before])

    def forget(self, steps: Sequence[int]) -> None:
        """Delete these steps, finished or not."""
        for step in steps:
            for path in (self.path(step), *self.folder.glob(f"step_{step:06d}.routes-*.npz")):
                durable.remove(path)
            durable.remove_tree(self.unfinished(step))
        if steps:
            self._index(dict.fromkeys(steps))

    @contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        if not path.is_file():
            step, _, part = path.name.removeprefix("step_").removesuffix(".npz").partition(".")
            what = f"rollouts of step {int(step)}" + (f" ({part} is missing)" if part else "")
            raise DumpError(f"{self.folder} has no {what}; {self._content()}")
        try:
            with np.load(path, allow_pickle=False) as file:
                yield file
        except DumpError:
            raise
        except Exception as error:  # what zipfile, zlib, json and numpy raise on odd bytes is a long list
            cause = printable(f"{type(error).__name__}: {error}")
            raise DumpError(f"{path} is damaged ({cause}); make the dump again") from error

    def _content(self) -> str:
        steps = self.steps()
        if not steps:
            return "it holds no rollouts; `fiberpo dump` or a run with --storage.dump true writes them"
        return f"it has {len(steps)} steps from {steps[0]} to {steps[-1]}; lower trainer.steps or dump more of them"

    def _index(self, changed: Mapping[int, Mapping[str, Any] | None]) -> None:
        """Put lines into index.jsonl, or take them out (None).

        A line that is none of ours is left out with a warning: the index is for people, and must not end a run.
        """
        path = self.folder / INDEX
        lines: dict[int, Mapping[str, Any] | None] = {}
        with durable.explained(path):
            found = path.read_bytes().split(b"\n") if path.is_file() else []
        for text in found:
            try:
                line = json.loads(text) if text else None
            except (ValueError, RecursionError):
                line = text
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines[line["step"]] = line
            elif line is not None:
                _log.warning("%s: a line that describes no step is left out: %.80r", path, text)
        lines |= changed
        with durable.replaced(path, text=True) as file:
            file.writelines(json_line(lines[step]) + "\n" for step in sorted(lines) if lines[step] is not None)


def _described(origin: Origin) -> Any:
    return _json_bytes(asdict(origin))


def _json_bytes(values: Mapping[str, Any]) -> Any:
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


def _earlier_routes(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The routes in a step's own file, as earlier versions wrote them: of all tokens, -1 where an engine gave none."""
    experts = stored.get("routed_experts")
    if experts is None or not len(experts) or "held_rows" in stored:
        return {}
    rows = np.flatnonzero((experts >= 0).all((1, 2)))
    dtype = expert_dtype(int(experts.max()) + 1)
    return {
        "routing_rows": np.arange(len(experts)),
        "held_rows": rows,
        "routed_experts": experts[rows].astype(dtype),
    }


def _origin(file: Any) -> Origin:
    described = json.loads(file[_ORIGIN].tobytes())
    if not isinstance(described, dict):
        raise ValueError(f"its origin is {described!r:.80} and no JSON object")
    if described.get("format") != FORMAT:
        raise DumpError(f"{file.fid.name} has format {described.get('format')!r:.80}; this version reads {FORMAT}")
    return Origin(**described)


def _numbered(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays under names that a file can have: environments choose the names behind the slash, with any characters
    and of any length. They stand in the file as numbers, and `_NAMES` says what the numbers mean."""
    stored: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, array in arrays.items():
        fact, slash, _ = name.partition("/")
        key = f"{fact}/{len(names)}" if slash else name
        if slash:
            names[key] = name
        stored[key] = array
    return stored | ({_NAMES: _json_bytes(names)} if names else {})


def _named(file: Any) -> dict[str, Any]:
    """The inverse of `_numbered`, for files of earlier versions too, which have the names themselves."""
    names = json.loads(file[_NAMES].tobytes()) if _NAMES in file.files else {}
    return {names.get(key, key): file[key] for key in file.files if key not in (_ORIGIN, _NAMES, _FILTERED)}


def _summary(batch: RolloutBatch, origin: Origin) -> dict[str, Any]:
    batch = batch.per_trajectory()
    return {
        "step": origin.step,
        "weights": origin.weights,
        "groups": int(batch.groups[-1]) + 1 if len(batch.groups) else 0,
        "trajectories": len(batch.lengths),
        "tokens": len(batch.tokens),
        "reward_mean": float(batch.rewards.mean()) if len(batch.rewards) else None,
        "accuracy": float(batch.correct.mean()) if len(batch.correct) else None,
        "settings": origin.settings,
    }
