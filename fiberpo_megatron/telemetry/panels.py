"""This module says which charts a run has, as data: the static report and the live page draw the same panels.

`panel_sections` maps the names of the metrics that a run has logged to sections of panels. A panel names its metrics
and says how they are drawn, and holds no numbers. The module imports the standard library and `telemetry.metrics` only.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from fiberpo_megatron.telemetry.metrics import Kind, describe

STATES = {"pass": "#7fc8a9", "rollback": "#f2b84b", "zeroed": "#d1495b"}
"""Colours for what a gate does to a node."""
REGIMES = {
    "both_pass": ("both pass", "#7fc8a9"),
    "one_rollback": ("one in rollback", "#f6d58a"),
    "both_rollback": ("both beyond, some in rollback", "#f2b84b"),
    "one_zeroed": ("one zeroed", "#e58b94"),
    "both_zeroed": ("both zeroed", "#b5303f"),
}
"""Labels and colours for what the two channels of a node do together."""
CHANNELS = (("plus", "S⁺"), ("minus", "S⁻"))
PHASES = {
    "generate": "#0072B2",
    "exchange": "#7fb3d5",
    "score": "#9fd3c7",
    "pack": "#b7b7b7",
    "old_log_probs": "#009E73",
    "gate": "#CC79A7",
    "train": "#D55E00",
    "publish": "#E69F00",
    "verify": "#f4d58d",
    "evaluate": "#8c6bb1",
    "checkpoint": "#6b7280",
}
"""Phases of a step in their order, with their colours; the time of other timers lies inside these."""
HELD_OUT_COLOUR = "#D55E00"
MOST_CURVES, MOST_PANELS, MOST_LEVELS = 40, 150, 30
"""Curves in a chart, charts in a section and levels with a section of their own. Environments name their numbers
freely, so that there may be thousands of names."""
LONGEST_KEY = 60


@dataclass(frozen=True)
class Curve:
    """Describes one curve or one area of a panel."""

    metric: str
    """Name of the metric, as in metrics.jsonl."""
    label: str
    """Text of the legend."""
    kind: Kind = "train"
    """Kind of the records that hold the metric."""
    colour: str | None = None
    """"#rrggbb"; None lets the drawing choose."""
    band: str | None = None
    """A metric whose value is the half-width of a shaded band around the curve."""
    minus: str | None = None
    """A metric that is subtracted from this one, at the same steps."""
    markers: bool = False
    """Whether points are joined by a thin line: for a few measurements rather than a value every step."""


@dataclass(frozen=True)
class Panel:
    """Describes one chart over the steps of a run."""

    key: str
    """Unique within its section, of lower-case letters, digits, hyphens and underscores: usable in file names."""
    title: str
    unit: str
    """Text of the vertical axis; "%" where `percent` is set."""
    form: Literal["lines", "stack"]
    curves: tuple[Curve, ...]
    log: bool = False
    """Whether a logarithmic axis is asked for; it can be used only where all values are positive."""
    percent: bool = False
    """Whether the values are shares that are shown times 100."""
    note: str = ""
    """How to read the chart."""


@dataclass(frozen=True)
class PanelSection:
    """Holds panels that belong together."""

    key: str
    """Unique within a run, with the same characters as the key of a panel."""
    title: str
    panels: tuple[Panel, ...]
    cut: bool = False
    """Whether the section would have more than MOST_PANELS panels, of which these are the first."""


def panel_sections(names: Mapping[Kind, Sequence[str]]) -> list[PanelSection]:
    """Return the sections of a run, in the order in which they are shown; none is empty.

    Args:
        names: the metrics of each kind of record, in the order in which they were first logged. Every one of them is
            drawn by some panel, except those that only repeat others (such as times inside a phase).
    """
    panels = _Panels(names)
    makers: list[tuple[str, Iterable[Panel | None]]] = [
        ("Learning", _learning(panels)),
        ("Environments", _environments(panels)),
        ("Policy movement", _movement(panels)),
        *((f"Gate of level: {level}", _gate(panels, level)) for level in panels.levels()[:MOST_LEVELS]),
        ("Experts", _experts(panels)),
        ("Speed", _speed(panels)),
        ("GPUs", _gpus(panels)),
        ("Supervised warm-up", _supervised(panels)),
        ("Other metrics", _other(panels)),
    ]
    sections, keys = [], _Keys()
    for title, made in makers:
        found = list(islice((panel for panel in made if panel is not None), MOST_PANELS + 1))
        own = _Keys()
        shown = tuple(replace(panel, key=own.of(panel.title)) for panel in found[:MOST_PANELS])
        if shown:
            sections.append(PanelSection(keys.of(title), title, shown, cut=len(found) > MOST_PANELS))
    return sections


class _Keys:
    """Makes keys of titles, each once."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def of(self, title: str) -> str:
        """Return a key that was not returned before; a title that occurs again gets a number."""
        spelled = title.replace("⁺", " plus").replace("⁻", " minus").lower()
        stem = re.sub(r"[^a-z0-9_]+", "-", spelled[: 2 * LONGEST_KEY])[:LONGEST_KEY].strip("-") or "panel"
        key, number = stem, 1
        while key in self._used:
            number += 1
            key = f"{stem}-{number}"
        self._used.add(key)
        return key


