"""This module decides which charts a report has: sections of panels, each made from the metrics that the run logged."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fiberpo_megatron.telemetry.metrics import describe
from fiberpo_megatron.telemetry.report.figures import Line, line_chart, stacked_chart
from fiberpo_megatron.telemetry.report.run_data import RunData, Series
from fiberpo_megatron.telemetry.sinks import METRICS_FILE

STATES = {"pass": "#7fc8a9", "rollback": "#f2b84b", "zeroed": "#d1495b"}
"""Colours for what a gate does to a node."""
REGIMES = {
    "both_pass": ("both pass", "#7fc8a9"),
    "one_rollback": ("one in rollback", "#f6d58a"),
    "both_rollback": ("both beyond, some in rollback", "#f2b84b"),
    "one_zeroed": ("one zeroed", "#e58b94"),
    "both_zeroed": ("both zeroed", "#b5303f"),
}
CHANNELS = (("plus", "S⁺"), ("minus", "S⁻"))
PHASES = (
    *("generate", "exchange", "score", "pack", "old_log_probs", "gate", "train", "publish", "verify"),
    *("evaluate", "checkpoint"),
)
"""Phases of a step in their order; other timers lie inside these."""
PHASE_COLOURS = dict(
    zip(
        PHASES,
        (
            *(
                "#0072B2",
                "#7fb3d5",
                "#9fd3c7",
                "#b7b7b7",
                "#009E73",
                "#CC79A7",
                "#D55E00",
                "#E69F00",
                "#f4d58d",
            ),
            *("#8c6bb1", "#6b7280"),
        ),
        strict=True,
    )
)


MOST_CURVES, MOST_PANELS, MOST_LEVELS = 40, 150, 30
"""Curves in a chart, charts in a section and levels with a section of their own. Environments name their numbers
freely, so that there may be thousands of names."""


@dataclass(frozen=True)
class Panel:
    """Holds one chart with its title and a sentence on how to read it."""

    title: str
    unit: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Holds charts that belong together."""

    title: str
    panels: tuple[Panel, ...]


class Charts:
    """Makes panels and remembers which metrics were shown, so that the rest can be shown under "other"."""

    def __init__(self, data: RunData) -> None:
        self.data = data
        self.shown: set[tuple[str, str]] = set()

    def take(self, kind: str, name: str) -> Series | None:
        """Return a metric's series and mark the metric as shown."""
        self.shown.add((kind, name))
        return self.data.series(kind, name)

    def lines(
        self,
        title: str,
        names: dict[str, str],
        *,
        kind: str = "train",
        log: bool = False,
        note: str = "",
    ) -> Panel | None:
        """Draw curves of {metric: label}; return None when none of them was logged. Shares are shown in %."""
        found = [(label, self.take(kind, name)) for name, label in names.items()]
        drawn = [Line(label, series) for label, series in found if series is not None]
        if not drawn:
            return None
        note = _with_limit(note, len(drawn))
        unit = describe(next(iter(names))).unit
        svg = line_chart(drawn[:MOST_CURVES], unit=unit, log=log, percent=unit == "share")
        return Panel(title, "%" if unit == "share" else unit, svg, note)

    def stack(
        self, title: str, names: dict[str, tuple[str, str | None]], *, kind: str = "train", note: str = ""
    ) -> Panel | None:
        """Draw areas of {metric: (label, colour)} on top of each other; return None when none of them was logged."""
        found = [(label, self.take(kind, name), colour) for name, (label, colour) in names.items()]
        parts = [(label, series, colour) for label, series, colour in found if series is not None]
        if not parts:
            return None
        note = _with_limit(note, len(parts))
        unit = describe(next(iter(names))).unit
        svg = stacked_chart(parts[:MOST_CURVES], unit=unit, percent=unit == "share", smooth=unit == "share")
        return Panel(title, "%" if unit == "share" else unit, svg, note)


def _with_limit(note: str, count: int) -> str:
    if count <= MOST_CURVES:
        return note
    return f"{note}{'; ' if note else ''}the first {MOST_CURVES} of {count} are drawn"


def attempt(what: str, make: Callable[[], Any], problems: list[str]) -> Any:
    """Return what `make` returns. What it raises becomes a problem that the report shows, and the result is empty:
    whatever a run folder holds, the other parts of its report are made."""
    try:
        return make()
    except Exception as error:
        problems.append(f"{what} could not be made ({type(error).__name__}: {error})")
        return ""


def build_sections(data: RunData, problems: list[str]) -> list[Section]:
    """Return all sections that have at least one panel. What cannot be drawn is appended to `problems`."""
    charts = Charts(data)
    makers: list[tuple[str, Iterable[Panel | None]]] = [
        ("Learning", _learning(charts)),
        ("Environments", _environments(charts)),
        ("Policy movement", _movement(charts)),
        *((f"Gate of level: {level}", _gate(charts, level)) for level in _levels(data)[:MOST_LEVELS]),
        ("Experts", _experts(charts)),
        ("Speed", _speed(charts)),
        ("GPUs", _gpus(charts)),
        ("Supervised warm-up", _supervised(charts)),
        ("Other metrics", _other(charts)),
    ]
    sections = []
    for title, panels in makers:
        drawn: list[Panel] = []
        attempt(f"the rest of the section {title!r}", lambda: drawn.extend(_limited(panels)), problems)  # noqa: B023
        if len(drawn) > MOST_PANELS:
            problems.append(f"the section {title!r} has more than {MOST_PANELS} charts; {METRICS_FILE} has all numbers")
        if drawn:
            sections.append(Section(title, tuple(drawn[:MOST_PANELS])))
    return sections


