"""This script compares objectives far off-policy on the demo's task: same data, budgets and warm-up, several seeds.

    python examples/stability/run.py                        (in the repository's root; what the README reports)
    python examples/stability/run.py --steps 10 --seeds 1   (a short look)

Further --section.key value pairs override stability.toml for every run. After an interruption, the same command
continues.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comparison.campaign import PlannedRun, execute, plan, require_same_settings, steps_recorded, unfinished, warm_up
from comparison.measures import FINISHED, Run, load_ended, measure
from comparison.plots import write_plots
from comparison.tables import markdown_table, write_tables

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.engines.servers import engines
from fiberpo_megatron.trainer.preflight import make_objective

HERE = Path(__file__).parent
WARM_UP = Path("examples/demo/warmup.toml")
OPTIONS = {
    "steps": "trainer.steps",
    "learning_rate": "optimizer.learning_rate",
    "epochs": "batch.epochs",
    "mini_batches": "batch.mini_batches",
    "model": "model.path",
}
"""Command-line options that are settings of every run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left, then write the table and the plots. Return the exit code."""
    options, further = _parser().parse_known_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the run and the engine
    try:
        if not WARM_UP.is_file():
            raise ValueError(f"{WARM_UP} does not exist in {Path.cwd()}; run this in the repository's root")
        compare(options, further)
    except KeyboardInterrupt:
        print("Interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except (ConfigError, ValueError, RuntimeError) as error:
        print(f"stability: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--objectives",
        nargs="+",
        default=["fiberpo", "grpo", "gspo"],
        metavar="NAME",
        help='names, or names with options of their own: "grpo epsilon=0.1"',
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    parser.add_argument("--steps", type=int, help="training steps of a run (default: of stability.toml)")
    parser.add_argument("--learning-rate", type=float, help="default: of stability.toml")
    parser.add_argument("--epochs", type=int, help="passes over a batch of rollouts (default: of stability.toml)")
    parser.add_argument("--mini-batches", type=int, help="optimiser steps of a pass (default: of stability.toml)")
    parser.add_argument(
        "--config", type=Path, default=HERE / "stability.toml", help="settings of every run (default: stability.toml)"
    )
    parser.add_argument(
        "--model", type=Path, help="warmed-up Hugging Face folder (default: the demo's, made if missing)"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/stability"), help="folder for runs, table and plots")
    parser.add_argument("--retry-stopped", action="store_true", help="repeat runs that stopped with an error")
    return parser


def compare(options: argparse.Namespace, further: Sequence[str]) -> None:
    """Make the whole comparison."""
    overrides = list(further)
    for name, key in OPTIONS.items():
        if getattr(options, name) is not None:
            overrides += [f"--{key}", str(getattr(options, name))]
    runs = plan(options.objectives, options.seeds, options.folder, options.config, overrides)
    for run in runs:
        make_objective(run.config())
        require_same_settings(run)
    config = runs[0].config()
    print(f"{len(runs)} runs: {describe(config)}", flush=True)
    left = unfinished(runs, options.retry_stopped)
    if left:
        warm_up(config.model.path, WARM_UP)
        run_all(left, config, options.folder)
    ended = [run for planned in runs if (run := load_ended(planned.objective, planned.seed, planned.folder))]
    report(ended, config, options.folder)


def describe(config: Config) -> str:
    """Describe the setting in one line."""
    batch = config.batch
    return (
        f"{config.trainer.steps} steps, {batch.prompts} x {batch.samples_per_prompt} rollouts a step, "
        f"{batch.epochs * batch.mini_batches} optimiser steps on each ({batch.epochs} epochs x {batch.mini_batches} "
        f"mini-batches), learning rate {config.optimizer.learning_rate:g}"
    )


def run_all(runs: Sequence[PlannedRun], config: Config, folder: Path) -> None:
    """Run one after the other, all with the same SGLang server; each run publishes its own weights first."""
    os.environ["OMP_NUM_THREADS"] = str(config.run.threads_per_rank)
    print("Starting SGLang ...", flush=True)
    with engines(config.rollout.engine, config.model.path, folder / "engine", dtype=config.model.dtype) as addresses:
        progress = Progress(len(runs), config.trainer.steps)
        for run in runs:
            outcome = execute(run, addresses[0], progress.watch(run))
            progress.end(run, outcome.text)


class Progress:
    """Prints the number of the run, its step, and the time left as estimated from the steps done so far."""

    def __init__(self, runs: int, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._runs, self._steps, self._clock = runs, steps, clock
        self._began, self._ended, self._done_before = clock(), 0, 0
        self._live = sys.stdout.isatty()

    def watch(self, run: PlannedRun) -> Callable[[int], None]:
        """Return a function that takes the run's steps; steps done in an earlier call do not count as work."""
        resumed_at = steps_recorded(run)
        self._done_before += resumed_at
        shown = -1

        def tell(steps: int) -> None:
            nonlocal shown
            due = steps != shown and (self._live or steps // 10 > shown // 10)
            if due:
                shown = steps
                self._line(f"{run.name}: step {steps}/{self._steps}{self._left(steps)}", "\r" if self._live else "\n")

        return tell

    def end(self, run: PlannedRun, outcome: str) -> None:
        """Count one more run as done."""
        self._ended += 1
        self._line(f"{run.name}: {outcome}{self._left(0)}", "\n", self._ended)

    def _left(self, steps: int) -> str:
        worked = self._ended * self._steps + steps - self._done_before
        if worked <= 0:
            return ""
        whole = self._runs * self._steps - self._ended * self._steps - steps
        minutes = (self._clock() - self._began) / worked * whole / 60
        return f", about {minutes:.0f} min left"

    def _line(self, text: str, end: str, number: int | None = None) -> None:
        line = f"run {number or self._ended + 1} of {self._runs}  {text}"
        print(line.ljust(78) if self._live else line, end=end, flush=True)


def report(ended: Sequence[Run], config: Config, folder: Path) -> None:
    """Write the table and the plots, and print the table."""
    results = [measure(run) for run in ended]
    settings: dict[str, Any] = {
        "description": describe(config),
        "seeds": sorted({result.seed for result in results}),
        "config": config.model_dump(mode="json", include={"optimizer", "batch", "algorithm", "evaluation", "trainer"}),
    }
    del settings["config"]["algorithm"]["objective"]
    paths = [*write_tables(results, settings, folder), write_plots(ended, describe(config), folder)]
    print(f"\n{markdown_table(results)}\n\n" + "\n".join(f"Wrote {path}" for path in paths))
    stopped = sum(result.outcome != FINISHED for result in results)
    if stopped:
        print(f"{stopped} of {len(results)} runs stopped with an error; see console.log in their folders")


if __name__ == "__main__":
    sys.exit(main())
