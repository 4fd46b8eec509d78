"""This module holds the built-in alarm rules. docs/alarms.md has a paragraph about each; tests/telemetry shows each a
recorded run that has the fault and one that has not."""

from statistics import median

from fiberpo_megatron.telemetry.alarms.history import SMOOTH, History
from fiberpo_megatron.telemetry.alarms.machine_rules import MACHINE_RULES
from fiberpo_megatron.telemetry.alarms.rule import Rule, Seen, level, relative
from fiberpo_megatron.telemetry.metrics import format_value

SOLVED = 0.95
"""With at least this accuracy a policy may be sure of itself: its entropy is no collapse."""
DRIFT_FLOOR = 0.01
"""Nats: partitions that drift less are not compared."""
CORE = ("reward/mean", "entropy", "gradient_norm", "objective/value", "ratio/max", "rollout_diff/mean", "kl/mean")
"""Metrics that must be finite in every step."""


def _solved(history: History) -> bool:
    accuracy = history.now("accuracy")
    return accuracy is not None and accuracy >= SOLVED


def _reward_rises(history: History) -> bool:
    """Return whether the training reward has risen by more than a twentieth of its spread since the start."""
    now, start, spread = history.now("reward/mean"), history.start("reward/mean"), history.start("reward/std")
    return now is not None and start is not None and now > start + 0.05 * max(spread or 0.0, 1e-6)


def _reward_hacking(history: History) -> Seen | None:
    best, newest = history.best, history.evaluation
    rewards = history.first("reward/mean")
    if best is None or newest is None or newest.reward is None or len(rewards) < SMOOTH:
        return None
    before = best.reward if best.reward is not None else median(rewards[:SMOOTH])
    drop = best.accuracy - newest.accuracy
    words = (
        f"held-out accuracy is {newest.accuracy:.3f} after {best.accuracy:.3f} at {best.done} steps, while the "
        f"training reward went from {before:.3g} to {newest.reward:.3g}"
    )
    return Seen("accuracy", drop if newest.reward > before else 0.0, words)


def _held_out_drop(history: History) -> Seen | None:
    best, newest = history.best, history.evaluation
    if best is None or newest is None or best.accuracy <= 0:
        return None
    words = f"held-out accuracy is {newest.accuracy:.3f} after {best.accuracy:.3f} at {best.done} steps"
    return Seen("accuracy", 1 - newest.accuracy / best.accuracy, words)


def _expert_drift(history: History) -> Seen | None:
    found = {name: history.now(name) for name in history.names("expert/drift/")}
    known = {name: value for name, value in found.items() if value is not None}
    if len(known) < 3:
        return None
    worst = max(known, key=lambda name: known[name])
    middle = max(median(known.values()), DRIFT_FLOOR)
    words = (
        f"expert partition {worst.rpartition('/')[2]} drifts by {format_value(worst, known[worst])} a token, the "
        f"median partition by {format_value(worst, median(known.values()))} (medians of {SMOOTH} steps)"
    )
    return Seen(worst, known[worst] / middle, words)


def _gradient_spikes(history: History) -> Seen | None:
    norms = history.recent("gradient_norm_max", 20)
    usual = median(norms) if len(norms) >= 10 else 0.0
    if usual <= 0:
        return None
    third = sorted(norms)[-3]
    words = (
        f"three of the last {len(norms)} steps have a gradient norm of {third:.3g} or more, and half of them have "
        f"{usual:.3g} at most"
    )
    return Seen("gradient_norm_max", third / usual, words)


def _not_finite(history: History) -> Seen | None:
    values = {name: history.latest(name) for name in CORE}
    bad = [name for name, value in values.items() if value is not None and value != value]
    return Seen(bad[0] if bad else CORE[0], float(len(bad)), f"{', '.join(bad) or 'no metric'} is not finite")


