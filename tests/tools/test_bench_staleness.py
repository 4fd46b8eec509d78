"""The benchmark of sampling ahead: its bound, and a run of it in a small form."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from fiberpo_megatron.config import load_config
from tools import bench_staleness as bench


def steps(total: float, generate: float, train: float, waiting: float = 0.0) -> list[dict[str, float]]:
    middle = {
        "seconds/total": total,
        "seconds/generate": generate,
        "seconds/train": train,
        "seconds/old_log_probs": 0.0,
        "idle/trainer_seconds": waiting,
    }
    return [
        middle,
        {key: 10 * value for key, value in middle.items()},
        {key: value / 10 for key, value in middle.items()},
    ]


def test_the_bound_is_what_slower_passes_leave():
    found = bench.figures(steps(9, 4, 4, 4), steps(6, 1, 5, 1), steps(4, 0, 4), steps(5, 0, 5))
    assert (found["ratio"], found["slowdown"]) == (round(6 / 9, 4), 1.25)
    assert found["bound"] == round((4 * 1.25 + 1) / 9, 4), "the passes last longer than sampling; 1 s is neither"
    assert (found["waiting_0"], found["waiting_1"]) == (4, 1)
    longer = bench.figures(steps(11, 6, 4), steps(7, 1, 5), steps(4, 0, 4), steps(5, 0, 5))
    assert longer["bound"] == round((6 + 1) / 11, 4), "sampling lasts longer"
    assert "0.67 times as long" in bench.report(found)


def test_its_config_is_one(tmp_path: Path):
    options = Namespace(prompts=4, response_tokens=20, epochs=3, steps=5)
    (tmp_path / "train.toml").write_text(bench.config_text(options, tmp_path / "model"))
    config = load_config(tmp_path / "train.toml", ["--rollout.staleness", "1"])
    assert (config.rollout.staleness, config.batch.epochs, config.rollout.max_response_tokens) == (1, 3, 20)


@pytest.mark.sglang
@pytest.mark.exhaustive
def test_in_a_small_form(capfd: pytest.CaptureFixture[str]):
    words = [
        "--steps",
        "4",
        "--prompts",
        "2",
        "--response-tokens",
        "20",
        "--epochs",
        "1",
        "--hidden",
        "64",
        "--layers",
        "2",
    ]
    assert bench.main(words) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert 0 < found["ratio"] < 5 and found["passes_alone"] > 0 and found["waiting_0"] > 0
