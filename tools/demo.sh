#!/usr/bin/env bash
# Runs the demo: warm-up, then FiberPO. Arguments go to the RL run, e.g. tools/demo.sh --parallel.tensor 2
set -euo pipefail
cd "$(dirname "$0")/.."
fiberpo=.venv/bin/fiberpo
if [ -e runs/demo ]; then
  kept="runs/demo.$(date -r runs/demo +%Y%m%d_%H%M%S)"
  mv runs/demo "$kept"
  echo "An earlier demo was kept in $kept"
fi
echo "1/2 Supervised warm-up of a tiny Qwen3-MoE (about 2 million parameters) on 2 ranks"
"$fiberpo" sft examples/demo/warmup.toml
echo "2/2 Reinforcement learning by FiberPO: Megatron-Core on 2 ranks, SGLang serving the rollouts"
echo "Watch it in a browser: $fiberpo watch runs/demo/train"
"$fiberpo" train examples/demo/train.toml "$@"
