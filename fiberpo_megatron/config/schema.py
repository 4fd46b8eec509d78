"""Every setting of a run: pydantic models, unknown keys refused, one docstring with the unit under every field.

Nothing here imports torch: a config can be loaded and checked on a login node.
"""

import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Budget = tuple[float, float]
Membership = Literal["soft", "hard"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts", "moe_act", "mla_up_proj"]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, field docstrings become descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


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
    """Seconds without a sign of life from a rank after which the run stops and names it; 0: nobody watches."""


class ModelConfig(Section):
    path: Path
    """Hugging Face folder: config.json, tokenizer files and, unless `random_init`, safetensors weights."""
    random_init: bool = False
    """Draw fresh weights from `run.seed` instead of reading safetensors (for pre-training a toy model)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameter and compute type. The optimizer always keeps float32 master weights."""
    fp8: Literal["none", "e4m3", "hybrid"] = "none"
    """Format in which linear layers multiply: e4m3 throughout, or (hybrid) e5m2 for gradients. Parameters stay in
    bfloat16. Needs a GPU with FP8 and Transformer Engine."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 scales are found. delayed takes them from earlier passes: the old log-probs then see other scales than
    the step does, which shifts importance ratios."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of stored: those inside `recompute_modules`, or
    (full) all but the inputs of each layer."""
    recompute_modules: list[RecomputeModule] | None = None
    """Parts of a layer that `recompute = "selective"` computes again. core_attn: attention without its projections
    (nothing to save where attention is fused); layernorm: the norms before attention and MLP; mlp: the MLP of dense
    layers; moe: router, dispatch and experts; shared_experts; moe_act: activations of the experts (grouped GEMM,
    hence GPU only); mla_up_proj: the up-projections of latent attention. Unset: layernorm, and of a dense model mlp,
    of one with experts moe_act (without a GPU moe)."""
    train_router: bool = False
    """Let the optimizer change the MoE routers. Off by default in RL: a moving router changes which experts
    the old policy used, which makes importance ratios noisy."""
    router_aux_loss: float = Field(0.0, ge=0)
    """Coefficient of the MoE load-balancing loss. It is not part of the policy gradient, hence 0 by default."""
    router_bias_update_rate: float = Field(0.0, ge=0)
    """How far each optimiser step moves the routers' correction bias of an expert that got fewer (up) or more (down)
    of the mini-batch's tokens than the mean; DeepSeek-V3 was trained with 0.001. 0 by default in RL: a bias that moves
    sends a token to other experts than the old policy did."""
    log_prob_chunk_tokens: int = Field(4096, ge=1)
    """Tokens whose float32 vocabulary row (one tensor-parallel shard) exists at the same time."""

    @model_validator(mode="after")
    def fp8_computes_from_bfloat16(self) -> "ModelConfig":
        if self.fp8 != "none" and self.dtype != "bfloat16":
            raise ValueError(f'model.fp8 = "{self.fp8}" with model.dtype = "{self.dtype}": set dtype = "bfloat16"')
        return self


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks; sequence parallelism is on whenever this exceeds 1."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks per pipeline stage (interleaved schedule when above 1)."""
    uneven_stages: bool = False
    """Allow pipeline stages (and their chunks) that differ by one layer, where the layers do not divide. The slowest
    stage sets the pace."""
    context: int = Field(1, ge=1)
    """Context-parallel ranks: each sequence is cut into 2 x context zigzag chunks."""
    expert: int = Field(1, ge=1)
    """Expert-parallel ranks; they are taken from the tensor x context x data ranks."""
    expert_tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks inside one expert."""
    data: int | None = Field(None, ge=1)
    """Data-parallel ranks. Unset: the world size over tensor x pipeline x context; with no launcher around,
    the smallest number that the expert layout allows."""
    distributed_optimizer: bool = True
    """Shard optimizer state and master weights over the data-parallel ranks."""

    @property
    def model_ranks(self) -> int:
        """Ranks of one model replica (tensor x pipeline x context)."""
        return self.tensor * self.pipeline * self.context

    def smallest_data(self) -> int:
        """Smallest data-parallel size at which expert x expert_tensor divides tensor x context x data."""
        data = 1
        while (self.tensor * self.context * data) % (self.expert * self.expert_tensor):
            data += 1
        return data

    def world_size(self) -> int:
        """Number of processes of the layout."""
        return self.model_ranks * (self.data or self.smallest_data())


class OptimizerConfig(Section):
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Decay after the warm-up, over `trainer.steps`, to `min_learning_rate`."""
    min_learning_rate: float = Field(0.0, ge=0)
    """Learning rate at the end of a decaying schedule."""
    warmup_steps: int = Field(0, ge=0)
    """Optimiser steps of linear warm-up from 0."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's first-moment decay."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Adam's second-moment decay."""
    eps: float = Field(1e-8, gt=0)
    """Adam's denominator floor."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (none on norms and biases)."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""
    cpu_offload: bool = False
    """Keep master weights and moments in host memory, except while the optimizer steps: they and the activations are
    then never on the device together. Costs two copies of them a step; changes no result."""


class AlgorithmConfig(Section):
    """The objective and the advantages. Mathematics: docs/fibration.md."""

    objective: str = "fiberpo"
    """fiberpo, fiberpo-domain, fiberpo-expert, fiberpo-expert-global, ppo, grpo, dapo, gspo, cispo, apc or
    reinforce."""
    epsilon: float | tuple[float, float] | None = None
    """Token-level clip width (log ratio for fiberpo). A pair is (positive, non-positive advantage). Unset: the
    objective's default."""
    budgets: dict[str, Budget] | None = None
    """(C+, C-) of each level, by the level's name (its keys joined by '+'). Unset: the preset's defaults."""
    levels: list[list[str]] | None = None
    """A level chain of one's own, fine to coarse, in place of the preset's."""
    expert_membership: Membership | None = None
    """How a token belongs to expert partitions (objectives with an expert level only). Unset: soft."""
    expert_partitions: int | None = Field(None, ge=1)
    """Number of contiguous expert blocks. Unset: the expert-parallel size."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound c of the dual-clip overlay: tokens with A < 0 and x > 0 use max(r A, c A)."""
    unclip_positive: bool = False
    """Overlay: tokens with A > 0 and x < 0 use r A."""
    weighting: Literal["seq-mean", "token-mean"] = "seq-mean"
    """mu of a token: 1/(trajectories x its trajectory's tokens), or 1/tokens."""
    advantage: Literal["group-mean", "leave-one-out", "none"] = "group-mean"
    """Baseline subtracted from a reward: the group's mean, the mean of the others, or none."""
    normalise_std: bool = True
    """Divide by the group's reward standard deviation (+1e-6)."""
    expert_routing: Literal["old", "rollout"] = "old"
    """Whose routing says which expert partitions a token belongs to: the old policy's, recorded in the
    old-log-prob pass, or the engine's."""
    routing_replay: Literal["none", "old", "rollout"] = "none"
    """Experts that training forwards use. none: the current routers'; old: those chosen in the old-log-prob pass
    (R2); rollout: those that the engine chose (R3), in the old-log-prob pass as well."""
    kernels: bool | None = None
    """The objective in fused Triton kernels (true), in torch (false), or, unset, in the kernels where they can run."""

    def objective_options(self) -> dict[str, object]:
        """Options that are set, as keyword arguments of `build_objective`."""
        names = ("epsilon", "budgets", "levels", "expert_membership", "dual_clip")
        options = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.unclip_positive:
            options["unclip_positive"] = True
        return options


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

    @model_validator(mode="after")
    def mini_batches_fit(self) -> "BatchConfig":
        if self.prompts % self.mini_batches:
            fits = [m for m in range(1, self.prompts + 1) if self.prompts % m == 0]
            raise ValueError(
                f"batch.mini_batches = {self.mini_batches} does not divide batch.prompts = {self.prompts}; "
                f"use one of {fits}"
            )
        return self


class EngineConfig(Section):
    """SGLang servers. Either their addresses, or how to start them."""

    urls: list[str] = []
    """Addresses of running servers (http://host:port). Empty: the run starts `count` servers itself."""
    api_key_file: Path | None = None
    """File (mode 0600) with the API key of the servers in `urls`. Servers that the run starts get a fresh key each run
    when this is unset."""
    count: int = Field(1, ge=1)
    """Servers started on this node when `urls` is empty."""
    tensor: int = Field(1, ge=1)
    """Tensor-parallel GPUs per server."""
    port: int | None = Field(None, ge=1, le=65535)
    """First port; server i listens on port + i. Unset: free ports are found."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Type in which the server computes. auto: the model's (`model.dtype`)."""
    threads: int = Field(1, ge=1)
    """CPU threads of a server (platform without GPU)."""
    max_total_tokens: int | None = Field(None, ge=1)
    """Size of the KV cache in tokens. Unset on a GPU: from `memory_fraction`; without: 16384."""
    max_running_requests: int = Field(64, ge=1)
    """Requests decoded together."""
    colocated: bool = False
    """Engines on the training ranks' GPUs: while they generate, gradients are dropped and the optimizer's state waits
    in host memory; while the trainer learns, they give up weights and KV cache. Needs weight_sync.method = "disk" on
    GPUs; servers given by URL need --enable-memory-saver."""
    memory_fraction: float = Field(0.8, gt=0, le=1)
    """Share of GPU memory for weights and KV cache; colocated engines share it with the trainer's parameters."""
    start_timeout_s: float = Field(300.0, gt=0)
    """Seconds a server may take to become healthy."""
    request_timeout_s: float = Field(600.0, gt=0)
    """Seconds one generation request may take."""
    python: Path | None = None
    """Interpreter that has SGLang, where its pins disagree with the trainer's. Unset: the environment variable
    FIBERPO_SGLANG_PYTHON (set in the CUDA image), else the trainer's own."""
    extra_args: list[str] = []
    """Further arguments of `python -m sglang.launch_server`."""


class RolloutConfig(Section):
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; log-probs on both sides are those of logits / temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling mass. Below 1 the sampling distribution is not the policy's: ratios are biased."""
    top_k: int = -1
    """Sample among the k most likely tokens; -1 is all."""
    max_response_tokens: int = Field(1024, ge=1)
    """Response tokens after which a trajectory is cut; in a conversation, of each turn."""
    stop: list[str] = []
    """Characters that end a response, such as a newline after a raw-text prompt: the first token that contains one is
    the last (trained on like the others), and the verifier sees the text before the character."""
    max_concurrent_requests: int = Field(256, ge=1)
    """Requests that one data-parallel leader keeps in flight."""
    return_routing: bool = False
    """Ask the engine for the experts of every token, and log per layer how often trainer and engine agree. Implied by
    algorithm.expert_routing = "rollout" and routing_replay = "rollout". Servers given by URL need
    --enable-return-routed-experts."""
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def greedy_is_not_sampling(self) -> "RolloutConfig":
        if self.top_k == 0 or self.top_k < -1:
            raise ValueError(f"rollout.top_k = {self.top_k}: use -1 (all tokens) or a number of at least 1")
        return self

    @model_validator(mode="after")
    def stop_is_characters(self) -> "RolloutConfig":
        longer = [text for text in self.stop if len(text) != 1]
        if longer:
            raise ValueError(
                f"rollout.stop: {longer[0]!r} is not one character; a longer text can be spread over tokens in many "
                "ways, and engines see tokens: choose one of its characters"
            )
        return self


class RolloutsConfig(Section):
    """Rollouts on disk: each step's trajectories in full (tokens, log-probs, rewards, routing)."""

    dump: bool = False
    """Keep the trajectories of every step in <run folder>/dump, for `rollouts.replay`."""
    replay: Path | None = None
    """Train on the trajectories of this folder (a dump, or a run folder that has one) in place of an engine's: no
    engine is started, nothing is published, held-out evaluation is left out."""
    unfinished: bool = True
    """Keep a step's trajectories on disk, each prompt's as soon as they have ended, until a checkpoint holds the step:
    a resumed run need not generate them again."""


class WeightSyncConfig(Section):
    method: Literal["disk", "distributed"] = "distributed"
    """distributed: rank 0 broadcasts to the engines (NCCL, gloo without GPU); disk: through a safetensors
    folder that every engine can read."""
    folder: Path | None = None
    """Folder for `disk`. Unset: <run folder>/published."""
    timeout_s: float = Field(300.0, gt=0)
    """Seconds that one publication may take."""
    bucket_mib: int = Field(256, ge=1)
    """Weights sent in one broadcast (MiB)."""
    verify_every: int = Field(1, ge=0)
    """After every so many publications an engine scores a probe, compared with the trainer's log-probs; 0 never."""
    verify_tolerance: float = Field(0.05, gt=0)
    """Largest mean |log-prob difference| of the probe; 1e-3 is right in float32."""


class AdditionTask(Section):
    """Two-number addition at character level: `34+58=` is answered by `092`."""

    kind: Literal["addition"]
    name: str = "addition"
    """Domain name in metrics."""
    digits: int = Field(2, ge=1, le=6)
    """Digits of each operand."""
    held_out_every: int = Field(10, ge=2)
    """Every so many-th problem (by a fixed hash) is kept for evaluation."""
    weight: float = Field(1.0, gt=0)
    """Share of prompts drawn from this domain, relative to the others."""


class SortTask(Section):
    """Sorting digits at character level: `s:40213=` is answered by `01234`."""

    kind: Literal["sort"]
    name: str = "sort"
    """Domain name in metrics."""
    length: int = Field(5, ge=2, le=16)
    """Digits to sort."""
    held_out_every: int = Field(10, ge=2)
    """Every so many-th problem (by a fixed hash) is kept for evaluation."""
    weight: float = Field(1.0, gt=0)
    """Share of prompts drawn from this domain, relative to the others."""


class JsonlTask(Section):
    """Prompts from a file: one JSON object a line with `prompt` (string or chat messages) and `answer`."""

    kind: Literal["jsonl"]
    name: str
    """Domain name in metrics."""
    train: Path
    """Training prompts."""
    held_out: Path | None = None
    """Evaluation prompts. Unset: this domain is not evaluated."""
    reward: Literal["exact", "math_verify"] = "exact"
    """exact: the stripped response equals the answer; math_verify: the math-verify library compares them."""
    chat_template: bool = True
    """Wrap a plain string prompt into the tokenizer's chat template as a user message."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template, as its makers document them (enable_thinking, tools, ...)."""
    max_turns: int = Field(1, ge=1)
    """Turns of the policy in one trajectory. Above 1, `retry_message` follows a wrong answer as a user message; the
    last answer is scored."""
    retry_message: str = Field("That is not right. Try again.", min_length=1)
    """What the user says to a wrong answer that is not the last."""
    weight: float = Field(1.0, gt=0)
    """Share of prompts drawn from this domain, relative to the others."""

    @model_validator(mode="after")
    def turns_have_a_template(self) -> "JsonlTask":
        if self.max_turns > 1 and not self.chat_template:
            raise ValueError(
                f"data.tasks: task {self.name!r} has max_turns = {self.max_turns} and chat_template = false: only a "
                "chat template says where a turn ends; set chat_template = true or max_turns = 1"
            )
        return self


class DataConfig(Section):
    tasks: list[AdditionTask | SortTask | JsonlTask] = Field(min_length=1)
    """Domains from which prompts are drawn."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longest prompt; a longer one stops the run with its line, before anything starts."""
    curriculum: Literal["none", "adaptive"] = "none"
    """none: domains are mixed by their `weight`; adaptive: by weight x max(curriculum_floor, 4 a (1 - a)), where a is
    the domain's running solve rate, so that what is solved about half of the time is drawn most."""
    curriculum_rate: float = Field(0.1, gt=0, le=1)
    """Share of a step's solve rate in the running one."""
    curriculum_floor: float = Field(0.1, gt=0, le=1)
    """Least factor of a domain that is always or never solved, relative to one that is solved half of the time."""
    random_reward: bool = False
    """Control experiment: rewards are fair coin flips that ignore the answer."""

    @model_validator(mode="after")
    def names_differ(self) -> "DataConfig":
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data.tasks: the domain name {twice[0]!r} is used twice; give each task its own `name`")
        return self


class EvaluationConfig(Section):
    every_steps: int = Field(0, ge=0)
    """Evaluate on held-out prompts every so many steps; 0: only before the first and after the last step."""
    prompts: int = Field(128, ge=0)
    """Held-out prompts per evaluation, all domains together; 0 switches evaluation off."""
    samples_per_prompt: int = Field(1, ge=1)
    """Sampled responses per held-out prompt, at the rollout's temperature."""


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

    @model_validator(mode="after")
    def metric_has_a_kind(self) -> "CheckpointConfig":
        if self.keep_best_metric and not self.keep_best_metric.startswith(("eval/", "train/")):
            raise ValueError(
                f"checkpoint.keep_best_metric = {self.keep_best_metric!r}: say of which record, eval/... or train/..., "
                "for example eval/accuracy"
            )
        return self


class TelemetryConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard event files to <run folder>/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the wandb package and WANDB_API_KEY."""
    rollouts_per_step: int = Field(4, ge=0)
    """Trajectories written as text to <run folder>/rollouts each step."""


class TrainerConfig(Section):
    steps: int = Field(100, ge=1)
    """Training steps; each generates once and takes batch.mini_batches x batch.epochs optimiser steps."""


class SlurmConfig(Section):
    """The job of `fiberpo slurm`: docs/slurm.md. Ranks follow from [parallel], servers from [rollout.engine]."""

    job_name: str = "fiberpo"
    """Name in the queue."""
    partition: str | None = None
    """Partition. Unset: the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    time: str = Field("24:00:00", pattern=r"^(\d+-)?\d+(:\d+){0,2}$")
    """Time limit of one start of the job ([days-]hours:minutes:seconds, or minutes)."""
    gpus_per_node: int = Field(8, ge=0)
    """GPUs of a node; 0: a cluster without."""
    ranks_per_node: int | None = Field(None, ge=1)
    """Training ranks per node, one GPU each. Unset: gpus_per_node (without GPUs: 1), or all ranks if they are fewer."""
    cpus_per_rank: int = Field(8, ge=1)
    """CPU cores of a training rank; the engines of a node get as many as its ranks together."""
    engine_nodes: int = Field(1, ge=0)
    """Nodes that run `rollout.engine.count` servers each. 0: the servers are given by `rollout.engine.urls`."""
    share_nodes: bool = False
    """Put the engines on the first `engine_nodes` training nodes: on GPUs that the ranks leave free, or with
    rollout.engine.colocated on theirs."""
    signal_s: int = Field(300, ge=10)
    """Seconds before the time limit at which the run is asked to save and stop: more than a step without its
    generation, an evaluation and a save."""
    requeue: bool = True
    """Queue the job again when it was stopped by its time limit; it goes on by itself."""
    chain: int = Field(1, ge=1)
    """Jobs to submit, each after the one before: for clusters that do not requeue."""
    dependency: str | None = None
    """What the (first) job waits for, e.g. "afterok:1234"."""
    array: str | None = Field(None, pattern=r"^[0-9,:%-]+$")
    """Indices of a job array, e.g. "0-3": independent runs with seed run.seed + index in <run folder>/array_<index>."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """How the processes are put into `image`: pyxis is srun's plugin for Enroot."""
    image: str | None = None
    """Container image (file, or for pyxis a registry's name)."""
    mounts: list[str] = []
    """Folders visible inside, "host:container[:ro]". The current folder always is, under its own name."""
    python: str | None = None
    """Python on the nodes. Unset: the one that runs `fiberpo slurm`; in a container: python."""
    options: list[str] = []
    """Further options of sbatch, e.g. "--exclude=node7"."""

    @field_validator("time", "array", mode="before")
    @classmethod
    def as_text(cls, value: object) -> object:
        """30 and 12:00:00 are a number and a time of day in TOML."""
        return str(value) if isinstance(value, (int, datetime.time)) else value

    @model_validator(mode="after")
    def one_line_each(self) -> "SlurmConfig":
        for name, value in self:
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and not text.isprintable():
                    raise ValueError(f"slurm.{name} has a line break or another control character: {text!r}")
        for option in self.options:
            if not option.startswith("-"):
                raise ValueError(f"slurm.options: {option!r} is no option of sbatch; write it as --name=value")
        return self

    @model_validator(mode="after")
    def signal_comes_after_the_start(self) -> "SlurmConfig":
        days, _, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if days:  # days-hours:minutes:seconds
            hours, minutes, seconds = (*parts, 0, 0)[:3]
        else:  # minutes, minutes:seconds or hours:minutes:seconds
            hours, minutes, seconds = (0, *parts, 0)[:3] if len(parts) < 3 else parts
        limit = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
        if limit <= self.signal_s:
            raise ValueError(
                f"slurm.signal_s = {self.signal_s} and slurm.time = {self.time!r} ({limit} s): the job would be asked "
                "to stop when it starts; lower signal_s or raise time"
            )
        return self

    @model_validator(mode="after")
    def container_has_an_image(self) -> "SlurmConfig":
        if (self.container == "none") != (self.image is None):
            raise ValueError(
                f'slurm.container = "{self.container}" and slurm.image = {self.image!r}: set both, or neither'
            )
        return self


class SftConfig(Section):
    steps: int = Field(200, ge=1)
    """Optimiser steps."""
    examples: int = Field(64, ge=1)
    """Examples per optimiser step, over all ranks."""


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    batch: BatchConfig = BatchConfig()
    rollout: RolloutConfig = RolloutConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    data: DataConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    trainer: TrainerConfig = TrainerConfig()
    sft: SftConfig = SftConfig()
    slurm: SlurmConfig = SlurmConfig()

    @property
    def needs_rollout_routing(self) -> bool:
        """Whether engines have to return the experts of every token."""
        algorithm = self.algorithm
        return self.rollout.return_routing or "rollout" in (algorithm.expert_routing, algorithm.routing_replay)
