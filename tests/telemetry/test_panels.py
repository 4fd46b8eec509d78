"""The panels of a run: which charts its metrics give, with names that files can have."""

import re

from fiberpo_megatron.telemetry.panels import MOST_CURVES, MOST_PANELS, Curve, panel_sections

NAMES = [
    *("reward/mean", "reward/std", "accuracy", "accuracy/sums", "accuracy/sorting", "response_length/mean"),
    *("ratio/mean", "ratio/max", "drift/mismatch", "drift/optimiser_steps", "kl/mean", "kl/coefficient"),
    *("gate/trajectory/plus/pass", "gate/trajectory/regime/both_pass", "gate/trajectory/s_plus/mean"),
    *("expert/mass/p0", "expert/drift/p0", "seconds/generate", "seconds/train", "seconds/gate", "seconds/total"),
    *("mfu/train", "tflops_per_gpu/train", "tflops_per_gpu/old_log_probs", "tokens_per_second_per_gpu/generate"),
    *("goodput", "idle_share", "restart/lost_seconds", "energy/joules_per_token", "memory/peak_gib"),
    *("slowest/train/rank", "slowest/train/excess_seconds", "engines/serving", "engines/queued", "disk/free_gib"),
    *("gpu/0/power", "curriculum/share/sums", "curriculum/share/sorting", "somebody/own"),
]


def metrics_of(curve: Curve) -> set[str]:
    return {name for name in (curve.metric, curve.band, curve.minus) if name is not None}


def test_every_metric_of_a_run_is_drawn_once_and_nothing_else():
    sections = panel_sections({"train": NAMES, "eval": ["accuracy", "accuracy/sums", "accuracy/sorting"]})
    found = {section.title: {panel.title: panel for panel in section.panels} for section in sections}
    used = {
        name for panels in found.values() for panel in panels.values() for c in panel.curves for name in metrics_of(c)
    }
    assert used == {*NAMES}
    assert found["Other metrics"].keys() == {"somebody/own"}
    assert [c.label for c in found["Domains"]["Accuracy of the held-out prompts"].curves] == ["sums", "sorting"]
    (mfu,) = found["Efficiency"]["Model FLOP utilisation"].curves
    assert found["Efficiency"]["Model FLOP utilisation"].percent and mfu.label == "train"
    phases = {c.metric: c for c in found["Speed"]["Seconds per phase"].curves}
    assert phases["seconds/train"].minus == "seconds/gate" and phases["seconds/generate"].minus is None
    assert found["Learning"]["Reward"].curves == (Curve("reward/mean", "mean ± standard deviation", band="reward/std"),)
    assert found["Slowest ranks"]["Slowest rank"].unit == "rank"


def test_keys_are_unique_and_fit_for_file_names():
    names = ["gate/A b/plus/pass", "gate/a-b/plus/pass", "gate/../x/plus/pass", "own/é", "own/è", "x" * 300]
    sections = panel_sections({"train": names})
    keys = [section.key for section in sections]
    assert len(set(keys)) == len(keys) == 4
    for section in sections:
        own = [panel.key for panel in section.panels]
        assert len(set(own)) == len(own)
        assert all(re.fullmatch(r"[a-z0-9_-]{1,70}", key) for key in [section.key, *own])


def test_thousands_of_names_give_bounded_panels():
    sections = panel_sections(
        {"train": [*(f"environment/{i}/mean" for i in range(999)), *(f"o/{i}" for i in range(999))]}
    )
    environments, other = sections
    assert len(environments.panels[0].curves) == MOST_CURVES and "of 999" in environments.panels[0].note
    assert len(other.panels) == MOST_PANELS and other.cut and not environments.cut


def test_a_band_or_a_subtracted_metric_that_was_not_logged_is_left_out():
    (learning, speed) = panel_sections({"train": ["reward/mean", "seconds/train"]})
    assert learning.panels[0].curves == (Curve("reward/mean", "mean"),)
    assert speed.panels[0].curves[0].minus is None