def _limited(panels: Iterable[Panel | None]) -> Iterator[Panel]:
    """Yield one panel more than is shown, at most."""
    return islice((panel for panel in panels if panel is not None), MOST_PANELS + 1)


def _learning(charts: Charts) -> Iterable[Panel | None]:
    yield _accuracy(charts, "Accuracy", "accuracy", "share of right responses, sampled at the rollout temperature")
    domains = sorted(
        {name for kind in ("train", "eval") for name in charts.data.names(kind) if name.startswith("accuracy/")}
    )
    for name in domains:
        panel = _accuracy(charts, f"Accuracy: {name.removeprefix('accuracy/')}", name, "")
        yield panel if len(domains) > 1 else None
    yield _reward(charts)
    yield charts.lines(
        "Entropy",
        {"entropy": "entropy"},
        note="of the next-token distribution; near 0 the policy no longer explores",
    )
    yield charts.lines(
        "Response length", {"response_length/mean": "mean", "response_length/max": "longest of the step"}
    )
    yield charts.lines("Truncated responses", {"truncated_share": "cut at the length limit"})
    for name in (
        "reward/mean",
        "response_length/mean",
        "response_length/max",
        "truncated_share",
        "reward/std",
    ):
        charts.shown.add(("eval", name))  # close to the training ones; in metrics.jsonl


def _accuracy(charts: Charts, title: str, name: str, note: str) -> Panel | None:
    train, held_out = charts.take("train", name), charts.take("eval", name)
    lines = [Line("training prompts", train)] if train is not None else []
    if held_out is not None:
        lines.append(Line("held-out prompts", held_out, "#D55E00", markers=True))
    return Panel(title, "%", line_chart(lines, unit="", percent=True), note) if lines else None


def _reward(charts: Charts) -> Panel | None:
    mean, deviation = charts.take("train", "reward/mean"), charts.take("train", "reward/std")
    if mean is None:
        return None
    lines = [Line("mean ± standard deviation" if deviation is not None else "mean", mean, band=deviation)]
    return Panel("Reward", "", line_chart(lines, unit="reward"), "over all trajectories of a step")


def _environments(charts: Charts) -> Iterable[Panel | None]:
    """Yield components of rewards, other numbers of the environments, and their failures."""
    for title, pattern, note in (
        ("Components of the reward", r"reward/(.+)/mean", "mean over the trajectories that have the component"),
        ("Numbers of the environments", r"environment/(.+)/mean", "mean over the trajectories that have the number"),
        ("Events of the environments", r"environment/(.+)", "counts of a step: failures, trajectories that began anew"),
    ):
        matches = (re.fullmatch(pattern, name) for name in charts.data.names("train"))
        found = {m[0]: m[1] for m in matches if m is not None and ("train", m[0]) not in charts.shown}
        yield charts.lines(title, found, note=note) if found else None
    yield charts.lines("Failed trajectories", {"failed_share": "kept with reward 0"})


def _movement(charts: Charts) -> Iterable[Panel | None]:
    yield charts.lines(
        "Importance ratio",
        {"ratio/mean": "mean", "ratio/p99": "99th percentile", "ratio/max": "max"},
        log=True,
        note="current over old policy, per token; 1 is on-policy",
    )
    yield charts.lines(
        "Clipped tokens",
        {"token/clip_share": "clipped"},
        note="tokens whose own clip stops their direct gradient",
    )
    yield charts.stack(
        "Trajectories by clipped tokens",
        {
            "token/trajectories_none_clipped": ("none clipped", STATES["pass"]),
            "token/trajectories_some_clipped": ("some", STATES["rollback"]),
            "token/trajectories_all_clipped": ("all", STATES["zeroed"]),
        },
    )
    yield charts.lines(
        "Rollout against trainer",
        {"rollout_diff/mean": "mean", "rollout_diff/max": "max"},
        log=True,
        note="|log-prob of the engine − log-prob of the trainer| of the sampled tokens, same weights",
    )
    yield charts.lines(
        "Gradient norm",
        {"gradient_norm": "mean of the steps", "gradient_norm_max": "max"},
        note="before clipping",
    )
    yield charts.lines("Effective sample size", {"effective_sample_size": "share of the tokens' weight"})
    yield charts.lines("Objective", {"objective/value": "J"}, note="mean over the optimiser steps of a step")
    yield charts.lines("Learning rate", {"learning_rate": "learning rate"})


