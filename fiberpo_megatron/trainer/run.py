"""This module makes a run an object: `Run.from_config(config).train()`. The command line makes the same object."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Self

from fiberpo_megatron import durable
from fiberpo_megatron.closeable import Closeable
from fiberpo_megatron.config import Config, dump_config
from fiberpo_megatron.engines.addresses import listen_towards_master
from fiberpo_megatron.engines.registry import Registry
from fiberpo_megatron.engines.traces import PooledTraces
from fiberpo_megatron.fibration import Objective
from fiberpo_megatron.interfaces import AdvantageEstimator, RolloutSource
from fiberpo_megatron.mcore.families import read_hf_config
from fiberpo_megatron.mcore.optimizers import Optimizer
from fiberpo_megatron.mcore.parallel.heartbeat import heartbeat
from fiberpo_megatron.mcore.parallel.layout import start_layout, stop_layout
from fiberpo_megatron.mcore.policy import build_policy
from fiberpo_megatron.mcore.weights import save_hf
from fiberpo_megatron.printable import printable
from fiberpo_megatron.run_lock import take
from fiberpo_megatron.sources.build import SourceParts, rollout_source
from fiberpo_megatron.sources.engine import EngineSource
from fiberpo_megatron.sources.stored import DUMP
from fiberpo_megatron.telemetry.goodput import Goodput, Session, begin_session
from fiberpo_megatron.telemetry.metrics import Kind
from fiberpo_megatron.telemetry.sinks import METRICS_FILE, read_records
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.together import together
from fiberpo_megatron.trainer.expectation import Expected, announced, nothing_expected
from fiberpo_megatron.trainer.figures import MakeFigures, make_figures, no_figures
from fiberpo_megatron.trainer.given import EnvironmentsGiven, with_given
from fiberpo_megatron.trainer.loop import Training, evaluate, train
from fiberpo_megatron.trainer.plugin_checks import make_advantage, make_objective, recorded, with_recorded_recipe
from fiberpo_megatron.trainer.preflight import check_folder, preflight
from fiberpo_megatron.trainer.profiling import NoProfiles, Profiles
from fiberpo_megatron.trainer.recorder import RunCheckpoints, last_report, open_recorder, restore
from fiberpo_megatron.trainer.sft import fine_tune
from fiberpo_megatron.trainer.step_dump import StepDumps
from fiberpo_megatron.trainer.stop import Stopped, leave, never
from fiberpo_megatron.trainer.tasks import start_tasks
from fiberpo_megatron.trainer.terms import build_terms
from fiberpo_megatron.trainer.token_records import token_records

Command = Literal["train", "sft", "dump", "eval"]
PLANNED_PROMPTS = 32
"""Prompts of the first step whose mean length a plan assumes."""


class Run(Closeable):
    """This is a run on one process: the policy, its data, and what trains it. Every rank of a layout makes the same.

        config = load_config("train.toml")
        with Run.from_config(config, environments={"sums": Sums}, objective=SmoothClip()) as run:
            run.train()

    Under torchrun or srun each process is one rank; without a launcher the run has one. The parts can be used alone:
    `run.policy` gives log-probs and optimiser steps, `run.objective` works on plain tensors, and `run.source()` yields
    rollouts. Leave the `with` block, or call `close`, to end engines and workers.
    """

    @classmethod
    def from_config(
        cls,
        config: Config,
        *,
        environments: EnvironmentsGiven | None = None,
        objective: Objective | type[Objective] | None = None,
        optimizer: Optimizer | type[Optimizer] | None = None,
        advantage: AdvantageEstimator | type[AdvantageEstimator] | None = None,
        command: Command = "train",
        resume: bool = False,
        stop: Callable[[], bool] = never,
        registry: Registry | None = None,
        checked: bool = False,
    ) -> Self:
        """Check the settings, join the other ranks, start the environments and build the policy.

        Classes and objects take the place of settings. They must be found at the top level of a module or script, and
        an object's options must be JSON values, because config.toml names them and workers make instances of their own.

        Args:
            config: what `load_config` returns.
            environments: by name, or in order; in the place of [[environments]].
            objective, optimizer, advantage: in the place of `algorithm.objective`, `optimizer.kind` and
                `algorithm.advantage`. A class takes the options of the config, an object has its own.
            command: what the run is for: train, sft (`fine_tune`), dump or eval (`evaluate`). The checks depend on it.
            resume: go on from the newest whole checkpoint in the run folder.
            stop: says whether this rank was asked to stop; the run then saves and raises `Stopped`.
            registry: where the engines of a SLURM job register.
            checked: the settings were checked before this process was started.

        Raises ConfigError (a ValueError) for settings that cannot work, before any engine starts.
        """
        config = with_recorded_recipe(with_given(config, environments, objective, optimizer, advantage), resume)
        return cls(config, command, resume, stop, registry, checked)

    def __init__(
        self,
        config: Config,
        command: Command,
        resume: bool,
        stop: Callable[[], bool],
        registry: Registry | None,
        checked: bool,
    ) -> None:
        """Use `from_config`."""
        self.config, self._resume, self._stop = config, resume, stop
        self.objective = make_objective(config)
        self.advantage = make_advantage(config, self.objective)
        self.terms = build_terms(config.algorithm)
        hf_config = read_hf_config(config.model.path, config.model.family)
        listen_towards_master()
        with ExitStack() as stack:
            layout = self.layout = start_layout(hf_config, config.parallel, config.run)
            self.timers = PhaseTimers(waited=lambda: layout.waited_s)
            stack.callback(stop_layout)
            patience, lock = config.run.heartbeat_timeout_s, None
            stack.enter_context(heartbeat(layout.rank, layout.world_size, patience, self.timers.phase, leave))
            with together(layout, "checking the settings"):
                if layout.rank == 0:
                    if not checked:
                        preflight(config, command, resume, layout.world_size)
                    lock = stack.enter_context(take(config.run.folder, command, leave))
                    check_folder(config, command, resume)  # again: a run may have ended while this one waited
            self.tasks = stack.enter_context(start_tasks(config, hf_config, layout))
            sets = [one.name for one in config.evaluation.sets]
            self.checkpoints = RunCheckpoints(config.run.folder / "checkpoints", config.checkpoint, lock, sets)
            with together(layout, "writing config.toml"):
                if layout.rank == 0:
                    config.run.folder.mkdir(parents=True, exist_ok=True)
                    text = dump_config(recorded(config, [(fact.path, fact.version) for fact in self.tasks.facts]))
                    with durable.replaced(config.run.folder / "config.toml", text=True) as file:
                        file.write(text)
            self.policy = build_policy(config, hf_config, layout, config.sft.steps if command == "sft" else None)
            if command == "train" and self.terms.needs_reference and config.algorithm.kl.servers is None:
                self.policy.keep_reference(config.algorithm.kl.reference)  # before a checkpoint is loaded
            self._parts = SourceParts(
                config=config,
                hf_config=hf_config,
                layout=layout,
                prompts=self.tasks.prompts,
                sets=self.tasks.sets,
                encoder=self.tasks.encoder,
                environments=self.tasks.environments,
                timers=self.timers,
                stop=stop,
                registry=registry,
                say=self.say,
                scores=command != "eval",
            )
            self._stack = stack.pop_all()

    def train(self) -> None:
        """Train to `trainer.steps`, write the last weights as a Hugging Face folder, and the report."""
        state = self._restore()
        start = int(state.get("step", 0))
        if state:
            self.tasks.prompts.restore(state["prompts"])
            self.terms.restore(state.get("terms", {}))
        with self.source(start, ("train", "eval"), self._resume) as (_, training):
            train(training, start)
        self._finish()

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of sampled answers to the held-out tasks, with the policy's current weights."""
        with self.source() as (source, training):
            source.publish(0)
            return evaluate(training, 0)

    def dump(self) -> None:
        """Write the rollouts of `trainer.steps` training steps with the current weights to disk."""
        with self.source(resume=self._resume) as (source, _):
            source.publish(0)
            for step in range(self.config.trainer.steps):
                rollouts = None if self.layout.any_rank(self._stop()) else source.take(step, version=0)
                if rollouts is None:
                    raise Stopped(step)
                rewards = rollouts.per_trajectory().rewards
                self.say(f"step {step}: {len(rewards)} trajectories, mean reward {rewards.mean():.3f}")
            self.say(f"Rollouts: {self.config.run.folder / DUMP}")

    def fine_tune(self) -> None:
        """Train on right answers for `sft.steps` optimiser steps: the supervised warm-up."""
        start, steps = int(self._restore().get("step", 0)), self.config.sft.steps
        with open_recorder(self.config, self.layout, self.tasks.names, start, steps, ("sft",), "warm-up") as recorder:
            examples = self.tasks.example_batch
            fine_tune(self.config, self.policy, examples, recorder, self.checkpoints, self.timers, start, self._stop)
            self._finish()

    @contextmanager
    def source(
        self, start: int = 0, kinds: Sequence[Kind] = (), resume: bool = True
    ) -> Iterator[tuple[RolloutSource, Training]]:
        """Yield the source of rollouts, with its engines, and the training loop's parts around it.

        `kinds` of records are written to the run folder; with none of them the console alone shows metrics.
        """
        config = self.config
        with ExitStack() as stack:
            names, steps = self.tasks.names, config.trainer.steps
            recorder = stack.enter_context(
                open_recorder(config, self.layout, self.tasks.all_names, start, steps, kinds, "training")
            )
            expected = self._expected(start) if "train" in kinds else nothing_expected
            source = stack.enter_context(rollout_source(self._parts, self.policy, recorder, start, resume))
            profiles = stack.enter_context(self._profiles(source)) if "train" in kinds else NoProfiles()
            training = Training(
                policy=self.policy,
                source=source,
                objective=self.objective,
                advantage=self.advantage,
                recorder=recorder,
                checkpoints=self.checkpoints,
                timers=self.timers,
                batch=config.batch,
                algorithm=config.algorithm,
                temperature=config.rollout.temperature,
                max_response_tokens=config.rollout.max_response_tokens,
                steps=steps,
                staleness=config.rollout.staleness,
                live=config.storage.replay is None,
                evaluate_every=config.evaluation.every_steps,
                evaluation_sets=config.evaluation.sets,
                save_every=config.checkpoint.every_steps,
                stop=self._stop,
                expected=expected,
                figures=self._figures(start, resume) if "train" in kinds else no_figures,
                dumps=StepDumps(config.run.folder, config.debug.steps, config.algorithm.objective.use),
                terms=self.terms,
                records=token_records(config, self.tasks.encoder.pieces, names) if "train" in kinds else None,
                profiles=profiles,
            )
            yield source, training

    def say(self, text: str) -> None:
        """Print one line for the person at the terminal."""
        if self.layout.is_logger:
            print(printable(text, keep="\n\t"), flush=True)

    def close(self) -> None:
        """End environments and process groups; idempotent."""
        self._stack.close()

    def _figures(self, start: int, resume: bool) -> MakeFigures:
        """Return what measures the figures of each step; the run's first step begins next."""
        goodput, folder = None, self.config.run.folder
        if self.layout.is_logger:
            now = time.time()
            session = Session(start, now - self.timers.elapsed(), now)
            sessions = begin_session(folder, session, fresh=not resume)
            goodput = Goodput(sessions, read_records(folder / METRICS_FILE))
        return make_figures(
            self.config,
            self._parts.hf_config,
            self.layout,
            lambda: self.timers.own,
            lambda: self.checkpoints.newest_bytes,
            goodput,
        )

    def _expected(self, start: int) -> Expected:
        """Print what a plan expects of the run, and return what gives the metrics of each step beside it."""
        config, tasks = self.config, self.tasks

        def mean_prompt() -> float:
            places = tasks.prompts.prompts_at(config.run.seed, start, config.batch.prompts)[:PLANNED_PROMPTS]
            assert tasks.environments is not None, "rank 0 leads a replica"
            prompts = tasks.environments.prompts(places, tasks.encoder)
            return sum(len(prompt.token_ids) for prompt in prompts) / len(prompts)

        return announced(config, self._parts.hf_config, self.layout, mean_prompt, self.say)

    def _profiles(self, source: RolloutSource) -> Profiles:
        """Return what answers requests of `fiberpo profile`, also for the run's engines."""
        pool = source.pool if isinstance(source, EngineSource) else None
        engines = PooledTraces(pool) if pool is not None else None
        return Profiles(self.config.run.folder, self.layout, self.layout.device.type, self.say, engines)

    def _restore(self) -> dict[str, Any]:
        return restore(self.policy, self.checkpoints.folder, self.say) if self._resume else {}

    def _finish(self) -> None:
        """Write the last weights as a Hugging Face folder, and the report."""
        folder = self.config.run.folder
        with together(self.layout, "writing the trained model"):
            save_hf(self.policy.weights.full(), folder / "hf", self.config.model.path, writer=self.layout.rank == 0)
        self.say(f"Weights: {folder / 'hf'}")
        if self.layout.is_logger:
            self.say(last_report(folder))
        self.layout.barrier()
