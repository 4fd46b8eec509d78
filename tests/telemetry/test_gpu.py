from types import SimpleNamespace
from typing import Any

import pytest

from fiberpo_megatron.telemetry.gpu import GIB, GpuMonitor, gpu_metrics


class NvmlError(Exception):
    pass


class FakeNvml:
    """Two GPUs; the second reports only its name and memory."""

    NVMLError = NvmlError
    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    nvmlClocksEventReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwSlowdown = 8
    nvmlClocksEventReasonSwThermalSlowdown = 32
    nvmlClocksThrottleReasonHwThermalSlowdown = 64
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128

    def nvmlInit(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str | bytes:
        return b"570.86"

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return b"NVIDIA H100" if handle else "NVIDIA H100"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=3 * GIB, total=80 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=self._first(handle, 97))

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self._first(handle, 650_500)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return self._first(handle, 71)

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> int:
        return self._first(handle, 2)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return self._first(handle, 4 | 64 | 1)  # 1: idle, which is no reason to worry

    def _first(self, handle: int, value: int) -> int:
        if handle:
            raise NvmlError("not supported")
        return value


def test_readings_have_units_and_missing_values_are_none():
    assert GpuMonitor(FakeNvml()).driver() == "570.86"
    first, second = GpuMonitor(FakeNvml()).read()
    assert first.name == second.name == "NVIDIA H100"
    assert (first.utilisation, first.memory_used, first.power, first.temperature) == (97.0, 3.0, 650.5, 71)
    assert first.throttle_reasons == ("power cap", "temperature (hardware)")
    assert (second.utilisation, second.power, second.throttle_reasons) == (None, None, ())


def test_metrics_are_flat_and_only_what_was_read():
    metrics = gpu_metrics(GpuMonitor(FakeNvml()).read())
    assert metrics["gpu/0/ecc_uncorrected"] == 2.0 and metrics["gpu/0/throttled"] == 1.0
    assert {name for name in metrics if name.startswith("gpu/1")} == {
        "gpu/1/memory_used",
        "gpu/1/memory_total",
        "gpu/1/throttled",
    }


def test_a_machine_without_driver_has_nothing_to_read(monkeypatch):
    nvml = FakeNvml()

    def fail() -> None:
        raise NvmlError("driver not loaded")

    monkeypatch.setattr(nvml, "nvmlInit", fail)
    assert GpuMonitor(nvml).read() == [] and gpu_metrics([]) == {}


def test_the_names_of_the_real_library():
    pynvml = pytest.importorskip("pynvml")
    for name in dir(FakeNvml):
        if name.lower().startswith("nvml"):
            assert hasattr(pynvml, name), name
            if isinstance(getattr(FakeNvml, name), int):
                assert getattr(pynvml, name) == getattr(FakeNvml, name), name


@pytest.mark.gpu
def test_a_real_gpu_is_read():
    readings = GpuMonitor().read()
    if not readings:
        pytest.skip("no NVIDIA GPU")
    assert all(r.memory_total and r.memory_used is not None for r in readings)