def _levels(data: RunData) -> list[str]:
    """Return the names of the gated levels, in the order in which they were logged."""
    pattern = re.compile(r"gate/(.+)/(?:plus|minus|regime)/\w+")
    matches = (pattern.fullmatch(name) for name in data.names("train"))
    return list(dict.fromkeys(match[1] for match in matches if match))


def _gate(charts: Charts, level: str) -> Iterable[Panel | None]:
    head = f"gate/{level}"
    yield charts.stack(
        "Joint regimes",
        {f"{head}/regime/{name}": label for name, label in REGIMES.items()},
        note="share of the level's nodes; what their two channels do together",
    )
    for channel, sign in CHANNELS:
        yield charts.stack(
            f"{sign} channel",
            {f"{head}/{channel}/{state}": (state, colour) for state, colour in STATES.items()},
            note="share of the level's nodes",
        )
    for channel, sign in CHANNELS:
        yield charts.lines(
            f"Aggregate drift {sign}",
            {f"{head}/s_{channel}/mean": "mean", f"{head}/s_{channel}/p99": "99th percentile"},
            note="of a node, before its gate",
        )
    yield charts.lines(
        "Base weight", {f"{head}/base_weight/mean": "mean", f"{head}/base_weight/p99": "99th percentile"}
    )


def _experts(charts: Charts) -> Iterable[Panel | None]:
    for title, head, draw in (
        ("Weight by expert partition", "expert/mass/", charts.stack),
        ("Drift by expert partition", "expert/drift/", None),
    ):
        names = [name for name in charts.data.names("train") if name.startswith(head)]
        labels = {name: name.removeprefix(head) for name in names}
        if draw is not None:
            yield draw(title, {name: (label, None) for name, label in labels.items()}) if names else None
        else:
            yield charts.lines(title, labels) if names else None
    yield charts.lines("Entropy of the expert weights", {"expert/entropy": "entropy"})


def _speed(charts: Charts) -> Iterable[Panel | None]:
    yield _phases(charts)
    yield charts.lines("Throughput", {"tokens_per_second": "prompt and response tokens over the whole step"})
    yield charts.lines(
        "Packing",
        {"useful_token_share": "positions that are not padding", "load_imbalance": "most loaded rank above the mean"},
    )
    yield charts.lines(
        "Time of a step and its plan",
        {
            "seconds/total": "measured",
            "expected/seconds/total": "expected with these trajectories",
            "planned/seconds/total": "planned before the start",
        },
        note="evaluations and checkpoints fall into single steps; the plan spreads checkpoints over all",
    )
    yield charts.lines("Time in the gate", {"gate/time_share": "all", "gate/reduce_share": "its reductions"})


def _phases(charts: Charts) -> Panel | None:
    """Draw the seconds of each phase; the gate's time is subtracted from training, of which it is a part."""
    found = {phase: charts.take("train", f"seconds/{phase}") for phase in PHASES}
    total = charts.take("train", "seconds/total")
    train, gate = found["train"], found["gate"]
    if train is not None and gate is not None and len(train.steps) == len(gate.steps):
        found["train"] = Series(train.steps, train.values - gate.values)
    parts: list[tuple[str, Series, str | None]]
    parts = [(p.replace("_", " "), s, PHASE_COLOURS[p]) for p, s in found.items() if s is not None]
    if not parts and total is not None:
        parts = [("total", total, None)]
    if not parts:
        return None
    return Panel("Seconds per phase", "s", stacked_chart(parts, unit="s"), "on the rank that writes the metrics")


def _gpus(charts: Charts) -> Iterable[Panel | None]:
    names = [name for name in charts.data.names("train") if name.startswith("gpu/")]
    for title, what in (
        ("Utilisation", "utilisation"),
        ("Memory in use", "memory_used"),
        ("Power", "power"),
        ("Temperature", "temperature"),
        ("Clocks held back", "throttled"),
        ("Uncorrected ECC errors", "ecc_uncorrected"),
    ):
        found = {name: f"GPU {name.split('/')[1]}" for name in names if name.endswith(f"/{what}")}
        yield charts.lines(title, found) if found else None
    charts.shown.update(
        (kind, name) for kind in charts.data.records for name in charts.data.names(kind) if "gpu/" in name
    )


def _supervised(charts: Charts) -> Iterable[Panel | None]:
    for title, name in (
        ("Loss", "loss"),
        ("Gradient norm", "gradient_norm"),
        ("Learning rate", "learning_rate"),
        ("Throughput", "tokens_per_second"),
    ):
        yield charts.lines(title, {name: describe(name).title}, kind="sft")


def _other(charts: Charts) -> Iterable[Panel | None]:
    hidden = ("seconds/", "expected/", "planned/", "token/count", "token/weight", "extra_forwards")
    for kind in charts.data.records:
        for name in charts.data.names(kind):
            if (kind, name) not in charts.shown and not name.startswith(hidden) and not name.endswith("/nodes"):
                prefix = "" if kind == "train" else f"{kind}: "
                yield charts.lines(f"{prefix}{name}", {name: name}, kind=kind)
