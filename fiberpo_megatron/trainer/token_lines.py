"""This module makes the lines of a step's token records out of the notes of all ranks; docs/watch.md has the format."""

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fiberpo_megatron.types import RolloutBatch

DIGITS = 9
"""Significant digits of a figure: those of a float32."""


@dataclass(frozen=True)
class RecordedTrajectory:
    """Says where a recorded trajectory is."""

    place: int
    """Its number among the step's trajectories."""
    trained: int
    """Its number among those that are trained on."""
    begin: int
    """Its first token among the tokens of those, ..."""
    first: int
    """... its first token after the prompt, ..."""
    end: int
    """... and the place behind its last one."""
    branches: tuple[int, ...] = ()
    """Places where its further token sequences begin."""


@dataclass(frozen=True)
class StepFacts:
    """Holds what every rank knows of a step."""

    step: int
    objective: str
    """The objective's name."""
    domains: Sequence[str]
    rollouts: RolloutBatch
    """The trajectories that are trained on, one entry for each."""
    pieces: Callable[[Sequence[int]], list[str]]


@dataclass
class Notes:
    """Holds what one rank notes of one mini-batch: about m of the recorded tokens."""

    at: list[int]
    """[m] the tokens' numbers among all that are recorded."""
    columns: dict[str, list[float]] = field(default_factory=dict)
    """[m] by name."""
    log_ratios: list[list[float]] = field(default_factory=list)
    """[m] of each optimiser step on the tokens."""
    coefficients: list[list[float]] = field(default_factory=list)
    """[m] of each optimiser step on the tokens."""
    figures: list[str] = field(default_factory=list)
    """Names of what the column "clip_figure" counts."""
    levels: list[dict[str, Any]] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """Return the notes as JSON values."""
        return dict(vars(self))


def packed(experts: Mapping[int, Tensor]) -> dict[str, Any]:
    """Return a rank's experts of all recorded tokens as JSON values: int16 [m, top_k] per layer, -1 where unknown."""
    return {
        str(layer): [chosen.shape[1], _base64(chosen.numpy().astype("<i2"))]
        for layer, chosen in experts.items()
        if bool((chosen >= 0).any())
    }


