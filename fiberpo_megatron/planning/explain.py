"""This module says in words why a search's best plan is the best, and what limits it."""

from fiberpo_megatron.planning.estimate import Plan
from fiberpo_megatron.planning.hardware import Assumptions
from fiberpo_megatron.planning.options import settings
from fiberpo_megatron.planning.roofline import Bound, bounds
from fiberpo_megatron.planning.search import Found, Goal
from fiberpo_megatron.planning.show import LAYOUT_HEADINGS, layout_row, table
from fiberpo_megatron.planning.timing import GIGA


def tokens_per_gpu(plan: Plan, gpus: int) -> float:
    """Return the tokens, prompts included, that a step makes for each GPU and second."""
    return plan.scenario.tokens / plan.time.total / gpus


def found_text(found: Found, goal: Goal, assumptions: Assumptions) -> str:
    """Return the whole answer of a search as Markdown: the plans, what limits the best one, why it is the best, and its
    settings."""
    best = found.plans[0]
    headings = ("GPUs", *LAYOUT_HEADINGS, "staleness", "tokens/s/GPU", "GPU hours" if goal.price is None else "cost")
    rows = [
        [
            str(candidate.gpus),
            *layout_row(plan),
            str(candidate.staleness),
            f"{tokens_per_gpu(plan, candidate.gpus):.0f}",
            f"{goal.cost(plan, candidate.gpus):,.0f}",
        ]
        for candidate, plan in zip(found.candidates, found.plans)
    ]
    limits = "\n".join(f"- {line}" for line in limit_lines(best, assumptions))
    reasons = "\n".join(f"- {line}" for line in reason_lines(found))
    return "\n\n".join(
        [
            f"{found.looked_at:,} layouts and kinds of engines were compared. The best for {goal.steps} steps:",
            table(headings, rows),
            f"What limits the first one:\n\n{limits}",
            f"Why it is the first:\n\n{reasons}",
            settings_text(found),
        ]
    )


def limit_lines(plan: Plan, assumptions: Assumptions) -> list[str]:
    """Return sentences on what the phases of a plan are bound by, the longest phase first."""
    lines = []
    for bound in sorted(bounds(plan, assumptions), key=lambda bound: -bound.seconds)[:4]:
        first, *rest = (f"{words} ({100 * part / bound.seconds:.0f} %)" for words, part in bound.parts[:3])
        then = f", then {' and '.join(rest)}" if rest else ""
        lines.append(f"{_name(bound)}: {bound.seconds:.1f} s. Its largest part is {first}{then}.")
    if plan.time.hidden > 0:
        lines.append(
            f"Of these {plan.time.hidden:.1f} s pass at the same time as another phase, so that a step takes "
            f"{plan.time.total:.1f} s; the trainer waits {plan.time.wait:.1f} s of it."
        )
    largest, cache = plan.largest, plan.engine
    lines.append(
        f"The fullest training GPU (stage {largest.stage}) needs {largest.total / GIGA:.1f} GB of "
        f"{plan.memory / GIGA:.0f}; an engine's GPU holds {cache.weights / GIGA:.1f} GB of weights and "
        f"{cache.cache / GIGA:.1f} GB of KV cache, which are {cache.cache_tokens / cache.longest:.0f} trajectories of "
        "full length."
    )
    return lines


def reason_lines(found: Found) -> list[str]:
    """Return sentences that compare the best plan with the best ones of other choices."""
    best = found.plans[0]
    lines = []
    for words, other in found.others:
        if other.problems:
            lines.append(f"The same {words} does not fit: {other.problems[0]}.")
            continue
        more = other.time.total / best.time.total - 1
        lines.append(
            f"The best {words} takes {other.time.total:.1f} s ({100 * more:+.0f} %): {_difference(best, other)}."
        )
    return lines or ["No other choice fits into the memory of these GPUs."]


def _name(bound: Bound) -> str:
    return bound.phase[0].upper() + bound.phase[1:]


def _difference(best: Plan, other: Plan) -> str:
    """Return which phase differs most."""
    names = {
        "generate": "generation",
        "old_log_probs": "the old log-probs",
        "train": "training",
        "optimizer": "the optimizer",
        "publish": "publication",
        "memory_turns": "the memory turns of colocated engines",
    }
    changes = {words: getattr(other.time, name) - getattr(best.time, name) for name, words in names.items()}
    changes["time without overlap"] = best.time.hidden - other.time.hidden
    words, seconds = max(changes.items(), key=lambda change: change[1])
    if seconds <= 0:
        return "no phase is slower, so the two are as good as equal"
    return f"{words} takes {seconds:.1f} s more"


def settings_text(found: Found) -> str:
    """Return the best plan's settings to paste, and what this version lacks for it."""
    best, candidate = found.plans[0], found.candidates[0]
    options = settings(best)
    pairs = [f"{name} {value}" for name, value in zip(options[::2], options[1::2])]
    text = [f"Its settings, for the end of a command line ({candidate.gpus} GPUs):\n"]
    text.append("    " + " \\\n    ".join(pairs))
    if best.config.rollout.engine.tensor > best.gpu.host_gpus:
        text.append(
            f"\nAn engine of {best.config.rollout.engine.tensor} GPUs spans machines of {best.gpu.host_gpus}; a run "
            "does not start such engines itself: start them, and give their addresses in rollout.engine.urls."
        )
    return "\n".join(text)
