"""This tool measures time and memory of every objective (value and gradient) on packed batches.

Each objective runs beside
  (a) padded: the same formula on [B, T] tensors with plain torch and autograd, on inputs that are already padded,
  (b) the memory floor: bytes in and out of one call over this machine's measured copy bandwidth,
  (c) on a GPU, the same objective in torch operations (`kernels=False`) in place of the fused kernels.
Response lengths are log-normal, capped at four times their mean; (a) works on [B, longest].

    python tools/bench_objective.py --sizes 65536 1048576 --objectives fiberpo grpo --json bench.json

With --operations it counts instead how many operations a call in fused kernels starts on the device and how often the
host waits, which without a GPU needs Triton and its interpreter:

    TRITON_INTERPRET=1 python tools/bench_objective.py --operations

With --exact-sums it times exact sums beside sums in float64 (`Objective.exact_sums`) in torch.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fiberpo_megatron.fibration import PRESET_LEVELS, Objective, build_objective

MEAN_LENGTH = 1024
LOG_SIGMA = 0.8
PARTITIONS = 8
EXPERTS, SLOTS = 128, 8
"""Experts of a layer, and those that a token is routed to, as in Qwen3-30B-A3B."""
GROUP = 16
DOMAINS = 6
WITH_BASELINE = (*PRESET_LEVELS, "ppo", "grpo", "dapo", "gspo", "cispo", "apc", "apc-trajectory", "reinforce")
"""Objectives whose formula this file also has for padded tensors."""
EPSILON = 0.05
BUDGET = (0.12, 0.10)


@dataclass
class Packed:
    """Holds one flat batch."""

    log_ratio: Tensor
    advantages: Tensor
    weights: Tensor
    keys: dict[str, Tensor]
    share: Tensor | None
    lengths: Tensor


@dataclass
class Result:
    objective: str
    tokens: int
    trajectories: int
    padding: float
    """Cells of the padded layout per token."""
    ours_ms: float
    ours_no_metrics_ms: float
    padded_ms: float
    floor_ms: float
    speedup: float
    speedup_no_metrics: float
    over_floor: float
    ours_peak_mb: float
    """Peak memory of a call beyond its inputs, outputs included."""
    padded_peak_mb: float
    peak_ratio: float
    no_metrics_over_floor: float
    torch_ms: float | None = None
    """Times of the torch operations on a GPU, with and without metrics; None on a CPU, where `ours` is they."""
    torch_no_metrics_ms: float | None = None


SHARED_PREFIX = 8
"""Tokens that all samples of a group begin with: the states that `apc` couples."""


def slot_shares(size: int, draw: torch.Generator) -> Tensor:
    """Draw the shares [size, PARTITIONS] of tokens that are routed to SLOTS of EXPERTS experts."""
    share = torch.zeros(size, PARTITIONS)
    for part in share.split(1 << 16):
        chosen = torch.rand(len(part), EXPERTS, generator=draw).topk(SLOTS, 1).indices
        part.scatter_add_(1, chosen // (EXPERTS // PARTITIONS), torch.full(chosen.shape, 1.0 / SLOTS))
    return share


def random_shares(size: int, draw: torch.Generator) -> Tensor:
    """Draw shares [size, PARTITIONS] that are any numbers, as those of weights by routing probability would be."""
    share = torch.rand(size, PARTITIONS, generator=draw)
    return share / share.sum(1, keepdim=True)


def make_packed(
    tokens: int, *, experts: bool, scale: float, device: str, seed: int = 0, shares: str = "slots"
) -> Packed:
    """Draw log-normal lengths of mean MEAN_LENGTH, capped at 4 x that, and log ratios of deviation `scale`."""
    draw = torch.Generator().manual_seed(seed)
    count = max(1, tokens // MEAN_LENGTH)
    lengths = torch.exp(LOG_SIGMA * torch.randn(count, generator=draw))
    lengths = (lengths * MEAN_LENGTH / lengths.mean()).clamp(1, 4 * MEAN_LENGTH).long()
    lengths[-1] = (lengths[-1] + tokens - lengths.sum()).clamp(1, 4 * MEAN_LENGTH)
    trajectory = torch.repeat_interleave(torch.arange(count), lengths)
    size = trajectory.shape[0]
    within = torch.arange(size) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    group = torch.arange(count) // GROUP
    domain = group % DOMAINS
    share = None
    if experts:
        share = (slot_shares if shares == "slots" else random_shares)(size, draw).to(device)
    return Packed(
        (torch.randn(size, generator=draw) * scale).to(device),
        torch.randn(count, generator=draw)[trajectory].to(device),
        (1.0 / (count * lengths.float()))[trajectory].to(device),
        {
            "trajectory": trajectory.to(device),
            "prompt_group": group[trajectory].to(device),
            "domain": domain[trajectory].to(device),
            "state": torch.where(within < SHARED_PREFIX, group[trajectory] * SHARED_PREFIX + within, -1).to(device),
        },
        share,
        lengths.to(device),
    )


def pad(flat: Tensor, lengths: Tensor) -> Tensor:
    """Return [N, ...] as [B, T, ...], with zeros after each trajectory's end."""
    mask = padding_mask(lengths)
    out = flat.new_zeros((*mask.shape, *flat.shape[1:]))
    out[mask] = flat
    return out


