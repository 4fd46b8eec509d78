"""This module imports the heavy modules and prepares the platform, for servers that fork ranks (tests, tools)."""

import megatron.core.distributed
import megatron.core.models.gpt
import megatron.core.optimizer
import megatron.core.pipeline_parallel
import megatron.core.transformer.moe.moe_layer  # noqa: F401
import torch

from fiberpo_megatron.mcore.platform import activate

activate()
torch.set_num_threads(1)  # a forked process must not inherit a thread pool
