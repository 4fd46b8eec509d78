"""This tool compares one layout with a single float64 process: log-probs, coefficients and the parameter gradient.

    python tools/layout_parity.py --tensor 2 --pipeline 2 --objective fiberpo-domain --micro-batch-tokens 64
    python tools/layout_parity.py --pipeline 2 --virtual-pipeline 2 --model latent --steps 3
    python tools/layout_parity.py --context 2 --objective gspo --terms kl=k3,kl.where=reward,entropy
    python tools/layout_parity.py --context 2 --model dense --dtype bfloat16 --shared-gpu

A small model (`--model`: Qwen3-MoE, dense Qwen3 with tied embeddings, DeepSeek-V3) with the same seeded weights is run
(a) by one process in float64 with all trajectories in one micro-batch and (b) by tensor x pipeline x context x data
processes in float32 (or `--dtype bfloat16`) with the given token budget. The last line is a JSON object with the
largest differences over the largest reference value (`coefficients_max_relative_diff` and so on), for gradients per
global tensor. `--steps N` also compares the parameters after N optimiser steps, which the reference takes with
torch.optim.AdamW. The reference runs on CPU, the layout on GPUs if there are any, one for each rank; with
`--shared-gpu` all ranks take the first GPU and the backend of `tools/shared_gpu.py`, because NCCL wants a GPU for each.
On GPUs float32 is multiplied in float32, not in TF32, unless the environment sets NVIDIA_TF32_OVERRIDE otherwise.
`fiberpo certify` makes this comparison for a config's model and objective.

With `--branches` half of the trajectories have branches, which a small `--micro-batch-tokens` cuts into several rows.

`--terms` adds terms to the objective. Its items, separated by commas, are sections of [algorithm]:

    NAME              the term with the settings of TERMS below
    NAME=VALUE        the same with another value of its main setting, which is the first one there
    NAME.KEY=VALUE    the same with another value of that setting

What terms read beside the policy's log-probs (the reference's, the teacher's, the engine's, and which trajectories are
right) is drawn from the seed. `entropy` enters through `gradient`, the others through `coefficients` as well.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fiberpo_megatron.certify.batch import Problem, draw_problem
from fiberpo_megatron.certify.models import MODELS
from fiberpo_megatron.certify.processes import RanksFailed, run_ranks, too_few_gpus
from fiberpo_megatron.certify.training_step import SIZES, Case, Outcome, compare, run_rank, run_reference

sys.path.insert(0, str(Path(__file__).parent.parent))
from tools.shared_gpu import share_gpu  # noqa: E402

TERMS: dict[str, dict[str, str | float]] = {
    "kl": {"estimator": "unbiased", "coefficient": 0.3},
    "entropy": {"coefficient": 0.2},
    "distillation": {"coefficient": 0.5, "teacher": "http://127.0.0.1:1", "reward_weight": 1.0},
    "off_policy_mask": {"delta": 0.02},
    "supervised": {"coefficient": 0.3},
}
"""Settings of each term, the main one first, with which it is a good part of the gradient."""


def terms_of(text: str) -> dict[str, dict[str, str | float]]:
    """Return sections of [algorithm] from the items of `--terms`. Raises ValueError for an unknown name."""
    sections: dict[str, dict[str, str | float]] = {}
    for item in filter(None, text.split(",")):
        path, _, value = item.partition("=")
        name, _, key = path.partition(".")
        if name not in TERMS:
            raise ValueError(f"--terms {item}: {name!r} is no term; choose from {', '.join(TERMS)}")
        section = sections.setdefault(name, dict(TERMS[name]))
        if value:
            section[key or next(iter(TERMS[name]))] = value
    return sections


def make_problem(seed: int, partitions: int, branches: bool = False) -> Problem:
    """Draw trajectories whose ratios are spread enough for clips and gates to act."""
    random = np.random.default_rng(seed)
    return draw_problem(
        random,
        groups=6,
        samples=4,
        longest=58,
        domains=3,
        partitions=partitions,
        vocabulary=61,
        shift=0.15,
        branches=branches,
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=1)
    parser.add_argument("--objective", default="fiberpo-domain")
    parser.add_argument("--micro-batch-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=list(MODELS), default="moe")
    parser.add_argument("--steps", type=int, default=0, help="optimiser steps after which parameters are compared")
    parser.add_argument("--branches", action="store_true", help="some trajectories have three token sequences")
    parser.add_argument("--terms", type=terms_of, default={}, help="what is added to the objective: kl=k3,entropy,..")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the layout")
    parser.add_argument("--shared-gpu", action="store_true", help="all ranks on the first GPU, messages over gloo")
    return parser.parse_args(words)


def case_of(words: Sequence[str] | None = None) -> Case:
    """Return what the command line asks for."""
    args = arguments(words)
    return Case(
        model=MODELS[args.model],
        objective=(args.objective, {}),
        problem=make_problem(args.seed, max(2, args.expert), args.branches),
        sizes={name: getattr(args, name) for name in SIZES},
        micro_batch_tokens=args.micro_batch_tokens,
        seed=args.seed,
        steps=args.steps,
        terms=args.terms,
        dtype=args.dtype,
    )


def run_rank_on_shared_gpu(case: Case, old: Mapping[int, float], budgets: Sequence[int]) -> list[Outcome]:
    """Do as `run_rank` on the first GPU, which the other ranks use as well."""
    share_gpu()
    return run_rank(case, old, budgets)


def main() -> None:
    """Compare one layout and print the differences."""
    case, shared = case_of(), arguments().shared_gpu
    run = run_rank_on_shared_gpu if shared else run_rank
    if not shared and too_few_gpus(case.ranks):
        raise SystemExit(
            f"layout_parity: this layout has {case.ranks} ranks, and NCCL wants a GPU for each, of which this machine "
            "shows fewer; add --shared-gpu, or empty CUDA_VISIBLE_DEVICES to run on the CPU"
        )
    try:
        case.check()
        (reference,) = run_ranks(1, run_reference, case, on_cpu=True)
        old = dict(zip(reference.index.tolist(), reference.old_log_probs.tolist()))
        outcomes = run_ranks(case.ranks, run, case, old, (case.micro_batch_tokens,))
    except (ValueError, RanksFailed) as error:
        raise SystemExit(f"layout_parity: {error}") from None
    found, _ = compare(reference, [outcome for (outcome,) in outcomes])
    print(json.dumps({f"{name}_max_relative_diff": one.relative for name, one in found.items()}))


if __name__ == "__main__":
    main()