class _Panels:
    """Makes panels, and remembers which metrics were used, so that the rest can be shown under "other"."""

    def __init__(self, names: Mapping[Kind, Sequence[str]]) -> None:
        self.names: dict[Kind, dict[str, None]] = {kind: dict.fromkeys(found) for kind, found in names.items()}
        self.used: set[tuple[Kind, str]] = set()

    def has(self, kind: Kind, name: str) -> bool:
        """Mark a metric as shown and return whether it was logged."""
        self.used.add((kind, name))
        return name in self.names.get(kind, ())

    def matching(self, pattern: str, kind: Kind = "train") -> dict[str, str]:
        """Return {metric: what the pattern's group matches} of the metrics that match and were not used yet."""
        matches = (re.fullmatch(pattern, name) for name in self.names.get(kind, ()))
        return {match[0]: match[1] for match in matches if match is not None and (kind, match[0]) not in self.used}

    def levels(self) -> list[str]:
        """Return the names of the gated levels, in the order in which they were logged."""
        found = self.matching(r"gate/(.+)/(?:plus|minus|regime)/\w+")
        return list(dict.fromkeys(found.values()))

    def make(
        self, title: str, curves: Iterable[Curve], *, form: Literal["lines", "stack"] = "lines", log: bool = False,
        note: str = "", unit: str | None = None,
    ) -> Panel | None:  # fmt: skip
        """Return a panel of the curves whose metrics were logged, or None if there are none.

        The unit is that of the first curve's metric where none is given; shares are shown in %.
        """
        curves = list(curves)
        found = [self._logged(curve) for curve in curves if self.has(curve.kind, curve.metric)]
        if not found:
            return None
        unit = describe(curves[0].metric).unit if unit is None else unit
        if len(found) > MOST_CURVES:
            note = f"{note}{'; ' if note else ''}the first {MOST_CURVES} of {len(found)} are drawn"
        percent = unit == "share"
        unit = "%" if percent else unit
        return Panel("", title, unit, form, tuple(found[:MOST_CURVES]), log=log, percent=percent, note=note)

    def lines(
        self, title: str, labels: Mapping[str, str], *, kind: Kind = "train", log: bool = False, note: str = ""
    ) -> Panel | None:
        """Return a panel of the curves {metric: label} that were logged, or None."""
        return self.make(title, [Curve(name, label, kind) for name, label in labels.items()], log=log, note=note)

    def _logged(self, curve: Curve) -> Curve:
        """Return the curve without a band or a subtracted metric that was not logged."""
        band = curve.band if curve.band is not None and self.has(curve.kind, curve.band) else None
        minus = curve.minus if curve.minus is not None and self.has(curve.kind, curve.minus) else None
        return replace(curve, band=band, minus=minus)


