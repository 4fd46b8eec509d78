"""kill -9 at ten points of a run: in every phase, at random moments, of the launcher, of one rank, of all processes.

The run goes on with --resume each time, and ends with bitwise the weights and metrics of a run that nobody disturbed.
"""

import random
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.end_to_end.test_replay import assert_same_weights, metrics
from tests.end_to_end.test_training import ROOT, command, processes_of, run

STEPS = 6
PHASES = ["generate", "forward", "save", "publish"]
SEED = 20260401


@dataclass
class Watch:
    """What a run is doing, seen from outside: its folder and the engine's load."""

    folder: Path
    engine: str

    def done(self) -> int:
        """Steps that a checkpoint holds."""
        found = [int(path.name.removeprefix("step-")) for path in (self.folder / "checkpoints").glob("step-*")]
        return max(found, default=0)

    def reached(self, phase: str, step: int) -> bool:
        """Whether step `step` (from 0) is in `phase`."""
        if phase == "publish":
            return (self.folder / "published" / f"{step + 1}.partial").exists()
        if phase == "save":
            return (self.folder / "checkpoints" / f".step-{step + 1:08d}.partial").exists()
        generated = (self.folder / "dump" / f"step_{step:06d}.npz").exists()
        if phase == "forward":
            return generated
        return not generated and (self.folder / "published" / str(step)).exists() and self.busy()

    def busy(self) -> bool:
        loads = httpx.get(f"{self.engine}/v1/loads", timeout=30).json()["loads"]
        return any(load["num_running_reqs"] for load in loads)


def kill(launcher: subprocess.Popen, victim: str, draw: random.Random) -> str | None:
    """kill -9; the rank, where it was one."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    ranks = {p.environ().get("RANK"): p for p in children if p.cmdline()[1:3] == ["-m", "fiberpo_megatron.cli.rank"]}
    if victim == "rank" and ranks:
        rank = draw.choice(sorted(ranks))
        ranks[rank].kill()
        return rank
    if victim == "everything":
        for process in children:
            process.kill()
    launcher.kill()
    return None


def disturb(words: list[str], watch: Watch, phase: str, victim: str, draw: random.Random) -> str:
    """Start or resume the run, kill it once, and wait until nothing of it is left. Returns the step it was at."""
    log = watch.folder.parent / "stderr"
    before = watch.done()
    step = before + (draw.randrange(2) if before < STEPS - 2 else 0)
    with log.open("w") as stderr:
        launcher = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
    deadline = time.monotonic() + 200
    end = time.monotonic() + draw.uniform(3, 12)  # of a kill at any moment
    while time.monotonic() < end if phase == "any" else not watch.reached(phase, step):
        assert launcher.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"{phase} of step {step} was not seen"
        assert watch.done() < STEPS
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.03))
    rank = kill(launcher, victim, draw)
    launcher.wait(timeout=200)
    while left := processes_of(watch.folder):
        assert time.monotonic() < deadline, f"outlived the kill of the {victim}: {left}"
        time.sleep(0.02)
    if rank is not None:
        assert re.search(rf"fiberpo: rank {rank}: was killed by signal SIGKILL", log.read_text()), log.read_text()
    assert watch.done() >= before
    return f"{phase} of step {step}, {victim}"


@pytest.mark.sglang
@pytest.mark.timeout(600)
def test_a_run_survives_ten_kills_and_ends_as_if_nothing_had_happened(model: Path, engine: Any, tmp_path: Path):
    options = [
        "--trainer.steps", str(STEPS), "--evaluation.prompts", "0", "--weight_sync.method", "disk",
        "--rollout.engine.urls", f'["{engine.url}"]', "--rollout.max_response_tokens", "24",
    ]  # fmt: skip
    done = run(model, tmp_path / "straight", *options)
    assert done.returncode == 0, done.stderr

    draw = random.Random(SEED)
    phases = [*PHASES, *PHASES, "any", "any"]
    draw.shuffle(phases)
    folder = tmp_path / "killed" / "run"
    folder.parent.mkdir()
    watch = Watch(folder, engine.url)
    words = [*command(model, folder, *options), "--resume"]
    for phase in phases:
        print(disturb(words, watch, phase, draw.choice(["everything", "launcher", "rank"]), draw))
    done = run(model, folder, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "straight", folder)
    assert metrics(tmp_path / "straight") == metrics(folder)
    assert not list((folder / "dump").glob("step_*")) and not processes_of(folder)
