"""This module compares the fused Triton kernels with the passes in torch, and with themselves in other orders and cuts.

On a machine without CUDA they run in Triton's interpreter, which has to be chosen before Triton is imported: hence the
process of its own, `python -m fiberpo_megatron.certify.kernels`.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fiberpo_megatron.certify.batch import Batch
from fiberpo_megatron.certify.checks import Check, Result, check_results
from fiberpo_megatron.certify.gates import cut_result, cuts, orders
from fiberpo_megatron.certify.ranks import in_order
from fiberpo_megatron.fibration import Objective, build_objective
from fiberpo_megatron.trainer.step_file import Tokens

PART = "The fused Triton kernels"
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Torch beside Triton, relative to the largest entry: another exponential, and sums with it."""
MOST_TOKENS, MOST_BATCHES = 64, 1
"""Bounds for Triton's interpreter, which runs the kernels in numpy, line by line: a call of 64 tokens takes seconds."""
DEADLINE_S = 900.0


def why_not(objective: Objective) -> str | None:
    """Return why the kernels are not compared, or None if they can be."""
    if objective.kernel is None:
        return f"objective {objective.name} has no Triton kernel"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed for this interpreter"
    return None


def check_kernels(named: tuple[str, dict[str, Any]], batches: Sequence[Batch], seed: int) -> Iterator[Check]:
    """Yield checks of the kernels on each batch in float32 and float64; runs them in a process of their own.

    Raises RuntimeError with that process's last words when it fails.
    """
    interpreted = not torch.cuda.is_available()
    small = [(batch.name, batch.tokens) for batch in batches]
    if interpreted:
        small = [_shortened(name, tokens) for name, tokens in small[:MOST_BATCHES]]
    objective = build_objective(named[0], **named[1], kernels=False)
    tried = [
        (f"{name}, {str(dtype).removeprefix('torch.')}", tokens.to(dtype=dtype))
        for name, tokens in small
        for dtype in (torch.float32, torch.float64)
    ]
    where, device = ("Triton's interpreter", "cpu") if interpreted else ("CUDA", "cuda")
    beside = "torch on the CPU" if interpreted else "torch on the same GPU"
    for (name, tokens), found in zip(tried, _run(named, [tokens for _, tokens in tried], seed, interpreted)):
        tolerance = TOLERANCE[tokens.log_ratio.dtype]
        wanted = Result.of(tokens.to(device=device).call(objective))
        steady = _steady(objective, tokens, wanted, tolerance)
        left = f" ({int((~steady).sum())} tokens near a kink left out)" if not bool(steady.all()) else ""
        first = found["in one call"]
        yield check_results(
            PART,
            f"{where} beside {beside}, in one call",
            name + left,
            replace(first, gradient=first.gradient[steady], gated_ratio=first.gated_ratio[steady], metrics=None),
            Result(wanted.gradient.cpu()[steady], wanted.gated_ratio.cpu()[steady]),
            tolerance,
        )
        for what, result in found.items():
            if what != "in one call":
                yield check_results(PART, f"{where}: {what}", name, result, first)


def _shortened(name: str, tokens: Tokens) -> tuple[str, Tokens]:
    """Return the batch, or its first tokens where it is longer than the interpreter is asked to run."""
    if len(tokens) <= MOST_TOKENS:
        return name, tokens
    return f"{name}, its first {MOST_TOKENS} tokens", tokens.take(slice(MOST_TOKENS))


def _steady(objective: Objective, tokens: Tokens, wanted: Result, tolerance: float) -> torch.Tensor:
    """Which tokens' results do not jump when log ratios change in their last bits, bool [T]."""
    steady = torch.ones(len(tokens), dtype=torch.bool)
    step = 4 * torch.finfo(tokens.log_ratio.dtype).eps
    for factor in (1 - step, 1 + step):
        nudged = replace(tokens, log_ratio=tokens.log_ratio * factor).to(device=wanted.gradient.device).call(objective)
        for found, one in ((nudged.gradient, wanted.gradient), (nudged.gated_ratio, wanted.gated_ratio)):
            steady &= ((found - one).abs() <= tolerance * one.abs().max()).cpu()
    return steady


def _run(
    named: tuple[str, dict[str, Any]], tried: list[Tokens], seed: int, interpreted: bool
) -> list[dict[str, Result]]:
    with tempfile.TemporaryDirectory(prefix="fiberpo-certify-") as folder:
        call = Path(folder) / "call"
        device = "cpu" if interpreted else "cuda"
        torch.save((*named, [vars(tokens) for tokens in tried], seed, device), call)
        environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
        environment["PYTHONPATH"] = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "fiberpo_megatron.certify.kernels", str(call)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"the process that runs the Triton kernels did not end in {DEADLINE_S:.0f} s") from error
        if done.returncode:
            raise RuntimeError(f"the process that runs the Triton kernels failed:\n{done.stderr[-2000:]}")
        found = torch.load(call.with_name("found"), weights_only=True)
        return [{what: Result(**result) for what, result in results.items()} for results in found]


def main(path: str) -> None:
    """Run the calls that the file at `path` describes; results go into the file `found` beside it."""
    use, options, tried, seed, device = torch.load(path, weights_only=True)
    objective = build_objective(use, **options, kernels=True)
    found = []
    for fields in tried:
        host = Tokens(**fields)  # orders and cuts are made of the tokens' ids and log ratios, on the host
        tokens = host.to(device=device)
        results = {
            "in one call": Result.of(tokens.call(objective)),
            "the same call again": Result.of(tokens.call(objective)),
        }
        for what, order in list(orders(host, seed))[::3]:
            out = Result.of(tokens.take(order.to(device)).call(objective))
            results[what] = Result(in_order([out.gradient], [order]), in_order([out.gated_ratio], [order]), out.metrics)
        for what, parts in list(cuts(host, seed))[1:5:3]:
            results[what] = cut_result(objective, tokens, [part.to(device) for part in parts], seed)
        found.append(
            {
                what: vars(Result(result.gradient.cpu(), result.gated_ratio.cpu(), result.metrics))
                for what, result in results.items()
            }
        )
    torch.save(found, Path(path).with_name("found"))


if __name__ == "__main__":
    main(sys.argv[1])
