"""This module warms models up by supervised training, and trains them by reinforcement; several runs at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor

from fiberpo_megatron.fibration import Objective
from study.model import Model, Shape, initial_parameters
from study.tasks import TASKS, Problems, Task

PROMPTS, SAMPLES = 24, 8
"""Prompts of a step, and samples of each."""
STEPS = {"short": 25, "long": 16, "domains": 20}
"""Training steps (batches of rollouts) of a run, by task."""
HELD_OUT = {"short": 1024, "long": 384, "domains": 768}
"""Held-out problems, by task."""
WARM_UP_BATCH, WARM_UP_RATE, WARM_UP_LIMIT, PROBE = 96, 2e-3, 3000, 192
"""Problems of a supervised step, its learning rate, the most steps, and problems by which the score is watched."""
TARGETS = {"short": 0.5, "long": 0.5, "domains": 0.55}
"""Score at which a warm-up stops, by task."""


@dataclass(frozen=True)
class Cell:
    """Describes one setting in which objectives are compared."""

    task: str
    epochs: int
    """Passes over a batch of rollouts."""
    mini_batches: int
    """Optimiser steps of one pass."""
    learning_rate: float

    @property
    def optimiser_steps(self) -> int:
        """Return the number of optimiser steps on each batch of rollouts."""
        return self.epochs * self.mini_batches

    @property
    def name(self) -> str:
        """Return the cell's name."""
        return f"{self.task}-{self.optimiser_steps}-{self.learning_rate:g}"


@dataclass(frozen=True)
class Outcome:
    """Holds what one run measured."""

    start: float
    """Held-out score of the warmed-up model."""
    final: float
    """Held-out score at the end."""
    ratio_max: float
    """Largest importance ratio of a token in the whole run."""
    seconds: float
    """Processor time; of runs that were made at once, an equal share each."""


def generator_of(*numbers: int) -> Generator:
    """Return a generator whose seed is a function of the numbers, each below 10,000."""
    seed = 0
    for number in numbers:
        seed = seed * 10_000 + number
    return torch.Generator().manual_seed(seed)


def draw(task: Task, generators: Sequence[Generator], count: int) -> Problems:
    """Return the problems of several runs, stacked: each tensor gets a first dimension of R."""
    drawn = [task.draw(generator, count) for generator in generators]
    return Problems(*(torch.stack([getattr(each, field.name) for each in drawn]) for field in fields(Problems)))


def optimizer_of(model: Model, learning_rate: float) -> torch.optim.AdamW:
    """Return AdamW over the parameters of all copies; it works element by element, so that copies stay apart."""
    return torch.optim.AdamW([model.flat], lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, foreach=False)


def step(model: Model, optimizer: torch.optim.AdamW, value: Tensor) -> None:
    """Take one step down the sum of all copies' losses, with the gradient's norm of each copy clipped to 1."""
    gradient = model.gradient(value)
    norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    model.flat.grad = gradient * (1.0 / (norm + 1e-6)).clamp(max=1.0)
    optimizer.step()


def held_out_scores(model: Model, task: Task, seeds: Sequence[int], count: int) -> Tensor:
    """Return the mean score [R] of one sampled answer to each held-out problem, the same problems for every call."""
    problems = draw(task, [generator_of(1, seed) for seed in seeds], count)
    sampled, _ = model.sample(problems.prompts, 1, task.answer_length, [generator_of(2, seed) for seed in seeds])
    return task.score(problems, sampled).mean(1)


def warm_up(task: Task, seeds: Sequence[int]) -> dict[int, Tensor]:
    """Return by seed the parameters [P] of models trained on right answers until they reach the task's target."""
    shape, waiting = Shape.of(task), list(seeds)
    done: dict[int, Tensor] = {}
    model = Model(shape, torch.stack([initial_parameters(shape, seed) for seed in seeds]))
    optimizer = optimizer_of(model, WARM_UP_RATE)
    generators = [generator_of(3, seed) for seed in seeds]
    for number in range(1, WARM_UP_LIMIT + 1):
        problems = draw(task, generators, WARM_UP_BATCH)
        mask = problems.answer_mask()
        log_probs = answer_log_probs(model, problems.prompts, problems.answers)
        step(model, optimizer, -(log_probs * mask).sum() / mask[0].sum())
        if number % 10 == 0:
            scores = held_out_scores(model, task, seeds, PROBE)
            for place, seed in enumerate(seeds):
                if seed in waiting and scores[place] >= TARGETS[task.name]:
                    done[seed] = model.flat[place].clone()
                    waiting.remove(seed)
            if not waiting:
                return done
    raise RuntimeError(
        f"the warm-ups of task {task.name!r} with the seeds {waiting} did not reach a score of {TARGETS[task.name]} "
        f"in {WARM_UP_LIMIT} steps; raise WARM_UP_LIMIT or lower the target"
    )


def answer_log_probs(model: Model, prompts: Tensor, answers: Tensor) -> Tensor:
    """Return the log-probs [R, B, A] of answers."""
    tokens = torch.cat([prompts, answers], 2)
    logits = model.logits(tokens[:, :, :-1], prompts.shape[2] - 1)
    return logits.log_softmax(-1).gather(-1, answers.unsqueeze(-1)).squeeze(-1)


def group_advantages(scores: Tensor) -> Tensor:
    """Return (score - mean) / deviation of each group of `SAMPLES` scores [R, B]; 0 where all are equal."""
    groups = scores.unflatten(1, (-1, SAMPLES))
    centred = groups - groups.mean(2, keepdim=True)
    return (centred / (groups.std(2, keepdim=True) + 1e-6)).flatten(1)


