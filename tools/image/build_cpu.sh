#!/usr/bin/env bash
# Builds the Dockerfile's cpu target on a machine without a Docker engine or an image registry: debootstrap makes a
# Debian root file system as the base, buildah executes the Dockerfile in a chroot, and then the image's own commands
# are tried in it. This needs root on Debian, about 6 GB of disk, and several minutes.
#
#   tools/image/build_cpu.sh [OPTION FOR BUILDAH BUILD ...]     e.g. --volume /etc/pip.conf:/etc/pip.conf:ro
#
# DEBIAN_MIRROR: Debian's archive (default: deb.debian.org).
# IMAGE_STORE: where images are kept (default: a temporary folder that is removed at the end).
# TRY: command that is run in the image at the end (default: a few steps of the demo).
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "$(id -u)" = 0 ] || { echo "build_cpu.sh: run it as root (debootstrap and chroot need it)" >&2; exit 1; }
for command in debootstrap buildah; do
  command -v "$command" >/dev/null ||
    { echo "build_cpu.sh: $command is missing; run apt-get install --yes debootstrap buildah" >&2; exit 1; }
done
store=${IMAGE_STORE:-$(mktemp --directory)}
[ -n "${IMAGE_STORE:-}" ] || trap 'rm -rf "$store"' EXIT
buildah() { command buildah --storage-driver vfs --root "$store/images" --runroot "$store/run" "$@"; }
base=localhost/python:3.11-slim

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  echo "1/3 Debian bookworm with its Python 3.11, in place of python:3.11-slim-bookworm"
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip bookworm "$store/debian" \
    "${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$store/debian" /
  buildah commit --quiet --format docker --rm "$container" "$base"
  rm -rf "$store/debian"
fi
echo "2/3 The Dockerfile's cpu target"
buildah build --format docker --isolation chroot --target cpu --build-arg PYTHON_IMAGE="$base" \
  --tag fiberpo-megatron:cpu "$@" .
echo "3/3 The image at work"
container=$(buildah from fiberpo-megatron:cpu)
run() { buildah run --isolation chroot "$container" -- "$@"; }
[ "$(run id --user --name)" = fiberpo ] || { echo "build_cpu.sh: the image runs as $(run id --user --name)" >&2; exit 1; }
run fiberpo --version
demo='fiberpo sft examples/demo/warmup.toml --sft.steps 3 && fiberpo train examples/demo/train.toml --trainer.steps 2'
run bash -c "${TRY:-$demo}"
buildah rm "$container" >/dev/null
echo "The cpu target was built and works"
