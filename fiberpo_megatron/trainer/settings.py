"""This module defines the settings of the training loop: [algorithm], [batch], [evaluation], [checkpoint], [trainer],
[sft] and [debug]."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fiberpo_megatron.settings import PluginConfig, Section, as_plugin
from fiberpo_megatron.trainer.importance_settings import ImportanceConfig, MismatchConfig
from fiberpo_megatron.trainer.term_settings import (
    DistillationConfig,
    EntropyConfig,
    KlConfig,
    OffPolicyMaskConfig,
    OverlongConfig,
    SupervisedConfig,
)

Budget = tuple[float, float]
BudgetsById = dict[str, Budget | str]
Chain = list[list[str]]
ChainsById = dict[str, Chain | str]
Membership = Literal["soft", "hard"]
PresetOption = bool | float | str | Budget | Chain | ChainsById | dict[str, Budget | BudgetsById]


FLAT = (
    "epsilon",
    "epsilon_high",
    "budgets",
    "levels",
    "expert_membership",
    "dual_clip",
    "k_max",
    "unclip_positive",
    "pessimistic",
)
"""Settings of [algorithm] that are options of an objective."""


class AlgorithmConfig(Section):
    """These settings choose the objective and the advantages. Their mathematics is in docs/fibration.md."""

    objective: PluginConfig = PluginConfig(use="fiberpo")
    """What is maximised: fiberpo, fiberpo-domain, fiberpo-expert, fiberpo-expert-global, ppo, grpo, drgrpo, dapo, gspo,
    gmpo, cispo, sapo, dppo, apc, apc-trajectory, reinforce, reinforce++, rloo (docs/objectives.md compares them), or
    the import path of an objective of yours (docs/extending.md).
    `{use = "...", options = {...}}` gives it options."""
    preset: Literal["recommended", "paper"] = "recommended"
    """Where options that the config does not set come from, for fiberpo, fiberpo-domain, fiberpo-expert and
    fiberpo-expert-global. recommended: the numbers that did best in examples/stability; paper: the bare form. Other
    objectives have no preset and take their own defaults. A resumed run keeps the preset and the numbers that it began
    with; only "paper" replaces them."""
    preset_options: dict[str, PresetOption] | None = None
    """The options that "recommended" stood for when the run began. A run writes them into its config.toml, so that it
    can be repeated whatever a later version recommends; leave them unset in a config of your own."""
    epsilon: float | tuple[float, float] | dict[Literal["low", "high"], float] | None = None
    """Token-level clip width: of the ratio; for fiberpo and gmpo of the log ratio; for dppo of the probability. One
    number, or `{low = ..., high = ...}`, where `high` is the upper one, or that of positive advantages for fiberpo. A
    pair is (high, low), and the run says so. Unset: the preset's, else the objective's default."""
    epsilon_high: float | None = None
    """Upper clip width of ppo, grpo, drgrpo, reinforce++, dapo, gspo and cispo; `epsilon` is then the lower one."""
    budgets: dict[str, Budget | BudgetsById] | None = None
    """(C+, C-) of each level, by the level's name (its keys joined by '+'; in a tree BRANCH:KEYS where branches do not
    share it). A table in place of a pair gives nodes budgets of their own: `{by = "domain", "*" = [C+, C-], math = [C+,
    C-]}`, where `by` is a key of the level or of a coarser one, and "*" stands for all others. Domains go by the
    environment's name, turns by their place in the trajectory (from 0), weight versions by how far they lie behind the
    trainer's, engines and expert partitions by number. A level that is not listed takes the preset's budget, else the
    objective's default."""
    levels: Chain | ChainsById | None = None
    """A custom chain of levels, fine to coarse, in place of the objective's own. A level is a list of keys: turn,
    trajectory, prompt_group, domain, expert, version (of the weights that sampled a token), engine. A table is a
    tree: `{by = "domain", "*" = CHAIN, math = CHAIN}`; equal coarse ends of its chains are shared."""
    expert_membership: Membership | None = None
    """How a token belongs to expert partitions (objectives with an expert level only). Unset: soft."""
    expert_partitions: int | None = Field(None, ge=1)
    """Number of contiguous expert blocks. Unset: the expert-parallel size."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound c of the dual-clip overlay: tokens with A < 0 and x > 0 use max(r A, c A). Unset: the preset's, else no
    bound."""
    unclip_positive: bool | None = None
    """Overlay: tokens with A > 0 and x < 0 use r A. Unset: the preset's, else false."""
    pessimistic: bool | None = None
    """The objective of a token is the smaller one of G A and r A, as in PPO. Read by the fibred objectives; with
    `dual_clip` = c, tokens with A < 0 have at least c A. Unset: the preset's, else false."""
    k_max: float | None = Field(None, ge=1)
    """Largest slope of a gate in rollback, whatever the number of tokens of its node. Read by the fibred objectives.
    Unset: the preset's, else no bound."""
    weighting: Literal["seq-mean", "token-mean", "seq-sum", "constant"] | None = None
    """mu of a token. seq-mean: 1/(trajectories x its trajectory's tokens); token-mean: 1/tokens; seq-sum:
    1/trajectories; constant: 1/(trajectories x `normaliser`). Unset: what the objective's paper has, which is
    token-mean for dapo, cispo and apc, constant for drgrpo and dppo, seq-sum for rloo, and seq-mean for the others. A
    run says so when the config overrides it."""
    normaliser: float | None = Field(None, gt=0)
    """Tokens by which the weighting "constant" divides the sum over a response, whatever its length. Unset:
    rollout.max_response_tokens."""
    advantage: PluginConfig | None = None
    """What a trajectory's reward is compared with. group-mean: the group's mean; leave-one-out and rloo: the mean of
    the others; none: nothing; reinforce++: the mean over the step's response tokens, divided by their standard
    deviation; or the import path of an estimator of yours. Unset: what the objective's paper has, which is
    rloo and reinforce++ for the objectives of these names, and group-mean for the others."""
    normalise_std: bool | None = None
    """Divide by the group's reward standard deviation (+1e-6). Read by the built-in baselines group-mean, leave-one-out
    and none. Unset: false for drgrpo, dppo and rloo, whose papers do not divide, and true for the others."""
    expert_routing: Literal["old", "rollout"] = "old"
    """Whose routing says which expert partitions a token belongs to: the old policy's, recorded in the
    old-log-prob pass, or the engine's."""
    routing_replay: Literal["none", "old", "rollout"] = "none"
    """Experts that training forwards use. none: the current routers'; old: those chosen in the old-log-prob pass
    (R2); rollout: those that the engine chose (R3), in the old-log-prob pass as well."""
    kernels: bool | None = None
    """The objective in fused Triton kernels (true), in torch (false), or, unset, in the kernels where they can run."""
    exact_sums: bool = True
    """Add up the gates' sums exactly, so that coefficients have the same bits in any layout. false adds up in float64
    on the torch path, which is faster on a CPU (docs/fibration.md)."""
    importance: ImportanceConfig = ImportanceConfig()
    mismatch: MismatchConfig = MismatchConfig()
    kl: KlConfig = KlConfig()
    entropy: EntropyConfig = EntropyConfig()
    distillation: DistillationConfig = DistillationConfig()
    off_policy_mask: OffPolicyMaskConfig = OffPolicyMaskConfig()
    supervised: SupervisedConfig = SupervisedConfig()
    overlong: OverlongConfig = OverlongConfig()
    truncated: Literal["train", "leave_out"] = "train"
    """What happens to trajectories whose response was cut by the length limit. leave_out: once advantages have been
    compared with their rewards, a step trains as if it had not sampled them, and the weights of the others are those of
    a smaller batch (overlong filtering, arXiv:2503.14476, section 3.4)."""

    @field_validator("objective", "advantage", mode="before")
    @classmethod
    def as_plugins(cls, value: object) -> object:
        """Take a string for a table with that `use`."""
        return None if value is None else as_plugin(value)

    def objective_options(self, domains: Sequence[str]) -> dict[str, Any]:
        """Return the objective's options that are set: the flat ones of [algorithm], those of its table, and `preset`,
        the one of `build_objective`.

        Flat budgets and levels call domains by their names, `domains`, which then are an option as well.
        """
        options: dict[str, Any] = {name: getattr(self, name) for name in FLAT if getattr(self, name) is not None}
        recorded = self.preset == "recommended" and self.preset_options is not None
        options["preset"] = self.preset_options if recorded else self.preset
        tables = {"levels": self.levels, **(self.budgets or {})}
        if any(isinstance(table, dict) and self._key(name, table) == "domain" for name, table in tables.items()):
            options["names"] = {"domain": {name: at for at, name in enumerate(domains)}}
        twice = sorted(options.keys() & self.objective.options.keys())
        if twice:
            raise ValueError(f"algorithm.{twice[0]} is set and also an option of algorithm.objective; keep one of them")
        return options | self.objective.options

    @staticmethod
    def _key(name: str, table: Mapping[str, object]) -> object:
        """The key by which a table goes: the level's own where the table does not say."""
        return table.get("by", name.rpartition(":")[2])


