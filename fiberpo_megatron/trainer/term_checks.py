"""This module checks, before any process starts, that a run's terms can work with its other settings."""

import json
from dataclasses import asdict
from pathlib import Path

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.mcore.families import Architecture, read_architecture, read_hf_config
from fiberpo_megatron.mcore.weights.files import stored_tensors


def check_reference(config: Config) -> None:
    """Raise ConfigError where the reference of [algorithm.kl] cannot take turns on the device with the policy."""
    kl, model = config.algorithm.kl, config.model
    if kl.coefficient == 0 or kl.servers is not None:
        return
    if kl.reference is not None:
        _check_folder(kl.reference, read_architecture(read_hf_config(model.path, model.family)))


def _check_folder(folder: Path, own: Architecture) -> None:
    setting = f"algorithm.kl.reference = {folder}"
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{setting} is no Hugging Face folder with a config.json and *.safetensors weights (current folder: "
            f"{Path.cwd()}); name one, or leave the setting out for the weights of model.path"
        )
    try:
        theirs = read_architecture(read_hf_config(folder, None))
        stored_tensors(folder)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{setting}: {folder / 'config.json'} is not JSON ({error})") from error
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{setting}: {error}") from error
    ours, others = asdict(own), asdict(theirs)
    differing = [
        f"{name} {others[name]} (model.path: {ours[name]})"
        for name in ours
        if ours[name] != others[name] and name not in ("initializer_range", "max_positions")
    ]
    if differing:
        raise ConfigError(
            f"{setting} is another model than model.path: {', '.join(differing)}; a reference in memory takes turns "
            "with the policy in the same parameters: name a model of the same shape, or serve this one with SGLang "
            "and set algorithm.kl.servers"
        )


def term_advice(config: Config) -> list[str]:
    """Return what in the settings of terms and of sampling is allowed but unwise, one line each, which begins with the
    setting."""
    kl, lines, rollout = config.algorithm.kl, list[str](), config.rollout
    if rollout.top_p < 1.0 or rollout.top_k != -1:
        lines.append(
            f"rollout.top_p = {rollout.top_p:g}, top_k = {rollout.top_k}: responses are drawn from a part of the "
            "distribution, but ratios and log-probs are those of the whole one, so that the gradient is biased towards "
            "likely tokens and nothing corrects it; set rollout.top_p = 1 and rollout.top_k = -1"
        )
    if kl.coefficient > 0 and kl.where == "loss" and kl.estimator == "k1":
        lines.append(
            'algorithm.kl.estimator = "k1": as a loss its gradient is zero on average, so that it adds noise and keeps '
            'the policy near nothing; "unbiased" or "k2" have the gradient of the KL divergence, as has "k1" with '
            'algorithm.kl.where = "reward"'
        )
    if kl.coefficient > 0 and kl.where == "reward" and kl.estimator in ("k2", "k3"):
        lines.append(
            f'algorithm.kl.estimator = "{kl.estimator}" with algorithm.kl.where = "reward": its gradient is not that '
            'of the KL divergence; "k1" has that one in the reward'
        )
    return lines
