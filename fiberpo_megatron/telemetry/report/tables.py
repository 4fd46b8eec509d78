"""This module writes the report's tables of alarms and engines."""

from collections.abc import Sequence
from dataclasses import fields

from fiberpo_megatron.telemetry.alarms import Alarm
from fiberpo_megatron.telemetry.engine_states import EngineStates
from fiberpo_megatron.telemetry.report.text import html_table, shown
from fiberpo_megatron.telemetry.solve_rates import SOLVE_RATES_FILE, SolveRate

MOST_ALARMS = 50
"""Alarms that the table lists: the last ones."""
MOST_IDS = 5
"""Ids of prompts that the table of solved prompts lists in a cell."""
ENGINE_COLUMNS = {
    "address": "engine",
    "state": "state",
    "weight_version": "weights",
    "running": "running",
    "queued": "queued",
    "token_usage": "KV cache in use",
    "cache_hit_rate": "prefix cache hits",
    "generation_tokens_per_second": "tokens/s",
    "answered_in_s": "answered in",
}
"""Fields of an engine's state, with the titles of their columns."""


def alarm_section(alarms: Sequence[Alarm]) -> str:
    """Return the alarms of a run with what to do about them; nothing without any."""
    raised = [alarm for alarm in alarms if alarm.state == "raised"]
    if not raised:
        return ""
    rows = [_alarm_row(alarm, alarms) for alarm in raised[-MOST_ALARMS:]]
    rest = f" The first {len(raised) - MOST_ALARMS} are left out." if len(raised) > MOST_ALARMS else ""
    titles = ["steps", "rule", "what was seen", "likely causes", "try"]
    about = f"Dashed red lines in the charts are the steps at which an alarm was raised.{rest}"
    return f"<section>\n<h2>Alarms</h2>\n<p class='about'>{about}</p>\n{html_table(titles, rows)}\n</section>"


def _alarm_row(alarm: Alarm, alarms: Sequence[Alarm]) -> list[str]:
    ends = [e.step for e in alarms if e.rule == alarm.rule and e.state == "cleared" and e.step > alarm.step]
    steps = f"{alarm.since} to {min(ends)}" if ends else f"since {alarm.since}"
    severity = f"<span class='{shown(alarm.severity)}'>{shown(alarm.severity)}</span>"
    causes = "".join(f"<li>{shown(cause)}</li>" for cause in alarm.causes)
    return [
        f"<span class='number'>{shown(steps)}</span>",
        f"{shown(alarm.rule.replace('_', ' '))}<br>{severity}",
        shown(alarm.message),
        f"<ul>{causes}</ul>",
        shown(alarm.setting),
    ]


def solve_section(rates: Sequence[SolveRate]) -> str:
    """Return how many training prompts are always, sometimes and never solved, with the first ones of both ends."""
    rows = []
    for environment in dict.fromkeys(rate.environment for rate in rates):
        mine = [rate for rate in rates if rate.environment == environment]
        always = [rate for rate in mine if rate.solved == rate.samples]
        never = [rate for rate in mine if not rate.solved]
        some = len(mine) - len(always) - len(never)
        rows.append(
            [shown(environment), *(f"<span class='number'>{n}</span>" for n in (len(always), some, len(never)))]
            + ["<br>".join(shown(rate.id) for rate in ends[:MOST_IDS]) for ends in (always, never)]
        )
    if not rows:
        return ""
    titles = ["environment", "always solved", "sometimes", "never solved", "first always", "first never"]
    about = (
        f"Training prompts by how often their samples were right in this run. They are all in {SOLVE_RATES_FILE}, with "
        "which the environments chat and math can leave out those that teach nothing."
    )
    return f"<section>\n<h2>Solved prompts</h2>\n<p class='about'>{about}</p>\n{html_table(titles, rows)}\n</section>"


def engine_section(states: EngineStates | None) -> str:
    """Return the last known states of the engines; nothing where the run has recorded none."""
    if states is None or not states.engines:
        return ""
    used = [f.name for f in fields(states.engines[0]) if any(getattr(e, f.name) is not None for e in states.engines)]
    columns = {name: title for name, title in ENGINE_COLUMNS.items() if name in used}
    rows = [[_cell(name, getattr(engine, name)) for name in columns] for engine in states.engines]
    for row, engine in zip(rows, states.engines, strict=True):
        row[1] += f"<br>{shown(engine.detail)}" if engine.detail else ""
    about = f"<p class='about'>After training step {states.step}</p>"
    return f"<section>\n<h2>Engines</h2>\n{about}\n{html_table(list(columns.values()), rows)}\n</section>"


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if name in ("token_usage", "cache_hit_rate") and isinstance(value, float):
        return f"{100 * value:.1f} %"
    if isinstance(value, float):
        return shown(f"{value:.3g}{' s' if name == 'answered_in_s' else ''}")
    return shown(value)
