"""This module holds what a panel is, and makes panels from the names of the metrics that a run has logged."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fiberpo_megatron.telemetry.metrics import Kind, describe

MOST_CURVES, MOST_PANELS = 40, 150
"""Curves in a chart and charts in a section. Environments name their numbers freely, so that there may be thousands of
names."""
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


class Keys:
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


class PanelMaker:
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
