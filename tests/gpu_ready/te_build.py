"""What a rank of a built model reports: its parameters, what it exports, and the classes that it is made of."""

from dataclasses import dataclass
from typing import Any

import torch

from tests.distributed.parity import MODELS, QWEN3_MOE

_MIXTRAL = {k: v for k, v in QWEN3_MOE.items() if k not in ("num_experts", "moe_intermediate_size", "norm_topk_prob")}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

KINDS: dict[str, dict[str, Any]] = {
    "qwen2": MODELS["dense"],
    "qwen3": MODELS["dense tied"],
    "qwen3_moe": MODELS["moe"],
    "deepseek_v3": MODELS["deepseek"],
    "llama": {
        **MODELS["dense"],
        "model_type": "llama",
        "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 8192},
    },
    "mixtral": {**_MIXTRAL, "model_type": "mixtral", "num_local_experts": 8},
    "qwen3 with yarn": {**MODELS["dense tied"], "rope_scaling": _YARN},
    "deepseek_v3 with yarn": {
        **MODELS["deepseek"],
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1},
    },
}
"""One small config.json for each family, and of the two kinds of attention one with YaRN."""


@dataclass(frozen=True)
class Built:
    """Holds what one rank built."""

    exported: dict[str, tuple[int, ...]]
    """Hugging Face name and shape of every tensor; the ranks export together."""
    keys: dict[str, tuple[int, ...]]
    """Name in checkpoints and global shape of every tensor that this rank holds a part of."""
    classes: set[str]
    """Names of Transformer Engine's classes in the model."""
    optimizer: str
    """Package and class of the optimizer that Megatron chose."""


def build(hf_config: dict[str, Any], parallel: dict[str, int], model: dict[str, Any]) -> Built:
    """Build the policy of a layout on this rank, with random weights, and export it."""
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy
    from fiberpo_megatron.mcore.weights.global_tensors import global_shards
    from tests.distributed.parity import make_config

    config = make_config(parallel=parallel, model=model)
    layout = start_layout(hf_config, config.parallel, config.run)
    policy = build_policy(config, hf_config, layout)
    modules = {type(module) for chunk in policy.models for module in chunk.modules()}
    return Built(
        exported={name: tuple(tensor.shape) for name, tensor in policy.weights.full()},
        keys={shard.key: tuple(shard.global_shape) for shard in global_shards(policy.models)},
        classes={t.__name__ for kind in modules for t in kind.__mro__ if t.__module__.startswith("transformer_engine")},
        optimizer=_innermost(policy),
    )


def fuses_weight_gradients(hf_config: dict[str, Any], parallel: dict[str, int], apex: bool) -> set[bool]:
    """Build a policy where apex can be imported, or cannot; return whether its layers add weight gradients inside their
    kernels. Called in a process of its own."""
    import sys
    from types import ModuleType

    from megatron.core.tensor_parallel import layers

    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy
    from tests.distributed.parity import make_config

    if apex:  # the name of its kernel, which Megatron-Core looks for when it is imported
        sys.modules["fused_weight_gradient_mlp_cuda"] = ModuleType("fused_weight_gradient_mlp_cuda")
        layers._grad_accum_fusion_available = True
    config = make_config(parallel=parallel)
    policy = build_policy(config, hf_config, start_layout(hf_config, config.parallel, config.run))
    modules = [module for chunk in policy.models for module in chunk.modules()]
    found = [module.fuse_wgrad_accumulation for module in modules if hasattr(module, "fuse_wgrad_accumulation")]
    found += [m.gradient_accumulation_fusion for m in modules if hasattr(m, "gradient_accumulation_fusion")]
    assert len(found) > 4, "no layer was looked at"
    return set(found)


def save_after_fp8(hf_config: dict[str, Any], parallel: dict[str, int], model: dict[str, Any], folder: str) -> set[int]:
    """Save a policy whose layers are as after a step in FP8, read the checkpoint into it, and return the sizes of the
    FP8 states that its grouped layers gave, in bytes."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    from fiberpo_megatron.mcore import checkpoint
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy
    from tests.distributed.parity import make_config

    config = make_config(parallel=parallel, model=model)
    policy = build_policy(config, hf_config, start_layout(hf_config, config.parallel, config.run))
    modules = [module for chunk in policy.models for module in chunk.modules()]
    layers = [module for module in modules if isinstance(module, TransformerEngineBaseModule)]
    recipe = get_fp8_recipe(policy.models[0].config)
    for layer in layers:
        layer.fp8, layer.fp8_meta["recipe"] = True, recipe  # what a forward pass within the recipe leaves
    sizes = {layer.get_extra_state().numel() for layer in layers if hasattr(layer, "num_gemms")}
    where = f"{folder}/step_000001"
    checkpoint.save(policy, where, {"saved": 1})
    assert checkpoint.load(policy, where) == {"saved": 1}
    return sizes


def _innermost(policy: Any) -> str:
    """Return the class of the optimizer inside Megatron's wrappers."""
    found = next(value for value in vars(policy).values() if hasattr(value, "param_groups"))
    while not isinstance(found, torch.optim.Optimizer):
        found = found.chained_optimizers[0] if hasattr(found, "chained_optimizers") else found.optimizer
    return f"{type(found).__module__.partition('.')[0]}.{type(found).__name__}"
