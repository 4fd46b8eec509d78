"""RL post-training of MoE language models with FiberPO on Megatron-Core, rollouts by SGLang."""

__version__ = "0.1.0"
