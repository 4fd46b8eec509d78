"""This module searches the fastest plan for a number of GPUs: layout, placement of engines, staleness, recomputation,
kept forward passes, offloading and precision.

The search is exact about what fits and ordered by bounds. For each number of training GPUs the layouts are looked at by
ascending time without recomputation and offloading and with all forward passes kept, which is a bound for their other
variants, until enough are found that fit. Each variant keeps as many forward passes as fit. The fastest trainers then
meet every kind of engine. Generation and training that overlap are first estimated by a closed form, and the best
candidates by the simulated queue.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.mcore.families import Architecture, read_architecture
from fiberpo_megatron.mcore.parallel.checks import layout_problems
from fiberpo_megatron.mcore.settings import ParallelConfig
from fiberpo_megatron.planning.engines import plan_engine
from fiberpo_megatron.planning.estimate import (
    Plan,
    make_plan,
    make_scenario,
    most_kept_forwards,
    passing_bytes,
    plan_stage,
    workload,
)
from fiberpo_megatron.planning.hardware import Assumptions, Gpu
from fiberpo_megatron.planning.options import COLOCATED_METHOD
from fiberpo_megatron.planning.phases import kept_buffers
from fiberpo_megatron.planning.reductions import gate_bytes
from fiberpo_megatron.planning.scenario import Scenario
from fiberpo_megatron.planning.states import GRADIENT_BYTES
from fiberpo_megatron.planning.timing import GIGA, step_time
from fiberpo_megatron.planning.training import further_passes, optimizer_seconds, optimizer_state_bytes, passes

_SIZES = (1, 2, 4, 8, 16)
_TENSOR = (1, 2, 4, 8)
"""Tensor parallelism beyond a node is not proposed."""
_EXPERT = (1, 2, 4, 8, 16, 32, 64)
_ENGINE_TENSOR = (1, 2, 4, 8, 16, 32)
_SHARES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14)
"""Training GPUs of separate engines, in sixteenths of all."""
STALENESS = (0, 1, 2, 4)
_KEPT = 3
"""Trainers that are kept for each number of training GPUs."""
_SIMULATED = 8
"""Candidates whose overlap is simulated."""
_VARIANTS = (("none", False), ("none", True), ("full", False), ("full", True))
"""Recomputation and offloading, in the order in which they are tried for a layout."""
_SLACK = 0.95
"""A rank's even share of the model, times this, is below the exact count of the fullest rank."""


@dataclass(frozen=True)
class Goal:
    """This is what a search looks for."""

    price: float | None = None
    """Price of a GPU for an hour. With it the cheapest run is searched, on as many of the GPUs as that takes; without
    it the most tokens per second and GPU on all of them."""
    steps: int = 1
    """Steps of the run whose cost is compared."""
    staleness: tuple[int, ...] = STALENESS
    """Values of staleness that are tried; 0 has to be among them."""

    def cost(self, plan: Plan, gpus: int) -> float:
        """Return the cost of the run on `gpus` GPUs. Without a price it counts hours of a GPU."""
        return (self.price if self.price is not None else 1.0) * gpus * plan.time.total * self.steps / 3600


@dataclass(frozen=True)
class Trainer:
    """This is a layout of the trainer that fits into the memory of its GPUs."""

    gpus: int
    parallel: ParallelConfig
    recompute: str
    offload: bool
    kept: int
    """`batch.kept_forwards`: as many as fit, and 1 where no forward pass can be kept."""
    seconds: float
    """Time of the passes and the optimizer in a step."""
    parameters: int
    """Bytes of parameters on the fullest GPU, which stay there while a colocated engine generates."""


@dataclass(frozen=True)
class Candidate:
    """This is a choice of everything that the search varies, with its estimated seconds of a step."""

    gpus: int
    trainer: Trainer
    colocated: bool
    engines: int
    engine_tensor: int
    staleness: int
    seconds: float


@dataclass(frozen=True)
class Found:
    """This is what a search found."""

    plans: tuple[Plan, ...]
    """Plans that fit, the best first."""
    candidates: tuple[Candidate, ...]
    """The candidates of these plans."""
    others: tuple[tuple[str, Plan], ...]
    """What the best plan is compared with: a choice in words, and the best plan with that choice."""
    looked_at: int
    """Layouts and engines whose time was estimated."""