class FilterConfig(Section):
    """This section replaces groups that teach nothing, because all of their trajectories are equal (dynamic sampling,
    arXiv:2503.14476, section 3.2). It is off unless [batch.filter] is in the config (docs/rollouts.md)."""

    on: Literal["correct", "reward"] = "correct"
    """What has to differ in a group that is trained on. correct: which of its answers are right; reward: the
    rewards."""
    oversample: float = Field(1.5, ge=1)
    """Prompts that a step draws at first, as a multiple of `batch.prompts`."""
    max_refills: int = Field(32, ge=0)
    """Further prompts that a step draws at most, one for each that is missing. After that it trains on the groups that
    it has."""


class BatchConfig(Section):
    prompts: int = Field(32, ge=1)
    """Prompts (groups) per training step, over all ranks."""
    samples_per_prompt: int = Field(8, ge=1)
    """Trajectories per prompt."""
    mini_batches: int = Field(1, ge=1)
    """Parts, cut at group boundaries, into which a step's trajectories are split; one optimiser step each."""
    epochs: int = Field(1, ge=1)
    """Passes over the same trajectories. Optimiser steps per training step = mini_batches x epochs."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Token budget of one packed row, padding included, over all context-parallel ranks."""
    oversized: Literal["error", "own_micro_batch"] = "error"
    """What happens to a trajectory longer than `micro_batch_tokens`."""
    kept_forwards: int = Field(1, ge=1)
    """Micro-batches of an optimiser step whose activations are kept from the forward pass that finds their log-probs
    (the old ones of the first step, or those that gates need of all micro-batches) until the backward pass, so that
    they pass the model once. More than 1 takes the memory of so many micro-batches' activations and changes no result.
    `fiberpo plan` says how many fit, and what they save."""
    filter: FilterConfig | None = None

    @property
    def drawn_prompts(self) -> int:
        """These are the prompts that a step draws: more than it trains on where a filter drops groups. Refills are not
        among them."""
        return self.prompts if self.filter is None else ceil(Fraction(str(self.filter.oversample)) * self.prompts)

    @model_validator(mode="after")
    def groups_can_differ(self) -> "BatchConfig":
        if self.filter is not None and self.samples_per_prompt < 2:
            raise ValueError(
                f"batch.filter with batch.samples_per_prompt = {self.samples_per_prompt}: no group of one trajectory "
                "differs, so that all would be dropped; raise it to 2 or more, or leave [batch.filter] out"
            )
        return self

    @model_validator(mode="after")
    def mini_batches_fit(self) -> "BatchConfig":
        if self.prompts % self.mini_batches:
            fits = [m for m in range(1, self.prompts + 1) if self.prompts % m == 0]
            raise ValueError(
                f"batch.mini_batches = {self.mini_batches} does not divide batch.prompts = {self.prompts}; "
                f"use one of {fits}"
            )
        return self


