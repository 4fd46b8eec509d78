"""docs/extending.md: its files, in an empty folder, through the real program on two ranks with a real engine."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
FIBERPO = [sys.executable, "-m", "fiberpo_megatron.cli.main"]


def write_files(folder: Path) -> list[str]:
    """The page's files, and their names."""
    names = []
    for name, text in re.findall(r"```(?:python|toml)\n# (\S+\.(?:py|toml))\n(.*?)```", PAGE.read_text(), re.S):
        (folder / name).write_text(text)
        names.append(name)
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([f"{n}=", str(n)] for n in range(60))
    return names


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [*FIBERPO, "train", "extensions.toml", "--run.folder", str(folder / "run"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def records(folder: Path) -> list[dict]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.sglang
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_of_ones_own_trains_dies_and_resumes(tmp_path: Path, model: Path, engine: Any) -> None:
    """The engine is the session's: test_training.py has a run that starts one of its own."""
    names = write_files(tmp_path)
    urls = ["--rollout.engine.urls", f'["{engine.url}"]']
    assert {"sums.py", "tries.py", "table.py", "soft_clip.py", "momentum.py", "one_file.py", "csv_sink.py"} <= set(
        names
    )
    shutil.copytree(model, tmp_path / "model")
    first = start(tmp_path, *urls)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate(timeout=10)[0]
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    done = start(tmp_path, "--resume", *urls)
    said, _ = done.communicate(timeout=240)
    assert done.returncode == 0 and "Resumed from" in said, said

    found = [r for r in records(tmp_path) if r["kind"] == "train"]
    assert [r["step"] for r in found] == [0, 1, 2, 3]
    for name in ("reward/digits/mean", "reward/exact/mean", "environment/tries/mean", "accuracy/tries", "turns/mean"):
        assert all(name in r for r in found), name
    assert all(r["turns/mean"] > 1 for r in found)  # two tries of some, with an untrained model
    with (tmp_path / "run" / "metric.csv").open() as file:
        assert {"train", "eval"} == {row[0] for row in csv.reader(file)}
    assert (tmp_path / "run" / "published" / "model.safetensors").is_file()
    samples = (tmp_path / "run" / "rollouts" / "step_000000.jsonl").read_text().splitlines()
    metadata = [r for r in map(json.loads, samples) if r["domain"] == "sums"]
    assert metadata and all({"metadata", "rewards", "metrics"} <= r.keys() for r in metadata)
    recorded = (tmp_path / "run" / "config.toml").read_text()
    assert 'use = "momentum:Momentum"' in recorded and 'use = "soft_clip:SoftClip"' in recorded


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--algorithm.objective", "nowhere:Soft"], r"there is no module 'nowhere'"),
        pytest.param(
            ["--algorithm.objective", "soft_clip:Hard"],
            r"soft_clip has no Hard; it defines SoftClip",
            marks=pytest.mark.exhaustive,
        ),
        (
            ["--algorithm.objective.options.breadth", "0.1"],
            r"does not read 'breadth'; remove it \(SoftClip reads width\)",
        ),
        pytest.param(["--optimizer.kind", "sums:Sums"], r"lacks the method build", marks=pytest.mark.exhaustive),
        pytest.param(
            ["--weight_sync.method", "csv_sink:CsvSink"], r"lacks the method publish", marks=pytest.mark.exhaustive
        ),
        (["--environments.0.options.digit", "3"], r"does not take the option 'digit'"),
        pytest.param(
            ["--environments.0.use", "sums:Outcome"], r"sums:Outcome is no environment", marks=pytest.mark.exhaustive
        ),
        pytest.param(
            ["--telemetry.sinks", '["csv_sink:Nothing"]'],
            r"csv_sink has no Nothing; it defines CsvSink",
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_cannot_work_is_one_message_before_any_rank_starts(
    tmp_path: Path, model: Path, override: list[str], message: str
) -> None:
    write_files(tmp_path)
    (tmp_path / "model").symlink_to(model)
    process = start(tmp_path, *override)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and re.search(message, said), said
    assert "Traceback" not in said and not (tmp_path / "run" / "logs").exists()
