#!/usr/bin/env bash
# Installs SGLang with its CUDA kernels in a separate interpreter, because it pins a torch other than the image's.
# It runs while an image is built from NVIDIA's PyTorch image (Dockerfile, apptainer.def).
set -euo pipefail
# Without a pip of its own: Debian's and Ubuntu's Python may lack ensurepip, and the image's pip installs there as well.
python3 -m venv --without-pip /opt/sglang
# The base image's constraint file is about its own packages, which this environment does not share.
# The lock, beside this script, has SGLang with all that it asks for; pip refuses a file of another content.
PIP_CONSTRAINT='' python3 -m pip --python /opt/sglang/bin/python install --no-cache-dir \
  --no-deps --require-hashes --only-binary :all: -r "$(dirname "$0")/sglang.lock"
# NCCL refuses a communicator of two versions, and the trainer broadcasts weights to the engines: both sides load this
# one, the newer of the two (an NCCL serves programs that were built against an older one).
library=$(find /opt/sglang -path '*/nvidia/*' -name 'libnccl.so.2' -print -quit)
[ -n "$library" ] || { echo "no libnccl.so.2 below /opt/sglang: where did SGLang's torch put its NCCL?" >&2; exit 1; }
mkdir -p /opt/nccl
ln -s "$library" /opt/nccl/libnccl.so.2
