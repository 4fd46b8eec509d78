"""This module holds what all processes that this package starts have in common."""

import signal
from collections.abc import Mapping, MutableMapping

LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
LAUNCHER_VARIABLES |= {"GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"}

GPU_VARIABLES = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
"""Variables of ranks and engines that decide how NCCL and CUDA work, unless the user has set them. With one connection
the kernels of all streams start in the order of their launches, so that Megatron's communication overlaps with its
computation (SGLang overwrites this one with 8 in its own processes). SGLang sets the two NCCL variables to 0 in its
processes as well, and two processes that share a communicator must agree on them."""


def set_gpu_variables(environment: MutableMapping[str, str]) -> None:
    """Set `GPU_VARIABLES` where they have no value yet; it must run before CUDA is first used."""
    for name, value in GPU_VARIABLES.items():
        environment.setdefault(name, value)


def exit_text(code: int) -> str:
    """Return an exit code of a process in words: "exit code 3" or, when it is negative, "signal SIGKILL".

    Real-time signals have no name of their own, so that their number stands there: "signal 40".
    """
    if code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name if -code in set(signal.Signals) else -code}"


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables without those that torchrun set for the rank.

    With them the process would take part in the trainer's own rendezvous.
    """
    return {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
