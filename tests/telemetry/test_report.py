import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fiberpo_megatron.telemetry.report import figures, write_report
from fiberpo_megatron.telemetry.report.figures import (
    Line,
    line_chart,
    moving_average,
    stacked_chart,
    window_of,
)
from fiberpo_megatron.telemetry.report.panels import build_sections
from fiberpo_megatron.telemetry.report.run_data import Series, load_run
from fiberpo_megatron.telemetry.sinks import JsonlSink

CONFIG = """
[run]
seed = 7
[model]
path = "models/<tiny>"
[algorithm]
objective = "fiberpo"
[parallel]
expert = 2
[trainer]
steps = 40
[[environments]]
use = "sums:Sums"
name = "addition"
"""


def train_metrics(step: int) -> dict[str, float]:
    gate = "gate/trajectory"
    return {
        "reward/mean": 0.4 + step / 100,
        "reward/std": 0.5,
        "accuracy": 0.4 + step / 100,
        "accuracy/addition": 0.4,
        "response_length/mean": 4.0,
        "entropy": 0.5,
        "ratio/mean": 1.0,
        "ratio/p99": 1.2,
        "ratio/max": 3.0,
        "token/clip_share": 0.1,
        f"{gate}/plus/pass": 0.7,
        f"{gate}/plus/rollback": 0.2,
        f"{gate}/plus/zeroed": 0.1,
        f"{gate}/regime/both_pass": 0.6,
        f"{gate}/regime/one_rollback": 0.4,
        f"{gate}/s_plus/mean": 0.1,
        f"{gate}/s_plus/p99": 0.3,
        "rollout_diff/mean": 1e-6,
        "gradient_norm": 0.7,
        "tokens_per_second": 900.0,
        "seconds/generate": 1.0,
        "seconds/train": 1.0,
        "seconds/gate": 0.25,
        "seconds/total": 2.5,
        "somebody/own": 1.0,
    }


def write_run(folder: Path, steps: int) -> Path:
    sink = JsonlSink(folder / "metrics.jsonl")
    sink.write(0, "eval", {"accuracy": 0.41})
    for step in range(steps):
        sink.write(step, "train", train_metrics(step))
    sink.write(steps, "eval", {"accuracy": 0.83})
    sink.close()
    (folder / "config.toml").write_text(CONFIG)
    (folder / "rollouts").mkdir()
    for step in range(steps):
        record = {
            "prompt": "<script>alert(1)</script>",
            "response": f"r{step}",
            "answer": "9",
            "log_probs": [-1, -3],
        }
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(json.dumps(record) + "\n")
    return folder


