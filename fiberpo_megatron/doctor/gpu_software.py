"""These checks look at what a machine with GPUs needs beside torch: the driver, Transformer Engine, apex, variables."""

import importlib.util
import os
import sys
from collections.abc import Mapping
from importlib import metadata

import torch

from fiberpo_megatron.config import Config
from fiberpo_megatron.doctor.report import Finding
from fiberpo_megatron.engines.command import interpreter, torch_libraries
from fiberpo_megatron.subprocesses import GPU_VARIABLES

LEAST_DRIVER = {12: 525, 13: 580}
"""The first driver for each major version of CUDA, from NVIDIA's table of compatibility."""
README = 'see README.md, "On GPUs"'
APEX_PARTS = {"fused_weight_gradient_mlp_cuda": "fused accumulation of weight gradients", "amp_C": "fused Adam"}
"""Compiled modules of apex that Megatron-Core uses, with what each brings."""


def driver(version: str, cuda: str | None = torch.version.cuda) -> list[Finding]:
    """Check that the driver is new enough for the CUDA that torch was built with. `version`: such as 580.65.06."""
    needed, found = LEAST_DRIVER.get(int(cuda.partition(".")[0]) if cuda else 0), version.partition(".")[0]
    if needed is None or not found.isdecimal() or int(found) >= needed:
        return [Finding("GPU driver", "pass", version)]
    seen = f"{version} is too old for CUDA {cuda}, with which torch was built; {needed} is the first that works"
    return [Finding("GPU driver", "fail", seen, f"Update the driver to {needed} or newer, or {README}")]


def transformer_engine() -> list[Finding]:
    """Check that Transformer Engine is installed, and say what it brings."""
    name = "Transformer Engine"
    if importlib.util.find_spec("transformer_engine") is None:
        return [Finding(name, "fail", "it is not installed; runs on GPUs need it", README)]
    version = metadata.version("transformer-engine")
    return [Finding(name, "pass", f"{version}: attention of packed rows, norms, grouped products, FP8, fused Adam")]


def apex() -> list[Finding]:
    """Say what apex brings here, or what is done without it: it is optional."""
    if importlib.util.find_spec("apex") is None:
        seen = "it is not installed: Transformer Engine's Adam is used, and weight gradients are added by torch"
        return [Finding("apex", "pass", seen)]
    missing = [what for module, what in APEX_PARTS.items() if importlib.util.find_spec(module) is None]
    if missing:
        seen = f"it was built without its CUDA extensions: no {', no '.join(missing)}"
        return [Finding("apex", "warn", seen, "Build it from NVIDIA/apex with its extensions, or remove it")]
    return [Finding("apex", "pass", ", ".join(APEX_PARTS.values()))]


def variables(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Check the variables of NCCL and CUDA that ranks and engines share; a run sets those that are unset."""
    values = {name: environment.get(name, usual) for name, usual in GPU_VARIABLES.items()}
    seen = ", ".join(f"{name}={value}" for name, value in values.items())
    connections = "CUDA_DEVICE_MAX_CONNECTIONS"
    if values[connections] != GPU_VARIABLES[connections]:
        what = "with it communication of tensor and expert parallelism does not overlap with computation"
        return [Finding("variables", "warn", f"{seen}: {what}", f"Unset {connections}, or set it to 1")]
    return [Finding("variables", "pass", seen)]


def shared_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that all ranks and engines must have alike: those of NCCL, and CUDA_DEVICE_MAX_CONNECTIONS.

    Names of interfaces and files, and what NCCL prints, may differ between machines.
    """
    own = ("NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_TOPO_FILE", "NCCL_IB_HCA")
    named = {name: value for name, value in environment.items() if name.startswith("NCCL_") and name not in own}
    return dict(sorted({**GPU_VARIABLES, **named, **_given(environment)}.items()))


def _given(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in GPU_VARIABLES if name in environment}


def engine_libraries(config: Config) -> list[Finding]:
    """Compare torch and NCCL of the engines' own interpreter, if they have one, with the trainer's."""
    engine, name = config.rollout.engine, "engine libraries"
    method = config.weight_sync.method.use
    if engine.urls:
        if method != "distributed":
            return []
        seen = "servers in rollout.engine.urls do not say which NCCL they have, and one communicator takes one version"
        ask = "python -c 'import torch; print(torch.cuda.nccl.version())'"
        return [Finding(name, "warn", seen, f"Compare what this prints with the servers' python and with ours: {ask}")]
    python = interpreter(engine)
    if python == sys.executable:
        return []
    ours, theirs = torch_libraries(sys.executable), torch_libraries(python)
    seen = f"torch {theirs.torch} and NCCL {theirs.nccl}, the trainer has torch {ours.torch} and NCCL {ours.nccl}"
    if ours.nccl != theirs.nccl and method == "distributed":
        fix = 'Install one version, let both load one libnccl.so.2, or set weight_sync.method = "disk"'
        return [Finding(name, "fail", f"{seen}: one communicator takes one version", fix)]
    if ours.torch != theirs.torch and method != "disk":
        fix = 'Install one version, or set weight_sync.method = "disk", which shares nothing but files'
        return [Finding(name, "warn", f"{seen}: {method} was not tested between two versions", fix)]
    return [Finding(name, "pass", seen)]


def every(config: Config | None) -> list[Finding]:
    """Run the checks of a machine with GPUs, except for the driver's (machine.py)."""
    found = [*transformer_engine(), *apex(), *variables()]
    return [*found, *engine_libraries(config)] if config else found
