"""Evaluation sets with a real engine, and the checkpoints of a run evaluated from beside it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fiberpo_megatron.engines.client import EngineAddress
from tests.end_to_end.test_training import ROOT, command, records

SETS = """[
  {name = "greedy", environment = "addition", prompts = 4, samples = 2, pass_at = [1, 2], temperature = 0.0},
  {name = "own", environment = {use = "examples.demo.environments:Addition", options = {digits = 3}, workers = 1},
   prompts = 3, samples = 2, temperature = 0.5, max_response_tokens = 3},
]"""


def fiberpo(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fiberpo_megatron.cli.main", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.sglang
def test_checkpoints_are_evaluated_beside_a_run(model: Path, engine: EngineAddress, tmp_path: Path):
    """What the run measured itself and what is measured beside it on its checkpoints, while it goes on training, are
    equal answers of a greedy policy. The second process touches no file of the run and measures each checkpoint
    once."""
    folder = tmp_path / "run"
    words = ["--rollout.engine.urls", f'["{engine.url}"]']
    words += ["--trainer.steps", "100", "--evaluation.every_steps", "20", "--evaluation.sets", " ".join(SETS.split())]
    words += ["--checkpoint.every_steps", "20", "--checkpoint.keep", "5"]
    words += ["--checkpoint.keep_best_metric", "eval/greedy/pass@2", "--weight_sync.method", "disk"]
    with (tmp_path / "run.log").open("w") as log:
        training = subprocess.Popen(command(model, folder, *words), cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 240
        while not (folder / "config.toml").is_file() and training.poll() is None:
            assert time.monotonic() < deadline, "the run wrote no config.toml within 240 s"
            time.sleep(0.5)
        following = subprocess.Popen(
            [sys.executable, "-m", "fiberpo_megatron.cli.main", "eval", str(folder), "--follow"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            first, deadline = folder / "evaluations" / "step_000020.json", time.monotonic() + 400
            while not first.is_file() and following.poll() is None:
                assert time.monotonic() < deadline, "the first checkpoint was not evaluated within 400 s"
                time.sleep(0.2)
            assert training.poll() is None, "the run had ended before its first checkpoint was evaluated from beside it"
            assert training.wait(timeout=400) == 0, (tmp_path / "run.log").read_text()[-3000:]
            output, errors = following.communicate(timeout=400)
        finally:
            following.kill()
    finally:
        training.kill()
    assert following.returncode == 0, errors[-3000:]
    assert "Evaluated 5 checkpoints" in output and "the run's last" in output
    evaluated = records(folder, "eval")
    assert [record["step"] for record in evaluated] == list(range(0, 101, 20))
    assert evaluated[1]["own/response_length/mean"] <= 3.0 and "greedy/pass@2/high" in evaluated[1]

    before = (folder / "metrics.jsonl").read_bytes()
    done = fiberpo("eval", str(folder), "--follow")
    assert done.returncode == 0, done.stderr
    assert "Evaluated 0 checkpoints" in done.stdout
    assert (folder / "metrics.jsonl").read_bytes() == before
    beside = records(folder / "evaluations", "eval")
    assert [record["step"] for record in beside] == list(range(20, 101, 20))
    for step in (20, 100):
        own, other = (
            json.loads((folder / "evaluations" / f"{kind}_{step:06d}.json").read_text())["sets"]["greedy"]["prompts"]
            for kind in ("training", "step")
        )
        assert own == other and len(own) == 4 and len(own[0]["samples"]) == 2
    assert not (folder / "evaluations" / "reading").exists()

    done = fiberpo("eval", str(folder), "--compare", "20", "100")
    assert done.returncode == 0 and "greedy: " in done.stdout, done.stderr
    assert (folder / "evaluations" / "compare_20_100.md").is_file()
    done = fiberpo("eval", str(folder), "--step", "7")
    assert (
        done.returncode != 0
        and "no complete checkpoint after 7 steps; it has those after: 20, 40, 60, 80, 100" in done.stderr
    )