class Search:
    """Searches plans for one config, model and kind of GPU."""

    def __init__(
        self,
        config: Config,
        hf_config: Mapping[str, Any],
        memory: float,
        gpu: Gpu,
        assumptions: Assumptions,
        goal: Goal,
    ) -> None:
        """`memory` is in bytes. The settings of `config` that the search does not vary stay as they are, except for
        `model.dtype`, which becomes bfloat16: float32 is never faster."""
        model = config.model.model_copy(update={"dtype": "bfloat16"})
        engine = config.rollout.engine.model_copy(update={"urls": [], "dtype": "auto"})
        rollout = config.rollout.model_copy(update={"engine": engine})
        self.config = config.model_copy(update={"model": model, "rollout": rollout})
        self.hf_config, self.memory, self.gpu, self.assumptions = hf_config, memory, gpu, assumptions
        self.goal = goal
        self.architecture: Architecture = read_architecture(hf_config)
        self.looked_at = 0
        alone = self.config.parallel.model_copy(update={"pipeline": 1})
        self._keeps = self.config.model_copy(update={"parallel": alone}).kept_forwards > 0
        """Whether layouts without a pipeline can keep forward passes."""
        self._base: Scenario | None = None
        self._gates: dict[int, int] = {}
        self._engine = {
            tensor: plan_engine(self._with(None, False, 1, tensor), self.architecture, memory)
            for tensor in _ENGINE_TENSOR
        }

    def run(self, gpus: int, count: int = 10) -> Found:
        """Return at most `count` plans for `gpus` GPUs, or fewer of them if the goal is the cheapest run."""
        sizes = [gpus]
        while self.goal.price is not None and sizes[-1] > 1:
            sizes.append(sizes[-1] // 2)
        found = [candidate for size in sizes for candidate in self._candidates(size)]
        found.sort(key=self._order)
        chosen = self._plans(found, max(count, _SIMULATED))[:count]
        others = tuple(self._others(found, *chosen[0])) if chosen else ()
        return Found(
            tuple(plan for _, plan in chosen), tuple(candidate for candidate, _ in chosen), others, self.looked_at
        )

    def plan(self, candidate: Candidate) -> Plan:
        """Return the exact plan of a candidate."""
        return make_plan(
            self._with(candidate.trainer, candidate.colocated, candidate.engines, candidate.engine_tensor),
            self.hf_config,
            candidate.gpus,
            self.memory,
            self.gpu,
            self.assumptions,
            staleness=candidate.staleness,
            drain=candidate.staleness == 0,
        )

    def _order(self, candidate: Candidate) -> tuple[float, ...]:
        """Return the key of candidates, the best first: cost, then time, then the simpler choice."""
        return (
            candidate.gpus * candidate.seconds,
            candidate.seconds,
            candidate.staleness,
            candidate.trainer.parallel.model_ranks,
            candidate.engine_tensor,
        )

    def _plans(self, found: list[Candidate], count: int) -> list[tuple[Candidate, Plan]]:
        """Return exact plans of the first candidates that fit, in the order of the goal."""
        exact: list[tuple[Candidate, Plan]] = []
        seen = set()
        for candidate in found:
            trainer = candidate.trainer
            kind = (candidate.gpus, trainer.gpus, candidate.colocated, candidate.engine_tensor, candidate.staleness)
            if kind in seen:  # another layout of the same trainer: as good as equal, and slower
                continue
            seen.add(kind)
            plan = self.plan(candidate)
            if not plan.problems:
                exact.append((candidate, plan))
            if len(exact) == count:
                break
        return sorted(exact, key=lambda pair: (self.goal.cost(pair[1], pair[0].gpus), pair[1].largest.total))

    def _candidates(self, gpus: int) -> Iterator[Candidate]:
        yield from self._colocated(gpus)
        machine = self.gpu.host_gpus if gpus >= 4 * self.gpu.host_gpus else 1  # whole machines in large runs
        for share in sorted({round(gpus * sixteenths / 16 / machine) * machine for sixteenths in _SHARES}):
            trainers = self._trainers(share, colocated=False) if 0 < share < gpus else []
            for trainer, tensor in product(trainers, self._engine_sizes(gpus - share)):
                engines = self._engines(gpus - share, tensor)
                for staleness in self.goal.staleness:
                    yield self._candidate(gpus, trainer, False, engines, tensor, staleness)

    def _colocated(self, gpus: int) -> Iterator[Candidate]:
        """Yield synchronous candidates whose engines share the trainer's GPUs."""
        for trainer in self._trainers(gpus, colocated=True):
            for tensor in self._sizes_beside(trainer):
                yield self._candidate(gpus, trainer, True, self._engines(gpus, tensor), tensor, 0)

    def _sizes_beside(self, trainer: Trainer) -> list[int]:
        """Return the sizes of engines that fit beside the parameters of a trainer on the same GPUs."""
        found = []
        for tensor in self._engine_sizes(trainer.gpus):
            config = self._with(trainer, True, self._engines(trainer.gpus, tensor), tensor)
            taken = trainer.parameters + kept_buffers(config)
            if plan_engine(config, self.architecture, self.memory, taken).fits:
                found.append(tensor)
        return found

    def _engine_sizes(self, gpus: int) -> list[int]:
        """Return the sizes of engines that hold the model: those of one machine if any do, else larger ones."""
        sizes = [tensor for tensor in _ENGINE_TENSOR if tensor <= gpus and self._engine[tensor].fits]
        inside = [tensor for tensor in sizes if tensor <= self.gpu.host_gpus]
        return inside or sizes[:1]

    def _engines(self, gpus: int, tensor: int) -> int:
        """Return the number of engines on `gpus` GPUs; on several machines each has equally many."""
        machine = self.gpu.host_gpus
        return gpus // tensor if gpus <= machine or tensor > machine else gpus // machine * (machine // tensor)

    def _candidate(
        self, gpus: int, trainer: Trainer, colocated: bool, engines: int, tensor: int, staleness: int
    ) -> Candidate:
        self.looked_at += 1
        scenario = self._scenario(trainer.gpus, trainer.parallel)
        config = self._with(trainer, colocated, engines, tensor)
        taken = trainer.parameters + kept_buffers(config) if colocated else 0
        scenario = replace(
            scenario,
            engine_gpus=engines * tensor,
            colocated=colocated,
            engine_tensor=tensor,
            recompute=trainer.recompute == "full",
            cpu_offload=trainer.offload,
            kept_forwards=self._kept(trainer.parallel, trainer.kept),
            staleness=float(staleness),
            drain=staleness == 0,
            cache_gb=plan_engine(config, self.architecture, self.memory, taken).cache / GIGA,
            publication="device" if colocated else scenario.publication,
            running_limit=self.config.running_requests,
        )
        time = step_time(scenario, self.assumptions, fast=True)
        return Candidate(gpus, trainer, colocated, engines, tensor, staleness, time.total)

    def _requests(self, trainer: Trainer, engines: int) -> int:
        """Return how many requests a leader has to keep in flight, so that the engines can run as many as they may."""
        rollout = self.config.rollout
        needed = -(-engines * self.config.running_requests // (trainer.parallel.data or 1))
        return max(rollout.max_concurrent_requests, needed)

    def _trainers(self, gpus: int, *, colocated: bool) -> list[Trainer]:
        """Return the fastest trainers on `gpus` GPUs that fit, with engines on the same GPUs if they are colocated; one
        for each layout."""
        bounds: list[tuple[float, int, int, ParallelConfig]] = []
        for parallel in self._layouts(gpus):
            scenario = self._scenario(gpus, parallel)
            least = sum(scenario.rank_parameters) * (scenario.width + GRADIENT_BYTES)
            if _SLACK * least + self.assumptions.reserved_gb * GIGA < self.memory:
                bounds.append((self._training_seconds(scenario), parallel.model_ranks, len(bounds), parallel))
        kept: list[Trainer] = []
        for bound, _, _, parallel in sorted(bounds, key=lambda entry: entry[:3]):
            slowest = kept[_KEPT - 1].seconds if len(kept) >= _KEPT else None
            if slowest is not None and bound >= slowest:
                break
            trainer = self._fitting(gpus, parallel, colocated)
            if trainer is not None and (not colocated or self._sizes_beside(trainer)):
                kept = sorted([*kept, trainer], key=lambda found: (found.seconds, found.parallel.model_ranks))[:_KEPT]
        return kept

    def _fitting(self, gpus: int, parallel: ParallelConfig, colocated: bool) -> Trainer | None:
        """Return the fastest variant of a layout that fits, or None."""
        fitting = []
        for recompute, offload in _VARIANTS:
            scenario = replace(self._scenario(gpus, parallel), recompute=recompute == "full", cpu_offload=offload)
            draft = Trainer(gpus, parallel, recompute, offload, kept=1, seconds=0.0, parameters=0)
            config = self._with(draft, colocated, 1, 1)
            work = workload(scenario)
            ends = sorted({0, parallel.pipeline - 1})
            state = optimizer_state_bytes(scenario)
            least = sum(scenario.rank_parameters) * (scenario.width + GRADIENT_BYTES)
            passing = max(sum(passing_bytes(config, self.architecture, end, work, self.assumptions)) for end in ends)
            moving = max(state, passing) if offload else state + passing
            if _SLACK * (least + moving) + self.assumptions.reserved_gb * GIGA > self.memory:
                continue
            stages = [plan_stage(config, self.architecture, gpus, stage, work, self.assumptions) for stage in ends]
            if max(stage.total for stage in stages) <= self.memory:
                parameters = max(stage.states.parameters for stage in stages)
                kept = most_kept_forwards(config, stages, work, self.memory)
                seconds = self._training_seconds(replace(scenario, kept_forwards=kept))
                fitting.append(replace(draft, kept=max(1, kept), seconds=seconds, parameters=parameters))
                if (recompute, offload) == _VARIANTS[0] and kept in (0, work.micro_batches):
                    break  # the others are slower
        return min(fitting, key=lambda trainer: trainer.seconds, default=None)

    def _training_seconds(self, scenario: Scenario) -> float:
        """Return the time of the passes and the optimizer in a step."""
        self.looked_at += 1
        own = passes(scenario, scenario.shape, self.assumptions)
        forwards = further_passes(scenario) + scenario.old_log_probs + scenario.reference
        steps = scenario.optimiser_steps * optimizer_seconds(scenario, self.assumptions)
        return own.train * scenario.epochs + own.forward * forwards + steps

    def _kept(self, parallel: ParallelConfig, count: int) -> int:
        """Return how many of `count` forward passes a layout keeps: none in a pipeline."""
        return count if self._keeps and parallel.pipeline == 1 else 0

    def _scenario(self, gpus: int, parallel: ParallelConfig) -> Scenario:
        """Return the scenario of a layout with an engine of one GPU, without recomputation and offloading, and with all
        forward passes kept where any can be."""
        config = self.config.model_copy(update={"parallel": parallel})
        if parallel.expert not in self._gates:  # the one size of a layout on which the gates depend
            self._gates[parallel.expert] = sum(gate_bytes(config))
        gates = self._gates[parallel.expert]
        if self._base is None:
            draft = self._with(Trainer(gpus, parallel, "none", False, 1, 0.0, 0), False, 1, 1)
            self._base = make_scenario(draft, self.architecture, gpus, 1, self.gpu, self.assumptions, gates, 0.0, True)
        scenario = replace(self._base, trainer_gpus=gpus, parallel=parallel, gate_bytes=gates)
        return replace(scenario, kept_forwards=self._kept(parallel, workload(scenario).micro_batches))

    def _with(self, trainer: Trainer | None, colocated: bool, engines: int, tensor: int) -> Config:
        """Return the config of a choice."""
        rollout, machine = self.config.rollout, self.gpu.host_gpus
        count = engines if engines * tensor <= machine or tensor > machine else machine // tensor
        engine = rollout.engine.model_copy(update={"count": count, "tensor": tensor, "colocated": colocated})
        slurm = {"engine_nodes": engines // count, "share_nodes": colocated}
        requests = {} if trainer is None else {"max_concurrent_requests": self._requests(trainer, engines)}
        changed: dict[str, Any] = {
            "rollout": rollout.model_copy(update={"engine": engine, **requests}),
            "slurm": self.config.slurm.model_copy(update=slurm),
        }
        sync = self.config.weight_sync
        if colocated and sync.method.use == "distributed":
            changed["weight_sync"] = sync.model_copy(update={"method": COLOCATED_METHOD})
        if trainer is not None:
            changed["parallel"] = trainer.parallel
            changed["model"] = self.config.model.model_copy(update={"recompute": trainer.recompute})
            changed["optimizer"] = self.config.optimizer.model_copy(update={"cpu_offload": trainer.offload})
            changed["batch"] = self.config.batch.model_copy(update={"kept_forwards": trainer.kept})
        return self.config.model_copy(update=changed)

    def _layouts(self, gpus: int) -> Iterator[ParallelConfig]:
        for tensor, pipeline, context in product(_TENSOR, _SIZES, _SIZES):
            ranks = tensor * pipeline * context
            if gpus % ranks or tensor > self.gpu.nvlink_domain:
                continue
            for expert, expert_tensor in product(_EXPERT, sorted({1, tensor})):
                parallel = self.config.parallel.model_copy(
                    update={
                        "tensor": tensor,
                        "pipeline": pipeline,
                        "context": context,
                        "expert": expert,
                        "expert_tensor": expert_tensor,
                        "virtual_pipeline": 1,
                        "uneven_stages": self.architecture.layers % pipeline != 0,
                        "data": gpus // ranks,
                    }
                )
                if not layout_problems(self.architecture, parallel, gpus):
                    yield parallel

    def _others(self, found: list[Candidate], best: Candidate, plan: Plan) -> Iterator[tuple[str, Plan]]:
        """Yield the best plans that differ from the best one in a choice, fit or not."""
        choices: list[tuple[str, Any]] = [
            ("with colocated engines", lambda c: c.colocated and not best.colocated),
            ("with engines on GPUs of their own", lambda c: not c.colocated and best.colocated and not c.staleness),
            ("without staleness", lambda c: not c.staleness and best.staleness),
            (
                f"with engines of another size than {best.engine_tensor} GPUs",
                lambda c: c.engine_tensor != best.engine_tensor,
            ),
            ("with fewer training GPUs", lambda c: not c.colocated and c.trainer.gpus < best.trainer.gpus),
            ("with more training GPUs", lambda c: not c.colocated and c.trainer.gpus > best.trainer.gpus),
        ]
        for words, differs in choices:
            same = [c for c in found if c.gpus == best.gpus and differs(c)]
            for _, other in self._plans(same[:1], 1):
                yield words, other
        variants: list[tuple[str, str, Any]] = [
            ("without recomputation", "recompute", "none"),
            ("without offloading the optimizer", "offload", False),
            ("that keeps one forward pass", "kept", 1),
        ]
        for words, name, value in variants:
            if getattr(best.trainer, name) != value:
                trainer = replace(best.trainer, **{"kept": 1, name: value})
                yield words, self.plan(replace(best, trainer=trainer))
        if best.trainer.parallel.model_ranks > 1:
            smaller = [c for c in found if c.trainer.parallel.model_ranks < best.trainer.parallel.model_ranks]
            for _, other in self._plans(smaller[:1], 1):
                yield "with fewer model-parallel ranks", other


def propose(
    config: Config,
    hf_config: Mapping[str, Any],
    gpus: int,
    memory: float,
    gpu: Gpu,
    assumptions: Assumptions,
    count: int = 10,
    goal: Goal | None = None,
) -> Found:
    """Return at most `count` plans that fit, the best first, and what they were compared with.

    Layout, placement, number and size of engines, staleness, recomputation, kept forward passes and offloading vary,
    and the trainer computes in bfloat16; the rest of the config stays.
    """
    return Search(config, hf_config, memory, gpu, assumptions, goal or Goal()).run(gpus, count)
