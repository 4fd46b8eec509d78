"""These checks look at the place for checkpoints: free space, permission to write, speed."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from fiberpo_megatron.config import Config
from fiberpo_megatron.doctor.report import Finding

MIB, GIB = 2**20, 2**30
PROBE_BYTES = 64 * MIB
SLOW_BYTES_PER_S = 100e6
LOW_BYTES = 5 * GIB


def existing(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that exists: a run makes the rest."""
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def free_disk(folder: Path, needed: int = LOW_BYTES) -> list[Finding]:
    """Check that the disk of `folder` has `needed` bytes free."""
    free = shutil.disk_usage(existing(folder)).free
    seen = f"{free / GIB:.1f} GiB are free for {folder}"
    if free >= needed:
        return [Finding("disk", "pass", seen)]
    fix = f"{needed / GIB:.1f} GiB are needed: free some, set run.folder to a larger disk, or lower checkpoint.keep"
    return [Finding("disk", "fail", seen, fix)]


def checkpoint_bytes(config: Config) -> int:
    """Return the bytes of the kept checkpoints and of the one being written: parameters, float32 masters and the
    optimizer's state."""
    from math import prod

    from fiberpo_megatron.mcore.families import read_architecture, read_hf_config
    from fiberpo_megatron.mcore.optimizers import make_optimizer
    from fiberpo_megatron.mcore.settings import ParallelConfig
    from fiberpo_megatron.planning.parameters import chunk_weights
    from fiberpo_megatron.planning.states import DTYPE_BYTES

    architecture = read_architecture(read_hf_config(config.model.path, config.model.family))
    width = DTYPE_BYTES[config.model.dtype]
    copies = width + (0 if width == 4 else 4)
    optimizer = make_optimizer(config.optimizer)
    shapes = [weight.shape for weight in chunk_weights(architecture, ParallelConfig(), 0, 0)]
    one = sum(copies * prod(shape) + optimizer.state_bytes(shape) for shape in shapes)
    return one * (config.checkpoint.keep + 1)


def write_speed(folder: Path, size: int = PROBE_BYTES) -> list[Finding]:
    """Measure the bytes per second of one process that writes a file and waits until it is on the disk."""
    where = existing(folder)
    block = os.urandom(MIB)  # a file system that compresses must not look fast
    try:
        with tempfile.TemporaryFile(dir=where, prefix=".fiberpo-doctor-") as file:
            began = time.perf_counter()
            for _ in range(max(1, size // MIB)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = size / (time.perf_counter() - began)
    except OSError as error:
        seen = f"{where} cannot be written: {error.strerror}"
        return [
            Finding("write speed", "fail", seen, "Set run.folder to a folder that you may write to and that has room")
        ]
    seen = f"{speed / 1e6:.0f} MB/s at {where}"
    if speed >= SLOW_BYTES_PER_S:
        return [Finding("write speed", "pass", seen)]
    fix = "Checkpoints will hold the run up: use a faster file system, or raise checkpoint.every_steps"
    return [Finding("write speed", "warn", seen, fix)]
