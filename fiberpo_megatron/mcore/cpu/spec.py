"""This is the transformer layer of the CPU platform: Megatron's local modules with this package's norm and core
attention."""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from fiberpo_megatron.mcore.cpu.attention import PackedAttention
from fiberpo_megatron.mcore.cpu.latent import PackedLatentAttention
from fiberpo_megatron.mcore.cpu.norm import RmsNorm


class CpuSpecProvider(LocalSpecProvider):
    """Returns Megatron's local modules, except for those that do not support packed rows or sequence parallelism."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Return RMSNorm with the sequence-parallel mark."""
        return RmsNorm

    def core_attention(self) -> type:
        """Return attention over packed rows, with grouped queries and context parallelism."""
        return PackedAttention


def layer_spec(*, num_experts: int | None, qk_layernorm: bool, latent: bool) -> Any:
    """Return one pre-norm layer, dense when `num_experts` is None; its keys in checkpoints equal the GPU layer's."""
    backend = CpuSpecProvider()
    norm = backend.layer_norm(rms_norm=True)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_latent_attention(backend) if latent else _attention(backend, qk_layernorm),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(backend=backend, num_experts=num_experts, moe_grouped_gemm=False),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_checkpoint_keys(num_experts, latent),
        ),
    )


def _attention(backend: CpuSpecProvider, qk_layernorm: bool) -> ModuleSpec:
    qk_norm = backend.layer_norm(rms_norm=True, for_qk=True) if qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _latent_attention(backend: CpuSpecProvider) -> ModuleSpec:
    norm = backend.layer_norm(rms_norm=True, for_qk=True)
    return ModuleSpec(
        module=PackedLatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=backend.column_parallel_linear(),
            # Every tensor-parallel rank holds the whole weight; its gradient is summed over their shares of the row.
            # Megatron also takes a column-parallel layer here, but then the gradients are wrong under tensor
            # parallelism.
            linear_q_down_proj=Linear,
            linear_q_up_proj=backend.column_parallel_linear(),
            linear_kv_down_proj=Linear,
            linear_kv_up_proj=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm,
            kv_layernorm=norm,
        ),
    )


def _checkpoint_keys(num_experts: int | None, latent: bool) -> dict[str, str]:
    """Return the names of norms in checkpoints: those of Transformer Engine, which fuses them into the next linear
    layer."""
    if latent:
        keys = {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        }
    else:
        keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if num_experts is None:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return keys
