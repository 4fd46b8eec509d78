"""This module holds what all processes that this package starts have in common."""

from collections.abc import Mapping

LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
LAUNCHER_VARIABLES |= {"GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"}


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables without those that torchrun set for the rank.

    With them the process would take part in the trainer's own rendezvous.
    """
    return {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
