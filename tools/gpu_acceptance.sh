#!/usr/bin/env bash
# The first hour on a GPU as one command: every step bounded in time, each with pass or fail and its figure, and one JSON
# file and one page at the end. Arguments are those of tools/gpu_acceptance.py, such as:
#   tools/gpu_acceptance.sh --out runs/acceptance
#   tools/gpu_acceptance.sh --dry-run            on a CPU, as far as it can
#   tools/gpu_acceptance.sh --steps doctor publish
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
exec "$python" tools/gpu_acceptance.py "$@"
