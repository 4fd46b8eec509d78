#!/usr/bin/env bash
# SmolLM2 learns subtraction; then the control is the same run with coin flips for rewards. Run `make env` first.
# Arguments go to both runs, e.g. examples/smollm2/run.sh --trainer.steps 5
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -e runs/smollm2/model ] || .venv/bin/python tools/convert_smollm2.py runs/smollm2/model --tensor 2
.venv/bin/fiberpo train examples/smollm2/train.toml "$@"
.venv/bin/fiberpo train examples/smollm2/train.toml --run.folder runs/smollm2/control --data.random_reward true "$@"
.venv/bin/python examples/results.py runs/smollm2 train="right answers rewarded" control="coin flips rewarded"