def padding_mask(lengths: Tensor) -> Tensor:
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths.unsqueeze(1)


# ---- (a): the same formulas as they are usually written on [B, T] ----


def padded_gate(residual: Tensor, budget: float, tokens: Tensor) -> Tensor:
    size = residual.abs()
    rollback = residual.sign() * (tokens + 1) * budget - tokens * residual
    inner = torch.where(size < (1 + 1 / tokens) * budget, rollback, torch.zeros_like(residual))
    return torch.where(size <= budget, residual, inner)


def padded_fiber(x: Tensor, advantages: Tensor, mu: Tensor, mask: Tensor, row_ids: list[Tensor]) -> Tensor:
    """Compute FiberPO and FiberPO-Domain: trajectory aggregates by row sums, coarser ones by index_add over rows."""
    plus, minus = torch.clamp(x, min=0), torch.clamp(-x, min=0)
    mass, tokens = (mu * mask).sum(1), mask.sum(1).to(x.dtype)
    s_plus, s_minus = (mu * plus * mask).sum(1) / mass, (mu * minus * mask).sum(1) / mass
    log_weight = padded_gates(s_plus, s_minus, mass, tokens, row_ids)
    same = torch.where(x >= 0, s_plus.unsqueeze(1), s_minus.unsqueeze(1))
    other = torch.where(x >= 0, s_minus.unsqueeze(1), s_plus.unsqueeze(1))
    sign = torch.where(x >= 0, 1.0, -1.0)
    fiber = torch.clamp(x - sign * same, -EPSILON, EPSILON) - torch.clamp(-sign * other, -EPSILON, EPSILON)
    return (mu * torch.exp(fiber + log_weight.unsqueeze(1)) * advantages * mask).sum()


def padded_gates(s_plus: Tensor, s_minus: Tensor, mass: Tensor, tokens: Tensor, row_ids: list[Tensor]) -> Tensor:
    """Return the summed log base weights over a chain of levels, for each row of the finest level."""
    total = torch.zeros_like(s_plus)
    back = torch.arange(s_plus.shape[0], device=s_plus.device)
    for ids in row_ids:
        up = s_plus.new_zeros(int(ids.max()) + 1)
        above_mass = up.index_add(0, ids, mass)
        above_plus = up.index_add(0, ids, mass * s_plus) / above_mass
        above_minus = up.index_add(0, ids, mass * s_minus) / above_mass
        gated = padded_gate(s_plus - above_plus[ids], BUDGET[0], tokens)
        gated = gated - padded_gate(s_minus - above_minus[ids], BUDGET[1], tokens)
        total = total + gated[back]
        tokens, back = up.index_add(0, ids, tokens), ids[back]
        mass, s_plus, s_minus = above_mass, above_plus, above_minus
    gated = padded_gate(s_plus, BUDGET[0], tokens) - padded_gate(s_minus, BUDGET[1], tokens)
    return total + gated[back]


