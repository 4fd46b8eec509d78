"""kill -9 at three points of a run (ten in `make test-all`): in every phase, at random moments, of the launcher, of one
rank, of all processes.

The run goes on with --resume each time, and ends with bitwise the weights and metrics of a run that nobody disturbed.
"""

import random
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.test_replay import assert_same_weights, metrics
from tests.end_to_end.test_training import ROOT, command, processes_of, records, run
from tests.rollout.finished_indices import finished_indices, segment_places

INDEX = "model.safetensors.index.json"
"""The last file of a publication."""
ENDLESS = 1000  # steps; the disturbed run must not end before its kills, on however fast a machine
PHASES = ["generate", "forward", "save", "publish"]
SEED = 20260401


@dataclass
class Watch:
    """What a run is doing, seen from outside: its folder. Sampling may be `ahead` so many steps."""

    folder: Path
    ahead: int = 0
    _step: int = 0
    _left: set[tuple[int, int]] = field(default_factory=set)
    _started: float = 0.0

    def done(self) -> int:
        """Steps that a checkpoint holds."""
        found = [int(path.name.removeprefix("step-")) for path in (self.folder / "checkpoints").glob("step-*")]
        return max(found, default=0)

    def start(self, step: int) -> None:
        """The run starts; look for a phase of `step`, or of a later one where it was missed."""
        self._started = time.time()
        self.begin(step)

    def begin(self, step: int) -> None:
        """Look for a phase of `step`."""
        self._step, self._left = step, self.finished(step)

    def reached(self, phase: str) -> bool:
        """Whether the step that comes next is in `phase`."""
        done = self.done()
        if done > self._step:
            self.begin(done)
        if done < self._step:
            return False
        if phase == "publish":
            folder = self.folder / "published" / str(done + 1)
            return folder.exists() and not (folder / INDEX).exists()
        if phase == "save":
            return (self.folder / "checkpoints" / f".step-{done + 1:08d}.partial").exists()
        if phase == "forward":
            return self.generated(done) and self.published(done)
        return bool(self.finished(done) - self._left)

    def generated(self, step: int) -> bool:
        return (self.folder / "dump" / f"step_{step:06d}.npz").exists()

    def published(self, step: int) -> bool:
        """Whether this start of the run has published the weights of `step`; rollouts may be an earlier one's."""
        try:
            return (self.folder / "published" / str(step) / INDEX).stat().st_mtime >= self._started
        except FileNotFoundError:
            return False

    def finished(self, step: int) -> set[tuple[int, int]]:
        """Prompts that have been generated, by step, of the steps that are being sampled while `step` is next."""
        return {
            (one, prompt)
            for one in range(step, step + self.ahead + 1)
            if not self.generated(one)
            for prompt in finished_indices(self.folder / "dump" / f"step_{one:06d}.unfinished")
        }


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
    """Start or resume the run, kill it once, and wait until nothing of it is left. Returns what it was doing."""
    log = watch.folder.parent / "stderr"
    before = watch.done()
    watch.start(before + draw.randrange(2))
    with log.open("w") as stderr, log.with_name("stdout").open("a") as stdout:
        launcher = subprocess.Popen(words, cwd=ROOT, stdout=stdout, stderr=stderr)
    deadline = time.monotonic() + 200
    end = time.monotonic() + draw.uniform(3, 10)  # of a kill at any moment
    while time.monotonic() < end if phase == "any" else not watch.reached(phase):
        assert launcher.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"{phase} was not seen"
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
    if phase == "generate" and watch.generated(watch.done()):
        phase = "forward"  # it was over when the signal came
    return phase


