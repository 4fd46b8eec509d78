"""Several layouts one after the other in the same processes: starting processes is what takes the time."""

from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch.distributed as dist
from megatron.core import parallel_state

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout, start_layout


def next_layout(hf_config: Mapping[str, Any], config: Config) -> ParallelLayout:
    """The layout of `config` on the launched ranks; the world of an earlier one is kept, its groups are not."""
    if not dist.is_initialized():
        return start_layout(hf_config, config.parallel, config.run)
    parallel_state.destroy_model_parallel()
    with mock.patch.object(dist, "init_process_group"):
        return start_layout(hf_config, config.parallel, config.run)