def padded_expert(
    x: Tensor, advantages: Tensor, mu: Tensor, mask: Tensor, share: Tensor, row_ids: list[Tensor]
) -> Tensor:
    """Compute both expert presets, soft: (trajectory, expert) aggregates by einsum over [B, T, P]."""
    plus, minus = torch.clamp(x, min=0), torch.clamp(-x, min=0)
    weight = mu * mask
    mass = torch.einsum("bt,btp->bp", weight, share)
    tokens = torch.einsum("bt,btp->bp", mask.to(x.dtype), share).clamp(min=1)
    s_plus = torch.einsum("bt,btp->bp", weight * plus, share) / mass
    s_minus = torch.einsum("bt,btp->bp", weight * minus, share) / mass
    log_weight = padded_gates(
        s_plus.reshape(-1), s_minus.reshape(-1), mass.reshape(-1), tokens.reshape(-1), row_ids
    ).view_as(mass)
    token_plus = torch.einsum("btp,bp->bt", share, s_plus)
    token_minus = torch.einsum("btp,bp->bt", share, s_minus)
    same = torch.where(x >= 0, token_plus, token_minus)
    other = torch.where(x >= 0, token_minus, token_plus)
    sign = torch.where(x >= 0, 1.0, -1.0)
    fiber = torch.clamp(x - sign * same, -EPSILON, EPSILON) - torch.clamp(-sign * other, -EPSILON, EPSILON)
    ratio = torch.exp(fiber + torch.einsum("btp,bp->bt", share, log_weight))
    return (mu * ratio * advantages * mask).sum()


def padded_token(name: str, x: Tensor, advantages: Tensor, mu: Tensor, mask: Tensor) -> Tensor:
    """Compute the objectives without a hierarchy."""
    if name == "gspo":
        ratio = torch.exp((x * mask).sum(1) / mask.sum(1)).unsqueeze(1)
        best = torch.minimum(ratio * advantages, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantages)
        return (mu * best * mask).sum()
    ratio = torch.exp(x)
    if name == "reinforce":
        return (mu * ratio * advantages * mask).sum()
    if name == "cispo":
        return (mu * ratio.clamp(0.0, 5.0).detach() * advantages * x * mask).sum()
    if name in ("apc", "apc-trajectory"):
        change = ratio - 1
        size = change.abs() * mask
        if name == "apc":  # samples of a group share their first states; all others are alone
            group = torch.arange(x.shape[0], device=x.device) // GROUP
            shared = min(SHARED_PREFIX, x.shape[1])
            table = x.new_zeros(int(group[-1]) + 1, shared)
            samples, total = mask.to(x.dtype), size.clone()
            samples[:, shared:] = 1.0
            samples[:, :shared] = table.index_add(0, group, samples[:, :shared])[group]
            total[:, :shared] = table.index_add(0, group, size[:, :shared])[group]
        else:
            samples, total = mask.sum(1, keepdim=True), size.sum(1, keepdim=True)
        bound = (samples * sum(BUDGET) - (total - size)).clamp(min=0)
        return (mu * (1 + torch.maximum(torch.minimum(change, bound), -bound)) * advantages * mask).sum()
    upper = 1.28 if name == "dapo" else 1.2
    best = torch.minimum(ratio * advantages, ratio.clamp(0.8, upper) * advantages)
    return (mu * best * mask).sum()


def row_chain(name: str, batch: Packed) -> list[Tensor]:
    """Return each level's parent node per node, fine to coarse; (row, partition) nodes are flattened."""
    first = batch.lengths.cumsum(0) - batch.lengths
    group = batch.keys["prompt_group"][first]
    domain_of_group = torch.zeros(int(group.max()) + 1, dtype=torch.long, device=group.device)
    domain_of_group[group] = batch.keys["domain"][first]
    rows = torch.arange(group.shape[0], device=group.device)
    p = torch.arange(PARTITIONS, device=group.device)

    def by_partition(parent: Tensor) -> Tensor:
        return (parent.unsqueeze(1) * PARTITIONS + p).reshape(-1)

    if name == "fiberpo":
        return []
    if name == "fiberpo-domain":
        return [group, domain_of_group]
    if name == "fiberpo-expert":
        return [rows.repeat_interleave(PARTITIONS), group, domain_of_group]
    return [by_partition(group), by_partition(domain_of_group), p.repeat(int(domain_of_group.max()) + 1)]


def objective_of(name: str, *, kernels: bool | None = None, exact_sums: bool = True) -> Objective:
    """Return the objective with this file's budgets."""
    options: dict[str, Any] = {}
    if name in PRESET_LEVELS:
        names = ["+".join(level) for level in PRESET_LEVELS[name]]
        options = {"epsilon": EPSILON, "budgets": dict.fromkeys(names, BUDGET)}
    return build_objective(name, kernels=kernels, exact_sums=exact_sums, **options)


def ours(
    name: str, batch: Packed, *, metrics: bool, kernels: bool | None = None, exact_sums: bool = True
) -> Callable[[], Any]:
    objective = objective_of(name, kernels=kernels, exact_sums=exact_sums)
    counts = {key: int(ids.max()) + 1 for key, ids in batch.keys.items()}

    def call() -> Any:
        return objective(
            batch.log_ratio,
            batch.advantages,
            batch.weights,
            keys=batch.keys,
            expert_share=batch.share,
            counts=counts,
            metrics=metrics,
        )

    return call


