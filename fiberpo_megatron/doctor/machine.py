"""These checks look at the machine: GPUs (through NVML), shared memory, open files."""

import os
import resource
import shutil
from pathlib import Path

from fiberpo_megatron.doctor.gpu_software import driver
from fiberpo_megatron.doctor.report import Finding
from fiberpo_megatron.telemetry.gpu import GpuMonitor, GpuReading

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = GIB
"""NCCL takes some 10 MiB of it per pair of local ranks; data workers and engines take the rest."""
OPEN_FILES, OPEN_FILES_AT_LEAST = 16384, 1024
"""Many ranks and requests need many sockets; below the second number even a small run ends with "Too many open
files"."""
BUSY_SHARE = 0.1


def gpu_count() -> int:
    """Return the number of GPUs that the driver shows."""
    return len(GpuMonitor().read())


def gpus(monitor: GpuMonitor | None = None) -> list[Finding]:
    """Check the driver and, for every GPU, memory errors, clocks that are held back, and memory that others use."""
    monitor = monitor or GpuMonitor()
    readings = monitor.read()
    if not readings:
        return [Finding("GPU", "pass", "none was found: runs use the CPU platform, which is for tests and demos")]
    found = driver(monitor.driver())
    for reading in readings:
        found += _gpu(reading)
    return found


def _gpu(reading: GpuReading) -> list[Finding]:
    name = f"GPU {reading.index}"
    found = []
    if reading.ecc_uncorrected:
        seen = f"it had {reading.ecc_uncorrected} uncorrected memory errors since the driver was loaded"
        found.append(Finding(name, "fail", seen, "Take the GPU out of the job and have it reset or replaced"))
    held = [reason for reason in reading.throttle_reasons if reason != "power cap"]
    if held:
        found.append(
            Finding(name, "warn", f"clocks are held back: {', '.join(held)}", "Check cooling and power supply")
        )
    used, total = reading.memory_used, reading.memory_total
    if used is not None and total and used > BUSY_SHARE * total:
        seen = f"{used:.1f} of {total:.0f} GiB are in use"
        fix = "Stop the process that nvidia-smi shows on it, unless it is an engine of this job"
        found.append(Finding(name, "warn", seen, fix))
    size = f", {total:.0f} GiB" if total else ""
    return found or [Finding(name, "pass", f"{reading.name}{size}")]


def shared_memory(folder: Path = SHARED_MEMORY, needed: int = SHARED_MEMORY_BYTES) -> list[Finding]:
    """Check that `folder` has `needed` bytes of free shared memory."""
    if not folder.is_dir():
        return [Finding("shared memory", "fail", f"{folder} does not exist", "Mount a tmpfs on it")]
    free = shutil.disk_usage(folder).free
    seen = f"{free / GIB:.2f} GiB are free in {folder}"
    if free >= needed:
        return [Finding("shared memory", "pass", seen)]
    fix = f"Start the container with --shm-size={-(-needed // GIB)}g or more, or --ipc=host"
    return [Finding("shared memory", "warn", seen, fix)]


def open_files() -> list[Finding]:
    """Check the soft limit of open files; the hard limit says whether it can be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return [Finding("open files", "pass", f"limit {soft}")]
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    fix = (
        f"Run `ulimit -n {wanted}` before the start"
        if wanted > soft
        else "Raise LimitNOFILE of the service that starts jobs"
    )
    return [
        Finding("open files", "warn" if soft >= OPEN_FILES_AT_LEAST else "fail", f"limit {soft} (hard {hard})", fix)
    ]


def cores() -> list[Finding]:
    """Return the number of cores that this process may use."""
    return [Finding("CPU", "pass", f"{len(os.sched_getaffinity(0))} cores")]