class Strict(HTMLParser):
    """Checks that tags are closed in order and collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "path", "use", "rect"):
            self.open.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href") or (k == "xlink:href" and v[0] != "#")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use", "rect"):
            assert self.open.pop() == tag


def test_a_whole_run(tmp_path):
    path = write_report(write_run(tmp_path, 40))
    assert path == tmp_path / "report.html"
    page = path.read_text(encoding="utf-8")
    reader = Strict()
    reader.feed(page)
    assert not reader.open and not reader.fetched, "well-formed and self-contained"
    assert "41.0 % → 83.0 %" in page and "held-out accuracy after 0 and 40 steps" in page
    assert "40 / 40" in page and ">1.7 min<" in page and "900 tokens/s" in page
    assert "0.445 → 0.745" in page, "mean of the first and the last 10 rewards"
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert all(f"<h3>Step {step}</h3>" in page for step in (0, 20, 39)), "first, middle, last"
    assert "-2.000" in page, "mean log-prob of the sample"
    assert "fiberpo · model models/&lt;tiny&gt; · tasks addition · parallel: expert 2 · seed 7" in page
    assert "<td>[0].use</td>" in page or "<td>environments[0].use</td>" in page
    assert page.count("<svg") == page.count("<figure>") >= 14


def test_the_panels_are_those_of_the_metrics(tmp_path):
    sections = build_sections(load_run(write_run(tmp_path, 5)), [])
    found = {section.title: [(d.panel.title, d.panel.unit) for d in section.drawings] for section in sections}
    assert found["Learning"][:2] == [("Accuracy", "%"), ("Reward", "")]
    assert ("Rollout against trainer", "nats") in found["Policy movement"]
    assert [title for title, _ in found["Gate of level: trajectory"]] == [
        "Joint regimes",
        "S⁺ channel",
        "Aggregate drift S⁺",
    ]
    assert ("Seconds per phase", "s") in found["Speed"]
    assert found["Other metrics"] == [("somebody/own", "")], "nothing known is left over"


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_in_progress(tmp_path, steps):
    page = write_report(write_run(tmp_path, steps)).read_text()
    assert f"{steps} / 40" in page or steps == 0


def test_an_empty_folder_says_so(tmp_path):
    page = write_report(tmp_path).read_text()
    assert "No metrics yet" in page and tmp_path.name in page


def test_a_supervised_run(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(4):
        sink.write(step, "sft", {"loss": 2.0 - step / 4, "gradient_norm": 1.0, "seconds/total": 0.1})
    page = write_report(tmp_path).read_text()
    assert "Supervised warm-up" in page and "1.88 → 1.38 nats" in page and ">4<" in page


def test_missing_torn_and_non_finite_values_are_survived(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(50):
        metrics = train_metrics(step)
        sink.write(step, "train", metrics if step % 3 else {**metrics, "entropy": float("nan"), "note": "text"})
    sink.write(50, "train", {"only/once": 3.0})
    sink.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 51, "ki')
    write_report(tmp_path)
    entropy = load_run(tmp_path).series("train", "entropy")
    assert entropy is not None and np.isnan(entropy.values[0]) and len(entropy.finite) == 33
    assert load_run(tmp_path).series("train", "note") is None


def test_a_metric_that_is_never_finite_draws_an_empty_chart(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(0, "train", {"reward/mean": float("nan"), "accuracy": 0.5})
    sink.close()
    assert load_run(tmp_path).series("train", "reward/mean") is None
    write_report(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a run folder"):
        write_report(tmp_path / "nowhere")


def test_a_moving_average_follows_a_line_and_fills_gaps():
    values = np.array([0.0, 1.0, 2.0, np.nan, 4.0])
    np.testing.assert_allclose(moving_average(values, 1), values)
    np.testing.assert_allclose(moving_average(values, 3), [0.5, 1.0, 1.5, 3.0, 4.0])
    assert np.isnan(moving_average(np.array([np.nan, np.nan]), 3)).all()
    assert [window_of(n) for n in (1, 29, 30, 120)] == [1, 1, 3, 9]


def series(*values: float) -> Series:
    return Series(np.arange(1, len(values) + 1), np.array(values))


def test_charts_are_well_formed_svg_without_size_and_dates():
    for svg in (
        line_chart([Line("a$b$ <c>", series(1.0, 2.0, 3.0, np.nan))], unit="nats", log=True),
        line_chart([Line("a", series(np.nan)), Line("b", series(-1.0, 0.0, 2.0, 3.0))], unit="", log=True),
        stacked_chart([("a", series(0.5), None), ("b", series(0.25, 0.5), None)], unit="s"),
        stacked_chart([("a", series(0.5), None)], unit="", percent=True),
    ):
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg") and "viewBox" in root.attrib and "width" not in root.attrib
    again = [line_chart([Line("a", series(1.0, 2.0, 3.0))], unit="") for _ in range(2)]
    assert again[0] == again[1] and not re.search(r"20\d\d-\d\d", again[0])


def test_what_environments_say_is_shown(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(3):
        said = {"reward/mean": 1.0, "reward/digits/mean": 0.5, "environment/tries/mean": 2.0}
        sink.write(step, "train", {**said, "environment/sums/failures": 3.0, "failed_share": 0.1})
    sink.close()
    (tmp_path / "rollouts").mkdir()
    record = {"prompt": "p", "rewards": {"digits": 0.25}, "metadata": {"source": "a<b"}, "failure": "deadline: 60 s"}
    (tmp_path / "rollouts" / "step_000000.jsonl").write_text(json.dumps(record) + "\n")
    (section,) = [s for s in build_sections(load_run(tmp_path), []) if s.title == "Environments"]
    assert [drawing.panel.title for drawing in section.drawings] == [
        "Components of the reward", "Numbers of the environments", "Events of the environments", "Failed trajectories"
    ]  # fmt: skip
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for text in ("digits: 0.25", "source: a&lt;b", "failure: deadline: 60 s"):
        assert text in page, text


def test_a_report_does_not_grow_with_the_steps_and_loses_no_peak():
    """However long a curve is, about 600 points of it are drawn, and the single peak among 20,000 is one of them."""
    values = np.sin(np.arange(20_000) / 50.0)
    values[7_777] = 9.0
    values[100:200] = np.nan
    steps = np.arange(20_000)
    kept = figures._extremes(values)
    assert 7_777 in kept and kept[0] == 0 and kept[-1] == 19_999 and len(kept) <= figures.MOST_POINTS + 2
    sizes = []
    for count in (2_000, 20_000):
        series = Series(steps[:count], values[:count])
        line = figures.Line("x", series, band=series)
        sizes.append(
            len(figures.line_chart([line], unit="")) + len(figures.stacked_chart([("x", series, None)], unit=""))
        )
    assert sizes[1] < 1.2 * sizes[0]
