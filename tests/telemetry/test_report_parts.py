"""The report's tables and its tokens, the figures as files, and the size of a report of a long run."""

import csv
import json
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from fiberpo_megatron.cli.main import main
from fiberpo_megatron.telemetry.alarms import ALARMS_FILE
from fiberpo_megatron.telemetry.engine_states import EngineState, EngineStates, write_engine_states
from fiberpo_megatron.telemetry.panels import panel_sections
from fiberpo_megatron.telemetry.report.export import write_figures
from fiberpo_megatron.telemetry.report.figures import _short
from fiberpo_megatron.telemetry.report.page import render
from fiberpo_megatron.telemetry.report.run_data import RunData, load_run
from fiberpo_megatron.telemetry.report.tokens import token_section
from fiberpo_megatron.telemetry.sinks import JsonlSink
from fiberpo_megatron.telemetry.token_log import write_tokens

ALARM: dict[str, Any] = {
    "step": 1, "kind": "train", "rule": "entropy_collapse", "state": "raised", "metric": "entropy", "value": 0.01,
    "limit": 0.05, "since": 0, "message": "the entropy fell to 0.01 <nats>", "causes": ["a rate & a half"],
    "setting": "optimizer.learning_rate: halve it", "severity": "warning",
}  # fmt: skip


def level(name: str, *states: str) -> dict[str, Any]:
    """A level with one node for all tokens."""
    node = {"id": {name: 0}, "S": [0.3, 0.4], "D": [0.31, -0.5], "C": [0.12, 0.1], "state": list(states)}
    return {"name": name, "nodes": [node], "of": [0, 0, 0]}


RECORD: dict[str, Any] = {
    "trajectory": 3, "domain": "sums", "reward": 1.0, "prompt": "1+<2>=",
    "tokens": {
        "text": ["a<", "b", "c"], "log_prob": [-0.5, -1.0, None], "entropy": [0.1, 0.2, None],
        "advantage": [1.5, 1.5, None], "free": [1, 0, None],
        "log_ratio": [[0.0, 0.0, None], [0.2, -0.3, None]], "coefficient": [[0.1, 0.1, None], [0.05, 0.0, None]],
    },
    "levels": [level("trajectory", "zeroed", "pass"), level("prompt_group", "rollback", "pass")],
}  # fmt: skip


def test_tokens_show_what_stopped_them():
    page = token_section([(7, [RECORD])])
    assert "<h3>Step 7</h3>" in page and "sums, reward 1, advantage 1.5" in page and "1+&lt;2&gt;=" in page
    first, second, third = [
        part.split("</span>")[0] for part in page.split("<p class='tokens'>")[1].split("<span class='t ")[1:]
    ]
    assert first.startswith("zeroed") and first.endswith(">a&lt;"), "the stronger outcome gives the colour"
    assert "trajectory: S⁺ 0.31 over 0.12, zeroed\nprompt_group: S⁺ 0.31 over 0.12, rollback" in first
    assert "log ratio 0.2\ncoefficient 0.05" in first, "those of the last optimiser step"
    assert second.startswith("clipped") and "own clip" in second and "S⁻" not in second, "its channel passes"
    assert third.startswith("other") and "coefficient" not in third


@pytest.mark.parametrize("levels", [3, [3, {"nodes": 1, "of": [[[9, 1]]]}], [{"nodes": [{"state": 2}], "of": [0]}]])
def test_tokens_of_a_damaged_record_are_shown_as_far_as_they_go(levels: Any):
    assert "<span class='t " in token_section([(0, [{**RECORD, "levels": levels}])])
    assert token_section([(0, [{"trajectory": 0}]), (1, [])]) != ""
    assert token_section([]) == ""


