"""This module knows the names, units and reductions of a run's metrics.

A record is a flat mapping from slash-separated names to numbers. Every name may be logged; those listed here
have a unit, a title for plots, and a rule by which several values of one step (one per optimiser step) become
one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from math import fsum, isfinite, nan
from typing import Literal

Kind = Literal["train", "eval", "sft"]
"""What a record is about: a training step, an evaluation, a supervised step."""
Reduction = Literal["mean", "max", "min", "sum", "last"]


def steps_done(kind: str, step: int) -> int:
    """Return the steps done at a record, for an axis that training and evaluation share: records of training steps are
    numbered from 0 by the step itself, those of evaluations by the steps before them."""
    return step if kind == "eval" else step + 1


@dataclass(frozen=True)
class Metric:
    """This describes one metric, or all that match a pattern."""

    pattern: str
    """Name; `*` stands for any characters."""
    title: str
    unit: str
    """Unit of the values: "" for pure numbers, "share" for numbers in [0, 1]."""
    reduction: Reduction = "mean"


METRICS: tuple[Metric, ...] = (
    Metric("*/avg@*/low", "lower end of an average accuracy's 95 % interval", "share"),
    Metric("*/avg@*/high", "upper end of an average accuracy's 95 % interval", "share"),
    Metric("*/avg@*", "accuracy on an evaluation set, mean over n samples", "share"),
    Metric("*/pass@*/low", "lower end of a pass@k's 95 % interval", "share"),
    Metric("*/pass@*/high", "upper end of a pass@k's 95 % interval", "share"),
    Metric("*/pass@*", "prompts of an evaluation set of which one of k samples is right", "share"),
    Metric("*/maj@*/low", "lower end of a majority accuracy's 95 % interval", "share"),
    Metric("*/maj@*/high", "upper end of a majority accuracy's 95 % interval", "share"),
    Metric("*/maj@*", "prompts of an evaluation set whose most frequent answer is right", "share"),
    Metric("overlong/penalty_mean", "mean penalty of responses near the length limit", ""),
    Metric("overlong/penalised_share", "trajectories with a penalty for their length", "share"),
    Metric("reward/mean", "mean reward", ""),
    Metric("reward/std", "standard deviation of rewards", ""),
    Metric("reward/*/mean", "mean component of the reward", ""),
    Metric("failed_share", "trajectories whose environment failed", "share"),
    Metric("environment/*/mean", "mean of an environment's number", ""),
    Metric("environment/*", "count of an environment", "", "sum"),
    Metric("accuracy", "accuracy", "share"),
    Metric("accuracy/*", "accuracy by domain", "share"),
    Metric("response_length/mean", "mean response length", "tokens"),
    Metric("response_length/max", "longest response", "tokens", "max"),
    Metric("turns/mean", "turns of the policy in a trajectory", ""),
    Metric("branches/mean", "token sequences of a trajectory", ""),
    Metric("branches/max", "most token sequences of a trajectory", "", "max"),
    Metric("branches/split", "trajectories whose sequences lie in several micro-batches", "", "sum"),
    Metric("truncated_share", "truncated responses", "share"),
    Metric("entropy", "entropy of the next-token distribution", "nats"),
    Metric("entropy_bonus/mean", "entropy of the next-token distribution, by the tokens' weights", "nats"),
    Metric("entropy_bonus/coefficient", "coefficient of the entropy", "", "last"),
    Metric("kl/mean", "KL divergence from the reference", "nats"),
    Metric("kl/k1_mean", "mean log ratio to the reference", "nats"),
    Metric("kl/loss", "KL divergence from the reference, times its coefficient", "nats"),
    Metric("kl/coefficient", "coefficient of the KL divergence", "", "last"),
    Metric("ratio/mean", "mean importance ratio", ""),
    Metric("ratio/p99", "99th percentile of importance ratios", "", "max"),
    Metric("ratio/max", "largest importance ratio", "", "max"),
    Metric("effective_sample_size", "effective sample size", "share"),
    Metric("objective/value", "objective", ""),
    Metric("token/count", "response tokens", "tokens", "sum"),
    Metric("token/weight", "weight of all tokens", ""),
    Metric("token/*", "token-level clipping", "share"),
    Metric("amplification/max", "largest gradient for a token's weight and advantage", "", "max"),
    Metric("amplification/level", "level that the largest gradient comes from", "", "last"),
    Metric("amplification/node/*", "id of the node that the largest gradient comes from", "", "last"),
    Metric("gate/time_share", "time in the gate, reductions included", "share"),
    Metric("gate/reduce_share", "time in the reductions of the gate", "share"),
    Metric("gate/reduce_bytes", "size of the gate's reductions in an optimiser step", "bytes"),
    Metric("gate/*/total_variation/*", "bound on the total variation of a node", ""),
    Metric("gate/*/nodes", "nodes of the level", ""),
    Metric("gate/*/s_plus/p99", "99th percentile of S+", "", "max"),
    Metric("gate/*/s_minus/p99", "99th percentile of S-", "", "max"),
    Metric("gate/*/s_*", "aggregate drift", ""),
    Metric("gate/*/base_weight/*", "base weight", ""),
    Metric("gate/*", "gate regime", "share"),
    Metric("expert/mass/*", "weight routed to an expert partition", "share"),
    Metric("expert/drift/*", "mean |log ratio| of an expert partition", "nats"),
    Metric("expert/entropy", "entropy of the expert weights", "nats"),
    Metric("drift/mismatch", "|engine - trainer| log-prob, tokens sampled with the trainer's weights", "nats"),
    Metric("drift/staleness", "|engine - trainer| log-prob, tokens sampled with older weights", "nats"),
    Metric("drift/optimiser_steps", "|log ratio| to the policy before a step's optimiser steps", "nats"),
    Metric("lag/mean", "versions by which the weights that sampled a token lie behind the trainer's", "versions"),
    Metric("lag/max", "the same of the oldest token", "versions", "max"),
    Metric("lag/token_share/*", "response tokens by lag", "share"),
    Metric("idle/trainer_seconds", "time in which the trainer waited for trajectories", "s", "sum"),
    Metric("rollout/tail_seconds", "time from the end of the median trajectory to that of the last one", "s", "max"),
    Metric("idle/engine_seconds", "seconds in which an engine had no request, mean over the engines", "s"),
    Metric("requests/*", "requests that were asked elsewhere, went on behind an abort, or came from disk", "", "sum"),
    Metric("drift/lag/*", "|engine - trainer| log-prob by the lag of the weights that sampled a token", "nats"),
    Metric("drift/engine/*", "|engine - trainer| log-prob of an engine's tokens, trainer's weights", "nats"),
    Metric("mismatch/masked_engines", "engines whose tokens are masked", "", "max"),
    Metric("importance/weight*", "mean importance weight of a token", ""),
    Metric("importance/masked_share*", "tokens that importance weights mask", "share"),
    Metric("importance/effective_sample_size*", "effective sample size of the importance weights", "share"),
    Metric("rollout_diff/mean", "mean |rollout - trainer| log-prob", "nats"),
    Metric("rollout_diff/max", "largest |rollout - trainer| log-prob", "nats", "max"),
    Metric("routing_agreement/layer_*", "tokens of which engine and trainer chose the same experts, by layer", "share"),
    Metric("routing_agreement/lag/*", "the same by the lag of the weights that the engine had", "share"),
    Metric("routing_agreement/mean", "tokens of which engine and trainer chose the same experts", "share"),
    Metric("curriculum/share/*", "prompts of a domain", "share", "last"),
    Metric("curriculum/solve_rate/*", "running solve rate of a domain", "share", "last"),
    Metric("distillation/reverse_kl", "divergence from the teacher at sampled tokens", "nats"),
    Metric("distillation/clipped_share", "tokens whose distillation advantage is clipped", "share"),
    Metric("distillation/unknown_share", "tokens that the teacher could not score", "share"),
    Metric("off_policy_mask/weight_share", "weight of masked tokens", "share"),
    Metric("off_policy_mask/drift", "mean log(rollout / policy)", "nats"),
    Metric("supervised/token_share", "response tokens of right answers", "share"),
    Metric("supervised/log_prob", "mean log-prob of right answers", "nats"),
    Metric("truncated/left_out_share", "trajectories left out because they were cut", "share"),
    Metric("truncated/steps_without_training", "steps all of whose trajectories were left out", "", "sum"),
    Metric("filter/dropped_groups", "groups that were dropped because they do not differ", "", "sum"),
    Metric("filter/refilled_groups", "prompts that were drawn in the place of dropped ones", "", "sum"),
    Metric("filter/aborted_groups", "prompts that were drawn and not needed", "", "sum"),
    Metric("filter/missing_share", "groups that a step lacks after all refills", "share"),
    Metric("filter/steps_without_training", "steps none of whose groups differ", "", "sum"),
    Metric("filter/accuracy", "accuracy of all groups that the filter looked at", "share"),
    Metric("scoring/*/trajectories", "trajectories that servers scored", "", "sum"),
    Metric("scoring/*/retries", "scoring requests that were sent again", "", "sum"),
    Metric("scoring/*/seconds", "time of scoring requests, summed over trajectories", "s", "sum"),
    Metric("gradient_norm", "gradient norm before clipping", ""),
    Metric("gradient_norm_max", "largest gradient norm before clipping", "", "max"),
    Metric("extra_forwards", "extra forward passes", "", "sum"),
    Metric("kept_forward_share", "old log-probs whose forward pass an optimiser step goes on from", "share", "last"),
    Metric("learning_rate", "learning rate", "", "last"),
    Metric("loss", "loss", "nats"),
    Metric("tokens_per_second", "throughput", "tokens/s", "last"),
    Metric("useful_token_share", "computed positions that are not padding", "share"),
    Metric("load_imbalance", "positions of the most loaded rank above the mean", "share", "max"),
    Metric("micro_batches", "micro-batches of a rank", "", "sum"),
    Metric("seconds/*", "time of a phase", "s", "sum"),
    Metric("expected/seconds/*", "time that a plan expects of a phase with the step's trajectories", "s", "sum"),
    Metric("expected/tokens_per_second", "throughput that a plan expects", "tokens/s", "last"),
    Metric("expected/micro_batches", "micro-batches of a rank that a plan expects", "", "sum"),
    Metric("planned/seconds/*", "time that was planned for a phase before the start", "s", "sum"),
    Metric("planned/tokens_per_second", "throughput that was planned before the start", "tokens/s", "last"),
    Metric("planned/micro_batches", "micro-batches of a rank that were planned before the start", "", "sum"),
    Metric("planned/response_length/mean", "mean response that was planned before the start", "tokens"),
    Metric("tflops_per_gpu/*", "useful operations of a phase on each GPU", "TFLOP/s", "last"),
    Metric("mfu/*", "model FLOP utilisation of a phase", "share", "last"),
    Metric("tokens_per_second_per_gpu/train", "trained tokens on each training GPU", "tokens/s", "last"),
    Metric("tokens_per_second_per_gpu/generate", "sampled tokens on each GPU of the engines", "tokens/s", "last"),
    Metric("idle_share", "time in which training waits for trajectories, engines or files", "share", "last"),
    Metric("memory/peak_gib", "peak of GPU memory in tensors, of the fullest rank", "GiB", "max"),
    Metric(
        "memory/reserved_peak_gib", "peak of GPU memory with the allocator's cache, of the fullest rank", "GiB", "max"
    ),
    Metric("memory/host_peak_gib", "peak of host memory of a training process, of the fullest rank", "GiB", "max"),
    Metric("slowest/*/rank", "rank that is furthest above the median of its peers in a phase", "", "last"),
    Metric(
        "slowest/*/excess_seconds", "time by which a phase's slowest rank is above the median of its peers", "s", "max"
    ),
    Metric(
        "slowest/*/excess_share",
        "time by which a phase's slowest rank is above the median of its peers",
        "share",
        "max",
    ),
    Metric("goodput", "time in steps that count, of the time since the run first began", "share", "last"),
    Metric("restart/count", "restarts of the run so far", "", "last"),
    Metric("restart/lost_seconds", "time lost to restarts so far", "s", "last"),
    Metric("energy/joules", "energy of this machine's GPUs", "J", "sum"),
    Metric("energy/joules_per_token", "energy of a trained token", "J/token", "last"),
    Metric("disk/free_gib", "free bytes of the run folder's file system", "GiB", "min"),
    Metric("disk/checkpoint_gib", "size of the newest checkpoint", "GiB", "last"),
    Metric("engines/serving", "engines that answered after the step", "", "last"),
    Metric("engines/not_answering", "engines of the run that did not serve after the step", "", "last"),
    Metric("engines/restarts", "how often engines have joined the run again", "", "last"),
    Metric("engines/queued", "requests in the engines' queues after the step", "", "last"),
    Metric("groups/zero_variance_share", "groups whose trajectories have the same reward", "share"),
    Metric("gpu/*/utilisation", "GPU utilisation", "%"),
    Metric("gpu/*/memory_used", "GPU memory in use", "GiB", "max"),
    Metric("gpu/*/power", "GPU power", "W"),
    Metric("gpu/*/temperature", "GPU temperature", "°C", "max"),
    Metric("gpu/*/ecc_uncorrected", "uncorrected ECC errors since boot", "", "last"),
    Metric("gpu/*/throttled", "GPU clocks held back", "share", "max"),
    Metric("*/reward/mean", "mean reward on an evaluation set", ""),
    Metric("*/response_length/mean", "mean response length on an evaluation set", "tokens"),
    Metric("*/truncated_share", "truncated responses on an evaluation set", "share"),
    Metric("*/failed_share", "trajectories of an evaluation set whose environment failed", "share"),
)

_REDUCERS: dict[Reduction, Callable[[list[float]], float]] = {
    "mean": lambda values: fsum(values) / len(values),
    "max": max,
    "min": min,
    "sum": fsum,
    "last": lambda values: values[-1],
}


@lru_cache(maxsize=4096)
def describe(name: str) -> Metric:
    """Return the first listed metric that matches `name`; for an unknown name a plain one that is averaged."""
    for metric in METRICS:
        if fnmatchcase(name, metric.pattern):
            return metric
    return Metric(name, name, "")


def combine(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return one value per name from several records of the same step, in order, by each metric's reduction.

    Names may be missing in some records. A value that is not finite makes the result nan: it must be seen.
    """
    values: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            values.setdefault(name, []).append(float(value))
    return {name: _reduce(describe(name).reduction, numbers) for name, numbers in values.items()}


def _reduce(reduction: Reduction, values: list[float]) -> float:
    if not all(map(isfinite, values)):
        return nan
    return _REDUCERS[reduction](values)


def format_value(name: str, value: float) -> str:
    """Return a value with its unit, short enough for a line of the console."""
    unit = describe(name).unit
    if unit == "share":
        return f"{100 * value:.1f} %"
    digits = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{digits} {unit}" if unit else digits
