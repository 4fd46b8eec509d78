"""This module starts ranks that measure, then an engine, and makes a calibration of what they say.

Under torchrun or srun the ranks are those of the launcher, and rank 0 goes on to the engine alone.
"""

import json
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import gcd
from pathlib import Path
from typing import Any

import torch

from fiberpo_megatron.calibration import fit
from fiberpo_megatron.calibration.controller import time_scores, time_trajectories
from fiberpo_megatron.calibration.decoding import EngineTimes, time_engine
from fiberpo_megatron.calibration.ranks import Job, RankTimes, measure
from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.engines.command import CPU_KV_TOKENS, interpreter, sglang_version
from fiberpo_megatron.launch.local import launch_ranks
from fiberpo_megatron.mcore.families import read_hf_config
from fiberpo_megatron.planning.calibration import Calibration
from fiberpo_megatron.planning.hardware import Assumptions

CPU_RANKS = 2
PUBLICATION_CALLS = 7
"""Control calls that an engine gets in a publication: pause, begin, a bucket, end, the version, resume, and a flush."""
SHORTEST_ROW = 256
CHECKPOINT = "calibration_checkpoint"
"""Folder that is written and removed."""
PACKAGES = ("fiberpo-megatron", "torch", "megatron-core", "sglang")
DEFAULT_MODEL: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "eos_token_id": 1,
}
"""config.json of the model that is timed where no config names one; SIZES complete it."""
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "vocab_size": 256,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_experts": 8,
        "torch_dtype": "float32",
    },
    "cuda": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "torch_dtype": "bfloat16",
    },
}


def calibrate(config: Config | None, say: Callable[[str], None]) -> Calibration | None:
    """Measure this machine (or, under a launcher, its ranks' machines), and return what a plan needs.

    `config` says which model, layout and engine are timed; without one a small mixture of experts is. Ranks other than
    0 get None. Raises RuntimeError when the ranks or the engine fail.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="fiberpo-calibrate-") as name:
        folder = Path(name)
        chosen = config or default_config(folder, kind)
        ranks = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else ranks_here(chosen, config is not None)
        chosen = for_ranks(chosen, ranks)
        hf_config = read_hf_config(chosen.model.path, chosen.model.family)
        length = min(chosen.data.max_prompt_tokens, 256) + chosen.rollout.max_response_tokens // 2
        length = max(8, min(length, int(hf_config.get("max_position_embeddings", length)) // 2))
        row = max(SHORTEST_ROW, min(chosen.batch.micro_batch_tokens, 16 * SHORTEST_ROW if kind == "cpu" else 10**9))
        shared = folder if "RANK" not in os.environ else chosen.run.folder  # that all ranks' machines see
        shared.mkdir(parents=True, exist_ok=True)
        job = Job(chosen.model_dump_json(), [row // 8, row // 2, row], length, str(shared / CHECKPOINT))
        say(f"Timing products, memory, links and passes on {ranks} ranks ...")
        times = ranks_times(job, ranks, folder, chosen.run.threads_per_rank)
        if os.environ.get("RANK", "0") != "0":
            return None
        engine = None
        if sglang_version(interpreter(chosen.rollout.engine)) is not None:
            say("Timing an engine ...")
            engine = engine_times(chosen, hf_config, folder)
        else:
            say("SGLang is not installed: decoding is not timed, and the planner's constants for it stay")
        scores = time_scores(chosen.environments, folder / "environments")
        trajectory = time_trajectories(min(64, length // 2 + 1), max(1, length // 2))
        return assemble(chosen, hf_config, kind, times, engine, scores, trajectory)


def default_config(folder: Path, kind: str) -> Config:
    """Write a model folder of config.json alone, and return a config for it."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**DEFAULT_MODEL, **SIZES[kind]}))
    dtype = SIZES[kind]["torch_dtype"]
    return Config.model_validate({"model": {"path": model, "dtype": dtype, "random_init": True}})


def ranks_here(config: Config, given: bool) -> int:
    """Return how many ranks to start on this machine: one for each GPU, or those of the config's layout on a CPU."""
    gpus = torch.cuda.device_count()
    if gpus:
        return gpus
    return config.parallel.world_size() if given else CPU_RANKS


