"""This module puts predictions beside published points: the error of every point and phase."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.mcore.settings import ParallelConfig
from fiberpo_megatron.planning.flops import TRAINING, forward_operations
from fiberpo_megatron.planning.hardware import GPUS, Assumptions
from fiberpo_megatron.planning.lengths import Lengths
from fiberpo_megatron.planning.publication import publish_seconds
from fiberpo_megatron.planning.published import DATA, PHASES, Published, scenarios, trainer_rates
from fiberpo_megatron.planning.scenario import Scenario
from fiberpo_megatron.planning.shapes import ModelShape, read_shape
from fiberpo_megatron.planning.show import table
from fiberpo_megatron.planning.timing import StepTime, step_time
from fiberpo_megatron.planning.training import row_time

NARROW = 0.2
"""A prediction whose half-width is at most this share of its middle is a range; a wider one counts as its middle."""


@dataclass(frozen=True)
class Prediction:
    """This is a predicted number; `low` and `high` differ where the source leaves a parameter open."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    def error(self, published: float) -> float:
        """Return the relative error: 0 inside a narrow range, else its nearer end's; of a wide one its middle's."""
        if self.high - self.low > 2 * NARROW * self.middle:
            return self.middle / published - 1
        return min(max(published, self.low), self.high) / published - 1


@dataclass(frozen=True)
class Comparison:
    """This is one point: predicted beside published, by phase."""

    id: str
    source: str
    predicted: Mapping[str, Prediction]
    published: Mapping[str, float]

    @property
    def errors(self) -> dict[str, float]:
        """Return the relative error of every phase that is published."""
        return {phase: self.predicted[phase].error(value) for phase, value in self.published.items()}


def compare(points: Sequence[Published], assumptions: Assumptions) -> list[Comparison]:
    """Predict every point."""
    return [
        Comparison(published.point.id, published.point.source, predict(published, assumptions), published.point.seconds)
        for published in points
    ]


def predict(published: Published, assumptions: Assumptions) -> dict[str, Prediction]:
    """Return the prediction of every phase, over all scenarios that agree with what the point states."""
    times = [step_time(scenario, assumptions) for scenario in scenarios(published, assumptions)]
    found = {}
    for phase in PHASES:
        values = [_phase(time, phase) for time in times]
        found[phase] = Prediction(min(values), max(values))
    return found


def _phase(time: StepTime, phase: str) -> float:
    return float(time.total if phase == "step" else getattr(time, phase))


def compare_parts(assumptions: Assumptions) -> list[Comparison]:
    """Predict the published rates of training alone (TFLOP/s of a GPU), and the published publications (seconds)."""
    parts = trainer_rates()
    found = []
    for row in parts["training"]:
        scenario = _part(row, 8 * row["layout"][3], 8, assumptions)
        rate = _training_rate(scenario, row, assumptions)
        found.append(
            Comparison(row["id"], row["source"], {"tflops": Prediction(rate, rate)}, {"tflops": row["tflops"]})
        )
    for row in parts["publication"]:
        seconds = publish_seconds(_part(row, row["trainer_gpus"], row["engine_gpus"], assumptions), assumptions)
        low, high = row["seconds"]
        middle = (low + high) / 2
        found.append(
            Comparison(row["id"], row["source"], {"publish": Prediction(seconds, seconds)}, {"publish": middle})
        )
    return found


def _part(row: Mapping[str, Any], trainer: int, engines: int, assumptions: Assumptions) -> Scenario:
    tensor, context, expert, pipeline = row["layout"]
    length = float(row.get("row_tokens", 4096))
    return Scenario(
        shape=_shape(row["model"]),
        gpu=GPUS[row["gpu"]],
        trainer_gpus=trainer,
        engine_gpus=engines,
        colocated=False,
        parallel=ParallelConfig(tensor=tensor, context=context, expert=expert, pipeline=pipeline),
        engine_tensor=row.get("engine_tensor", 1),
        prompts=1,
        samples=1,
        optimiser_steps=1,
        lengths=Lengths(0.0, length, length, assumptions.length_spread),
        row_tokens=int(length),
        recompute=False,
    )


def _training_rate(scenario: Scenario, row: Mapping[str, Any], assumptions: Assumptions) -> float:
    """Return the TFLOP/s of a GPU in a row's forward and backward pass; attention counts as causal, as it is run."""
    used = replace(assumptions, expert_imbalance=1.0) if row["balanced"] else assumptions
    tokens, shape = float(row["row_tokens"]), scenario.shape
    time = row_time(scenario, shape, tokens, used)
    operations = TRAINING * forward_operations(shape, [tokens]) / scenario.parallel.model_ranks
    return operations / (time.forward + time.backward) / 1e12


def _shape(model: str) -> ModelShape:
    return read_shape(read_object(DATA / model / "config.json"))


@dataclass(frozen=True)
class Summary:
    """These are the errors of all steps together, as absolute values."""

    median: float
    largest: float
    points: int


def summary(comparisons: Sequence[Comparison]) -> Summary:
    """Return median and largest error of the points whose step time is published."""
    errors = [abs(comparison.errors["step"]) for comparison in comparisons if "step" in comparison.published]
    return Summary(median(errors), max(errors), len(errors)) if errors else Summary(0.0, 0.0, 0)


def published_json(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return `predicted`, `published` and `error` of every point, by its id.

    A predicted number is the middle of its `range`; an error is predicted over published, less 1.
    """
    return {
        comparison.id: {
            "predicted": {phase: each.middle for phase, each in comparison.predicted.items()},
            "range": {phase: [each.low, each.high] for phase, each in comparison.predicted.items()},
            "published": dict(comparison.published),
            "error": comparison.errors,
        }
        for comparison in comparisons
    }


def published_table(comparisons: Sequence[Comparison]) -> str:
    """Return predicted beside published seconds as a Markdown table, a row for every point and published phase."""
    rows = [
        [
            comparison.id,
            phase.replace("_", " "),
            _number(comparison.predicted[phase]),
            f"{value:g}",
            f"{100 * comparison.errors[phase]:+.0f} %",
        ]
        for comparison in comparisons
        for phase, value in comparison.published.items()
    ]
    return table(("point", "phase", "predicted", "published", "error"), rows)


def published_text(comparisons: Sequence[Comparison]) -> str:
    """Return the table and a sentence about the steps' errors."""
    found = summary(comparisons)
    text = published_table(comparisons)
    if found.points:
        text += (
            f"\n\nSteps of {found.points} points: median error {100 * found.median:.0f} %, largest "
            f"{100 * found.largest:.0f} %"
        )
    return text


def _number(prediction: Prediction) -> str:
    digits = 1 if prediction.high < 100 else 0
    if prediction.low == prediction.high:
        return f"{prediction.low:.{digits}f}"
    return f"{prediction.low:.{digits}f} to {prediction.high:.{digits}f}"
