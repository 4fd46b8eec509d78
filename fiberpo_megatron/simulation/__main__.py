"""`python -m fiberpo_megatron.simulation` runs the trainings of many seeds; it ends with 1 at the first that breaks an
invariant."""

import argparse
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from fiberpo_megatron.simulation.invariants import INVARIANTS
from fiberpo_megatron.simulation.run import Simulated, simulate

LAST = 40
"""Events of a broken run that are shown."""
SAY_EVERY_S = 10.0


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fiberpo_megatron.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many trainings")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first one")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the seeds")
    parser.add_argument("--verbose", action="store_true", help="show all events of each training")
    asked = parser.parse_args()
    began = said = time.monotonic()
    seen: Counter[str] = Counter()
    seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    for done, found in enumerate(_simulated(seeds, asked.jobs), 1):
        seen.update(_befell(found))
        if asked.verbose:
            _show(found, len(found.trace))
        if found.broken is not None:
            _show(found, LAST)
            return 1
        if time.monotonic() - said > SAY_EVERY_S or done == asked.seeds:
            said = time.monotonic()
            rate = 60 * done / (said - began)
            print(f"{done} of {asked.seeds} seeds, {rate:.0f} a minute: every invariant holds", flush=True)
    print("What befell them: " + ", ".join(f"{what} {times}" for what, times in sorted(seen.items())))
    return 0


def _simulated(seeds: Sequence[int], jobs: int) -> Iterator[Simulated]:
    """Yield what became of the seeds, in order."""
    if jobs == 1:
        _begin()
        yield from map(simulate, seeds)
        return
    with ProcessPoolExecutor(jobs, initializer=_begin) as processes:
        try:
            yield from processes.map(simulate, seeds, chunksize=4)
        finally:
            processes.shutdown(cancel_futures=True)


def _begin() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # production's warnings about what befalls it


def _befell(found: Simulated) -> Counter[str]:
    counts: Counter[str] = Counter(processes=found.processes, steps=found.scenario.steps)
    for _, what, facts in found.trace:
        if what == "fault":
            counts[f"engine {facts['fault']}"] += 1
        elif what in ("killed", "machine lost", "SIGTERM", "disk full"):
            counts[what] += 1
    return counts


def _show(found: Simulated, events: int) -> None:
    print(f"Seed {found.scenario.seed}: {found.scenario}")
    for now, what, facts in found.trace[-events:]:
        print(f"{now:12.3f} s  {what}  " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    broken = found.broken
    if broken is None:
        return
    statement = next(" ".join((one.__doc__ or "").split()) for one in INVARIANTS if one.__name__ == broken.name)
    if broken.__cause__ is not None:
        traceback.print_exception(broken.__cause__)
    print(f"Seed {found.scenario.seed} breaks {broken.name}: {broken}\nIt says: {statement}")
    print(f"Replay it: python -m fiberpo_megatron.simulation --seeds 1 --first-seed {found.scenario.seed} --verbose")


if __name__ == "__main__":
    sys.exit(main())
