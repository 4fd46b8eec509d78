"""This module defines the settings of sampling and of the rollouts on disk: [rollout] and [storage]."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.settings import Section


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
    step_timeout_s: float = Field(14400.0, gt=0)
    """Seconds that the trajectories of a step, or of an evaluation, may take. The other ranks wait so long for those
    that ask the engines; they enter no collective meanwhile, so that run.distributed_timeout_s does not limit it."""
    staleness: int = Field(0, ge=0)
    """Steps by which sampling may run ahead of training (docs/rollouts.md): while a step is trained, trajectories of
    later steps are sampled, and no token that is trained on is older than so many versions of the weights. 0: engines
    and trainer take turns, and every token is of the newest weights."""
    partial: Literal["drain", "retract", "segment"] = "drain"
    """What a publication does with unfinished trajectories, where staleness is above 0. drain: it waits until all have
    ended, so that a trajectory has one version of the weights and runs repeat. retract: engines pause, load and go on.
    segment: requests are aborted and continued behind the tokens that they have, on any engine."""
    chunk_tokens: int | None = Field(None, ge=1)
    """Largest number of tokens that one request samples; a longer response takes several. Unset: one request for each
    response. Smaller segments let requests of earlier steps go first, and a dead engine costs less."""
    tool_call_parser: str | None = None
    """Name of SGLang's parser for the model's tool calls, such as `qwen25`. An environment that passes tools to the
    policy needs it."""
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
    def partial_fits(self) -> "RolloutConfig":
        if self.staleness and self.engine.colocated and self.partial != "segment":
            raise ValueError(
                f"rollout.staleness = {self.staleness} with rollout.engine.colocated = true and rollout.partial = "
                f"{self.partial!r}: engines that share GPUs with the trainer sleep while it trains; set "
                'rollout.partial = "segment", which keeps the tokens of unfinished responses, or staleness = 0'
            )
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


class StorageConfig(Section):
    """These settings keep each step's trajectories in full (tokens, log-probs, rewards, routing) on disk."""

    dump: bool = False
    """Keep the trajectories of every step in <run folder>/dump, for `storage.replay`."""
    replay: Path | None = None
    """Train on the trajectories of this folder (a dump, or a run folder that has one) in place of an engine's. No
    engine is started, nothing is published, and held-out evaluation is left out."""
    unfinished: bool = True
    """Keep a step's trajectories on disk until a checkpoint holds the step, each prompt's as soon as they have ended. A
    resumed run then need not generate them again."""
