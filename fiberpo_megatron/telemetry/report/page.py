"""This module writes the page: headline, charts, sample rollouts and settings in one HTML file."""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from fiberpo_megatron import durable
from fiberpo_megatron.telemetry.metrics import describe, format_value, steps_done
from fiberpo_megatron.telemetry.report.panels import Drawing, Section, attempt, build_sections
from fiberpo_megatron.telemetry.report.plan import Phase, compare
from fiberpo_megatron.telemetry.report.run_data import RunData, Series, load_run, number, table, value_at
from fiberpo_megatron.telemetry.report.tables import alarm_section, engine_section, solve_section
from fiberpo_megatron.telemetry.report.text import TEXT, shown
from fiberpo_megatron.telemetry.report.tokens import token_section
from fiberpo_megatron.telemetry.report.trace import trace_section

REPORT_FILE = "report.html"
LONGEST_TITLE = 120
DEEPEST = 20
"""Levels of tables in the settings that are shown one by one."""
AVERAGED_STEPS = 10
"""Steps at the beginning and end of a run over which headline figures are averaged."""

READING = "Pale lines are single steps, bold ones a moving average over about a fifteenth of the run."

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1f2937; font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue",
  Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; font-weight: 650; }
h2 { font-size: 18px; margin: 40px 0 12px; padding-bottom: 6px; border-bottom: 1px solid #e5e7eb; }
h3 { font-size: 15px; margin: 22px 0 8px; }
.about { color: #6b7280; margin: 0 0 20px; }
.cards + .about { margin: 16px 0 0; font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; }
.card { border: 1px solid #e5e7eb; border-radius: 8px; padding: 12px 14px; }
.card.main { border-color: #0072B2; background: #f3f8fc; grid-column: span 2; }
.card.main b { font-size: 28px; }
.card b { display: block; font-size: 20px; line-height: 1.3; font-weight: 650; }
.card span { color: #6b7280; font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(370px, 1fr)); gap: 18px 22px; }
figure { margin: 0; }
figcaption { font-weight: 600; font-size: 14px; }
figcaption span { color: #6b7280; font-weight: 400; }
figure svg { width: 100%; height: auto; display: block; }
figure p { margin: 0; color: #6b7280; font-size: 12.5px; line-height: 1.35; }
.scroll { overflow-x: auto; margin-bottom: 18px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; color: #6b7280; font-weight: 600; border-bottom: 1px solid #d1d5db;
  padding: 4px 10px 4px 0; }
td { vertical-align: top; border-bottom: 1px solid #eef0f3; padding: 5px 10px 5px 0; }
td pre { margin: 0; min-width: 6em; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 14em; overflow-y: auto;
  font: 13px/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
td.right { color: #04724d; } td.wrong { color: #b5303f; }
.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
.settings { columns: 2 420px; column-gap: 36px; }
.settings table { break-inside: avoid; margin-bottom: 16px; }
.settings td:first-child { width: 46%; color: #4b5563; }
.problems { border: 1px solid #E69F00; border-radius: 8px; margin: 20px 0; padding: 0 14px; background: #fffaf0; }
.problems h2 { border: 0; margin: 10px 0 0; font-size: 15px; }
td ul { margin: 0; padding-left: 1.1em; }
.warning { color: #9a5b00; } .stop { color: #b5303f; font-weight: 600; } .notice { color: #6b7280; }
.tokens { font: 13px/1.75 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 0 0 12px; }
.tokens .facts { display: block; color: #6b7280; font-size: 12.5px; }
.t { border-radius: 3px; padding: 1px 2px; box-shadow: inset 0 0 0 1px #fff; }
.t.free { background: #d5efe2; } .t.clipped { background: #dcdcf5; border-bottom: 2px dotted #5b5bb5; }
.t.rollback { background: #fbe3b5; border-bottom: 2px dashed #b97a00; }
.t.zeroed { background: #f6cdd2; border-bottom: 2px solid #b5303f; } .t.other { color: #6b7280; }
.empty { color: #6b7280; border: 1px dashed #d1d5db; border-radius: 8px; padding: 24px; }
@media print {
  .charts { grid-template-columns: 1fr 1fr; }
  figure, .card, tr { break-inside: avoid; }
}
"""


def write_report(run_folder: Path | str) -> Path:
    """Write <run folder>/report.html from what the folder holds and return its path.

    This may be called during the run. What cannot be read or drawn is skipped and named on the page. Raises ValueError
    if there is no such folder, and OSError if the file cannot be written.
    """
    folder = Path(run_folder)
    page = render(load_run(folder))
    path = folder / REPORT_FILE
    with durable.replaced(path, text=True) as file:
        file.write(page)
    return path


def render(data: RunData) -> str:
    """Return the whole page."""
    problems = list(data.problems)
    sections = build_sections(data, problems)
    body = f"<p class='about'>{READING}</p>\n" + "\n".join(_section(section) for section in sections)
    if not sections:
        body = '<p class="empty">No metrics yet. Write the report again when the run has done a step.</p>'
    about = attempt("the line below the title", lambda: _about(data), problems)
    cards = attempt("the headline", lambda: _cards(data), problems)
    samples = attempt("the sample rollouts", lambda: _rollouts(data), problems)
    alarms = attempt("the table of alarms", lambda: alarm_section(data.alarms), problems)
    engines = attempt("the table of engines", lambda: engine_section(data.engines), problems)
    solved = attempt("the table of solved prompts", lambda: solve_section(data.solve_rates), problems)
    tokens = attempt("the tokens and their gates", lambda: token_section(data.tokens), problems)
    traces = attempt("the time of a step", lambda: trace_section(data.traces), problems)
    charts = _once(f"{traces}\n{body}")
    plan = attempt("the comparison with the plan", lambda: plan_section(data), problems)
    settings = attempt("the table of settings", lambda: _settings(data.config), problems)
    name = shown(data.name)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{name}</h1>\n<p class='about'>{shown(about)}</p>\n"
        f"{cards}\n{_problems(problems)}\n{alarms}\n{plan}\n{charts}\n{solved}\n{engines}\n{tokens}\n{samples}\n{settings}\n</main>\n</body>\n</html>\n"
    )


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{shown(problem)}</li>" for problem in problems)
    return f'<section class="problems">\n<h2>Left out of this report</h2>\n<ul>{items}</ul>\n</section>'


def _about(data: RunData) -> str:
    config = data.config
    tasks = config.get("environments") or value_at(config, "data", "tasks")  # data.tasks: of earlier versions
    tasks = [task for task in tasks if isinstance(task, Mapping)] if isinstance(tasks, list) else []
    names = [str(task.get("name", task.get("kind", ""))) for task in tasks]
    objective = value_at(config, "algorithm", "objective")
    parts = [
        (objective.get("use") if isinstance(objective, Mapping) else objective)
        if _kind(data) == "train"
        else "supervised warm-up",
        f"model {value_at(config, 'model', 'path')}" if value_at(config, "model", "path") else None,
        f"tasks {', '.join(names)}" if names else None,
        _layout(table(config, "parallel")),
        f"seed {value_at(config, 'run', 'seed')}" if value_at(config, "run", "seed") is not None else None,
    ]
    return " · ".join(str(part) for part in parts if part)


def _layout(parallel: Mapping[str, Any]) -> str | None:
    names = ("tensor", "pipeline", "context", "expert", "data")
    sizes = [f"{name} {parallel[name]}" for name in names if number(parallel.get(name)) > 1]
    return f"parallel: {', '.join(sizes)}" if sizes else None


def _cards(data: RunData) -> str:
    cards = [
        f'<div class="card{" main" if main else ""}"><b>{shown(value)}</b><span>{shown(label)}</span></div>'
        for value, label, main in _headline(data)
    ]
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _headline(data: RunData) -> Iterator[tuple[str, str, bool]]:
    """Yield (value, label, whether it is the main one)."""
    held_out = data.series("eval", "accuracy")
    if held_out is not None and held_out.finite.size:
        values = held_out.finite
        if values.size > 1:
            text = f"{100 * values[0]:.1f} % → {100 * values[-1]:.1f} %"
            yield text, f"held-out accuracy after {held_out.steps[0]} and {held_out.steps[-1]} steps", True
        else:
            yield f"{100 * values[0]:.1f} %", f"held-out accuracy after {held_out.steps[0]} steps", True
    kind = _kind(data)
    for name, label in (("reward/mean", "mean reward"), ("loss", "loss")):
        series = data.series(kind, name)
        if series is not None and series.finite.size:
            text, steps = _change(name, series)
            yield text, f"{label}, first and last {steps} steps", False
    yield from _progress(data, kind)
    for name, label in (
        ("tokens_per_second", "throughput, median"),
        ("rollout_diff/mean", "|rollout − trainer| log-prob, median"),
        ("ratio/max", "largest importance ratio"),
    ):
        series = data.series(kind, name)
        if series is not None and series.finite.size:
            ordered = sorted(series.finite)
            yield format_value(name, ordered[-1 if name == "ratio/max" else len(ordered) // 2]), label, False


def _progress(data: RunData, kind: str) -> Iterator[tuple[str, str, bool]]:
    records = data.records.get(kind, [])
    if not records:
        return
    done = steps_done(kind, records[-1]["step"])
    planned = value_at(data.config, "sft" if kind == "sft" else "trainer", "steps")
    yield (f"{done} / {planned}" if planned else str(done)), "steps done", False
    times = data.series(kind, "seconds/total")
    if times is not None:
        yield _duration(float(times.finite.sum())), "time of these steps", False


def _change(name: str, series: Series) -> tuple[str, int]:
    values = series.finite
    count = max(1, min(AVERAGED_STEPS, values.size // 2))
    first, last = float(values[:count].mean()), float(values[-count:].mean())
    unit = describe(name).unit
    start = format_value(name, first).removesuffix(f" {unit}")
    return f"{start} → {format_value(name, last)}", count


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _once(page: str) -> str:
    """Return the page with each letter's outline once: all charts use the same, by its name."""
    seen: set[str] = set()

    def first(match: re.Match[str]) -> str:
        known = match[1] in seen
        seen.add(match[1])
        return "" if known else match[0]

    return re.sub(r'<path id="(DejaVuSans[^"]*)"[^>]*/>\n?', first, page)


def _section(section: Section) -> str:
    charts = "\n".join(_figure(drawing) for drawing in section.drawings)
    return (
        f'<section>\n<h2>{shown(section.title, LONGEST_TITLE)}</h2>\n<div class="charts">\n{charts}\n</div>\n</section>'
    )


def _figure(drawing: Drawing) -> str:
    panel = drawing.panel
    unit = f" <span>({shown(panel.unit)})</span>" if panel.unit else ""
    note = f"<p>{shown(panel.note)}</p>" if panel.note else ""
    return f"<figure><figcaption>{shown(panel.title, LONGEST_TITLE)}{unit}</figcaption>{drawing.svg}{note}</figure>"


def _rollouts(data: RunData) -> str:
    if not data.rollouts:
        return ""
    parts = [f"<h3>Step {step}</h3>\n{_rollout_table(records)}" for step, records in data.rollouts]
    return f"<section>\n<h2>Sample rollouts</h2>\n{''.join(parts)}\n</section>"


def _rollout_table(records: list[dict[str, Any]]) -> str:
    rows = []
    for record in records:
        given = record.get("log_probs")
        log_probs = [value for value in map(number, given if isinstance(given, list) else ()) if isfinite(value)]
        mean = f"{sum(log_probs) / len(log_probs):.3f}" if log_probs else ""
        mark = "right" if record.get("correct") else "wrong"
        rows.append(
            f"<tr><td>{_text(record.get('prompt'))}</td>"
            f"<td class='{mark}'>{_text(record.get('response'))}</td>"
            f"<td>{_text(record.get('answer'))}</td>"
            f"<td>{_text(_details(record))}</td>"
            f"<td class='number'>{shown(record.get('reward', ''))}</td>"
            f"<td class='number'>{mean}</td><td>{shown(record.get('finish_reason', ''))}</td></tr>"
        )
    head = "".join(
        f"<th>{title}</th>"
        for title in ("prompt", "response", "answer", "details", "reward", "log-prob, nats/token", "finish reason")
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _details(record: Mapping[str, Any]) -> str:
    """Return what the environment said beside the reward, a line each."""
    lines = [
        f"{name}: {value}" for key in ("rewards", "metrics", "metadata") for name, value in table(record, key).items()
    ]
    return "\n".join([*lines, *([f"failure: {record['failure']}"] if record.get("failure") else [])])


def _text(value: object) -> str:
    return f"<pre>{'' if value is None else shown(value, keep=TEXT)}</pre>"


def plan_section(data: RunData) -> str:
    """Return the table of phases beside the run's plan, with what is furthest from it; nothing without a plan."""
    found = compare(data)
    if found is None:
        return ""
    head = "".join(
        f"<th>{title}</th>"
        for title in ("phase", "planned before the start", "expected with these trajectories", "measured", "difference")
    )
    rows = "".join(_plan_row(phase) for phase in (*found.phases, found.total))
    verdict = "".join(f"<p>{shown(line)}</p>" for line in found.verdict)
    return (
        f"<section>\n<h2>Plan</h2>\n<p class='about'>Seconds of a step, mean of {found.steps} steps</p>\n"
        f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>\n{verdict}\n</section>'
    )


def _plan_row(phase: Phase) -> str:
    numbers = (f"{value:.2f}" if isfinite(value) else "" for value in (phase.planned, phase.expected, phase.measured))
    off = f"{100 * phase.off / phase.planned:+.0f} %" if phase.planned > 0 and isfinite(phase.off) else ""
    cells = "".join(f"<td class='number'>{text}</td>" for text in (*numbers, off))
    return f"<tr><td>{shown(phase.name.replace('_', ' '))}</td>{cells}</tr>"


def _settings(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    tables = []
    for section, content in config.items():
        rows = "".join(f"<tr><td>{shown(key)}</td><td>{shown(value)}</td></tr>" for key, value in _flat(content))
        tables.append(f"<table><tr><th colspan='2'>{shown(section)}</th></tr>{rows}</table>")
    return f'<section>\n<h2>Settings</h2>\n<div class="settings">{"".join(tables)}</div>\n</section>'


def _flat(content: Any, head: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield nested tables as dotted names; a list of tables is numbered. What is nested deeper than any config is one
    value."""
    if isinstance(content, Mapping) and depth < DEEPEST:
        for key, value in content.items():
            yield from _flat(value, f"{head}.{key}" if head else str(key), depth + 1)
    elif isinstance(content, list) and content and all(isinstance(item, Mapping) for item in content):
        for place, item in enumerate(content):
            yield from _flat(item, f"{head}[{place}]", depth + 1)
    else:
        yield head, content


def _kind(data: RunData) -> str:
    """Return what the run is about: training, unless it has only supervised steps."""
    return "sft" if "sft" in data.records and "train" not in data.records else "train"
