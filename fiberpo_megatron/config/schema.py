"""This module joins the sections of a run's config, each of which is defined beside what it configures.

Nothing here imports torch: a config can be loaded and checked on a login node.
"""

from pathlib import Path

from pydantic import Field, model_validator

from fiberpo_megatron.data.settings import DataConfig
from fiberpo_megatron.engines.settings import ScoringServers
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.evaluation.settings import EvaluationConfig
from fiberpo_megatron.launch.settings import SlurmConfig
from fiberpo_megatron.mcore.optimizers.settings import OptimizerConfig
from fiberpo_megatron.mcore.settings import ModelConfig, ParallelConfig
from fiberpo_megatron.planning.settings import PlanningConfig
from fiberpo_megatron.rollout.settings import RolloutConfig, StorageConfig
from fiberpo_megatron.settings import Section
from fiberpo_megatron.telemetry.settings import TelemetryConfig
from fiberpo_megatron.trainer.settings import (
    AlgorithmConfig,
    BatchConfig,
    CheckpointConfig,
    DebugConfig,
    SftConfig,
    TrainerConfig,
)
from fiberpo_megatron.weight_sync.settings import WeightSyncConfig


class RunConfig(Section):
    folder: Path = Path("runs/default")
    """Folder of the run: config.toml, metrics.jsonl, checkpoints, rollouts, engine logs, report.html."""
    seed: int = Field(0, ge=0)
    """Seed of weights (when drawn), prompt order and rollout sampling."""
    threads_per_rank: int = Field(1, ge=1)
    """CPU threads of each training rank (torch intra-op)."""
    distributed_timeout_s: float = Field(600.0, gt=0)
    """Seconds that a collective waits for the other ranks before the run stops and names the operation."""
    heartbeat_timeout_s: float = Field(120.0, ge=0)
    """Seconds without a sign of life from a rank after which the run stops and names it; 0 switches the watch
    off."""


