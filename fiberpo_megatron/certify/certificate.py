"""This module runs all comparisons of a certificate and collects what they found."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fiberpo_megatron.certify import gates, kernels, real_ranks
from fiberpo_megatron.certify.batch import Batch, draw_problem, made_batches, steady
from fiberpo_megatron.certify.checks import Check
from fiberpo_megatron.certify.models import small_model
from fiberpo_megatron.certify.peer import PeerComparison, compare_peer
from fiberpo_megatron.certify.processes import RanksFailed, run_ranks, too_few_gpus
from fiberpo_megatron.certify.replay import replay
from fiberpo_megatron.certify.training_step import SIZES, Case, check_own_gates, compare, run_rank, run_reference
from fiberpo_megatron.config import Config
from fiberpo_megatron.fibration import OBJECTIVES, Objective, build_objective
from fiberpo_megatron.mcore.families import read_hf_config
from fiberpo_megatron.trainer.plugin_checks import make_objective
from fiberpo_megatron.trainer.step_dump import machine, options_of
from fiberpo_megatron.trainer.step_file import StepFile

REPLAY = "The dumped step beside a replay"
STEP = "The whole training step beside one float64 process"
OWN_GATES = "The gates of real layouts beside one call about what their ranks saw"
STEP_TOLERANCE = 1e-5
"""float32 beside float64, relative to the largest entry of a tensor: a sum in another order moves these numbers by
about 1e-6."""
LAYOUTS: Mapping[str, Mapping[str, int]] = {
    "one process": {},
    "DP2": {"data": 2},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
    "EP2": {"expert": 2, "data": 2},
    "PP2 VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "TP2 CP2": {"tensor": 2, "context": 2},
    "PP2 EP2": {"pipeline": 2, "expert": 2, "data": 2},
    "DP4 EP2": {"expert": 2, "data": 4},
}
"""Layouts that are tried where the machine may start as many processes; the config's own comes in addition."""
BUDGETS = (1, 96, 100_000)
"""Token budgets of a micro-batch: one trajectory, a few, all."""
STEPS = 2
"""Optimiser steps after which parameters are compared."""


@dataclass
class Certificate:
    """Holds everything that a certificate says."""

    about: dict[str, Any]
    """What was certified, on what, and the command that repeats it; JSON values."""
    checks: list[Check] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(what, error) of comparisons that broke off."""
    not_run: list[tuple[str, str]] = field(default_factory=list)
    """(what, why) of comparisons that this machine, model or objective does not allow."""
    reached: list[str] = field(default_factory=list)
    """States of gates and clips that the batches brought about, by the names of metrics."""
    not_reached: list[str] = field(default_factory=list)
    peers: list[PeerComparison] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Return whether every comparison was made to its end and is within its bound."""
        return bool(self.checks) and not self.failures and all(check.passed for check in self.checks)


def certify(
    config: Config,
    *,
    command: str,
    dump: Path | None = None,
    ranks: int = 2,
    gates_only: bool = False,
    tolerance: float = 1e-5,
    say: Callable[[str], None] = print,
) -> Certificate:
    """Run every comparison that this machine allows.

    Args:
        config: gives the objective, the model's architecture and the seed.
        command: the command line, which the certificate quotes.
        dump: a dumped step, or a file of another framework; None makes batches from the seed.
        ranks: the most processes at a time.
        gates_only: leave the whole training step out.
        tolerance: how far another framework's coefficients may be from ours, relative to the largest.
        say: takes one line after each part.

    Raises ValueError (StepFileError, ConfigError) for a config or a file that cannot be used.
    """
    began = time.monotonic()
    file = None if dump is None else StepFile(dump)
    objective, named = _objective(config, file)
    partitions = config.algorithm.expert_partitions or max(2, config.parallel.expert)
    domains, seed = max(1, len(config.environments)), config.run.seed
    certificate = Certificate(_about(config, named, objective, command, ranks, dump))
    if file is not None:
        batches = _of_file(certificate, file, objective, tolerance)
    else:
        batches, certificate.not_reached = made_batches(objective, seed, domains, partitions)
        certificate.reached = sorted({state for batch in batches for state in batch.states})
    certificate.about["batches"] = [batch.name for batch in batches]
    for batch in batches:
        for dtype in {batch.tokens.log_ratio.dtype} if file is not None else (torch.float32, torch.float64):
            subject = f"{batch.name}, {str(dtype).removeprefix('torch.')}"
            _part(certificate, gates.PART, gates.check_gates(objective, batch.tokens.to(dtype=dtype), subject, seed))
    said = _tell(certificate, say, 0)
    if ranks > 1:
        _part(certificate, real_ranks.PART, real_ranks.check_processes(named, batches, min(ranks, 4), seed))
    else:
        certificate.not_run.append((real_ranks.PART, "--ranks is 1"))
    said = _tell(certificate, say, said)
    reason = kernels.why_not(objective)
    if reason is None:
        _part(certificate, kernels.PART, kernels.check_kernels(named, batches, seed))
        said = _tell(certificate, say, said)
    else:
        certificate.not_run.append((kernels.PART, reason))
    if gates_only:
        certificate.not_run.append((STEP, "--gates-only was given"))
    else:
        _part(
            certificate, STEP, _training_steps(certificate, config, objective, named, ranks, domains, partitions, say)
        )
    _tell(certificate, say, said)
    certificate.about["seconds"] = round(time.monotonic() - began, 1)
    return certificate


def _objective(config: Config, file: StepFile | None) -> tuple[Objective, tuple[str, dict[str, Any]]]:
    """The file's objective where it names one, else the config's; and its name and options."""
    if file is not None and file.objective is not None:
        use, options = file.objective
        try:
            return build_objective(use, **options), (use, options)
        except ValueError as error:
            raise ValueError(f"the objective that {file.path} names cannot be built: {error}") from error
    objective = make_objective(config)
    use = objective.name if objective.name in OBJECTIVES else config.algorithm.objective.use
    return objective, (use, options_of(objective))


