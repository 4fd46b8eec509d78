"""This module plans the runs of a comparison, finds those that are left to do, and executes one by the command line."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from comparison.measures import FINISHED, OUTCOME_FILE, Outcome, read_outcome
from fiberpo_megatron.config import Config, load_config
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.process import check_reachable
from fiberpo_megatron.telemetry.sinks import METRICS_FILE, read_records
from fiberpo_megatron.trainer.plugin_checks import recorded

CONSOLE_FILE = "console.log"
STOP_CODE = 1
"""Exit code of `fiberpo train` when a rank raised. Others mean a wrong config or a signal, which is not a
measurement."""
POLL_S = 0.5
END_S = 30.0
CLI = (sys.executable, "-m", "fiberpo_megatron.cli.main")


@dataclass(frozen=True)
class PlannedRun:
    """Describes one run of the comparison."""

    objective: str
    seed: int
    folder: Path
    config_file: Path
    overrides: tuple[str, ...]
    """Overrides of the config file, except for the engine's address."""

    @property
    def name(self) -> str:
        return f"{self.objective}, seed {self.seed}"

    def config(self) -> Config:
        """Return the resolved config. Raises ConfigError."""
        return load_config(self.config_file, self.overrides)

    def command(self, engine: str, cli: Sequence[str]) -> list[str]:
        """Return the `fiberpo train` command, which continues if an earlier call of it was interrupted."""
        resume = ["--resume"] if (self.folder / METRICS_FILE).exists() else []
        urls = ["--rollout.engine.urls", json.dumps([engine])]
        return [*cli, "train", str(self.config_file), *resume, *self.overrides, *urls]


def plan(
    objectives: Sequence[str], seeds: Sequence[int], folder: Path, config_file: Path, overrides: Sequence[str]
) -> list[PlannedRun]:
    """Plan every objective under a seed before the next seed, so that an interrupted campaign still compares equal
    cases.

    An objective is a name, which may be followed by options of its own: "grpo epsilon=0.1".
    """
    runs = []
    for seed in seeds:
        for objective in objectives:
            name, *options = objective.split()
            run_folder = folder / f"{re.sub('[^a-z0-9.=-]+', '-', objective)}-seed{seed}"
            own = ["--run.folder", str(run_folder), "--run.seed", str(seed), "--algorithm.objective", name]
            for option in options:
                key, equals, value = option.partition("=")
                if not equals:
                    raise ValueError(f"objective {objective!r}: {option!r} is no option; write NAME KEY=VALUE ...")
                own += [f"--algorithm.{key}", value]
            runs.append(PlannedRun(objective, seed, run_folder, config_file, (*overrides, *own)))
    return runs


def require_same_settings(run: PlannedRun) -> None:
    """Raise ValueError when the run's folder was made with other settings, since its numbers would mix with new
    ones."""
    made = run.folder / "config.toml"
    if not made.is_file():
        return
    before, now = (_settings(recorded(config, [])) for config in (load_config(made), run.config()))
    if before != now:
        differing = ", ".join(key for key in sorted(before | now) if before.get(key) != now.get(key))
        raise ValueError(
            f"{run.folder} holds a run with other settings ({differing}); choose another --folder, or remove it"
        )


def _settings(config: Config) -> dict[str, object]:
    """Return dotted name -> value, without the engine's address."""
    flat: dict[str, object] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", config.model_dump(mode="json"))
    del flat["rollout.engine.urls"]
    return flat


ENGINE_LOST = re.compile(r"Engine(Unreachable|Timeout|Aborted)\b")
"""How the message of a run begins that lost a connection, although the engine may answer again by now."""


def unfinished(runs: Sequence[PlannedRun], retry_stopped: bool) -> list[PlannedRun]:
    """Return the runs still to do. With `retry_stopped`, those that stopped are removed and run again."""
    left = []
    for run in runs:
        outcome = read_outcome(run.folder)
        if outcome is not None and retry_stopped and outcome.text != FINISHED:
            (run.folder / OUTCOME_FILE).unlink()
            outcome = None
        if outcome is None:
            left.append(run)
    return left


def steps_recorded(run: PlannedRun) -> int:
    """Return the training steps that the run has written so far."""
    return sum(record["kind"] == "train" for record in read_records(run.folder / METRICS_FILE))


def execute(run: PlannedRun, engine: EngineAddress, tell: Callable[[int], None], cli: Sequence[str] = CLI) -> Outcome:
    """Execute a run to its end and write its outcome; `tell` receives the steps done, from time to time.

    A run that raises has stopped, which is a result. Raises RuntimeError for what is not: a refused config, a signal, a
    lost engine.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    began, console = time.monotonic(), run.folder / CONSOLE_FILE
    with console.open("ab") as output:
        start = output.tell()
        with _process(run.command(engine.url, cli), output) as process:
            while process.poll() is None:
                time.sleep(POLL_S)
                tell(steps_recorded(run))
    code = process.returncode
    text = FINISHED
    if code != 0:
        reason = stop_reason(console.read_text(encoding="utf-8", errors="replace")[start:])
        if code != STOP_CODE:
            raise RuntimeError(f"{run.name}: fiberpo train ended with exit code {code}: {reason} (log: {console})")
        check_reachable(engine)  # a dead engine stops a run as well, but says nothing about its objective
        if ENGINE_LOST.match(reason):
            raise RuntimeError(f"{run.name}: {reason}; the same command goes on with this run (log: {console})")
        text = f"stopped: {reason}"
    outcome = Outcome(text, _seconds(run, time.monotonic() - began))
    outcome.write(run.folder)
    return outcome


def stop_reason(console: str) -> str:
    """Return the first error message of `fiberpo train`, in one line."""
    found = re.search(r"^fiberpo: (?:rank \d+: )?(.+)$", console, re.MULTILINE)
    return found[1].strip() if found else "no message"


def _seconds(run: PlannedRun, this_time: float) -> float:
    """Return the wall time of the run: this call's, or the steps' own times if an earlier call did a part."""
    records = read_records(run.folder / METRICS_FILE)
    steps = sum(record.get("seconds/total") or 0.0 for record in records if record["kind"] == "train")
    return max(this_time, steps)


@contextmanager
def _process(command: Sequence[str], output: object) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a child process that does not outlive the block."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def warm_up(model: Path, config_file: Path) -> None:
    """Make the warmed-up model by `fiberpo sft`, unless it is there; `model` is the folder `hf` of that run."""
    if (model / "config.json").is_file():
        return
    if model.name != "hf":
        raise ValueError(f"--model {model} has no config.json; name a Hugging Face folder, or leave --model out")
    print(f"{model} is missing: supervised warm-up (a few minutes)", flush=True)
    resume = ["--resume"] if (model.parent / METRICS_FILE).exists() else []
    subprocess.run([*CLI, "sft", str(config_file), *resume, "--run.folder", str(model.parent)], check=True)