def _learning(panels: _Panels) -> Iterator[Panel | None]:
    yield _accuracy(panels, "Accuracy", "accuracy", "share of right responses, sampled at the rollout temperature")
    domains = sorted({*panels.matching(r"accuracy/(.+)"), *panels.matching(r"accuracy/(.+)", "eval")})
    for name in domains:
        panel = _accuracy(panels, f"Accuracy: {name.removeprefix('accuracy/')}", name, "")
        yield panel if len(domains) > 1 else None
    label = "mean ± standard deviation" if "reward/std" in panels.names.get("train", ()) else "mean"
    yield panels.make(
        "Reward", [Curve("reward/mean", label, band="reward/std")], note="over all trajectories of a step"
    )
    yield panels.lines(
        "Entropy",
        {"entropy": "entropy"},
        note="of the next-token distribution; near 0 the policy no longer explores",
    )
    yield panels.lines(
        "Response length", {"response_length/mean": "mean", "response_length/max": "longest of the step"}
    )
    yield panels.lines("Truncated responses", {"truncated_share": "cut at the length limit"})
    for name in ("reward/mean", "response_length/mean", "response_length/max", "truncated_share", "reward/std"):
        panels.has("eval", name)  # close to the training ones; metrics.jsonl has them


def _accuracy(panels: _Panels, title: str, name: str, note: str) -> Panel | None:
    curves = [
        Curve(name, "training prompts"),
        Curve(name, "held-out prompts", "eval", HELD_OUT_COLOUR, markers=True),
    ]
    return panels.make(title, curves, note=note)


def _environments(panels: _Panels) -> Iterator[Panel | None]:
    """Yield components of rewards, other numbers of the environments, and their failures."""
    for title, pattern, note in (
        ("Components of the reward", r"reward/(.+)/mean", "mean over the trajectories that have the component"),
        ("Numbers of the environments", r"environment/(.+)/mean", "mean over the trajectories that have the number"),
        ("Events of the environments", r"environment/(.+)", "counts of a step: failures, trajectories that began anew"),
    ):
        yield panels.lines(title, panels.matching(pattern), note=note)
    yield panels.lines("Failed trajectories", {"failed_share": "kept with reward 0"})


def _movement(panels: _Panels) -> Iterator[Panel | None]:
    yield panels.lines(
        "Importance ratio",
        {"ratio/mean": "mean", "ratio/p99": "99th percentile", "ratio/max": "max"},
        log=True,
        note="current over old policy, per token; 1 is on-policy",
    )
    yield panels.lines(
        "Clipped tokens", {"token/clip_share": "clipped"}, note="tokens whose own clip stops their direct gradient"
    )
    yield panels.make(
        "Trajectories by clipped tokens",
        [
            Curve("token/trajectories_none_clipped", "none clipped", colour=STATES["pass"]),
            Curve("token/trajectories_some_clipped", "some", colour=STATES["rollback"]),
            Curve("token/trajectories_all_clipped", "all", colour=STATES["zeroed"]),
        ],
        form="stack",
    )
    yield panels.lines(
        "Rollout against trainer",
        {"rollout_diff/mean": "mean", "rollout_diff/max": "max"},
        log=True,
        note="|log-prob of the engine − log-prob of the trainer| of the sampled tokens, same weights",
    )
    yield panels.lines(
        "Gradient norm",
        {"gradient_norm": "mean of the steps", "gradient_norm_max": "max"},
        note="before clipping",
    )
    yield panels.lines("Effective sample size", {"effective_sample_size": "share of the tokens' weight"})
    yield panels.lines("Objective", {"objective/value": "J"}, note="mean over the optimiser steps of a step")
    yield panels.lines("Learning rate", {"learning_rate": "learning rate"})