def test_alarms_and_engines_are_tables_and_alarms_are_marks(tmp_path: Path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(4):
        sink.write(step, "train", {"entropy": 1.0 - step / 5, "reward/mean": 0.5})
    sink.close()
    plain = render(load_run(tmp_path))
    (tmp_path / ALARMS_FILE).write_text(
        "\n".join(json.dumps(one) for one in (ALARM, ALARM | {"step": 3, "state": "cleared"}, {"step": 0}))
    )
    engine = EngineState("http://a:1", "not answering", detail="connection <refused>", token_usage=0.25)
    write_engine_states(tmp_path, EngineStates(3, 0.0, (engine,)))
    write_tokens(tmp_path, 2, [RECORD], keep=4)
    page = render(load_run(tmp_path))
    for text in (
        "0 to 3", "entropy collapse", "the entropy fell to 0.01 &lt;nats&gt;", "<li>a rate &amp; a half</li>",
        "optimizer.learning_rate: halve it", "not answering<br>connection &lt;refused&gt;", "25.0 %", "a&lt;",
    ):  # fmt: skip
        assert text in page and text not in plain, text
    charts = [[figure for figure in p.split("<figure>") if figure.startswith("<figcaption>")] for p in (plain, page)]
    changed = [b.split("</figcaption>")[0] for a, b in zip(*charts, strict=True) if a != b]
    assert [title.removeprefix("<figcaption>").split(" ")[0] for title in changed] == ["Entropy"]


def test_files_that_cannot_be_read_are_named_and_the_rest_is_shown(tmp_path: Path):
    (tmp_path / "engines.json").write_text("oops")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/step_000003.jsonl.gz").write_bytes(b"oops")
    problems = load_run(tmp_path).problems
    assert [problem.split(" ")[0] for problem in problems] == ["engines.json", "tokens/step_000003.jsonl.gz"]


def test_figures_are_svg_files_and_csv_with_every_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    sink = JsonlSink(run / "metrics.jsonl")
    values = np.random.default_rng(0).random(700)
    for step, value in enumerate(values):
        metrics = {"reward/mean": value, "reward/std": 0.5, "seconds/train": 2.0, "seconds/gate": value}
        sink.write(step, "train", metrics if step != 5 else {"reward/mean": float("nan")})
    sink.write(0, "eval", {"accuracy": 0.25})
    sink.close()
    assert main(["report", str(run), "--figures", str(tmp_path / "figures")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'figures'}: 6 files\n"
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    stems = {"learning-accuracy", "learning-reward", "speed-seconds-per-phase"}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "csv")}
    for stem in stems:
        root = ElementTree.parse(tmp_path / f"figures/{stem}.svg").getroot()
        assert root.attrib["width"].endswith("in") and "viewBox" in root.attrib
    rows = list(csv.reader((tmp_path / "figures/learning-reward.csv").open()))
    assert rows[0] == ["steps_done", "train: reward/mean", "train: reward/std"] and len(rows) == 701
    assert [float(row[1]) for row in rows[1:] if row[1]] == [*values[:5], *values[6:]], "all of them, as they were"
    assert rows[6] == ["6", "", ""]
    phases = list(csv.reader((tmp_path / "figures/speed-seconds-per-phase.csv").open()))
    assert phases[0] == ["steps_done", "train: seconds/gate", "train: seconds/train - seconds/gate"]
    assert float(phases[1][2]) == 2.0 - values[0]
    with pytest.raises(ValueError, match="holds no metrics yet"):
        write_figures(tmp_path / "figures", tmp_path / "more")


def test_a_short_path_is_the_long_one_to_a_tenth():
    rng = np.random.default_rng(1)
    points = np.cumsum(rng.normal(size=(300, 2)) * 7, axis=0)
    path = "M" + "L".join(f" {x:.6f} {y:.6f} \n" for x, y in points) + "z\n"
    short = _short(path)
    assert len(short) < 0.45 * len(path) and short.endswith("z")
    begin, _, rest = short.removeprefix("M").rstrip("z").partition("l")
    numbers = [float(n) for n in _numbers(begin) + _numbers(rest)]
    drawn = np.cumsum(np.array(numbers).reshape(-1, 2), axis=0)
    np.testing.assert_allclose(drawn, points, atol=0.0501)


def _numbers(text: str) -> list[str]:
    """The numbers of a path, by SVG's rules: a sign begins a new one, and a second point as well."""
    import re

    return re.findall(r"-?(?:\d+\.?\d*|\.\d+)", text)


def long_run(steps: int, names: list[str]) -> RunData:
    rng = np.random.default_rng(2)
    records = [{"step": step, **dict(zip(names, rng.random(len(names))))} for step in range(steps)]
    return RunData("long", {}, {"train": records}, [])


@pytest.mark.exhaustive
def test_a_report_of_ten_thousand_steps_is_small(tmp_path: Path):
    """The names are those that a run of the demo with an expert level logged, and those of GPUs beside them."""
    names = [line for line in (Path(__file__).parent / "demo_metrics.txt").read_text().splitlines() if line]
    names += [f"gpu/{i}/{what}" for i in range(8) for what in ("utilisation", "memory_used", "power", "temperature")]
    data, began = long_run(10_000, names), time.process_time()
    page = render(data)
    assert len(page.encode()) < 5e6, len(page)
    assert time.process_time() - began < 120
    panels = sum(len(section.panels) for section in panel_sections(data.names_by_kind()))
    assert page.count("<figure>") == panels >= 60
