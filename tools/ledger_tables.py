"""This tool writes the tables of published runs, GPUs and constants in docs/planning.md.

With `--check` it says whether they are current.

`--refit` also writes the table of sources left out, which takes some minutes: for each source, the constants of FITTED
are fitted to the points of the others and the left-out points are predicted with them.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib import import_module
from math import log
from pathlib import Path

from fiberpo_megatron.planning import sources
from fiberpo_megatron.planning.hardware import GPUS, Assumptions
from fiberpo_megatron.planning.ledger import compare, compare_parts, published_table, published_text, summary
from fiberpo_megatron.planning.overheads import Overheads
from fiberpo_megatron.planning.published import Published, built_in
from fiberpo_megatron.planning.show import table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/planning.md"
PUBLISHED = ("<!-- published: tools/ledger_tables.py -->", "<!-- end of published -->")
LEFT_OUT = ("<!-- left out: tools/ledger_tables.py --refit -->", "<!-- end of left out -->")
HARDWARE = ("<!-- gpus: tools/ledger_tables.py -->", "<!-- end of gpus -->")
CONSTANTS = ("<!-- constants: tools/ledger_tables.py -->", "<!-- end of constants -->")
SOURCES = {"NeMo-RL": "np-", "verl, fully asynchronous": "vf-", "verl, V1 trainer": "va-"}
FITTED = {
    "decode_kernel_us": 4.0,
    "engine_request_us": 30.0,
    "expert_memory_efficiency": 0.62,
    "engine_host_ms": 2.0,
    "pageable_copy_efficiency": 0.10,
    "network_latency_us": 15.0,
    "eager_kernel_us": 40.0,
}
"""Constants for which published measurements give a range, with the middle of it; docs/planning.md (Constants)."""
_ERROR, _PRIOR = 0.15, 0.3
"""Standard deviations of a step's logarithm around its prediction, and of a constant's around the middle."""
_FACTORS = (0.75, 0.87, 0.95, 1.0, 1.05, 1.15, 1.33)
_ROUNDS = 2


def published_tables() -> str:
    """Return the tables of steps and of parts."""
    parts = compare_parts(Assumptions())
    return f"{published_text(compare(built_in(), Assumptions()))}\n\n{published_table(parts)}"


def gpu_table() -> str:
    """Return the table of GPUs."""
    headings = ("GPU", "GB", "TFLOPS", "GB/s", "NVLink", "domain", "network", "host", "GPUs a host", "source")
    rows = [
        [
            gpu.name,
            *(f"{value:g}" for value in (gpu.memory_gb, gpu.tflops, gpu.memory_gb_per_s, gpu.nvlink_gb_per_s)),
            *(f"{value:g}" for value in (gpu.nvlink_domain, gpu.network_gb_per_s, gpu.host_gb_per_s, gpu.host_gpus)),
            gpu.source,
        ]
        for gpu in GPUS.values()
    ]
    return table(headings, rows)


def constants_table() -> str:
    """Return a row for every constant of the model of time: its value, and where it comes from."""
    rows = []
    for field in fields(Assumptions):
        if field.name not in Overheads.__dataclass_fields__:
            rows.append(_constant_row(field.name, getattr(Assumptions(), field.name), sources.SOURCES[field.name]))
    for name, source in sources.COUNTS.items():
        module, attribute = name.split(".")
        value = getattr(import_module(f"fiberpo_megatron.planning.{module}"), attribute)
        rows.append(_constant_row(name, value, source))
    return table(("constant", "value", "kind", "source", "what it says, and how the value follows"), rows)


def _constant_row(name: str, value: float | tuple[float, ...], source: sources.Source) -> list[str]:
    text = " to ".join(f"{each:g}" for each in (value if isinstance(value, tuple) else (value,)))
    return [f"`{name}`", text, source.kind, source.where, source.figure]


def refit(points: Sequence[Published]) -> Assumptions:
    """Fit the constants of FITTED to points, each held near its value by a prior."""
    best = replace(Assumptions(), **FITTED)
    least = _cost(points, best)
    for _ in range(_ROUNDS):
        for name in FITTED:
            start = getattr(best, name)
            for factor in _FACTORS:
                tried = replace(best, **{name: start * factor})
                cost = _cost(points, tried)
                if cost < least:
                    best, least = tried, cost
    return best


def _cost(points: Sequence[Published], assumptions: Assumptions) -> float:
    steps = [
        log(comparison.predicted["step"].middle / comparison.published["step"])
        for comparison in compare(points, assumptions)
    ]
    moved = [log(getattr(assumptions, name) / middle) for name, middle in FITTED.items()]
    return sum((each / _ERROR) ** 2 for each in steps) + sum((each / _PRIOR) ** 2 for each in moved)


def left_out_table() -> str:
    """Return a row for each source: the constants fitted without it, and the errors of its points with them."""
    points = built_in()
    rows = []
    for source, prefix in {"none": "", **SOURCES}.items():
        own = [published for published in points if published.point.id.startswith(prefix)]
        fitted = refit([published for published in points if not prefix or published not in own])
        comparisons = compare(own, fitted)
        found = summary(comparisons)
        moved = ", ".join(f"{name} {getattr(fitted, name):.3g}" for name in FITTED)
        errors = ", ".join(f"{100 * each.errors['step']:+.0f}" for each in comparisons)
        rows.append([source, moved, errors, f"{100 * found.median:.0f} %", f"{100 * found.largest:.0f} %"])
    return table(("left out", "fitted constants", "errors of its points, %", "median", "largest"), rows)


def _replaced(text: str, marks: tuple[str, str], inside: str) -> str:
    begin, end = marks
    head, rest = text.split(begin)
    return f"{head}{begin}\n\n{inside}\n\n{end}{rest.split(end)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not current; write nothing")
    parser.add_argument("--refit", action="store_true", help="also the table of sources left out (minutes)")
    options = parser.parse_args()
    text = PAGE.read_text()
    wanted = _replaced(_replaced(text, PUBLISHED, published_tables()), HARDWARE, gpu_table())
    wanted = _replaced(wanted, CONSTANTS, constants_table())
    if options.refit:
        wanted = _replaced(wanted, LEFT_OUT, left_out_table())
    if options.check:
        print("current" if text == wanted else f"{PAGE} is not current: run python tools/ledger_tables.py")
        return int(text != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
