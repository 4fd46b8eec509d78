"""Evaluation sets with a real engine, and the checkpoints of a run evaluated from beside it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fiberpo_megatron.engines.client import EngineAddress
from tests.end_to_end.test_training import ROOT, records, run

SETS = """[
  {name = "greedy", environment = "addition", prompts = 4, samples = 2, pass_at = [1, 2], temperature = 0.0},
  {name = "own", environment = {use = "examples.demo.environments:Addition", options = {digits = 3}, workers = 1},
   prompts = 3, samples = 2, temperature = 0.5, max_response_tokens = 3},
]"""


def fiberpo(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fiberpo_megatron.cli.main", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.exhaustive
@pytest.mark.sglang
def test_checkpoints_are_evaluated_beside_a_run(model: Path, engine: EngineAddress, tmp_path: Path):
    """What the run measured itself and what is measured on its checkpoints afterwards are equal answers of a greedy
    policy. The second process touches no file of the run, and measures each checkpoint once."""
    folder = tmp_path / "run"
    words = ["--rollout.engine.urls", f'["{engine.url}"]']
    words += ["--trainer.steps", "2", "--evaluation.every_steps", "1", "--evaluation.sets", " ".join(SETS.split())]
    words += ["--checkpoint.keep", "2", "--checkpoint.keep_best_metric", "eval/greedy/pass@2"]
    words += ["--weight_sync.method", "disk"]
    done = run(model, folder, *words, timeout_s=600)
    assert done.returncode == 0, done.stderr
    evaluated = records(folder, "eval")
    assert [record["step"] for record in evaluated] == [0, 1, 2]
    assert evaluated[1]["own/response_length/mean"] <= 3.0 and "greedy/pass@2/high" in evaluated[1]
    before = (folder / "metrics.jsonl").read_bytes()

    done = fiberpo("eval", str(folder), "--follow")
    assert done.returncode == 0, done.stderr
    assert "Evaluated 2 checkpoints" in done.stdout
    assert (folder / "metrics.jsonl").read_bytes() == before
    beside = records(folder / "evaluations", "eval")
    assert [record["step"] for record in beside] == [1, 2]
    for step in (1, 2):
        own, other = (
            json.loads((folder / "evaluations" / f"{kind}_{step:06d}.json").read_text())["sets"]["greedy"]["prompts"]
            for kind in ("training", "step")
        )
        assert own == other and len(own) == 4 and len(own[0]["samples"]) == 2
    assert not (folder / "evaluations" / "reading").exists()

    done = fiberpo("eval", str(folder), "--compare", "1", "2")
    assert done.returncode == 0 and "greedy: " in done.stdout, done.stderr
    assert (folder / "evaluations" / "compare_1_2.md").is_file()
    done = fiberpo("eval", str(folder), "--step", "7")
    assert done.returncode != 0 and "no complete checkpoint after 7 steps; it has those after: 1, 2" in done.stderr
