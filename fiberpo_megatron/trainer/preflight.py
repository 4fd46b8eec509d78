"""This module checks what can be checked before any process starts: files, folders, contradictory options."""

import json
import os
from pathlib import Path

import torch

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.mcore.families import read_architecture, read_hf_config
from fiberpo_megatron.mcore.parallel.checks import check_layout, check_routers
from fiberpo_megatron.mcore.parallel.dispatcher import check_dispatcher
from fiberpo_megatron.mcore.weights.files import stored_tensors
from fiberpo_megatron.rollout.dump import RolloutDump
from fiberpo_megatron.sources.stored import DUMP, dump_of
from fiberpo_megatron.trainer.batch import SUPPLIED_KEYS
from fiberpo_megatron.trainer.fp8 import missing_for_fp8
from fiberpo_megatron.trainer.gpu_checks import check_gpus
from fiberpo_megatron.trainer.plugin_checks import (
    advantage_config,
    advice,
    check_plugins,
    make_advantage,
    make_objective,
    with_recorded_recipe,
)
from fiberpo_megatron.trainer.term_checks import check_reference, term_advice
from fiberpo_megatron.user_warnings import on_console


def preflight(config: Config, command: str, resume: bool, world_size: int, here: bool = True) -> None:
    """Raises ConfigError naming the setting, the value seen and the fix. `command`: train, sft, dump or eval;
    `world_size`: training ranks that run or are about to be started; `here`: on this machine, not from a login node."""
    config = with_recorded_recipe(config, resume)
    _check_model(config, command)
    _check_layout(config, world_size, here)
    check_gpus(config, command, world_size, here)
    if here:
        _check_fp8(config)
    check_folder(config, command, resume)
    _check_rollouts(config, command, resume)
    if command == "sft" and config.algorithm.routing_replay != "none":
        raise ConfigError(
            f'algorithm.routing_replay = "{config.algorithm.routing_replay}": a supervised step has no recorded '
            'routing to replay; set it to "none"'
        )
    _check_colocated(config)
    if command in ("train", "dump", "eval"):
        _check_routing(config)
    if command in ("train", "dump"):
        _check_scoring(config)
    if command == "train":
        _check_advantages(config)
        _check_keys(config)
        check_reference(config)
    check_plugins(config, resume, environments=here)
    for line in (*advice(config), *term_advice(config), *_rollout_advice(config)) if command == "train" else ():
        on_console(line)


def _rollout_advice(config: Config) -> list[str]:
    rollout = config.rollout
    if rollout.staleness < 2 or rollout.partial != "drain":
        return []
    return [
        f'rollout.staleness = {rollout.staleness}: with rollout.partial = "drain" every publication waits for all '
        "trajectories that may run, so that more than 1 makes tokens older and nothing faster; set it to 1, or "
        'rollout.partial to "segment"'
    ]


def _check_colocated(config: Config) -> None:
    if config.rollout.engine.colocated and config.weight_sync.method.use == "distributed" and torch.cuda.is_available():
        raise ConfigError(
            'weight_sync.method = "distributed" needs different GPUs for rank 0 and the engines (NCCL), but '
            'rollout.engine.colocated = true; set weight_sync.method = "ipc"'
        )


def _check_model(config: Config, command: str) -> None:
    model = config.model.path
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"model.path = {model}: there is no {model / 'config.json'} (current folder: {Path.cwd()}); name a "
            "Hugging Face folder; if a warm-up is to write it, run `fiberpo sft` on its config first"
        )
    if not config.model.random_init and not any(model.glob("*.safetensors")):
        raise ConfigError(
            f"model.path = {model} has no *.safetensors weights; name a folder that has, or set "
            "model.random_init = true to start from fresh weights"
        )
    try:
        stored_tensors(model)  # reads the headers: a shard that is missing or cut off is found before engines start
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"model.path: {error}") from error
    if command in ("train", "dump") and config.model.random_init:
        raise ConfigError(
            "model.random_init = true: reinforcement learning needs a model that is sometimes right; warm it up with "
            "`fiberpo sft` and set model.path to the folder that it writes"
        )


def _check_layout(config: Config, world_size: int, here: bool) -> None:
    path = config.model.path / "config.json"
    try:
        hf_config = read_hf_config(config.model.path, config.model.family)
        check_layout(hf_config, config.parallel, world_size)
        check_routers(read_architecture(hf_config), config.model, config.parallel)
        check_dispatcher(read_architecture(hf_config), config.parallel, here)
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.path: {path} is not JSON ({error})") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_fp8(config: Config) -> None:
    model = config.model
    missing = missing_for_fp8(model.fp8_recipe) if model.fp8 != "none" else None
    if missing:
        raise ConfigError(f'model.fp8 = "{model.fp8}": {missing}; or set model.fp8 = "none"')


