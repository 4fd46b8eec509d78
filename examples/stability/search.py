"""This script is the study of objectives in one process: tuning, comparison, tables.

    python examples/stability/search.py                     (in the repository's root: tune, compare, report)
    python examples/stability/search.py levels report       (FiberPO's choice with more levels, in the cells of domains)
    python examples/stability/search.py defaults report     (the objectives with their defaults, as in the comparison)

A run that the CSV file has is not repeated, so that the same command continues after an interruption.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from study.campaign import options_of, plan, read_rows, run
from study.plan import (
    CELLS,
    COMPARISON_SEEDS,
    FINAL_SEEDS,
    GRIDS,
    SCREENING_CELLS,
    SCREENING_SEEDS,
    Options,
    with_levels,
)
from study.report import COMPARISON, DEFAULTS, FINAL, LEVELS, SCREENING, SUBJECT, chosen, finalists, texts, write_report

HERE = Path(__file__).parent
STAGES = ("tune", "compare", "levels", "defaults", "report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left of the stages. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages", nargs="*", default=["tune", "compare", "report"], metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each (default: 1)")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results" / "search", help="folder of runs.csv, the tables and the plot"
    )
    parser.add_argument(
        "--warm-ups", type=Path, default=Path("runs/search"), help="folder of warmed-up models, made if missing"
    )
    options = parser.parse_args(arguments)
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; choose from {', '.join(STAGES)}")
    warnings.simplefilter("ignore")  # wide widths are among what is tried
    file = options.results / "runs.csv"
    where = (file, options.warm_ups, options.workers)
    if "tune" in options.stages:
        run(plan(SCREENING, SCREENING_CELLS, GRIDS, SCREENING_SEEDS, read_rows(file)), *where)
        second = {name: [options_of(o) for o in best] for name, best in finalists(read_rows(file)).items()}
        run(plan(FINAL, CELLS, second, FINAL_SEEDS, read_rows(file)), *where)
    if "compare" in options.stages:
        best = {name: [options_of(text)] for name, text in chosen(read_rows(file)).items()}
        run(plan(COMPARISON, CELLS, best, COMPARISON_SEEDS, read_rows(file)), *where)
    if "levels" in options.stages:
        cells = [cell for cell in CELLS if cell.task == "domains"]
        levels = {SUBJECT: [with_levels(options_of(chosen(read_rows(file))[SUBJECT]))]}
        run(plan(LEVELS, cells, levels, COMPARISON_SEEDS, read_rows(file)), *where)
    if "defaults" in options.stages:
        bare: dict[str, list[Options]] = {name: [{}] for name in GRIDS}
        run(plan(DEFAULTS, CELLS, bare, COMPARISON_SEEDS, read_rows(file)), *where)
    if "report" in options.stages:
        rows = read_rows(file)
        paths = write_report(rows, options.results)
        print("\n".join([*texts(rows).values(), *(f"Wrote {path}" for path in paths)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