@dataclass(frozen=True)
class Batch:
    """Holds the trajectories of R runs: [R, B, P], [R, B, A] or [R, B]."""

    prompts: Tensor
    answers: Tensor
    log_probs: Tensor
    """Those of the policy that sampled."""
    mask: Tensor
    advantages: Tensor
    domains: Tensor

    def of_prompts(self, chosen: Tensor) -> Batch:
        """Return the trajectories of some prompts; `chosen` [R, n] has those of every run."""
        rows = (chosen.unsqueeze(2) * SAMPLES + torch.arange(SAMPLES)).flatten(1)
        runs = torch.arange(len(rows)).unsqueeze(1)
        return Batch(*(getattr(self, field.name)[runs, rows] for field in fields(self)))


def roll_out(model: Model, task: Task, seeds: Sequence[int], number: int) -> Batch:
    """Return the trajectories of step `number` with their advantages."""
    generators = [generator_of(6, seed, number) for seed in seeds]
    problems = draw(task, generators, PROMPTS)
    answers, log_probs = model.sample(problems.prompts, SAMPLES, task.answer_length, generators)
    each = problems.repeated(SAMPLES)
    advantages = group_advantages(task.score(each, answers))
    return Batch(each.prompts, answers, log_probs, each.answer_mask(), advantages, each.domains)


def coefficients(objective: Objective, log_ratio: Tensor, batch: Batch) -> Tensor:
    """Return c = dJ/d log_ratio [R, B, A] of several runs with one objective.

    One call serves all: ids of different runs differ, so that no node holds tokens of two runs. Weights are those of
    `seq-mean`: every trajectory of a run weighs the same, and every token of a trajectory.
    """
    mask, (runs, rows, width) = batch.mask, batch.mask.shape
    trajectory = torch.arange(runs * rows).unsqueeze(1).expand(-1, width)[mask.flatten(0, 1)]
    domain = batch.domains + TASKS["domains"].domains * torch.arange(runs).unsqueeze(1)
    keys = {"trajectory": trajectory, "prompt_group": trajectory // SAMPLES, "domain": domain.flatten()[trajectory]}
    weights = 1.0 / (rows * mask.sum(2))
    out = objective(
        log_ratio[mask],
        batch.advantages.flatten()[trajectory],
        weights.flatten()[trajectory],
        keys={key: keys[key] for key in objective.keys},
        metrics=False,
    )
    return torch.zeros_like(log_ratio).masked_scatter_(mask, out.gradient)


def train(
    cell: Cell,
    objectives: Sequence[Objective],
    seeds: Sequence[int],
    starts: Sequence[Tensor],
    *,
    steps: int | None = None,
    tell: Callable[[int], None] = lambda _: None,
) -> dict[tuple[int, int], Outcome]:
    """Train a model for every pair of an objective and a seed, all at once.

    Args:
        cell: task, optimiser steps and learning rate.
        objectives: the objectives.
        seeds: each gives prompts, the noise of sampling, the order of mini-batches and the held-out problems.
        starts: per seed the parameters [P] of its warmed-up model.
        steps: batches of rollouts; the task's number by default.
        tell: receives the number of steps done, after each.

    Returns:
        By (place of the objective, seed) what was measured. Runs beside it change it by rounding alone.
    """
    began, task = time.process_time(), TASKS[cell.task]
    each = list(seeds) * len(objectives)
    model = Model(Shape.of(task), torch.stack(list(starts) * len(objectives)))
    optimizer = optimizer_of(model, cell.learning_rate)
    before = held_out_scores(model, task, each, HELD_OUT[task.name])
    widest = torch.full((len(each),), -math.inf)
    for number in range(STEPS[task.name] if steps is None else steps):
        batch = roll_out(model, task, each, number)
        orders = [generator_of(7, seed, number) for seed in each]
        for _ in range(cell.epochs):
            order = torch.stack([torch.randperm(PROMPTS, generator=generator) for generator in orders])
            for chosen in order.chunk(cell.mini_batches, 1):
                widest = torch.maximum(widest, _optimise(model, optimizer, objectives, batch.of_prompts(chosen)))
        tell(number + 1)
    final = held_out_scores(model, task, each, HELD_OUT[task.name])
    seconds = (time.process_time() - began) / len(each)
    places = [(place, seed) for place in range(len(objectives)) for seed in seeds]
    return {
        pair: Outcome(float(a), float(b), math.exp(float(x)), seconds)
        for pair, a, b, x in zip(places, before, final, widest, strict=True)
    }


def _optimise(model: Model, optimizer: torch.optim.AdamW, objectives: Sequence[Objective], batch: Batch) -> Tensor:
    """Take an optimiser step on a mini-batch; return the largest log ratio of each run, [R]."""
    log_probs = answer_log_probs(model, batch.prompts, batch.answers)
    log_ratio = (log_probs.detach() - batch.log_probs) * batch.mask
    parts = [
        tensors.chunk(len(objectives)) for tensors in (log_ratio, *(getattr(batch, f.name) for f in fields(batch)))
    ]
    found = [
        coefficients(objective, part[0], Batch(*part[1:]))
        for objective, part in zip(objectives, zip(*parts, strict=True), strict=True)
    ]
    step(model, optimizer, -(torch.cat(found) * log_probs).sum())
    return log_ratio.flatten(1).amax(1)