def for_ranks(config: Config, ranks: int) -> Config:
    """Return the config with a layout for so many ranks: without a pipeline, and each size no larger than fits."""
    wanted = config.parallel
    tensor = gcd(wanted.tensor, ranks)
    context = gcd(wanted.context, ranks // tensor)
    expert_tensor = gcd(wanted.expert_tensor, ranks)
    expert = gcd(wanted.expert if wanted.expert > 1 else ranks, ranks // expert_tensor)
    sizes = {"tensor": tensor, "context": context, "expert": expert, "expert_tensor": expert_tensor}
    sizes |= {"pipeline": 1, "virtual_pipeline": 1, "data": ranks // (tensor * context)}
    return config.model_copy(update={"parallel": wanted.model_copy(update=sizes)})


def ranks_times(job: Job, ranks: int, folder: Path, threads: int) -> RankTimes | None:
    """Return what the launcher's ranks measured, or ranks that are started here; only rank 0 gets a result."""
    if "RANK" in os.environ:
        return measure(job)
    written, out = folder / "job.json", folder / "ranks.json"
    written.write_text(json.dumps(asdict(job)))
    words = ["-m", "fiberpo_megatron.calibration.ranks", str(written), str(out)]
    code = launch_ranks(words, ranks, folder / "logs", {"OMP_NUM_THREADS": str(threads)})
    if code or not out.is_file():
        raise RuntimeError(f"the {ranks} ranks that measure ended with exit code {code}; the message above says why")
    return RankTimes.from_json(json.loads(out.read_text()))


def engine_times(config: Config, hf_config: dict[str, Any], folder: Path) -> EngineTimes:
    """Time one engine with the config's settings, on a cache of the size that a run has."""
    settings = config.rollout.engine.model_copy(update={"count": 1, "max_running_requests": config.running_requests})
    longest = min(4096, int(hf_config.get("max_position_embeddings", 4096)))
    cache = settings.max_total_tokens or (10**6 if torch.cuda.is_available() else CPU_KV_TOKENS)
    return time_engine(
        settings,
        config.model.path,
        folder / "engine",
        dtype=config.model.dtype,
        samples=config.batch.samples_per_prompt,
        vocabulary=int(hf_config["vocab_size"]),
        cache=cache,
        longest=longest,
    )


def assemble(
    config: Config,
    hf_config: dict[str, Any],
    kind: str,
    times: RankTimes | None,
    engine: EngineTimes | None,
    scores: list[float],
    trajectory: list[float],
) -> Calibration:
    """Return the calibration that the timings make."""
    if times is None:
        raise ConfigError("rank 0 measured nothing; start the calibration again")
    device = torch.cuda.get_device_name() if kind == "cuda" else "cpu"
    machine = {
        "device": device,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "ranks": times.ranks,
        "layout": config.parallel.model_dump(),
        "model": {
            key: value for key, value in hf_config.items() if isinstance(value, (int, str)) and value is not True
        },
        "threads_per_rank": config.run.threads_per_rank,
    }
    constants = fit.device_constants(times, memory_gb(kind))
    made = datetime.now(UTC).isoformat(timespec="seconds")
    known = Calibration(machine, versions(), made, constants, {})
    gpu, assumptions = known.gpu(config.model.dtype), known.assumptions(Assumptions())
    constants = {**constants, **fit.trainer_constants(times, config, hf_config, gpu, assumptions)}
    if engine is not None:
        known = Calibration(machine, versions(), made, constants, {})
        served = known.gpu(config.model.dtype), known.assumptions(Assumptions())
        constants |= fit.engine_constants(engine, scores, config, hf_config, *served)
        constants = fit.with_calls(constants, engine.call, PUBLICATION_CALLS)
    constants["assumptions.trajectory_ms"] = fit.spread([1e3 * seconds for seconds in trajectory], "ms")
    return Calibration(machine, versions(), made, constants, fit.measurements(times, engine, scores, trajectory))


def memory_gb(kind: str) -> float:
    """Return the memory of the device, in 10^9 bytes."""
    if kind == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def versions() -> dict[str, str]:
    """Return the versions of the packages whose speed was measured."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