def _gate(panels: _Panels, level: str) -> Iterator[Panel | None]:
    head = f"gate/{level}"
    yield panels.make(
        "Joint regimes",
        [Curve(f"{head}/regime/{name}", label, colour=colour) for name, (label, colour) in REGIMES.items()],
        form="stack",
        note="share of the level's nodes; what their two channels do together",
    )
    for channel, sign in CHANNELS:
        yield panels.make(
            f"{sign} channel",
            [Curve(f"{head}/{channel}/{state}", state, colour=colour) for state, colour in STATES.items()],
            form="stack",
            note="share of the level's nodes",
        )
    for channel, sign in CHANNELS:
        yield panels.lines(
            f"Aggregate drift {sign}",
            {f"{head}/s_{channel}/mean": "mean", f"{head}/s_{channel}/p99": "99th percentile"},
            note="of a node, before its gate",
        )
    yield panels.lines(
        "Base weight", {f"{head}/base_weight/mean": "mean", f"{head}/base_weight/p99": "99th percentile"}
    )


def _experts(panels: _Panels) -> Iterator[Panel | None]:
    weights = panels.matching(r"expert/mass/(.+)")
    curves = [Curve(name, label) for name, label in weights.items()]
    yield panels.make("Weight by expert partition", curves, form="stack")
    yield panels.lines("Drift by expert partition", panels.matching(r"expert/drift/(.+)"))
    yield panels.lines("Entropy of the expert weights", {"expert/entropy": "entropy"})


def _speed(panels: _Panels) -> Iterator[Panel | None]:
    yield _phases(panels)
    yield panels.lines("Throughput", {"tokens_per_second": "prompt and response tokens over the whole step"})
    yield panels.lines(
        "Packing",
        {"useful_token_share": "positions that are not padding", "load_imbalance": "most loaded rank above the mean"},
    )
    yield panels.lines(
        "Time of a step and its plan",
        {
            "seconds/total": "measured",
            "expected/seconds/total": "expected with these trajectories",
            "planned/seconds/total": "planned before the start",
        },
        note="evaluations and checkpoints fall into single steps; the plan spreads checkpoints over all",
    )
    yield panels.lines("Time in the gate", {"gate/time_share": "all", "gate/reduce_share": "its reductions"})


def _phases(panels: _Panels) -> Panel | None:
    """Return the seconds of each phase; the gate's time is subtracted from training, of which it is a part."""
    minus = {"train": "seconds/gate"}
    curves = [
        Curve(f"seconds/{phase}", phase.replace("_", " "), colour=colour, minus=minus.get(phase))
        for phase, colour in PHASES.items()
    ]
    title, note = "Seconds per phase", "on the rank that writes the metrics"
    panel = panels.make(title, curves, form="stack", note=note)
    return panel or panels.make(title, [Curve("seconds/total", "total")], form="stack", note=note)


def _gpus(panels: _Panels) -> Iterator[Panel | None]:
    for title, what in (
        ("Utilisation", "utilisation"),
        ("Memory in use", "memory_used"),
        ("Power", "power"),
        ("Temperature", "temperature"),
        ("Clocks held back", "throttled"),
        ("Uncorrected ECC errors", "ecc_uncorrected"),
    ):
        found = panels.matching(rf"gpu/(.+)/{what}")
        yield panels.lines(title, {name: f"GPU {index}" for name, index in found.items()})
    panels.used.update((kind, name) for kind, found in panels.names.items() for name in found if "gpu/" in name)


def _supervised(panels: _Panels) -> Iterator[Panel | None]:
    for title, name in (
        ("Loss", "loss"),
        ("Gradient norm", "gradient_norm"),
        ("Learning rate", "learning_rate"),
        ("Throughput", "tokens_per_second"),
    ):
        yield panels.lines(title, {name: describe(name).title}, kind="sft")


def _other(panels: _Panels) -> Iterator[Panel | None]:
    hidden = ("seconds/", "expected/", "planned/", "token/count", "token/weight", "extra_forwards")
    for kind, found in panels.names.items():
        for name in found:
            if (kind, name) not in panels.used and not name.startswith(hidden) and not name.endswith("/nodes"):
                prefix = "" if kind == "train" else f"{kind}: "
                yield panels.lines(f"{prefix}{name}", {name: name}, kind=kind)
