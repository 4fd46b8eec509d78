"""This module computes what one SGLang engine holds: the weights, and tokens of KV cache in the memory that is left."""

from dataclasses import dataclass

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.mcore.families import Architecture
from fiberpo_megatron.planning.parameters import model_parameters
from fiberpo_megatron.planning.states import DTYPE_BYTES


@dataclass(frozen=True)
class EnginePlan:
    """This is the memory of one engine, per GPU."""

    weights: int
    """Bytes of weights."""
    cache_token: int
    """Bytes of one token's keys and values over all layers."""
    cache: int
    """Bytes of KV cache; 0 if the weights leave no room."""
    longest: int
    """Tokens of the longest trajectory."""

    @property
    def cache_tokens(self) -> int:
        return self.cache // self.cache_token

    @property
    def fits(self) -> bool:
        """Say whether there is room for the longest trajectory."""
        return self.cache_tokens >= self.longest


def engine_count(config: Config) -> int:
    """Return the number of engines of a config; `rollout.engine.count` run on each of `slurm.engine_nodes`."""
    return len(config.rollout.engine.urls) or config.rollout.engine.count * max(1, config.slurm.engine_nodes)


def engine_dtype_bytes(config: Config) -> int:
    """Return the bytes of a number in the engine."""
    dtype = config.rollout.engine.dtype
    return DTYPE_BYTES[config.model.dtype if dtype == "auto" else dtype]


def cache_token_bytes(architecture: Architecture, tensor: int, width: int) -> int:
    """Return the bytes of one token's KV cache on one of an engine's `tensor` GPUs.

    GPUs beyond the number of key-value heads hold copies. With latent attention every GPU holds the whole latent.
    """
    latent = architecture.latent
    if latent is not None:
        return architecture.layers * (latent.key_value_rank + latent.rotary_size) * width
    heads = -(-architecture.key_value_heads // tensor)
    return 2 * architecture.layers * heads * architecture.head_dim * width


def plan_engine(config: Config, architecture: Architecture, memory: float, taken: int = 0) -> EnginePlan:
    """Plan one GPU with `memory` bytes of an engine of the config, in whose share other processes use `taken` bytes."""
    engine, width = config.rollout.engine, engine_dtype_bytes(config)
    weights = -(-model_parameters(architecture) * width // engine.tensor)
    token = cache_token_bytes(architecture, engine.tensor, width)
    room = max(0, int(engine.memory_fraction * memory) - weights - taken)
    if engine.max_total_tokens is not None:
        room = min(room, engine.max_total_tokens * token)
    return EnginePlan(weights, token, room, config.data.max_prompt_tokens + config.rollout.max_response_tokens)
