#!/usr/bin/env bash
# A tiny model learns a task of reasoning-gym; then the control is the same run with coin flips for rewards. Run
# `make env` first. Arguments go to both runs, e.g. examples/reasoning_gym/run.sh --trainer.steps 5
set -euo pipefail
cd "$(dirname "$0")/../.."
.venv/bin/python -m examples.reasoning_gym.make_model runs/reasoning_gym/model
[ -e runs/reasoning_gym/warmup/hf/config.json ] || .venv/bin/fiberpo sft examples/reasoning_gym/warmup.toml
train() { .venv/bin/fiberpo train examples/reasoning_gym/train.toml --run.folder "runs/reasoning_gym/$1" "${@:2}"; }
train train "$@"
train control --data.random_reward true "$@"
.venv/bin/python examples/results.py runs/reasoning_gym train="scored by reasoning-gym" control="coin flips"
