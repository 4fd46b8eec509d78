"""These settings describe the model and its parallel layout: [model] and [parallel]."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fiberpo_megatron.settings import Section

RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts", "moe_act", "mla_up_proj"]


class ModelConfig(Section):
    path: Path
    """Hugging Face folder: config.json, tokenizer files and, unless `random_init`, safetensors weights."""
    family: str | None = None
    """Model family: the import path of a `Family` object (docs/models.md), or the name of a family of this package.
    Unset: the one of config.json's `model_type`."""
    random_init: bool = False
    """Draw fresh weights from `run.seed` instead of reading safetensors (for pre-training a toy model)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameter and compute type. The optimizer always keeps float32 master weights."""
    fp8: Literal["none", "e4m3", "hybrid"] = "none"
    """Format in which linear layers multiply: e4m3 throughout, or (hybrid) e5m2 for gradients. Parameters stay in
    bfloat16. Needs a GPU with FP8 and Transformer Engine."""
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 scales are found, always in the tensor itself. Delayed scaling, which takes them from earlier passes, is
    refused: at every start its first step has another gradient."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are computed again in the backward pass instead of stored: those inside `recompute_modules`, or
    (full) all but the inputs of each layer."""
    recompute_modules: list[RecomputeModule] | None = None
    """Parts of a layer that `recompute = "selective"` computes again. core_attn: attention without its projections
    (nothing to save if attention is fused); layernorm: the norms before attention and MLP; mlp: the MLP of dense
    layers; moe: router, dispatch and experts; shared_experts: the shared experts; moe_act: activations of the experts
    (grouped GEMM, hence GPU only); mla_up_proj: the up-projections of latent attention. Unset: layernorm and, for a
    dense model, mlp; for one with experts, moe_act (without a GPU, moe)."""
    train_router: bool = False
    """Let the optimizer change the MoE routers. Off by default in RL: a moving router changes which experts
    the old policy used, which makes importance ratios noisy."""
    router_aux_loss: float = Field(0.0, ge=0)
    """Coefficient of the MoE load-balancing loss. It is not part of the policy gradient, hence 0 by default."""
    router_bias_update_rate: float = Field(0.0, ge=0)
    """How far each optimiser step moves the routers' correction bias of an expert that got fewer (up) or more (down) of
    the mini-batch's tokens than the mean; DeepSeek-V3 was trained with 0.001. It is 0 by default in RL, because a bias
    that moves sends a token to other experts than the old policy did."""
    log_prob_chunk_tokens: int = Field(4096, ge=1)
    """Tokens whose float32 vocabulary row (one tensor-parallel shard) exists at the same time."""

    @field_validator("fp8_recipe", mode="before")
    @classmethod
    def scales_are_of_the_tensor_itself(cls, value: Any) -> Any:
        if value == "delayed":
            raise ValueError(
                "the scales of delayed scaling come from earlier passes: the old log-probs are computed with other "
                "scales than the step, and at every start the first step has another gradient "
                '(on an H200 its norm was 0.54 of that in bfloat16); set "tensorwise" or "blockwise"'
            )
        return value

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
    """Allow pipeline stages (and their chunks) that differ by one layer if the layers do not divide. The slowest stage
    limits the speed."""
    context: int = Field(1, ge=1)
    """Context-parallel ranks: each sequence is cut into 2 x context zigzag chunks."""
    expert: int = Field(1, ge=1)
    """Expert-parallel ranks; they are taken from the tensor x context x data ranks."""
    expert_tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks inside one expert."""
    data: int | None = Field(None, ge=1)
    """Data-parallel ranks. Unset: the world size over tensor x pipeline x context; without a launcher, the smallest
    number that the expert layout allows."""
    distributed_optimizer: bool = True
    """Shard optimizer state and master weights over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum the gradients of a bucket of parameters over the data-parallel ranks while the backward pass of the last
    micro-batch computes those of the next, instead of all after it. Off by default, because no GPU has run it yet."""
    overlap_param_gather: bool = False
    """Collect the updated parameters of the other data-parallel ranks while the next forward pass begins, instead of
    right after the optimizer's step. Needs `distributed_optimizer` and `overlap_grad_reduce`."""
    moe_dispatcher: Literal["alltoall", "flex"] = "alltoall"
    """How tokens travel to the ranks of their experts: by all-to-all collectives, or (flex) by DeepEP's kernels, which
    have to be installed. flex needs a GPU, and tensor x expert above 1."""

    @model_validator(mode="after")
    def gather_overlaps_with_shards(self) -> "ParallelConfig":
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError(
                "parallel.overlap_param_gather = true needs parallel.distributed_optimizer = true (it is "
                f"{str(self.distributed_optimizer).lower()}) and parallel.overlap_grad_reduce = true (it is "
                f"{str(self.overlap_grad_reduce).lower()}); set both, or leave it out"
            )
        return self

    @property
    def model_ranks(self) -> int:
        """Return the number of ranks of one model replica (tensor x pipeline x context)."""
        return self.tensor * self.pipeline * self.context

    def smallest_data(self) -> int:
        """Return the smallest data-parallel size at which expert x expert_tensor divides tensor x context x data."""
        data = 1
        while (self.tensor * self.context * data) % (self.expert * self.expert_tensor):
            data += 1
        return data

    def world_size(self) -> int:
        """Return the number of processes of the layout."""
        return self.model_ranks * (self.data or self.smallest_data())
