"""This module reads what `fiberpo calibrate` measured, and puts it in the place of the planner's constants.

A calibration is a JSON file. `constants` are what a plan uses, each with its value, its spread over the rounds (`low`
and `high`, the quartiles) and its unit; `measurements` are the timings that they were computed from; `machine`,
`versions` and `made` say where, with what and when.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

from fiberpo_megatron import durable
from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.planning.hardware import GPUS, Assumptions, Gpu, assume

FORMAT = "fiberpo calibration 1"
FILE = "calibration.json"
DEVICE = (
    "float32_tflops",
    "bfloat16_tflops",
    "memory_gb",
    "memory_gb_per_s",
    "link_gb_per_s",
    "network_gb_per_s",
)
"""Constants of the device, which make its row among the GPUs. Links and network are absent where one rank, or one
machine, was at hand."""


SAME_MACHINE = 10**6
"""Ranks that the links of a CPU connect: all of them."""


@dataclass(frozen=True)
class Constant:
    """This is a measured constant."""

    value: float
    low: float
    """Lower quartile over the rounds."""
    high: float
    """Upper quartile over the rounds."""
    unit: str


@dataclass(frozen=True)
class Calibration:
    """These are the constants of one machine."""

    machine: Mapping[str, Any]
    """`device` (cpu, or the GPU's name), `ranks`, `layout`, `model` and what else describes the measurement."""
    versions: Mapping[str, str]
    made: str
    constants: Mapping[str, Constant]
    """By `device.NAME` (DEVICE) or `assumptions.NAME` (a field of `Assumptions`)."""
    measurements: Mapping[str, Constant]

    def value(self, name: str, default: float) -> float:
        """Return a constant's value; `default` where it was not measured."""
        return self.constants[name].value if name in self.constants else default

    def gpu(self, dtype: str) -> Gpu:
        """Return the device as a row of hardware for a model of type `dtype`, with what was achieved as its figures.

        What was not measured is the vendor's where the device has a row in `GPUS`; a CPU's ranks share one machine, so
        that its links stand for the network too.
        """
        name = f"device.{dtype}_tflops"
        if name not in self.constants:
            raise ValueError(f'the calibration has no {name}, which model.dtype = "{dtype}" needs; calibrate again')
        vendor = vendor_row(str(self.machine["device"]))
        row = vendor or Gpu(str(self.machine["device"]), 1, 1, 1, 1, SAME_MACHINE, 1, 1, "")
        links = self.value("device.link_gb_per_s", row.nvlink_gb_per_s)
        memory = self.value("device.memory_gb_per_s", row.memory_gb_per_s)
        return replace(
            row,
            memory_gb=self.value("device.memory_gb", row.memory_gb),
            tflops=self.constants[name].value,
            memory_gb_per_s=memory,
            nvlink_gb_per_s=links,
            network_gb_per_s=self.value("device.network_gb_per_s", vendor.network_gb_per_s if vendor else links),
            host_gb_per_s=vendor.host_gb_per_s if vendor else memory,
            source=f"measured {self.made}",
        )

    def assumptions(self, base: Assumptions) -> Assumptions:
        """Return `base` with the measured assumptions in it."""
        prefix = "assumptions."
        return replace(
            base,
            **{
                name.removeprefix(prefix): constant.value
                for name, constant in self.constants.items()
                if name.startswith(prefix)
            },
        )

    def write(self, path: Path) -> None:
        """Write the file, whole. Raises OSError."""
        with durable.replaced(path, text=True) as file:
            json.dump({"format": FORMAT, **asdict(self)}, file, indent=1)
            file.write("\n")


def vendor_row(device: str) -> Gpu | None:
    """Return the row of a device by the name that it gives itself, such as "NVIDIA H100 80GB HBM3"; None without one.

    The longest name of a row that is a word of the device's name is taken: GB200 is not B200.
    """
    words = re.split(r"[\s_-]+", device)
    found = [gpu for name, gpu in GPUS.items() if name in words]
    return max(found, key=lambda gpu: len(gpu.name), default=None)


def calibrated(calibration: Calibration | None, given: Sequence[str]) -> Assumptions:
    """Return the assumptions of a plan: the defaults, in their place what was measured, in its place what is `given`
    as ["name=value", ..]. Raises ValueError for what cannot be assumed."""
    chosen = assume(given)
    if calibration is None:
        return chosen
    names = {text.partition("=")[0] for text in given}
    return replace(calibration.assumptions(Assumptions()), **{name: getattr(chosen, name) for name in names})


def read_calibration(path: Path) -> Calibration:
    """Read a file. Raises ValueError that names the file and what is wrong with it, and OSError where it cannot be
    opened."""
    found = read_object(path)
    if found.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {found.get('format')!r}, not {FORMAT!r}; make it again: fiberpo calibrate")
    try:
        constants = {name: _constant(value) for name, value in found["constants"].items()}
        measurements = {name: _constant(value) for name, value in found["measurements"].items()}
        machine, versions = dict(found["machine"]), dict(found["versions"])
        device, made = str(machine["device"]), str(found["made"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: {type(error).__name__}: {error}; a calibration has constants, measurements, machine.device, "
            "versions and made: make it again with fiberpo calibrate"
        ) from error
    _check_names(path, constants)
    _check_values(path, constants, cpu=vendor_row(device) is None)
    return Calibration(machine, versions, made, constants, measurements)


def _constant(fields_of_it: Mapping[str, Any]) -> Constant:
    value, low, high = (float(fields_of_it[name]) for name in ("value", "low", "high"))
    if not all(map(isfinite, (value, low, high))):
        raise ValueError(f"{value}, {low} and {high} are not all finite")
    return Constant(value, low, high, str(fields_of_it["unit"]))


def _check_names(path: Path, constants: Mapping[str, Constant]) -> None:
    known = {f"device.{name}" for name in DEVICE}
    known |= {f"assumptions.{field.name}" for field in fields(Assumptions)}
    unknown = sorted(constants.keys() - known)
    if unknown:
        raise ValueError(f"{path}: no plan uses the constant {unknown[0]!r}; make the file again: fiberpo calibrate")


def _check_values(path: Path, constants: Mapping[str, Constant], cpu: bool) -> None:
    needed = ["device.memory_gb", "device.memory_gb_per_s"] if cpu else []
    missing = [name for name in needed if name not in constants]
    if missing:
        raise ValueError(f"{path}: {missing[0]} is missing, and no vendor's figure stands for it; calibrate again")
    for name, constant in constants.items():
        least = 0.0 if name.startswith("assumptions.") and name.endswith(("_s", "_ms", "_us")) else 1e-12
        most = 1.0 if name.endswith(("_efficiency", "_share", "_acceptance")) else 1e15
        if not least <= constant.value <= most:
            raise ValueError(f"{path}: {name} = {constant.value} is not between {least:g} and {most:g}")
