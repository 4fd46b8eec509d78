"""This module reads what NVIDIA's management library says about this machine's GPUs; without a GPU it reads nothing."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

GIB = 2**30

THROTTLE_REASONS = {
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "temperature (software)",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "temperature (hardware)",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
}
"""NVML constants of reasons that reduce speed, and how they are shown."""


@dataclass(frozen=True)
class GpuReading:
    """Holds the state of one GPU at one moment; a value is None if the GPU does not report it."""

    index: int
    """NVML's number of the GPU, whatever CUDA_VISIBLE_DEVICES says."""
    name: str
    utilisation: float | None
    """% of the last sampling period (up to 1 s) in which a kernel ran."""
    memory_used: float | None
    """GiB, all processes."""
    memory_total: float | None
    """GiB"""
    power: float | None
    """W"""
    temperature: float | None
    """°C"""
    ecc_uncorrected: int | None
    """Uncorrected memory errors since the driver was loaded."""
    throttle_reasons: tuple[str, ...]
    """Why the clocks are held back right now."""


class GpuMonitor:
    """Reads all GPUs of the machine; without nvidia-ml-py, a driver or a GPU it returns no readings."""

    def __init__(self, nvml: Any | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Load NVML, or take `nvml` in place of the pynvml module (for tests)."""
        self._clock = clock
        self._energy: dict[int, tuple[float, int | None, int | None]] = {}
        """By GPU: time, energy counter (mJ) and power (mW) at the last call of `energy`."""
        self._nvml = nvml if nvml is not None else _import_nvml()
        self._handles: list[Any] = []
        if self._nvml is None:
            return
        try:
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except self._nvml.NVMLError:  # no driver, or no GPU behind it
            self._handles = []

    def read(self) -> list[GpuReading]:
        """Return one reading per GPU."""
        return [self._reading(index, handle) for index, handle in enumerate(self._handles)]

    def energy(self) -> float | None:
        """Return the joules that all GPUs of the machine took since the last call; None without a GPU that says.

        A GPU's own counter says it exactly. Without one (before Volta, or a part of a GPU) it is the mean of the power
        at both calls, times the time between them. The first call returns 0.
        """
        found = [self._joules(index, handle) for index, handle in enumerate(self._handles)]
        known = [joules for joules in found if joules is not None]
        return sum(known) if known else None

    def _joules(self, index: int, handle: Any) -> float | None:
        counter = self._ask("nvmlDeviceGetTotalEnergyConsumption", handle)
        milliwatts = None if counter is not None else self._ask("nvmlDeviceGetPowerUsage", handle)
        if counter is None and milliwatts is None:
            return None
        now, before = (self._clock(), counter, milliwatts), self._energy.get(index)
        self._energy[index] = now
        if before is None:
            return 0.0
        if counter is not None and before[1] is not None:
            return max(0.0, (counter - before[1]) / 1000)  # the counter begins at 0 when the driver is loaded again
        if milliwatts is not None and before[2] is not None:
            return float((milliwatts + before[2]) / 2000 * (now[0] - before[0]))
        return 0.0

    def driver(self) -> str:
        """Return the version of the driver, or "unknown" without one."""
        version = self._ask("nvmlSystemGetDriverVersion") if self._handles else None
        return version.decode() if isinstance(version, bytes) else str(version or "unknown")

    def _reading(self, index: int, handle: Any) -> GpuReading:
        nvml = self._nvml
        assert nvml is not None
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        utilisation = self._ask("nvmlDeviceGetUtilizationRates", handle)
        milliwatts = self._ask("nvmlDeviceGetPowerUsage", handle)
        name = self._ask("nvmlDeviceGetName", handle)
        return GpuReading(
            index=index,
            name=name.decode() if isinstance(name, bytes) else str(name),
            utilisation=None if utilisation is None else float(utilisation.gpu),
            memory_used=None if memory is None else memory.used / GIB,
            memory_total=None if memory is None else memory.total / GIB,
            power=None if milliwatts is None else milliwatts / 1000,
            temperature=self._ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
            ecc_uncorrected=self._ask(
                "nvmlDeviceGetTotalEccErrors",
                handle,
                nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                nvml.NVML_VOLATILE_ECC,
            ),
            throttle_reasons=self._throttle_reasons(handle),
        )

    def _throttle_reasons(self, handle: Any) -> tuple[str, ...]:
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons", handle) or 0
        return tuple(text for name, text in THROTTLE_REASONS.items() if bits & getattr(self._nvml, name))

    def _ask(self, function: str, *arguments: Any) -> Any:
        """Return the library's answer, or None if this GPU or driver does not support the question."""
        assert self._nvml is not None
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError:
            return None


def gpu_metrics(readings: Sequence[GpuReading]) -> dict[str, float]:
    """Return readings as flat metrics gpu/<index>/<what>; `throttled` is 1 while the clocks are held back."""
    metrics: dict[str, float] = {}
    for reading in readings:
        head = f"gpu/{reading.index}"
        for what in ("utilisation", "memory_used", "memory_total", "power", "temperature", "ecc_uncorrected"):
            value = getattr(reading, what)
            if value is not None:
                metrics[f"{head}/{what}"] = float(value)
        metrics[f"{head}/throttled"] = float(bool(reading.throttle_reasons))
    return metrics


def _import_nvml() -> Any | None:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml
