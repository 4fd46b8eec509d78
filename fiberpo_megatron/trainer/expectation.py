"""This module says what a plan expects of a run: a few lines at its start, and seconds beside those of every step.

`planned/...` is the plan before the start, with the assumed length of responses. `expected/...` is the same plan with
the trajectories that the step really had. What differs between the two is due to lengths; what differs between
`expected/...` and the measured seconds is due to the machine, or to the plan.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fiberpo_megatron.config import Config
from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.planning.calibration import FILE, Calibration, calibrated, read_calibration, vendor_row
from fiberpo_megatron.planning.engines import engine_count
from fiberpo_megatron.planning.estimate import Plan, make_plan
from fiberpo_megatron.planning.hardware import Assumptions, Gpu
from fiberpo_megatron.planning.lengths import Lengths, longest
from fiberpo_megatron.planning.scenario import Scenario
from fiberpo_megatron.planning.timing import GIGA, StepTime, step_time
from fiberpo_megatron.planning.training import packing
from fiberpo_megatron.types import RolloutBatch

_log = logging.getLogger(__name__)
LEAST_SPREAD, MOST_SPREAD = 0.05, 4.0
"""Bounds of the standard deviation of the logarithm of lengths; responses of equal lengths have the least."""
NEAR = 0.01


class NoPlan(Exception):
    """The run has no plan; the message says why, and what would make one."""


def phase_seconds(time: StepTime, replays: bool = False) -> dict[str, float]:
    """Return the seconds of a step by the names of the run's own timers; phases that do not occur are left out.

    `publish` stands for publication and its check, and `host` for the timers tasks, stored_rollouts, exchange and pack.
    With `replays` nothing is generated and nothing published.
    """
    found = {
        "generate": 0.0 if replays else time.generate,
        "old_log_probs": time.old_log_probs,
        "reference": time.reference,
        "teacher": time.teacher,
        "train": time.train + time.optimizer,
        "publish": 0.0 if replays else time.publish,
        "memory_turns": 0.0 if replays else time.memory_turns,
        "host": time.host,
        "checkpoint": time.checkpoint,
    }
    total = sum(found.values()) - (0.0 if replays else time.hidden)
    return {name: seconds for name, seconds in found.items() if seconds > 0} | {"total": total}


@dataclass
class Expectation:
    """This knows a run's plan, and what it expects of each step."""

    plan: Plan
    assumptions: Assumptions
    source: str
    """Where the plan's constants come from, for people."""
    replays: bool = False
    """Whether the run trains on stored trajectories."""
    _failed: bool = field(default=False, init=False)

    @property
    def planned(self) -> dict[str, float]:
        """Return the metrics of the plan before the start."""
        return self._metrics(self.plan.scenario, "planned") | {
            "planned/response_length/mean": self.plan.scenario.lengths.response
        }

    def lines(self) -> list[str]:
        """Return what the plan expects, for the start of the run."""
        plan = self.plan
        seconds = self._seconds(plan.scenario)
        phases = ", ".join(
            f"{name.replace('_', ' ')} {_short(value)}" for name, value in seconds.items() if name != "total"
        )
        rate = plan.work.tokens / seconds["total"]
        gpus = plan.training_gpus + (0 if plan.config.rollout.engine.colocated else plan.engine_gpus)
        lengths = plan.scenario.lengths
        largest = plan.largest
        each = "ranks and engines" if plan.gpu.name == "cpu" else "GPUs"
        lines = [
            f"Plan ({self.source}): a step takes {_short(seconds['total'])} s ({phases})",
            f"  {rate:,.0f} tokens/s, {rate / gpus:,.0f} on each of {gpus} {each}, if prompts have "
            f"{lengths.prompt:,.0f} tokens and responses {lengths.response:,.0f} of {lengths.limit:,.0f}",
            f"  memory of a training rank: at most {largest.total / GIGA:.1f} GB of {plan.memory / GIGA:.0f} GB "
            f"(stage {largest.stage})",
        ]
        return lines + [f"  WARNING: the plan does not fit: {problem}" for problem in plan.problems]

    def __call__(self, rollouts: RolloutBatch) -> dict[str, float]:
        """Return the metrics `planned/...` and `expected/...` of a step that had these trajectories.

        Planning must not end a run: an error is one warning, and later steps have no such metrics. Nothing is expected
        of a step without trajectories.
        """
        if self._failed or not len(rollouts.lengths):
            return {}
        try:
            scenario = with_trajectories(self.plan.scenario, rollouts)
            return self.planned | self._metrics(scenario, "expected")
        except Exception as error:  # whatever it is, training is worth more than its forecast
            self._failed = True
            _log.warning("what a step should take is not known any more (%s: %s)", type(error).__name__, error)
            return {}

    def _seconds(self, scenario: Scenario) -> dict[str, float]:
        return phase_seconds(step_time(scenario, self.assumptions), self.replays)

    def _metrics(self, scenario: Scenario, prefix: str) -> dict[str, float]:
        seconds = self._seconds(scenario)
        batches = max(1, scenario.optimiser_steps // scenario.epochs)
        return {
            **{f"{prefix}/seconds/{name}": value for name, value in seconds.items()},
            f"{prefix}/tokens_per_second": scenario.tokens / seconds["total"],
            f"{prefix}/micro_batches": float(batches * packing(scenario).rows),
        }


def with_trajectories(scenario: Scenario, rollouts: RolloutBatch) -> Scenario:
    """Return the scenario of a step that had these trajectories: their number, and how long they were.

    What an environment wrote between turns counts with the prompt, because engines read it. A branch counts as one more
    trajectory: engines and ranks have as much to do with it.
    """
    responses = rollouts.response_lengths
    count, groups = len(responses), int(rollouts.groups[-1]) + 1
    lengths = Lengths(
        prompt=float(rollouts.lengths.mean() - responses.mean()),
        response=float(responses.mean()),
        limit=float(responses.max()),
        spread=max(LEAST_SPREAD, float(np.log(np.maximum(responses, 1)).std())),
    )
    lengths = with_longest(lengths, count, float(responses.max()))
    return replace(scenario, prompts=groups, samples=max(1, round(count / groups)), lengths=lengths)


def with_longest(lengths: Lengths, count: int, most: float) -> Lengths:
    """Return the lengths with a spread at which the longest of `count` responses has `most` tokens or, beyond the
    spread of the responses themselves, comes nearest to it: the end of a generation depends on it."""
    low, high = lengths.spread, MOST_SPREAD
    if longest(lengths, count) >= (1 - NEAR) * most:
        return lengths
    while high - low > NEAR:
        middle = (low + high) / 2
        reached = longest(replace(lengths, spread=middle), count) >= (1 - NEAR) * most
        low, high = (low, middle) if reached else (middle, high)
    return replace(lengths, spread=high)


def expectation(
    config: Config, hf_config: Mapping[str, Any], world_size: int, prompt_tokens: float | None
) -> Expectation:
    """Return what to expect of a run on `world_size` training ranks whose prompts have `prompt_tokens` tokens.

    That is a mean; with None it is what `planning.assume` or the default says.

    Raises NoPlan where nothing is known about the machine, and ValueError or OSError for a calibration that cannot be
    used.
    """
    calibration = _calibration(config)
    known = [] if prompt_tokens is None else [f"prompt_tokens={max(1.0, prompt_tokens)}"]
    assumptions = calibrated(calibration, [*known, *config.planning.assume])
    gpu, source = _device(config, calibration)
    parallel = config.parallel.model_copy(update={"data": world_size // config.parallel.model_ranks})
    config = config.model_copy(update={"parallel": parallel})
    serving = engine_count(config) * config.rollout.engine.tensor
    gpus = max(world_size, serving) if config.rollout.engine.colocated else world_size + serving
    plan = make_plan(config, hf_config, gpus, gpu.memory_gb * GIGA, gpu, assumptions)
    return Expectation(plan, assumptions, source, config.storage.replay is not None)


def calibration_file(config: Config) -> Path | None:
    """Return the calibration that a run uses: the one that is set, or one beside the run; None without one."""
    if config.planning.calibration is not None:
        return config.planning.calibration
    beside: Sequence[Path] = (config.run.folder / FILE, config.run.folder.parent / FILE)
    return next((path for path in beside if path.is_file()), None)


def _calibration(config: Config) -> Calibration | None:
    path = calibration_file(config)
    return None if path is None else read_calibration(path)


def _device(config: Config, calibration: Calibration | None) -> tuple[Gpu, str]:
    """Return the row of hardware of this machine's device, and where its figures come from."""
    here = device_name()
    if calibration is not None:
        measured = str(calibration.machine["device"])
        if measured != here:
            raise ValueError(f"{calibration_file(config)} was measured on {measured}, but this machine has {here}")
        return calibration.gpu(config.model.dtype), f"calibration of {calibration.made[:10]}"
    row = vendor_row(here)
    if row is None:
        raise NoPlan(
            f"No plan: nothing is known about the speed of this machine ({here}). `fiberpo calibrate CONFIG.toml --out "
            f"{config.run.folder.parent / FILE}` measures it for the next run"
        )
    return row, f"{row.name}, vendor's figures"


def device_name() -> str:
    """Return the name of this machine's training device: the GPU's own, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def peak_tflops(config: Config) -> float | None:
    """Return the peak of one training device, against which MFU is measured; None if it is not known.

    For a GPU that is its vendor's figure for dense bfloat16 products, in float32 as well. A CPU has a peak only where a
    calibration has measured its products. Raises ValueError or OSError for a calibration that cannot be used.
    """
    row = vendor_row(device_name())
    if row is not None:
        return row.tflops
    calibration = _calibration(config)
    return None if calibration is None else _device(config, calibration)[0].tflops


def _short(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}" if seconds >= 1 else f"{seconds:.2f}"


Expected = Callable[[RolloutBatch], Mapping[str, float]]
"""Returns what was planned and is expected of a step that had these trajectories, as metrics."""


def nothing_expected(rollouts: RolloutBatch) -> Mapping[str, float]:
    """Return no metrics: nothing is known of what a step should take, or another rank logs it."""
    return {}


def announced(
    config: Config,
    hf_config: Mapping[str, Any],
    layout: Layout,
    mean_prompt: Callable[[], float],
    say: Callable[[str], None],
) -> Expected:
    """Say what the plan expects of the run, and return what gives the expected metrics of each step.

    Every rank calls this. Rank 0 alone calls `mean_prompt`, for the mean tokens of the next step's prompts, and the
    rank that logs plans. Without a plan one line says why; a failure to plan is a line as well, and never an error.
    """
    tokens = ""
    if layout.rank == 0:
        try:
            tokens = repr(float(mean_prompt()))
        except Exception as error:  # the source reads the same tasks next, and reports it
            _log.warning("the prompts of the next step cannot be read for the plan: %s", error)
    tokens = layout.share_text(tokens if layout.rank == 0 else None)
    if not layout.is_logger:
        return nothing_expected
    try:
        found = expectation(config, hf_config, layout.world_size, float(tokens) if tokens else None)
        lines = found.lines()
    except NoPlan as reason:
        say(str(reason))
        return nothing_expected
    except Exception as error:  # a plan is never worth a run
        say(f"WARNING: no plan of this run could be made ({type(error).__name__}: {error})")
        return nothing_expected
    for line in lines:
        say(line)
    return found
