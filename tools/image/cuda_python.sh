#!/usr/bin/env bash
# `cuda_python.sh FOLDER` installs this package and what the image lacks. torch, Transformer Engine and apex are the base
# image's own builds; its constraint file keeps pip from replacing them.
# It runs while an image is built from NVIDIA's PyTorch image (Dockerfile, apptainer.def).
set -euo pipefail
before=$(python3 -c 'from importlib.metadata import version; print(version("torch"))')
python3 -m pip install --no-cache-dir --no-build-isolation "$1[math,wandb]"
python3 - "$before" <<'PY'
import sys
from importlib.metadata import version

names = ("torch", "transformer-engine", "apex", "megatron-core", "nvidia-ml-py", "fiberpo-megatron")
found = {name: version(name) for name in names}  # PackageNotFoundError names what is missing
print(found)
if found["torch"] != sys.argv[1]:
    sys.exit(f"torch {sys.argv[1]} of the base image was replaced by {found['torch']}: pin what pulled it in")
PY