class Config(Section):
    """This is the config of a whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    batch: BatchConfig = BatchConfig()
    rollout: RolloutConfig = RolloutConfig()
    storage: StorageConfig = StorageConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    environments: list[EnvironmentConfig] = []
    """Where tasks and rewards come from, one table each. A run from Python may pass them as classes instead."""
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    trainer: TrainerConfig = TrainerConfig()
    sft: SftConfig = SftConfig()
    slurm: SlurmConfig = SlurmConfig()
    planning: PlanningConfig = PlanningConfig()
    debug: DebugConfig = DebugConfig()

    @property
    def needs_rollout_routing(self) -> bool:
        """This says whether engines have to return the experts of every token."""
        algorithm = self.algorithm
        return self.rollout.return_routing or "rollout" in (algorithm.expert_routing, algorithm.routing_replay)

    @property
    def kept_forwards(self) -> int:
        """This is the number of micro-batches of an optimiser step whose forward pass both finds log-probs and serves
        the backward pass: 0 where `_one_forward_problem` says why there is none, otherwise `batch.kept_forwards`."""
        return 0 if self._one_forward_problem else self.batch.kept_forwards

    @property
    def _one_forward_problem(self) -> str | None:
        """This is the setting for whose sake no micro-batch can pass the model once for both.

        Other stages of a pipeline take part in a pass. A pass with gradient counts the load of experts, and FP8 takes
        scales from it: one that is followed by an error must not have been.
        """
        model, parallel = self.model, self.parallel
        if parallel.pipeline > 1:
            return f"parallel.pipeline = {parallel.pipeline}"
        if model.router_aux_loss:
            return f"model.router_aux_loss = {model.router_aux_loss}"
        if model.router_bias_update_rate:
            return f"model.router_bias_update_rate = {model.router_bias_update_rate}"
        return f'model.fp8 = "{model.fp8}"' if model.fp8 != "none" else None

    @property
    def running_requests(self) -> int:
        """This is the number of responses that one engine decodes at once: `rollout.engine.max_running_requests`, or if
        that is 0, one engine's share of the responses that the leaders keep in flight in a step."""
        engine, batch = self.rollout.engine, self.batch
        if engine.max_running_requests:
            return engine.max_running_requests
        in_flight = batch.drawn_prompts * batch.samples_per_prompt
        if self.parallel.data is not None:
            in_flight = min(in_flight, self.parallel.data * self.rollout.max_concurrent_requests)
        servers = len(engine.urls) or engine.count * max(1, self.slurm.engine_nodes)
        return max(1, -(-in_flight // servers))

    @property
    def scoring_servers(self) -> dict[str, tuple[str, ScoringServers]]:
        """These are the servers that score trajectories, by the fact of `RolloutBatch` that they give, with the section
        that names them."""
        algorithm = self.algorithm
        found = {
            "teacher_log_probs": ("algorithm.distillation.teacher", algorithm.distillation.teacher),
            "reference_log_probs": ("algorithm.kl.servers", algorithm.kl.servers),
        }
        return {fact: (section, servers) for fact, (section, servers) in found.items() if servers is not None}

    @model_validator(mode="after")
    def forwards_can_be_kept(self) -> "Config":
        problem = self._one_forward_problem
        if problem and self.batch.kept_forwards > 1:
            raise ValueError(
                f"batch.kept_forwards = {self.batch.kept_forwards} with {problem}: no forward pass can be kept there; "
                "leave batch.kept_forwards out"
            )
        return self

    @model_validator(mode="after")
    def dumped_steps_exist(self) -> "Config":
        last = self.trainer.steps - 1
        beyond = [step for step in self.debug.steps if step > last]
        if beyond:
            raise ValueError(
                f"debug.dump_step = {beyond[0]}: the run has steps 0 to {last} (trainer.steps); choose one of them"
            )
        return self

    @model_validator(mode="after")
    def importance_fits_the_rollouts(self) -> "Config":
        rollout, method = self.rollout, self.algorithm.importance.method_at(self.rollout.staleness)
        if method != "off" and (rollout.top_p < 1.0 or rollout.top_k != -1):
            raise ValueError(
                f"rollout.top_p = {rollout.top_p:g}, top_k = {rollout.top_k} with algorithm.importance.method = "
                f'"{method}": engines give the log-probs of the whole distribution, from before the cut, and weights '
                "made of them would be biased; set rollout.top_p = 1 and rollout.top_k = -1"
            )
        return self

    @model_validator(mode="after")
    def overlong_cache_fits(self) -> "Config":
        cache, limit = self.algorithm.overlong.cache_tokens, self.rollout.max_response_tokens
        if cache is not None and self.algorithm.overlong.limit_tokens is None and cache > limit:
            raise ValueError(
                f"algorithm.overlong.cache_tokens = {cache} is above rollout.max_response_tokens = {limit}, the limit; "
                "lower it, or set algorithm.overlong.limit_tokens"
            )
        return self

    @model_validator(mode="after")
    def names_differ(self) -> "Config":
        names = [environment.name for environment in self.environments]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"environments: the name {twice[0]!r} is used twice; give each its own `name`")
        return self

    @model_validator(mode="after")
    def sets_have_environments(self) -> "Config":
        names = [environment.name for environment in self.environments]
        for one in self.evaluation.sets:
            own = one.own_environment
            if own is not None and own.name in names:
                raise ValueError(
                    f"evaluation set {one.name!r} has an environment of its own, but one of [[environments]] has the "
                    f'same name; rename the set, or write environment = "{one.name}"'
                )
            if own is None and names and one.environment not in names:
                raise ValueError(
                    f"evaluation set {one.name!r}: environment = {one.environment!r} is none of [[environments]] "
                    f"({', '.join(names)}); correct the name, or write a table with `use`"
                )
        return self

    @model_validator(mode="after")
    def best_metric_is_measured(self) -> "Config":
        metric, evaluation = self.checkpoint.keep_best_metric, self.evaluation
        if metric is None or not metric.startswith("eval/"):
            return self
        family, sets = metric.split("/")[1], {one.name: one for one in evaluation.sets}
        if family not in sets and not evaluation.prompts:
            raise ValueError(
                f"checkpoint.keep_best_metric = {metric!r}: evaluation.prompts = 0 leaves the default set out, and no "
                f"evaluation set is called {family!r}; name one of {sorted(sets)}, or set evaluation.prompts"
            )
        if family in sets and metric.removeprefix("eval/") not in sets[family].metrics:
            raise ValueError(
                f"checkpoint.keep_best_metric = {metric!r}: the evaluation set {family!r} has no such metric; use one "
                f"of {', '.join('eval/' + name for name in sets[family].metrics)}"
            )
        return self
