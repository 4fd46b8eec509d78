"""This module shows a few trajectories with their tokens coloured by what the gate and the clips did to them."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from fiberpo_megatron.telemetry.report.run_data import number, value_at
from fiberpo_megatron.telemetry.report.text import shown

MOST_TRAJECTORIES, MOST_TOKENS = 3, 200
"""Trajectories of a step, and tokens of a trajectory, that are shown."""
OUTCOMES = {
    "zeroed": "a level's gate is closed for it",
    "rollback": "a level's gate turns it back",
    "clipped": "its own clip stops its direct gradient",
    "free": "it learns",
    "other": "the environment wrote it, or nothing is recorded",
}
"""What can happen to a token, the strongest first, with the words of the legend."""
CHANNELS = ("S⁺", "S⁻")


def token_section(steps: Sequence[tuple[int, Sequence[Mapping[str, Any]]]]) -> str:
    """Return the recorded trajectories of some steps, given as (step, records); nothing without any."""
    parts = [f"<h3>Step {step}</h3>\n{_trajectories(records)}" for step, records in steps if records]
    if not parts:
        return ""
    legend = " ".join(f"<span class='t {name}'>{shown(name)}</span> {shown(words)}" for name, words in OUTCOMES.items())
    return (
        f"<section>\n<h2>Tokens and their gates</h2>\n<p class='about'>{legend}. At the last optimiser step on the "
        f"batch; the pointer shows each token's numbers.</p>\n{''.join(parts)}\n</section>"
    )


def _trajectories(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the trajectories with the largest advantages on either side: without one there is no gradient."""
    ordered = sorted(records, key=lambda record: -abs(_advantage(record)))[:MOST_TRAJECTORIES]
    return "".join(_trajectory(record) for record in ordered)


def _trajectory(record: Mapping[str, Any]) -> str:
    texts = _list(value_at(record, "tokens", "text"))
    tokens = "".join(_token(record, place, text) for place, text in enumerate(texts[:MOST_TOKENS]))
    rest = f" … ({len(texts)} tokens)" if len(texts) > MOST_TOKENS else ""
    facts = f"{record.get('domain', '')}, reward {number(record.get('reward')):g}, advantage {_advantage(record):.3g}"
    prompt = shown(record.get("prompt", ""), 400, "\n\t")
    return f"<p class='tokens'><span class='facts'>{shown(facts)}</span>{prompt}{tokens}{rest}</p>\n"


def _token(record: Mapping[str, Any], place: int, text: object) -> str:
    details = [repr(text) if isinstance(text, str) else ""]
    for name, title in (("log_prob", "log-prob"), ("entropy", "entropy"), ("advantage", "advantage")):
        value = number(_at(value_at(record, "tokens", name), place))
        details += [f"{title} {value:.4g}"] if isfinite(value) else []
    ratio, coefficient = (_last(record, name, place) for name in ("log_ratio", "coefficient"))
    details += [f"log ratio {ratio:.4g}"] if isfinite(ratio) else []
    details += [f"coefficient {coefficient:.4g}"] if isfinite(coefficient) else []
    outcome = "free" if isfinite(ratio) else "other"
    if _at(value_at(record, "tokens", "free"), place) == 0:
        outcome = "clipped"
        details.append("its own clip stops its direct gradient")
    states = set()
    for state, words in _gates(record, place, 1 if ratio < 0 else 0) if isfinite(ratio) else ():
        states.add(state)
        details.append(words)
    outcome = next((state for state in ("zeroed", "rollback") if state in states), outcome)
    title = shown("\n".join(details), 2000, "\n")
    return f"<span class='t {outcome}' title=\"{title}\">{shown(text, 60, chr(10))}</span>"


def _gates(record: Mapping[str, Any], place: int, channel: int) -> Iterator[tuple[str, str]]:
    """Yield (state, words) of each level that does something to a token: "trajectory: S⁺ 0.31 over 0.12, zeroed"."""
    for level in _list(record.get("levels")):
        nodes, of = _list(value_at(level, "nodes")), _at(value_at(level, "of"), place)
        owners = [owner[0] for owner in of if _list(owner)] if isinstance(of, list) else [of]
        for owner in owners:
            node = _at(nodes, owner)
            state = _at(value_at(node, "state"), channel)
            drift, budget = (abs(number(_at(value_at(node, name), channel))) for name in ("D", "C"))
            if isinstance(state, str) and state != "pass":
                words = f"{value_at(level, 'name')}: {CHANNELS[channel]} {drift:.3g} over {budget:.3g}, {state}"
                yield state, words


def _advantage(record: Mapping[str, Any]) -> float:
    known = [value for value in map(number, _list(value_at(record, "tokens", "advantage"))) if isfinite(value)]
    return known[0] if known else 0.0


def _last(record: Mapping[str, Any], name: str, place: int) -> float:
    """Return a token's value at the last optimiser step."""
    rows = _list(value_at(record, "tokens", name))
    return number(_at(rows[-1], place)) if rows else float("nan")


def _at(values: object, place: object) -> Any:
    """Return an entry of a list, or None when it has none."""
    inside = isinstance(values, list) and isinstance(place, int) and 0 <= place < len(values)
    return values[place] if inside else None  # type: ignore[index]


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