def without_engine_rounding(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last bits of the engine's own log-probs depend on which requests it decodes together; nothing is trained on
    them."""
    return [
        {k: v for k, v in record.items() if not k.startswith(("rollout_diff/", "drift/mismatch"))} for record in records
    ]


def file_mode(folder: Path) -> int:
    """What the umask gives."""
    (folder / "plain").touch()
    return (folder / "plain").stat().st_mode & 0o777


@pytest.mark.sglang
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "phases",
    [["generate", "save", "publish"], pytest.param([*PHASES, "any"] * 2, marks=pytest.mark.exhaustive)],
    ids=len,
)
def test_a_run_survives_kills_and_ends_as_if_nothing_had_happened(
    model: Path, engine: Any, tmp_path: Path, phases: list[str]
):
    options = [
        "--evaluation.prompts", "0", "--weight_sync.method", "disk", "--rollout.max_response_tokens", "40",
        "--rollout.engine.urls", f'["{engine.url}"]',
        "--rollout.max_concurrent_requests", "8",  # half of a rank's prompts: a step has more than one end
        "--optimizer.schedule", "constant", "--optimizer.warmup_steps", "2",  # do not depend on the number of steps
    ]  # fmt: skip
    draw = random.Random(SEED)
    phases = draw.sample(phases, len(phases))
    folder = tmp_path / "killed" / "run"
    folder.parent.mkdir()
    watch = Watch(folder)
    words = [*command(model, folder, *options, "--trainer.steps", str(ENDLESS)), "--resume"]
    hit = set()
    for phase in phases:
        hit.add(disturb(words, watch, phase, draw.choice(["everything", "launcher", "rank"]), draw))
    either = {"generate", "forward"}  # generation may be over when the signal comes
    assert hit | either == {*phases} | either

    options += ["--trainer.steps", str(watch.done() + 1)]
    done = run(model, folder, *options, "--resume")
    assert done.returncode == 0, done.stderr
    told = (folder.parent / "stdout").read_text() + done.stdout
    assert re.search(r"Step \d+: [1-8] of 8 prompts had been generated before", told), told
    done = run(model, tmp_path / "straight", *options)
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "straight", folder)
    assert without_engine_rounding(metrics(tmp_path / "straight")) == without_engine_rounding(metrics(folder))
    assert not list((folder / "dump").glob("step_*")) and not processes_of(folder)
    written = [path for name in ("checkpoints", "published", "hf") for path in (folder / name).rglob("*.*")]
    unreadable = [path for path in written if path.is_file() and path.stat().st_mode & 0o777 != file_mode(tmp_path)]
    assert written and not unreadable  # an engine, or somebody who goes on with it, may be another user


@pytest.mark.sglang
@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_ten_kills_with_staleness_2(model: Path, engine: Any, tmp_path: Path):
    """Responses are cut into segments of 5 tokens. After each kill no segment is on disk twice, so that none was asked
    for again; the run that was killed ten times ends with the weights of the one that was not."""
    options = [
        "--evaluation.prompts", "0", "--weight_sync.method", "disk", "--rollout.max_response_tokens", "40",
        "--rollout.engine.urls", f'["{engine.url}"]', "--rollout.max_concurrent_requests", "8",
        "--rollout.staleness", "2", "--rollout.chunk_tokens", "5",
        # weights of 0 or 1 do not depend on the last bits of the engine's log-probs
        "--algorithm.importance.method", "sequence-mask",
        "--optimizer.schedule", "constant", "--optimizer.warmup_steps", "2",
    ]  # fmt: skip
    draw = random.Random(SEED + 1)
    folder = tmp_path / "killed" / "run"
    folder.parent.mkdir()
    watch = Watch(folder, ahead=2)
    words = [*command(model, folder, *options, "--trainer.steps", str(ENDLESS)), "--resume"]
    kept = 0
    for phase in draw.sample(["generate"] * 5 + ["publish", "save", "forward", "any", "any"], 10):
        disturb(words, watch, phase, draw.choice(["everything", "launcher", "rank"]), draw)
        places = [segment_places(path) for path in (folder / "dump").glob("step_*.unfinished")]
        assert all(len(of_step) == len(set(of_step)) for of_step in places)
        kept += sum(map(len, places))
    assert kept > 0, "no kill came while trajectories were sampled"
    options += ["--trainer.steps", str(watch.done() + 1)]
    done = run(model, folder, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert sum(record.get("requests/resumed", 0) for record in records(folder, "train")) > 0
    done = run(model, tmp_path / "straight", *options)
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "straight", folder)
    names = ("gradient_norm", "reward/mean", "lag/mean", "response_length/mean")
    for one, other in zip(records(tmp_path / "straight", "train"), records(folder, "train"), strict=True):
        assert [one[name] for name in names] == [other[name] for name in names]
