"""Which checks a run of the doctor makes, in order."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fiberpo_megatron.config import Config
from fiberpo_megatron.doctor import engines, inputs, machine, software, storage
from fiberpo_megatron.doctor.report import Check, Finding, examine
from fiberpo_megatron.engines.settings import EngineConfig

QUICK_S, CHECK_S = 2.0, 30.0
LOCAL_RANKS = 2
MEASURED = ("all-reduce", "links", "clocks")
"""Checks that a job tells even when they pass: a later start can be compared."""


def before_a_run(config: Config) -> list[Finding]:
    """What costs a moment and nothing at the start finds by itself: findings that are not a pass.

    Ranks of torchrun or srun all call it: they also find out who is missing, slow or late (`ranks.meet`), and rank 0
    gets the findings of every machine, the measured ones even if they pass.
    """
    checks: list[tuple[str, Check]] = [
        *_software(config),
        ("disk", lambda: storage.free_disk(config.run.folder)),
        ("GPU", machine.gpus),
        ("shared memory", machine.shared_memory),
        ("open files", machine.open_files),
    ]
    met: list[Finding] = []
    if "RANK" in os.environ:
        from fiberpo_megatron.doctor import ranks

        met = ranks.meet(config.run.distributed_timeout_s)
        checks = checks[:-3] if os.environ["RANK"] == "0" else []  # the machines told theirs
    found = [finding for name, check in checks for finding in examine(name, check, QUICK_S)]
    return [finding for finding in found + met if finding.status != "pass" or finding.check in MEASURED]


def full(config: Config | None) -> list[Finding]:
    """Everything; under torchrun or srun every rank calls it, and rank 0 gets the findings."""
    talked = _ranks()
    if os.environ.get("RANK", "0") != "0":
        return []
    checks = [*_software(config), *(_of_config(config) if config else [])]
    return [finding for name, check in checks for finding in examine(name, check, CHECK_S)] + talked


def _software(config: Config | None) -> list[tuple[str, Check]]:
    gpu, engine = bool(machine.gpu_count()), config.rollout.engine if config else EngineConfig()
    return [("Python", software.python_version), ("packages", lambda: software.packages(gpu, engine))]


def _of_config(config: Config) -> Iterator[tuple[str, Check]]:
    folder = config.run.folder / "checkpoints"
    world = int(os.environ.get("WORLD_SIZE", config.parallel.world_size()))
    yield "model files", lambda: inputs.model_files(config)
    yield "tokenizer", lambda: inputs.tokenizer(config)
    yield "layout", lambda: inputs.layout(config, world)
    yield "prompts", lambda: inputs.task_files(config)
    if (config.model.path / "config.json").is_file():
        yield "disk", lambda: storage.free_disk(folder, storage.checkpoint_bytes(config))
    yield "write speed", lambda: storage.write_speed(folder)
    yield "ports", lambda: engines.ports(config)
    yield "engines", lambda: engines.servers(config)


def _ranks() -> list[Finding]:
    """The launcher's ranks, or as many of our own as show that ranks can talk on this machine."""
    from fiberpo_megatron.doctor import ranks

    if "RANK" in os.environ:
        return ranks.meet()
    from fiberpo_megatron.launch.local import launch_ranks

    with tempfile.TemporaryDirectory(prefix="fiberpo-doctor-") as folder:
        out = Path(folder) / "findings.json"
        words = ["-m", "fiberpo_megatron.doctor.ranks", str(out)]
        code = launch_ranks(words, _local_ranks(), Path(folder) / "logs", {"OMP_NUM_THREADS": "1"})
        if code == 0 and out.is_file():
            return [Finding(**values) for values in json.loads(out.read_text())]
        seen = f"ranks on this machine cannot talk to each other (exit code {code}, message above)"
        return [*ranks.machine_findings(), Finding("ranks", "fail", seen, "Check the loopback interface and NCCL")]


def _local_ranks() -> int:
    """A rank for every GPU; two without, or the one there is."""
    return machine.gpu_count() or LOCAL_RANKS
