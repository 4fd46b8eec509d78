"""This module compares the torch and NCCL of the engines' own interpreter with those of this process."""

import sys

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.engines.command import interpreter, torch_libraries


def check_nccl(config: Config) -> None:
    """Refuse two versions of NCCL, which cannot share the communicator by which weights are sent.

    Call it on the machine that starts the engines, for a run on GPUs. Servers whose addresses are given say nothing of
    their libraries and are not checked. Raises ConfigError with both versions, or when an interpreter cannot import
    torch.
    """
    if config.weight_sync.method.use != "distributed" or config.rollout.engine.urls:
        return
    python = interpreter(config.rollout.engine)
    if python == sys.executable:
        return
    try:
        ours, theirs = torch_libraries(sys.executable), torch_libraries(python)
    except RuntimeError as error:
        raise ConfigError(f"rollout.engine.python: {error}; install torch in it, or name another one") from error
    if ours.nccl != theirs.nccl:
        raise ConfigError(
            f'weight_sync.method = "distributed": the trainer has NCCL {ours.nccl} (torch {ours.torch}), the engines\' '
            f"{python} has NCCL {theirs.nccl} (torch {theirs.torch}), and one communicator takes one version; install "
            "the same version in both, let both load one libnccl.so.2 through LD_LIBRARY_PATH, or set "
            'weight_sync.method = "disk"'
        )