LEARNING_RULES: tuple[Rule, ...] = (
    Rule(
        "entropy_collapse",
        "The policy has become certain of its tokens before it solves the task: groups stop to differ, and learning "
        "ends.",
        limit=0.2,
        of=f"entropy over that of the first steps, while accuracy is below {SOLVED}",
        read=relative("entropy", fine=_solved),
        below=True,
        causes=(
            "positive advantages sharpen the same tokens in every step",
            "the learning rate is too high",
            "the upper clip width leaves rare tokens no room to grow",
        ),
        setting="algorithm.entropy.target: the entropy of the first steps, so that a bonus is steered to keep it",
    ),
    Rule(
        "entropy_growth",
        "The policy becomes random: it unlearns what it could.",
        limit=2.0,
        of="entropy over that of the first steps",
        read=relative("entropy", floor=0.05),
        causes=(
            "the learning rate is too high, so that updates overshoot",
            "tokens with negative advantages are pushed without a bound",
            "rewards are noise",
        ),
        setting="optimizer.learning_rate: divide it by three, from a checkpoint before the growth began",
    ),
    Rule(
        "long_responses",
        "Responses grow while the reward does not: length is no longer used for the task.",
        limit=1.4,
        of="mean response length over that of the first steps, while the training reward has not risen",
        read=relative("response_length/mean", floor=1.0, fine=_reward_rises),
        causes=(
            "long wrong answers are penalised less per token than short ones (weighting seq-mean)",
            "the reward pays for length",
            "the policy no longer ends its responses",
        ),
        setting='algorithm.weighting: "constant", which takes the incentive to long wrong answers away',
    ),
    Rule(
        "truncation",
        "Many responses are cut before their end, so that their rewards say little.",
        limit=0.3,
        of="share of truncated responses",
        read=level("truncated_share"),
        causes=("responses grow beyond the limit", "the limit is too low for the task", "the policy repeats itself"),
        setting='rollout.max_response_tokens: raise it, or set algorithm.truncated to "leave_out"',
    ),
    Rule(
        "reward_hacking",
        "The training reward is higher than at the best evaluation, but held-out accuracy has fallen: the policy "
        "learns what the reward pays for, not the task.",
        limit=0.05,
        of="fall of held-out accuracy since its best, while the training reward has risen",
        read=_reward_hacking,
        kind="eval",
        steps=2,
        calm=2,
        causes=(
            "the reward can be had without the task (its format, length, or a weak check)",
            "the training prompts are learnt by heart",
            "training prompts have become easier by a curriculum",
        ),
        setting="algorithm.kl.coefficient: 0.01, and read the highest rewarded rollouts",
    ),
    Rule(
        "held_out_drop",
        "Held-out accuracy has lost much of its best value.",
        limit=0.3,
        of="share of the best held-out accuracy that is lost",
        read=_held_out_drop,
        kind="eval",
        steps=2,
        calm=2,
        causes=("the policy has collapsed", "over-training on few prompts", "the learning rate is too high"),
        setting='checkpoint.keep_best_metric: "eval/accuracy", and go on from that checkpoint with a third of the '
        "learning rate",
    ),
    Rule(
        "ratio_tail",
        "Tokens are far from the policy that sampled them: single tokens and trajectories dominate the update.",
        limit=5.0,
        of="99th percentile of importance ratios",
        read=level("ratio/p99", window=3),
        steps=1,
        causes=(
            "too many optimiser steps on the same trajectories",
            "the learning rate is too high",
            "the gates' budgets are too wide to stop the tail",
        ),
        setting="batch.epochs: 1 (or fewer batch.mini_batches), then optimizer.learning_rate",
    ),
    Rule(
        "expert_drift",
        "One partition of experts moves much further than the others in a step.",
        limit=4.0,
        of=f"largest expert/drift over the median partition's, which counts as at least {DRIFT_FLOOR} nats",
        read=_expert_drift,
        causes=(
            "few tokens are routed to it, so that each moves it far",
            "routers move while experts learn",
            "one domain alone uses it",
        ),
        setting='algorithm.routing_replay: "old", or a smaller budget of the expert level in algorithm.budgets',
    ),
    Rule(
        "mismatch_growth",
        "The engine's log-probs move away from the trainer's for the same weights and tokens.",
        limit=3.0,
        of="mean |rollout - trainer| log-prob over that of the first steps, both at least 0.005 nats",
        read=relative("rollout_diff/mean", floor=0.005),
        causes=(
            "routing of experts differs between engine and trainer",
            "weights have grown to where bfloat16 rounds coarsely",
            "engines serve older weights than they say",
        ),
        setting='algorithm.routing_replay: "rollout" for a MoE model; algorithm.off_policy_mask.delta for the tail',
    ),
    Rule(
        "gradient_spikes",
        "Single steps have gradients far beyond the usual ones.",
        limit=10.0,
        of="third largest gradient norm of the last 20 steps over their median",
        read=_gradient_spikes,
        steps=1,
        causes=("few trajectories with large advantages", "ratio tails", "a router that flips"),
        setting="optimizer.clip_grad: about twice the usual norm",
    ),
    Rule(
        "not_finite",
        "A figure of the step is not a number.",
        limit=0.0,
        of="metrics of the step that are not finite",
        read=_not_finite,
        steps=1,
        calm=1,
        causes=("an overflow in the objective or the model", "a reward that is not finite", "broken hardware"),
        setting="debug.dump_step: a step before it, and read what the objective saw",
    ),
    Rule(
        "no_signal",
        "In most groups all trajectories have the same reward: their advantages are zero, and the step learns nothing "
        "from them.",
        limit=0.8,
        of="share of groups without a difference in reward",
        read=level("groups/zero_variance_share"),
        causes=("prompts are all solved or all too hard", "entropy has collapsed", "too few samples of a prompt"),
        setting='data.curriculum: "adaptive", or a higher batch.samples_per_prompt',
    ),
    Rule(
        "few_groups",
        "The filter finds too few groups that differ, so that steps are smaller than they should be.",
        limit=0.5,
        of="share of a step's groups that are missing after all refills",
        read=level("filter/missing_share"),
        causes=("prompts are all solved or all too hard", "too few refills", "too few samples of a prompt"),
        setting="batch.filter.max_refills: raise it, or a higher batch.samples_per_prompt",
    ),
    Rule(
        "kl",
        "The policy is far from its reference.",
        limit=0.5,
        of="KL divergence from the reference per token, in nats",
        read=level("kl/mean"),
        causes=("the coefficient is too small for the learning rate", "reward hacking", "a collapse"),
        setting="algorithm.kl.coefficient: double it, or set algorithm.kl.target",
    ),
)
RULES: tuple[Rule, ...] = (*LEARNING_RULES, *MACHINE_RULES)
"""All built-in rules, those of learning first."""