def _about(
    config: Config,
    named: tuple[str, dict[str, Any]],
    objective: Objective,
    command: str,
    ranks: int,
    dump: Path | None,
) -> dict[str, Any]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    where = f"cuda ({gpus} GPU{'s' if gpus > 1 else ''}; layouts of more processes on cpu)" if gpus else "cpu"
    return {
        "command": command,
        "objective": {"use": named[0], "options": named[1]},
        "seed": config.run.seed,
        "ranks": ranks,
        "machine": machine(objective, torch.device("cpu")) | {"cores": os.cpu_count(), "layouts_on": where},
        "dump": None if dump is None else {"path": str(dump), "sha256": _digest(dump)},
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_file(certificate: Certificate, file: StepFile, objective: Objective, tolerance: float) -> list[Batch]:
    """Check what the file says the coefficients are, and return its tokens."""
    batches = []
    own = "machine" in file.about
    for number in file.steps:
        step = file.step(number, objective)
        batches.append(Batch(f"optimiser step {number} ({len(step.tokens)} tokens)", step.tokens))
        if not own:
            peer = compare_peer(step, objective, tolerance)
            certificate.peers.append(peer)
            certificate.checks.append(peer.check)
    if own:
        result = replay(file.path)
        certificate.about["replay"] = result.why
        for row in result.rows:
            for name, one in row.found.items():
                subject = f"optimiser step {row.step} ({row.tokens} tokens)"
                check = Check(REPLAY, name, subject, {name: one}, row.tolerances[name], row.worst)
                certificate.checks.append(check)
    return batches


def _part(certificate: Certificate, what: str, checks: Iterator[Check]) -> None:
    """Take the checks of a part; an error ends the part and fails the certificate, the other parts go on."""
    try:
        certificate.checks += checks
    except (RanksFailed, RuntimeError, ValueError) as error:
        certificate.failures.append((what, str(error)))


def _tell(certificate: Certificate, say: Callable[[str], None], since: int) -> int:
    """Say how the parts went whose checks follow the first `since` ones; return the number of all checks."""
    new = certificate.checks[since:]
    for part in dict.fromkeys(check.part for check in new):
        own = [check for check in new if check.part == part]
        say(f"{part}: {sum(check.passed for check in own)} of {len(own)} comparisons passed")
    return len(certificate.checks)


def _training_steps(
    certificate: Certificate,
    config: Config,
    objective: Objective,
    named: tuple[str, dict[str, Any]],
    ranks: int,
    domains: int,
    partitions: int,
    say: Callable[[str], None],
) -> Iterator[Check]:
    """Run the training step of the config's model, or of a small one of its family, in every layout that fits."""
    model, shrunk = small_model(read_hf_config(config.model.path, config.model.family))
    random = np.random.default_rng(config.run.seed)
    vocabulary = int(model["vocab_size"])
    problem = draw_problem(
        random, groups=6, samples=4, longest=58, domains=domains, partitions=partitions, vocabulary=vocabulary
    )
    problem, moved = steady(problem, objective, random)
    tolerance = max(STEP_TOLERANCE, 10 * moved)
    certificate.about["model"] = {
        "family": model.get("model_type"),
        "shrunk": shrunk,
        "tokens": int(problem.rollouts.lengths.sum()),
        "sensitivity": moved,
    }
    case = Case(model, named, problem, {}, 0, config.run.seed, STEPS)
    (reference,) = run_ranks(1, run_reference, case, on_cpu=True)
    old = dict(zip(reference.index.tolist(), reference.old_log_probs.tolist()))
    subject = f"{model.get('model_type')}, {model['num_hidden_layers']} layers, hidden size {model['hidden_size']}"
    for name, sizes in _layouts(config).items():
        tried = Case(model, named, problem, sizes, 0, config.run.seed, STEPS)
        if tried.ranks > ranks:
            certificate.not_run.append((name, f"it takes {tried.ranks} processes and --ranks is {ranks}"))
            continue
        try:
            tried.check()
        except ValueError as error:
            certificate.not_run.append((name, str(error)))
            continue
        budgets = BUDGETS if name in ("one process", "DP2", "CP2") else (BUDGETS[1],)
        on_cpu = too_few_gpus(tried.ranks)
        device = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
        by_rank = run_ranks(tried.ranks, run_rank, tried, old, budgets, on_cpu=on_cpu)
        for number, budget in enumerate(budgets):
            outcomes = [of_rank[number] for of_rank in by_rank]
            wanted = reference if number == len(budgets) - 1 else replace(reference, parameters=[])
            found, worst = compare(wanted, outcomes)
            what = f"{name}, micro-batches of {_budget(budget)}" + (", on the CPU (too few GPUs)" if on_cpu else "")
            yield Check(STEP, what, subject, found, tolerance, worst)
            yield check_own_gates(tried, outcomes, OWN_GATES, what, subject, device)
        say(f"{name}: {tried.ranks} process{'es' if tried.ranks > 1 else ''}")


def _budget(budget: int) -> str:
    return {1: "one trajectory", BUDGETS[-1]: "all trajectories"}.get(budget, f"{budget} tokens")


def _layouts(config: Config) -> dict[str, Mapping[str, int]]:
    """All layouts to try, the config's own at last where it is another."""
    parallel = config.parallel
    own = {name: getattr(parallel, name) for name in SIZES} | {"data": parallel.data or parallel.smallest_data()}
    own = {name: size for name, size in own.items() if size > 1}
    return {**LAYOUTS, **({"the config's layout": own} if own not in LAYOUTS.values() else {})}
