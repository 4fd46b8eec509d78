#!/usr/bin/env bash
# Three domains under `fiberpo-domain` with a budget for each, under `fiberpo`, and a control with coin flips for
# rewards. Run `make env` first. Arguments go to all runs, e.g. examples/domains/run.sh --trainer.steps 5
set -euo pipefail
cd "$(dirname "$0")/../.."
train() { .venv/bin/fiberpo train examples/domains/train.toml --run.folder "runs/domains/$1" "${@:2}"; }
[ -e runs/domains/warmup/hf/config.json ] || .venv/bin/fiberpo sft examples/domains/warmup.toml
train budgets "$@"
train fiberpo --algorithm.objective fiberpo --algorithm.budgets '{}' "$@"
train control --data.random_reward true "$@"
.venv/bin/python examples/results.py runs/domains budgets="fiberpo-domain" fiberpo="fiberpo" control="coin flips" \
    --metrics accuracy/sort accuracy/add2 accuracy/add3
