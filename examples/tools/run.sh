#!/usr/bin/env bash
# A tiny model learns to call a calculator; then the control is the same run with coin flips for rewards. Run `make env`
# first. Arguments go to both runs, e.g. examples/tools/run.sh --trainer.steps 5
set -euo pipefail
cd "$(dirname "$0")/../.."
.venv/bin/python -m examples.tools.make_model runs/tools/model
.venv/bin/python -m examples.tools.problems runs/tools
[ -e runs/tools/warmup/hf/config.json ] || .venv/bin/fiberpo sft examples/tools/warmup.toml
train() { .venv/bin/fiberpo train examples/tools/train.toml --run.folder "runs/tools/$1" "${@:2}"; }
train train "$@"
train control --data.random_reward true "$@"
.venv/bin/python examples/results.py runs/tools train="right answers rewarded" control="coin flips rewarded" \
    --metrics accuracy environment/used_tool/mean without_tool/avg@1