class CheckpointConfig(Section):
    every_steps: int = Field(1, ge=0)
    """Save every so many steps; 0: only after the last. 1 loses nothing but the unfinished step."""
    keep: int = Field(2, ge=1)
    """Complete checkpoints kept, newest first."""
    keep_best_metric: str | None = None
    """Keep the checkpoint with the best value of this metric as well: "eval/accuracy", "train/reward/mean" or another
    that rank 0 knows. A step without it (no evaluation was due) cannot be the best."""
    keep_best_mode: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value is the best."""
    asynchronous: bool = False
    """Copy the state to host memory and let a thread write it while training goes on. The checkpoint counts from the
    first step's end that finds it written; the run waits before the next save and before it ends."""
    trust_others: bool = False
    """Load checkpoints that other users own or may write to. Loading one executes nothing in any case, but whoever can
    write a checkpoint decides the weights."""

    @model_validator(mode="after")
    def metric_has_a_kind(self) -> "CheckpointConfig":
        if self.keep_best_metric and not self.keep_best_metric.startswith(("eval/", "train/")):
            raise ValueError(
                f"checkpoint.keep_best_metric = {self.keep_best_metric!r}: say of which record, eval/... or train/..., "
                "for example eval/accuracy"
            )
        return self


class TrainerConfig(Section):
    steps: int = Field(100, ge=1)
    """Training steps; each generates once and takes batch.mini_batches x batch.epochs optimiser steps."""


class SftConfig(Section):
    steps: int = Field(200, ge=1)
    """Optimiser steps."""
    examples: int = Field(64, ge=1)
    """Examples per optimiser step, over all ranks."""


class DebugConfig(Section):
    dump_step: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] | None = None
    """Training step, by its number in metrics.jsonl (the first is 0), or a list of them, of which everything that the
    objective saw and gave is written to <run folder>/step_dumps, for `fiberpo replay-step` and `fiberpo certify`."""

    @property
    def steps(self) -> list[int]:
        """Return the training steps to dump."""
        if self.dump_step is None:
            return []
        return [self.dump_step] if isinstance(self.dump_step, int) else self.dump_step
