"""This module decides which checks a run of the doctor makes, and in which order."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fiberpo_megatron.config import Config
from fiberpo_megatron.doctor import attention, engines, gpu_software, inputs, machine, software, storage
from fiberpo_megatron.doctor.report import Check, Finding, examine
from fiberpo_megatron.engines.settings import EngineConfig

QUICK_S, CHECK_S = 2.0, 30.0
LOCAL_RANKS = 2
MEASURED = ("all-reduce", "links", "clocks")
"""Checks that a job reports even when they pass, so that a later start can be compared."""


def before_a_run(config: Config) -> list[Finding]:
    """Run the quick checks for problems that a start would not report clearly; return the findings that are not a pass.

    Under torchrun or srun every rank calls this. The ranks then also find out which ranks are missing, slow or late
    (`ranks.meet`), and rank 0 gets the findings of every machine; measurements are included even if they pass.
    """
    met: list[Finding] = []
    if "RANK" in os.environ:
        from fiberpo_megatron.doctor import ranks

        met = ranks.meet(config.run.distributed_timeout_s)
        if os.environ["RANK"] != "0":
            return met
    checks: list[tuple[str, Check]] = [*_software(config), ("disk", lambda: storage.free_disk(config.run.folder))]
    if "RANK" not in os.environ:  # the ranks' machines have reported these
        checks += [("GPU", machine.gpus), ("shared memory", machine.shared_memory), ("open files", machine.open_files)]
    found = [finding for name, check in checks for finding in examine(name, check, QUICK_S)]
    return [finding for finding in found + met if finding.status != "pass" or finding.check in MEASURED]


def full(config: Config | None) -> list[Finding]:
    """Run all checks; under torchrun or srun every rank calls this, and rank 0 gets the findings."""
    talked = _ranks()
    if os.environ.get("RANK", "0") != "0":
        return []
    checks = [*_software(config), *(_of_config(config) if config else [])]
    if machine.gpu_count():
        checks.append(("GPU software", lambda: gpu_software.every(config)))
    found = [finding for name, check in checks for finding in examine(name, check, CHECK_S)]
    if machine.gpu_count():
        found += examine("attention", lambda: attention.check(config), attention.DEADLINE_S + CHECK_S)
    return found + talked


def _software(config: Config | None) -> list[tuple[str, Check]]:
    gpu, engine = bool(machine.gpu_count()), config.rollout.engine if config else EngineConfig()
    return [("Python", software.python_version), ("packages", lambda: software.packages(gpu, engine))]


def _of_config(config: Config) -> Iterator[tuple[str, Check]]:
    folder = config.run.folder / "checkpoints"
    world = int(os.environ.get("WORLD_SIZE", config.parallel.world_size()))
    yield "model files", lambda: inputs.model_files(config)
    yield "tokenizer", lambda: inputs.tokenizer(config)
    yield "layout", lambda: inputs.layout(config, world)
    yield "environments", lambda: inputs.environments(config)
    if (config.model.path / "config.json").is_file():
        yield "disk", lambda: storage.free_disk(folder, storage.checkpoint_bytes(config))
    yield "write speed", lambda: storage.write_speed(folder)
    yield "ports", lambda: engines.ports(config)
    yield "engines", lambda: engines.servers(config)


def _ranks() -> list[Finding]:
    """Check communication between the launcher's ranks, or between a few ranks that are started here for this
    purpose."""
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
    """Return one rank per GPU, or LOCAL_RANKS without a GPU."""
    return machine.gpu_count() or LOCAL_RANKS