def check_folder(config: Config, command: str, resume: bool) -> None:
    """Raise ConfigError if the run folder holds another run, or cannot be made or written."""
    folder = config.run.folder
    metrics = folder / "metrics.jsonl"
    if command in ("train", "sft") and not resume and metrics.exists():
        raise ConfigError(
            f"run.folder = {folder} already holds a run ({metrics}); continue it with --resume, or choose another "
            "folder with --run.folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.folder = {folder} cannot be made: {error}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"run.folder = {folder} is not writable; choose another with --run.folder")


def _check_rollouts(config: Config, command: str, resume: bool) -> None:
    rollout = config.rollout
    if rollout.staleness and rollout.partial == "retract" and config.needs_rollout_routing:
        raise ConfigError(
            'rollout.partial = "retract" with the engines\' expert routing (rollout.return_routing, or "rollout" in '
            "algorithm.routing_replay or expert_routing): an engine that goes on under new weights reads the earlier "
            'tokens again, and routes them anew; set rollout.partial to "segment" or "drain"'
        )
    replay, own = config.storage.replay, config.run.folder / DUMP
    if replay is not None and command != "train":
        raise ConfigError(f"storage.replay = {replay}: `fiberpo {command}` replays nothing; leave it out")
    if replay is not None and not dump_of(replay).steps():
        raise ConfigError(
            f"storage.replay = {replay}: there are no rollouts (step_*.npz); name a run folder or a dump written by "
            "`fiberpo dump` or a run with --storage.dump true"
        )
    if (command == "dump" or config.storage.dump) and not resume and RolloutDump(own).steps():
        raise ConfigError(
            f"run.folder = {config.run.folder} already holds rollouts ({own}); continue with --resume, or choose "
            "another folder with --run.folder"
        )


def _check_scoring(config: Config) -> None:
    """Refuse sampling under which a server's log-probs would not be those of the distribution that was sampled from."""
    rollout = config.rollout
    for section, _ in config.scoring_servers.values():
        if rollout.temperature != 1.0:
            raise ConfigError(
                f"rollout.temperature = {rollout.temperature:g}: SGLang scores the trajectories of {section} at "
                "temperature 1, so that their log-probs and the policy's would be of different distributions; set "
                f"rollout.temperature = 1, or unset {section}"
            )
    if config.algorithm.distillation.teacher is not None and (rollout.top_p != 1.0 or rollout.top_k != -1):
        raise ConfigError(
            f"rollout.top_p = {rollout.top_p:g}, top_k = {rollout.top_k}: algorithm.distillation estimates a "
            "divergence from samples of the whole next-token distribution; set top_p = 1 and top_k = -1"
        )


def _check_advantages(config: Config) -> None:
    distillation = config.algorithm.distillation
    if distillation.teacher is not None and distillation.reward_weight == 0:
        return  # nothing is made of the comparison of rewards
    count, objective = config.batch.samples_per_prompt, make_objective(config)
    estimator, use = make_advantage(config, objective), advantage_config(config, objective).use
    least = getattr(estimator, "least_samples", 1)
    if count < least:
        std = getattr(estimator, "normalise_std", None)
        and_std = "" if std is None else f", normalise_std = {str(std).lower()}"
        raise ConfigError(
            f"batch.samples_per_prompt = {count} leaves nothing to compare a trajectory with (algorithm.advantage = "
            f'"{use}"{and_std}); raise it to {least} or more, or set algorithm.advantage = "none" and '
            "algorithm.normalise_std = false"
        )


def _check_keys(config: Config) -> None:
    """Refuse an objective whose levels need experts that the model does not have."""
    architecture = read_architecture(read_hf_config(config.model.path, config.model.family))
    try:
        make_objective(config).check_keys((*SUPPLIED_KEYS, *(("expert",) if architecture.experts else ())))
    except ValueError as error:
        raise ConfigError(f"[algorithm]: {error}") from error


def _check_routing(config: Config) -> None:
    """Refuse models whose routing the engine cannot return in a usable form."""
    if not config.needs_rollout_routing:
        return
    if config.rollout.engine.router_url is not None:
        raise ConfigError(
            "routing was asked of the engine, but rollout.engine.router_url is set, and sglang-router does not pass on "
            "that requests ask for it; remove router_url, or set rollout.return_routing = false and "
            'algorithm.expert_routing and routing_replay to anything but "rollout"'
        )
    architecture = read_architecture(read_hf_config(config.model.path, config.model.family))
    if architecture.experts is None:
        raise ConfigError(f"routing was asked for, but a {architecture.model_type} model has no experts")
    dense = list(architecture.experts.dense_layers)
    if dense:
        raise ConfigError(
            f"routing was asked of the engine, but layers {dense} of the model have no experts, and nothing marks them "
            "in what an engine reports; set rollout.return_routing = false and algorithm.expert_routing and "
            'routing_replay to anything but "rollout"'
        )