def padded(name: str, batch: Packed) -> Callable[[], Tensor]:
    mask = padding_mask(batch.lengths)
    x, advantages = pad(batch.log_ratio, batch.lengths), pad(batch.advantages, batch.lengths)
    mu = pad(batch.weights, batch.lengths)
    share = None if batch.share is None else pad(batch.share, batch.lengths)
    chain = row_chain(name, batch) if name in PRESET_LEVELS else []

    def call() -> Tensor:
        leaf = x.detach().requires_grad_(True)
        if share is not None:
            value = padded_expert(leaf, advantages, mu, mask, share, chain)
        elif name in PRESET_LEVELS:
            value = padded_fiber(leaf, advantages, mu, mask, chain)
        else:
            value = padded_token(name, leaf, advantages, mu, mask)
        torch.autograd.backward(value)
        assert leaf.grad is not None
        return leaf.grad

    return call


# ---- measuring ----


def best_ms(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Return the milliseconds of the fastest of `repeats` calls.

    With one CPU thread this is the thread's own time, so that other jobs on the machine do not count; else wall time.
    """
    clock = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = clock()
        call()
        synchronize(device)
        times.append(clock() - start)
    return 1e3 * min(times)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_mb(call: Callable[[], Any], device: str) -> float:
    """Return the peak memory of a call beyond what was held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        synchronize(device)
        del result
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system, so that the call cannot reuse it
    Path("/proc/self/clear_refs").write_text("5")  # resets this process's peak resident size
    before = _status_kb("VmRSS")
    result = call()
    peak = _status_kb("VmHWM")
    del result
    return (peak - before) / 2**10


def _status_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def copy_bandwidth(device: str) -> float:
    """Return the bytes that a large copy reads and writes per second."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (best_ms(lambda: target.copy_(source), 5, device) / 1e3)


def bytes_in_out(name: str, batch: Packed) -> int:
    """Return the bytes of the inputs that the objective reads (with the ids of its keys) and of its two outputs, once
    each."""
    size = batch.log_ratio.numel()
    keys = build_objective(name).keys
    share = 0 if batch.share is None else batch.share.numel() * 4
    return size * (3 * 4 + 8 * len(keys) + 2 * 4) + share


def drawn(name: str, tokens: int, options: argparse.Namespace, device: str) -> Packed:
    """Return the batch of one objective."""
    return _packed(tokens, "expert" in name, options.scale, device, options.shares)


@lru_cache(maxsize=2)  # drawing a large one takes longer than all that is measured on it
def _packed(tokens: int, experts: bool, scale: float, device: str, shares: str) -> Packed:
    return make_packed(tokens, experts=experts, scale=scale, device=device, shares=shares)


def measure_one(name: str, tokens: int, kind: str, options: argparse.Namespace) -> tuple[float, float]:
    """Return (ms, peak MB) of one implementation."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    batch = drawn(name, tokens, options, options.device)
    if kind == "padded":
        call: Callable[[], Any] = padded(name, batch)
    else:
        kernels = False if kind.startswith("torch") else None
        call = ours(name, batch, metrics="no_metrics" not in kind, kernels=kernels)
    call()
    peak = peak_mb(call, options.device)
    return best_ms(call, options.repeats, options.device), peak


def isolated(name: str, tokens: int, kind: str, options: argparse.Namespace) -> tuple[float, float]:
    """Run measure_one in a separate process, so that peaks do not mix; on a GPU, in this process."""
    if options.device == "cuda":
        return measure_one(name, tokens, kind, options)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure_one, (name, tokens, kind, options))


def bench(name: str, tokens: int, bandwidth: float, options: argparse.Namespace) -> Result:
    batch = drawn(name, tokens, options, options.device)
    floor = 1e3 * bytes_in_out(name, batch) / bandwidth
    padding = batch.lengths.numel() * int(batch.lengths.max()) / batch.log_ratio.numel()
    full, peak = isolated(name, tokens, "ours", options)
    bare, _ = isolated(name, tokens, "ours_no_metrics", options)
    slow, slow_peak = isolated(name, tokens, "padded", options)
    in_torch = {}
    if options.device == "cuda":
        for kind in ("torch", "torch_no_metrics"):
            in_torch[f"{kind}_ms"], _ = isolated(name, tokens, kind, options)
    return Result(
        name,
        batch.log_ratio.numel(),
        batch.lengths.numel(),
        padding,
        full,
        bare,
        slow,
        floor,
        slow / full,
        slow / bare,
        full / floor,
        peak,
        slow_peak,
        peak / max(slow_peak, 1e-9),
        bare / floor,
        **in_torch,
    )


