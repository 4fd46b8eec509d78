"""examples/library under torchrun: an own reward and an own objective, without the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "library" / "train.py"


def test_it_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 80


@pytest.mark.sglang
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.exhaustive
def test_it_trains_on_two_ranks(model: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    options = ["--trainer.steps", "2", "--batch.prompts", "4", "--batch.epochs", "1", "--evaluation.prompts", "4"]
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(model), str(tmp_path / "run"), *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held out: {" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [r for r in records if r["kind"] == "train"]
    assert len(trained) == 2 and all("reward/digits/mean" in r for r in trained)
    config = (tmp_path / "run" / "config.toml").read_text()
    assert "train.py:Sums" in config and "train.py:SoftClip" in config and "width = 0.1" in config