def lines(
    facts: StepFacts, trajectories: Sequence[RecordedTrajectory], everyone: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return one record for each trajectory, in their order, from what all ranks noted."""
    count = sum(one.end - one.first for one in trajectories)
    steps = max((len(one["notes"]) for one in everyone), default=0)
    notes = [(index, note) for one in everyone for index, note in enumerate(one["notes"]) if note["at"]]
    columns: dict[str, list[Any]] = {}
    log_ratios: list[list[Any]] = []
    coefficients: list[list[Any]] = []
    mini_batch = [0] * count
    for index, note in notes:
        for at in note["at"]:
            mini_batch[at] = index
        for name, values in note["columns"].items():
            _put(columns.setdefault(name, [None] * count), note["at"], values)
        for target, rows in ((log_ratios, note["log_ratios"]), (coefficients, note["coefficients"])):
            target += [[None] * count for _ in range(len(rows) - len(target))]
            for row, values in zip(target, rows):
                _put(row, note["at"], values)
    figures: list[str] = next((note["figures"] for _, note in notes if note["figures"]), [])
    experts = _experts(everyone, count)
    found, start = [], 0
    for one in trajectories:
        own = slice(start, start + one.end - one.first)
        record = _record(facts, one) | {
            "mini_batch": mini_batch[_first_noted(columns, own)],
            "mini_batches": steps,
            "clip_figures": figures,
            "levels": _levels_of(facts, one, own, [note["levels"] for _, note in notes]),
        }
        record["tokens"] |= {name: values[own] for name, values in columns.items()}
        record["tokens"]["log_ratio"] = [row[own] for row in log_ratios]
        record["tokens"]["coefficient"] = [row[own] for row in coefficients]
        if experts is not None:
            layers, chosen, same = experts
            record["experts"] = {"layers": layers, "top_k": chosen.shape[2], "chosen": _base64(chosen[own])}
            record["experts"] |= {} if same is None else {"engine_same": _base64(same[own])}
        found.append(record)
        start = own.stop
    return found


def _first_noted(columns: Mapping[str, Sequence[Any]], own: slice) -> int:
    known = columns.get("log_prob", [])
    return next((at for at in range(own.start, own.stop) if known and known[at] is not None), own.start)


def _put(target: list[Any], at: Iterable[int], values: Iterable[float]) -> None:
    for place, value in zip(at, values, strict=True):
        target[place] = value if isinstance(value, int) else _rounded(value)


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _record(facts: StepFacts, one: RecordedTrajectory) -> dict[str, Any]:
    """What the batch itself says of a trajectory."""
    batch, whole, of = facts.rollouts, slice(one.first, one.end), one.trained
    ids = batch.tokens[whole].tolist()
    record: dict[str, Any] = {
        "step": facts.step,
        "trajectory": one.place,
        "objective": facts.objective,
        "group": int(batch.groups[of]),
        "domain": facts.domains[int(batch.domains[of])],
        "reward": _rounded(float(batch.rewards[of])),
        "correct": bool(batch.correct[of]),
        "truncated": bool(batch.truncated[of]),
        "prompt": "".join(facts.pieces(batch.tokens[one.begin : one.first].tolist())),
        "prompt_tokens": one.first - one.begin,
    }
    if one.branches:
        record["branches"] = [begin - one.first for begin in one.branches]
    record["tokens"] = {
        "id": ids,
        "text": facts.pieces(ids),
        "sampled": batch.response_mask[whole].astype(int).tolist(),
        "rollout_log_prob": [_rounded(float(value)) for value in batch.rollout_log_probs[whole]],
        "weight_version": batch.weight_versions[whole].tolist(),
        "engine": batch.engines[whole].tolist(),
    }
    return record


def _levels_of(
    facts: StepFacts, one: RecordedTrajectory, own: slice, noted: Sequence[Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """The levels with the nodes of one trajectory's tokens; several ranks may have noted the same node."""
    batch = facts.rollouts
    names = {
        "trajectory": one.place,
        "prompt_group": int(batch.groups[one.trained]),
        "domain": facts.domains[int(batch.domains[one.trained])],
    }
    found: dict[str, dict[str, Any]] = {}
    for levels in noted:
        for level in levels:
            mine = [(at, node, share) for at, node, share in level["of"] if own.start <= at < own.stop]
            if not mine:
                continue
            size = own.stop - own.start
            entry = {"name": level["name"], "keys": level["keys"], "nodes": [], "of": [None] * size}
            entry = found.setdefault(level["name"], entry)
            known = [tuple(node["id"].values()) for node in entry["nodes"]]
            for at, node, share in mine:
                facts_of = level["nodes"][node]
                ids = {key: names.get(key, value) for key, value in facts_of["id"].items()}
                if tuple(ids.values()) not in known:
                    known.append(tuple(ids.values()))
                    rounded = {name: [_rounded(value) for value in facts_of[name]] for name in ("S", "D", "C")}
                    entry["nodes"].append(
                        {"id": ids, **rounded, "k": _rounded(facts_of["k"]), "state": facts_of["state"]}
                    )
                number = known.index(tuple(ids.values()))
                if "expert" in level["keys"]:
                    entry["of"][at - own.start] = [*(entry["of"][at - own.start] or []), [number, _rounded(share)]]
                else:
                    entry["of"][at - own.start] = number
    return list(found.values())


def _experts(
    everyone: Sequence[Mapping[str, Any]],
    count: int,
) -> tuple[list[int], NDArray[np.int16], NDArray[np.uint8] | None] | None:
    """The layers, the experts [tokens, layers, top_k] of training, and whether the engine chose the same set: 1, 0, or
    255 where one of the two is not known."""
    ranks = [rank["experts"] for rank in everyone]
    layers = sorted({int(layer) for rank in ranks for layer in rank})
    if not layers:
        return None
    top_k = next(rank[str(layers[0])][0] for rank in ranks if str(layers[0]) in rank)
    chosen = _joined(ranks, layers, top_k, count)
    theirs = _joined([rank["engine"] for rank in everyone], layers, top_k, count)
    if (theirs < 0).all():
        return layers, chosen, None
    same = (np.sort(theirs, -1) == np.sort(chosen, -1)).all(-1).astype(np.uint8)
    same[(theirs < 0).any(-1) | (chosen < 0).any(-1)] = 255
    return layers, chosen, same


def _joined(ranks: Sequence[Mapping[str, Any]], layers: Sequence[int], top_k: int, count: int) -> NDArray[np.int16]:
    """What all ranks know of the experts [tokens, layers, top_k]; -1 where none does."""
    found = np.full((count, len(layers), top_k), -1, "<i2")
    for rank in ranks:
        for layer, (_, text) in rank.items():
            theirs = np.frombuffer(base64.b64decode(text), "<i2").reshape(count, top_k)
            at = layers.index(int(layer))
            found[:, at] = np.where(theirs >= 0, theirs, found[:, at])
    return found


def _base64(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
