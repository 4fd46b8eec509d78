"""This module says which charts a run has, as data: the static report and the live page draw the same panels.

`panel_sections` maps the names of the metrics that a run has logged to sections of panels. A panel names its metrics
and says how they are drawn, and holds no numbers. The module imports the standard library and `telemetry.metrics` only.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from fiberpo_megatron.telemetry import machine_panels
from fiberpo_megatron.telemetry.machine_panels import PHASES
from fiberpo_megatron.telemetry.metrics import Kind, describe
from fiberpo_megatron.telemetry.panel_maker import (
    MOST_CURVES,
    MOST_PANELS,
    Curve,
    Keys,
    Panel,
    PanelMaker,
    PanelSection,
)

__all__ = ["MOST_CURVES", "MOST_PANELS", "PHASES", "Curve", "Panel", "PanelSection", "panel_sections"]

STATES = {"pass": "#7fc8a9", "rollback": "#f2b84b", "zeroed": "#d1495b"}
"""Colours for what a gate does to a node."""
REGIMES = {
    "both_pass": ("both pass", "#7fc8a9"),
    "one_rollback": ("one in rollback", "#f6d58a"),
    "both_rollback": ("both beyond, some in rollback", "#f2b84b"),
    "one_zeroed": ("one zeroed", "#e58b94"),
    "both_zeroed": ("both zeroed", "#b5303f"),
}
"""Labels and colours for what the two channels of a node do together."""
CHANNELS = (("plus", "S⁺"), ("minus", "S⁻"))
HELD_OUT_COLOUR = "#D55E00"
MOST_LEVELS = 30
"""Gated levels with a section of their own."""


def panel_sections(names: Mapping[Kind, Sequence[str]]) -> list[PanelSection]:
    """Return the sections of a run, in the order in which they are shown; none is empty.

    Args:
        names: the metrics of each kind of record, in the order in which they were first logged. Every one of them is
            drawn by some panel, except those that only repeat others (such as times inside a phase).
    """
    panels = PanelMaker(names)
    makers: list[tuple[str, Iterable[Panel | None]]] = [
        ("Learning", _learning(panels)),
        ("Domains", _domains(panels)),
        ("Evaluation sets", _evaluation_sets(panels)),
        ("Environments", _environments(panels)),
        ("Policy movement", _movement(panels)),
        ("Terms of the objective", _terms(panels)),
        *((f"Gate of level: {level}", _gate(panels, level)) for level in panels.levels()[:MOST_LEVELS]),
        ("Experts", _experts(panels)),
        ("Speed", machine_panels.speed(panels)),
        ("Efficiency", machine_panels.efficiency(panels)),
        ("Slowest ranks", machine_panels.slowest(panels)),
        ("Engines", machine_panels.engines(panels)),
        ("Memory and disk", machine_panels.memory(panels)),
        ("GPUs", machine_panels.gpus(panels)),
        ("Supervised warm-up", _supervised(panels)),
        ("Other metrics", _other(panels)),
    ]
    sections, keys = [], Keys()
    for title, made in makers:
        found = list(islice((panel for panel in made if panel is not None), MOST_PANELS + 1))
        own = Keys()
        shown = tuple(replace(panel, key=own.of(panel.title)) for panel in found[:MOST_PANELS])
        if shown:
            sections.append(PanelSection(keys.of(title), title, shown, cut=len(found) > MOST_PANELS))
    return sections


def _learning(panels: PanelMaker) -> Iterator[Panel | None]:
    yield _accuracy(panels, "Accuracy", "accuracy", "share of right responses, sampled at the rollout temperature")
    label = "mean ± standard deviation" if "reward/std" in panels.names.get("train", ()) else "mean"
    yield panels.make(
        "Reward", [Curve("reward/mean", label, band="reward/std")], note="over all trajectories of a step"
    )
    yield panels.lines(
        "Entropy",
        {"entropy": "entropy"},
        note="of the next-token distribution; near 0 the policy no longer explores",
    )
    yield panels.lines(
        "Response length", {"response_length/mean": "mean", "response_length/max": "longest of the step"}
    )
    yield panels.lines(
        "Penalty for long responses",
        {"overlong/penalty_mean": "mean penalty"},
        note="what is added to rewards of responses near the length limit; the reward's own chart is without it",
    )
    yield panels.lines("Penalised responses", {"overlong/penalised_share": "with a penalty for their length"})
    yield panels.lines("Turns", {"turns/mean": "of the policy in a trajectory"})
    yield panels.lines(
        "Truncated responses",
        {"truncated_share": "cut at the length limit", "truncated/left_out_share": "left out of training"},
    )
    yield panels.lines(
        "Groups without a signal",
        {"groups/zero_variance_share": "same reward throughout"},
        note="groups whose trajectories have the same reward bring no gradient",
    )
    for name in (
        "reward/mean",
        "response_length/mean",
        "response_length/max",
        "truncated_share",
        "reward/std",
        "turns/mean",
    ):
        panels.has("eval", name)  # close to the training ones; metrics.jsonl has them


def _accuracy(panels: PanelMaker, title: str, name: str, note: str) -> Panel | None:
    curves = [
        Curve(name, "training prompts"),
        Curve(name, "held-out prompts", "eval", HELD_OUT_COLOUR, markers=True),
    ]
    return panels.make(title, curves, note=note)


def _domains(panels: PanelMaker) -> Iterator[Panel | None]:
    """Yield the domains side by side, then each one alone; nothing where there is only one."""
    train, held_out = panels.matching(r"accuracy/(.+)"), panels.matching(r"accuracy/(.+)", "eval")
    names = sorted({**train, **held_out})
    for name in names:
        panels.has("train", name)
        panels.has("eval", name)
    if len(names) > 1:
        yield panels.lines("Accuracy of the training prompts", train)
        curves = [Curve(name, label, "eval", markers=True) for name, label in held_out.items()]
        yield panels.make("Accuracy of the held-out prompts", curves)
        for name in names:
            yield _accuracy(panels, f"Accuracy: {name.removeprefix('accuracy/')}", name, "")
    shares = panels.matching(r"curriculum/share/(.+)")
    yield panels.make("Prompts by domain", [Curve(name, label) for name, label in shares.items()], form="stack")
    yield panels.lines("Running solve rate", panels.matching(r"curriculum/solve_rate/(.+)"))


def _evaluation_sets(panels: PanelMaker) -> Iterator[Panel | None]:
    """Yield what was measured on each evaluation set, and the sets side by side."""
    average, sets = panels.matching(r"(.+)/avg@\d+", "eval"), dict[str, dict[str, str]]()
    for name, label in panels.matching(r"(.+/(?:avg|pass|maj)@\d+)", "eval").items():
        one, _, metric = label.rpartition("/")
        sets.setdefault(one, {})[name] = metric
        for end in ("low", "high"):
            panels.has("eval", f"{name}/{end}")
    if len(average) > 1:
        curves = [Curve(name, label, "eval", markers=True) for name, label in average.items()]
        yield panels.make("Average accuracy of the sets", curves)
    note = "mean over n samples, at least one of k right, and the most frequent answer"
    for one, names in sets.items():
        curves = [Curve(name, label, "eval", markers=True) for name, label in names.items()]
        yield panels.make(f"Evaluation set: {one}", curves, note=note)
    for title, end in (
        ("Rewards of the sets", "reward/mean"),
        ("Response length of the sets", "response_length/mean"),
        ("Truncated responses of the sets", "truncated_share"),
        ("Failed trajectories of the sets", "failed_share"),
    ):
        names = {name: label for name, label in panels.matching(rf"(.+)/{end}", "eval").items() if label in sets}
        yield panels.lines(title, names, kind="eval")


def _environments(panels: PanelMaker) -> Iterator[Panel | None]:
    """Yield components of rewards, other numbers of the environments, and their failures."""
    for title, pattern, note in (
        ("Components of the reward", r"reward/(.+)/mean", "mean over the trajectories that have the component"),
        ("Numbers of the environments", r"environment/(.+)/mean", "mean over the trajectories that have the number"),
        ("Events of the environments", r"environment/(.+)", "counts of a step: failures, trajectories that began anew"),
    ):
        yield panels.lines(title, panels.matching(pattern), note=note)
    yield panels.lines("Failed trajectories", {"failed_share": "kept with reward 0"})


def _movement(panels: PanelMaker) -> Iterator[Panel | None]:
    yield panels.lines(
        "Importance ratio",
        {"ratio/mean": "mean", "ratio/p99": "99th percentile", "ratio/max": "max"},
        log=True,
        note="current over old policy, per token; 1 is on-policy",
    )
    yield panels.lines(
        "Drift by cause",
        {
            "drift/mismatch": "mismatch of engine and trainer",
            "drift/staleness": "older weights of the engine",
            "drift/optimiser_steps": "optimiser steps",
        },
        log=True,
        note="mean |difference of log-probs| of a token: tokens sampled with the trainer's own weights, tokens sampled "
        "with older ones, and what the optimiser steps on a batch add",
    )
    yield panels.lines("Lag of tokens", {"lag/mean": "mean", "lag/max": "oldest"}, note="in versions of the weights")
    yield panels.lines("Tokens by lag", panels.matching(r"lag/token_share/(.+)"))
    yield panels.lines(
        "Waiting",
        {
            "idle/trainer_seconds": "trainer",
            "idle/engine_seconds": "engines",
            "rollout/tail_seconds": "last trajectory after the median one",
        },
    )
    yield panels.lines(
        "Drift by lag",
        panels.matching(r"drift/lag/(.+)"),
        log=True,
        note="mean |difference of log-probs| of a token, by how many versions older its weights were",
    )
    yield panels.lines(
        "Mismatch by engine",
        panels.matching(r"drift/engine/(.+)"),
        log=True,
        note="mean |difference of log-probs| of the tokens that each engine sampled with the trainer's own weights",
    )
    yield from _importance(panels)
    yield panels.lines(
        "Clipped tokens", {"token/clip_share": "clipped"}, note="tokens whose own clip stops their direct gradient"
    )
    yield panels.make(
        "Trajectories by clipped tokens",
        [
            Curve("token/trajectories_none_clipped", "none clipped", colour=STATES["pass"]),
            Curve("token/trajectories_some_clipped", "some", colour=STATES["rollback"]),
            Curve("token/trajectories_all_clipped", "all", colour=STATES["zeroed"]),
        ],
        form="stack",
    )
    yield panels.lines(
        "Rollout against trainer",
        {"rollout_diff/mean": "mean", "rollout_diff/max": "max"},
        log=True,
        note="|log-prob of the engine − log-prob of the trainer| of the sampled tokens, same weights",
    )
    yield panels.lines(
        "Gradient norm",
        {"gradient_norm": "mean of the steps", "gradient_norm_max": "max"},
        note="before clipping",
    )
    yield panels.lines("Effective sample size", {"effective_sample_size": "share of the tokens' weight"})
    yield panels.lines("Objective", {"objective/value": "J"}, note="mean over the optimiser steps of a step")
    yield panels.lines("Learning rate", {"learning_rate": "learning rate"})
    yield panels.lines(
        "Largest amplification",
        {"amplification/max": "|coefficient| over weight and |advantage|"},
        log=True,
        note="of one token in a step",
    )


def _importance(panels: PanelMaker) -> Iterator[Panel | None]:
    """Yield the importance weights over all tokens, by lag and by engine."""
    yield panels.lines(
        "Engines that are masked", {"mismatch/masked_engines": "engines"}, note="by algorithm.mismatch.mask"
    )
    for title, name, note in (
        ("Importance weight", "weight", "mean of a token; 1 without truncation and masks, in expectation"),
        ("Masked tokens", "masked_share", "tokens whose importance weight is 0"),
        ("Effective sample size of importance weights", "effective_sample_size", "(sum w)² / (n sum w²)"),
    ):
        yield panels.lines(title, {f"importance/{name}": "all tokens"}, note=note)
        yield panels.lines(f"{title} by lag", panels.matching(rf"importance/{name}/lag/(.+)"), note=note)
        yield panels.lines(f"{title} by engine", panels.matching(rf"importance/{name}/engine/(.+)"), note=note)


def _terms(panels: PanelMaker) -> Iterator[Panel | None]:
    yield panels.lines("KL divergence from the reference", {"kl/mean": "mean", "kl/k1_mean": "mean log ratio"})
    yield panels.lines("Coefficients", {"kl/coefficient": "KL divergence", "entropy_bonus/coefficient": "entropy"})
    yield panels.lines("Divergence from the teacher", {"distillation/reverse_kl": "at sampled tokens"})
    yield panels.lines(
        "Masked and unknown tokens",
        {
            "off_policy_mask/weight_share": "masked as off-policy",
            "distillation/clipped_share": "distillation advantage clipped",
            "distillation/unknown_share": "not scored by the teacher",
        },
    )


def _gate(panels: PanelMaker, level: str) -> Iterator[Panel | None]:
    head = f"gate/{level}"
    yield panels.make(
        "Joint regimes",
        [Curve(f"{head}/regime/{name}", label, colour=colour) for name, (label, colour) in REGIMES.items()],
        form="stack",
        note="share of the level's nodes; what their two channels do together",
    )
    for channel, sign in CHANNELS:
        yield panels.make(
            f"{sign} channel",
            [Curve(f"{head}/{channel}/{state}", state, colour=colour) for state, colour in STATES.items()],
            form="stack",
            note="share of the level's nodes",
        )
    for channel, sign in CHANNELS:
        yield panels.lines(
            f"Aggregate drift {sign}",
            {f"{head}/s_{channel}/mean": "mean", f"{head}/s_{channel}/p99": "99th percentile"},
            note="of a node, before its gate",
        )
    yield panels.lines(
        "Base weight", {f"{head}/base_weight/mean": "mean", f"{head}/base_weight/p99": "99th percentile"}
    )
    yield panels.lines(
        "Bound on the total variation",
        {f"{head}/total_variation/mean": "mean", f"{head}/total_variation/p99": "99th percentile"},
        note="between old and current policy over a node's tokens",
    )


def _experts(panels: PanelMaker) -> Iterator[Panel | None]:
    weights = panels.matching(r"expert/mass/(.+)")
    curves = [Curve(name, label) for name, label in weights.items()]
    yield panels.make("Weight by expert partition", curves, form="stack")
    yield panels.lines("Drift by expert partition", panels.matching(r"expert/drift/(.+)"))
    yield panels.lines("Entropy of the expert weights", {"expert/entropy": "entropy"})
    yield panels.lines(
        "Routing agreement",
        {name: label.replace("_", " ") for name, label in panels.matching(r"routing_agreement/(.+)").items()},
        note="tokens for which engine and trainer chose the same experts",
    )


def _supervised(panels: PanelMaker) -> Iterator[Panel | None]:
    for title, name in (
        ("Loss", "loss"),
        ("Gradient norm", "gradient_norm"),
        ("Learning rate", "learning_rate"),
        ("Throughput", "tokens_per_second"),
    ):
        yield panels.lines(title, {name: describe(name).title}, kind="sft")


def _other(panels: PanelMaker) -> Iterator[Panel | None]:
    hidden = (
        "seconds/",
        "expected/",
        "planned/",
        "token/count",
        "token/weight",
        "extra_forwards",
        "kept_forward_share",
        "amplification/",
        "slowest/",
    )
    for kind, found in panels.names.items():
        for name in found:
            if (kind, name) not in panels.used and not name.startswith(hidden) and not name.endswith("/nodes"):
                prefix = "" if kind == "train" else f"{kind}: "
                yield panels.lines(f"{prefix}{name}", {name: name}, kind=kind)