def table_line(result: Result | None, device: str) -> str:
    """Return a line of the table, or its head for None."""
    if result is None:
        cells = ["objective", "tokens", "ours ms", "no metrics ms", "padded ms", "floor ms"]
        cells += ["speedup", "no metrics", "peak MB", "padded MB"]
        cells += ["torch ms", "no metrics ms", "over floor", "no metrics"] if device == "cuda" else []
    else:
        numbers: tuple[float, ...] = (
            result.ours_ms,
            result.ours_no_metrics_ms,
            result.padded_ms,
            result.floor_ms,
            result.speedup,
            result.speedup_no_metrics,
            result.ours_peak_mb,
            result.padded_peak_mb,
        )
        if result.torch_ms is not None and result.torch_no_metrics_ms is not None:
            numbers += (result.torch_ms, result.torch_no_metrics_ms, result.over_floor, result.no_metrics_over_floor)
        digits = 3 if device == "cuda" else 1
        cells = [result.objective, str(result.tokens), *(f"{number:.{digits}f}" for number in numbers)]
    return f"{cells[0]:<22}" + "".join(f"{cell:>15}" for cell in cells[1:])


def print_operations(options: argparse.Namespace) -> None:
    """Print device operations and host waits per call, with and without metrics; they do not depend on the tokens."""
    from device_operations import count

    print(f"{'objective':<22}{'operations':>12}{'waits':>8}{'no metrics':>14}{'waits':>8}")
    for name in options.objectives:
        batch = drawn(name, 4096, options, options.device)
        full, bare = (count(ours(name, batch, metrics=metrics, kernels=True)) for metrics in (True, False))
        print(f"{name:<22}{full.operations:>12}{full.waits:>8}{bare.operations:>14}{bare.waits:>8}", flush=True)


def print_exact_sums(options: argparse.Namespace) -> None:
    """Print the milliseconds of calls in torch with exact sums beside those with float64 sums, taken in turn."""
    heads = ("exact ms", "float64 ms", "ratio", "no metrics", "float64 ms", "ratio")
    print(f"{'objective':<22}{'tokens':>10}" + "".join(f"{head:>12}" for head in heads))
    for tokens in options.sizes:
        for name in options.objectives:
            batch = drawn(name, tokens, options, options.device)
            cells = []
            for metrics in (True, False):
                calls = [ours(name, batch, metrics=metrics, kernels=False, exact_sums=exact) for exact in (True, False)]
                rounds = [[best_ms(call, 1, options.device) for call in calls] for _ in range(options.repeats)]
                exact, floats = (min(times) for times in zip(*rounds, strict=True))
                cells += [f"{exact:.1f}", f"{floats:.1f}", f"{exact / floats:.2f}"]
            print(f"{name:<22}{tokens:>10}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1 << 16, 1 << 18, 1 << 20, 1 << 22], help="tokens")
    parser.add_argument("--objectives", nargs="+", default=list(WITH_BASELINE), choices=WITH_BASELINE)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; the fastest counts")
    parser.add_argument("--scale", type=float, default=0.05, help="standard deviation of the log ratio")
    parser.add_argument(
        "--shares", choices=("slots", "random"), default="slots", help="tokens' shares in expert partitions"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--operations", action="store_true", help="count operations and waits instead of timing")
    parser.add_argument("--exact-sums", action="store_true", help="time exact sums beside sums in float64 instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.operations:
        print_operations(options)
        return
    if options.exact_sums:
        print_exact_sums(options)
        return
    bandwidth = copy_bandwidth(options.device)
    print(f"{options.device}, {options.threads} threads, copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    print(table_line(None, options.device))
    results = []
    for tokens in options.sizes:
        for name in options.objectives:
            results.append(bench(name, tokens, bandwidth, options))
            print(table_line(results[-1], options.device), flush=True)
            if options.json is not None:  # after each, so that a run that is cut short leaves what it has measured
                _write(options, bandwidth, results)


def _write(options: argparse.Namespace, bandwidth: float, results: list[Result]) -> None:
    report = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "threads": options.threads,
        "torch": torch.__version__,
        "copy_bandwidth": bandwidth,
        "scale": options.scale,
        "shares": options.shares,
        "results": [asdict(result) for result in results],
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
