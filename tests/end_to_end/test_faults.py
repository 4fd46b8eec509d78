"""What goes wrong in a run: within a bounded time every rank has ended, the message names rank and cause, nothing is
left running, and the last checkpoint is good. Rollouts are replayed, so no engine is needed.

A rank that is killed: test_kills.py. Faults inside a save or a step: tests/distributed/test_checkpoint_failures.py and
test_failures.py.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from fiberpo_megatron.config import load_config
from fiberpo_megatron.interfaces import Policy
from fiberpo_megatron.mcore.checkpoint.folders import (
    CheckpointError,
    DamagedCheckpoint,
    complete_steps,
    damaged_files,
    describe,
    latest,
)
from fiberpo_megatron.rollout.dump import Origin, RolloutDump, prompts_digest
from fiberpo_megatron.sources.stored import shared_settings
from fiberpo_megatron.trainer.recorder import restore
from fiberpo_megatron.trainer.tasks import start_tasks
from fiberpo_megatron.types import Completion, Prompt, RolloutGroup, Trajectory, flatten
from tests.end_to_end.test_training import CONFIG, ROOT, SMALL, command, processes_of, records, run
from tests.tiny_model import VOCABULARY
from tests.trainer.toy import SingleLayout

STEPS = 40


@pytest.fixture(scope="module")
def rollouts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RolloutDump:
    """Random responses to the prompts of STEPS steps, as `fiberpo dump` would store them."""
    config = load_config(
        CONFIG, [*SMALL, "--model.path", str(model), "--run.folder", str(tmp_path_factory.mktemp("run"))]
    )
    prompts: list[list[Prompt]] = []
    with start_tasks(config, json.loads((model / "config.json").read_text()), SingleLayout()) as tasks:
        for step in range(STEPS):
            places = tasks.prompts.prompts_at(config.run.seed, step, config.batch.prompts)
            prompts.append(tasks.environments.prompts(places, tasks.encoder))
    dump = RolloutDump(tmp_path_factory.mktemp("rollouts"))
    random = np.random.default_rng(0)
    for step, asked in enumerate(prompts):
        groups = []
        for prompt in asked:
            answers = []
            for _ in range(config.batch.samples_per_prompt):
                tokens = tuple(random.integers(2, VOCABULARY, 5).tolist())
                completion = Completion(tokens, np.full(5, -4.0, np.float32), "stop", ())
                answers.append(Trajectory(prompt, completion, "", float(random.integers(2)), False))
            groups.append(RolloutGroup(prompt, tuple(answers)))
        origin = Origin(step, str(step), prompts_digest(asked), shared_settings(config, VOCABULARY), "")
        dump.write(flatten(groups), origin)
    return dump


def options(rollouts: RolloutDump, steps: int, *more: str) -> list[str]:
    return ["--trainer.steps", str(steps), "--storage.replay", str(rollouts.folder), *more]


def assert_over(folder: Path, last: int) -> None:
    """Nothing runs any more, and the newest checkpoint is that of `last`, whole."""
    assert not processes_of(folder)
    newest = latest(folder / "checkpoints")
    assert newest is not None and newest.name == f"step-{last:08d}"
    assert damaged_files(newest, describe(newest)) is None


def test_a_rank_that_hangs(model: Path, rollouts: RolloutDump, tmp_path: Path):
    """A stopped process: its neighbour names it. It takes no SIGTERM, so the launcher needs 30 s more to end it."""
    folder = tmp_path / "run"
    words = command(model, folder, *options(rollouts, STEPS, "--run.heartbeat_timeout_s", "10"))
    launcher = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 150
    while not complete_steps(folder / "checkpoints"):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    [stopped] = [p for p in processes_of(folder) if p.environ().get("RANK") == "1"]
    os.kill(stopped.pid, signal.SIGSTOP)
    began = time.monotonic()
    _, error = launcher.communicate(timeout=150)
    assert launcher.returncode == 1 and time.monotonic() - began < 120
    assert re.search(
        rf"fiberpo: rank 0: RankSilent: rank 1 \(.*pid {stopped.pid}\) has given no sign of life for", error
    ), error
    assert "its phase was '" in error
    newest = latest(folder / "checkpoints")
    assert newest is not None
    assert_over(folder, int(newest.name.removeprefix("step-")))


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def tensors(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}" / "__1_0.distcp"


def test_a_gradient_that_is_not_finite_and_damaged_checkpoints(model: Path, rollouts: RolloutDump, tmp_path: Path):
    """One trajectory's reward of step 2 is NaN, hence the advantages of its group. Then the newest
    checkpoint is damaged: the run resumes from the one before."""
    folder, broken = tmp_path / "run", RolloutDump(tmp_path / "broken")
    shutil.copytree(rollouts.folder, broken.folder)
    batch = rollouts.read(2)
    rewards = batch.rewards.copy()
    rewards[-1] = np.nan
    broken.write(replace(batch, rewards=rewards), rollouts.origin(2))
    done = run(model, folder, *options(broken, 4))
    assert done.returncode == 1
    named = (
        r"rank [01]: ValueError: the reward of trajectory 31 \(prompt group 7\) is nan; its environment, or the stored"
    )
    assert re.search(named, done.stderr)
    assert_over(folder, 2)

    flip(tensors(folder, 2))
    done = run(model, folder, *options(rollouts, 4), "--resume")
    assert done.returncode == 0, done.stderr
    assert re.search(r"WARNING: .*step-00000002 is damaged: __1_0.distcp has another checksum", done.stdout)
    assert f"Resumed from {folder / 'checkpoints' / 'step-00000001'}" in done.stdout
    assert [record["step"] for record in records(folder, "train")] == [0, 1, 2, 3]
    assert_over(folder, 4)

    for step in (3, 4):
        flip(tensors(folder, step))
    checkpoints, said = folder / "checkpoints", list[str]()
    with pytest.raises(CheckpointError, match=rf"none of the 2 checkpoints in {re.escape(str(checkpoints))} is whole"):
        restore(cast(Policy, Loading()), checkpoints, said.append)
    assert len(said) == 2 and all("has another checksum" in line for line in said)


class Loading:
    """One rank that looks at a checkpoint as a policy does before it loads it."""

    layout = SingleLayout()

    def load(self, path: str) -> None:
        damage = damaged_files(Path(path), describe(Path(path)))
        if damage is not None:
            raise DamagedCheckpoint(damage)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the tiny model, and not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2400k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(model: Path, rollouts: RolloutDump, small_disk: Path, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(small_disk)
    done = run(model, folder, *options(rollouts, 4))
    assert done.returncode == 1
    assert re.search(r"saving the checkpoint \S+ \(earlier ones are untouched\) failed on rank [01]", done.stderr)
    assert re.search(r"the disk is full: 0 MiB are free; make room or lower checkpoint.keep", done.stderr)
    assert_over(folder, 1)
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
