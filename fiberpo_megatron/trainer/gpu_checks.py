"""This module refuses what cannot work on GPUs, before any process starts."""

import os

import torch

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.engines.libraries import check_nccl

ENGINE_COMMANDS = ("train", "dump", "eval")


def gpus_of(config: Config, here: bool) -> int:
    """Return the GPUs of a machine of the run: those that this process sees or, from a login node (not `here`), those
    of the job's nodes; 0 for a run on CPUs."""
    if not here:
        return config.slurm.gpus_per_node
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_gpus(config: Config, command: str, world_size: int, here: bool) -> None:
    """Raise ConfigError for what cannot work on the run's GPUs; without a GPU nothing is checked.

    `command`: train, sft, dump or eval; `world_size`: training ranks; `here`: the run is on this machine.
    """
    gpus = gpus_of(config, here)
    if not gpus:
        return
    _check_types(config, command, here)
    if here:
        _check_count(config, command, world_size, gpus)
    if here and starts_engines(config, command):
        check_nccl(config)


def starts_engines(config: Config, command: str) -> bool:
    """Return whether the run itself starts SGLang servers on this machine."""
    given = config.rollout.engine.urls or config.storage.replay is not None
    return command in ENGINE_COMMANDS and not given and "RANK" not in os.environ


def _check_types(config: Config, command: str, here: bool) -> None:
    hide = ", or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on the CPU" if here else ""
    if config.model.dtype == "float32":
        raise ConfigError(
            'model.dtype = "float32" on a GPU: Transformer Engine has no fused attention of packed rows in float32, '
            'and SGLang\'s on Hopper takes 16-bit types only; set model.dtype = "bfloat16" '
            f"(examples/demo/train_gpu.toml is a config for one GPU){hide}"
        )
    if command in ENGINE_COMMANDS and config.rollout.engine.dtype == "float32" and not config.rollout.engine.urls:
        raise ConfigError(
            'rollout.engine.dtype = "float32" on a GPU: SGLang\'s attention on Hopper takes 16-bit types only; set '
            f'rollout.engine.dtype = "auto", which is the model\'s type{hide}'
        )


def _check_count(config: Config, command: str, world_size: int, gpus: int) -> None:
    """Refuse more ranks or engines than the machine has GPUs: NCCL takes every GPU once."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    bound = gpus == 1 and "RANK" in os.environ  # SLURM may show each of several ranks a GPU of its own
    if ranks > gpus and not bound:
        raise ConfigError(
            f"[parallel] makes {ranks} training ranks on this machine, which has {gpus} GPU{'s'[: gpus > 1]}; every "
            "rank needs its own GPU: lower parallel.tensor, pipeline, context, expert or data"
        )
    engine = config.rollout.engine
    if not starts_engines(config, command):
        return
    needed = engine.count * engine.tensor + (0 if engine.colocated else ranks)
    if needed > gpus:
        what = f"{engine.count} engine{'s'[: engine.count > 1]} of {engine.tensor} GPU{'s'[: engine.tensor > 1]}"
        beside = "" if engine.colocated else f" beside {ranks} training ranks"
        share = "" if engine.colocated else ", or let them share with rollout.engine.colocated = true"
        raise ConfigError(f"{what}{beside} need {needed} GPUs, this machine has {gpus}; start fewer{share}")
