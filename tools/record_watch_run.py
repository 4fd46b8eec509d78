#!/usr/bin/env python3
"""Record the run that the tests of the live page and its screenshots show: tests/watch/data/demo.

`python tools/record_watch_run.py --model FOLDER` runs eight steps of the demo from the weights of `make demo`'s warm-up
(runs/demo/warmup/hf), with two rules of alarms tightened so that they are raised, and keeps the small files of its run
folder. `--run FOLDER` keeps those of a run that was made before. Paths of the machine are shortened to their last name.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "tests/watch/data/demo"
RULES = """
[telemetry.alarms.rules]
ratio_tail = {limit = 1.05}
truncation = {limit = 0.004, steps = 2}
"""
FILES = ("config.toml", "metrics.jsonl", "alarms.jsonl", "engines.json", "sessions.jsonl")
STEPS = 8
TOKEN_STEPS = (0, 3, 7)
"""Steps whose tokens and rollouts are kept, from 0."""


def record(run: Path, model: Path) -> None:
    """Run the demo into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "train.toml"
        config.write_text((ROOT / "examples/demo/train.toml").read_text() + RULES)
        command = [sys.executable, "-m", "fiberpo_megatron.cli.main", "train", str(config)]
        settings = {"model.path": model, "run.folder": run, "trainer.steps": STEPS, "evaluation.every_steps": 4}
        for name, value in settings.items():
            command += [f"--{name}", str(value)]
        subprocess.run(command, check=True, cwd=ROOT)


def keep(run: Path) -> None:
    """Copy what the tests need of a run folder."""
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir(parents=True)
    for name in FILES:
        if (run / name).is_file():
            text = (run / name).read_text()
            (KEPT / name).write_text(re.sub(r'"/[^"\n]*/([^"/\n]+)"', r'"\1"', text))
    for folder in ("tokens", "rollouts"):
        for path in sorted((run / folder).glob("*")):
            number = re.search(r"_(\d{6,})", path.name)
            if number and (path.name.startswith("eval") or int(number[1]) in TOKEN_STEPS):
                (KEPT / folder).mkdir(exist_ok=True)
                shutil.copy(path, KEPT / folder)
    print(f"{KEPT.relative_to(ROOT)}: {sum(path.stat().st_size for path in KEPT.rglob('*') if path.is_file())} bytes")


def main() -> None:
    """Record, and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "runs/demo/warmup/hf", metavar="FOLDER")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="keep the files of this run folder")
    options = parser.parse_args()
    if options.run is not None:
        keep(options.run)
        return
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder) / "demo", options.model.resolve())
        keep(Path(folder) / "demo")


if __name__ == "__main__":
    main()
