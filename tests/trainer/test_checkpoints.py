"""When the run folder's checkpoints are complete, and which of them are kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fiberpo_megatron.mcore.checkpoint.folders import Description, complete_steps, describe, mark_all, step_of
from fiberpo_megatron.trainer.recorder import RunCheckpoints
from fiberpo_megatron.trainer.settings import CheckpointConfig
from tests.trainer.toy import SingleLayout


@dataclass
class Pending:
    """A save that is written when it is told."""

    folder: Path
    state: Mapping[str, object]
    ready: bool = False

    def written(self) -> bool:
        return self.ready

    def finish(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "tensors").write_bytes(b"x")
        Description(step_of(self.folder), {}, {}, {}, self.state, mark_all(self.folder)).write(self.folder)


@dataclass
class FilePolicy:
    """Writes one byte a checkpoint."""

    layout: SingleLayout = field(default_factory=SingleLayout)
    begun: list[Pending] = field(default_factory=list)

    def begin_save(self, folder: str, state: Mapping[str, object]) -> Pending:
        self.begun.append(Pending(Path(folder), state))
        return self.begun[-1]

    def save(self, folder: str, state: Mapping[str, object]) -> None:
        self.begin_save(folder, state).finish()


def steps(root: Path) -> list[int | None]:
    return [step_of(folder) for folder in complete_steps(root)]


def test_the_best_by_an_evaluation_and_the_newest_are_kept(tmp_path: Path):
    settings = CheckpointConfig(keep=1, keep_best_metric="eval/accuracy")
    checkpoints, policy = RunCheckpoints(tmp_path, settings), FilePolicy()
    for step, accuracy in enumerate([0.3, 0.8, None, 0.5], start=1):
        evaluated = {} if accuracy is None else {"eval/accuracy": accuracy}
        checkpoints.save(policy, step, prompts={"drawn": [step]}, measured={"train/loss": 1.0} | evaluated)
        assert checkpoints.complete(wait=False) == step
    assert steps(tmp_path) == [2, 4]
    state = describe(complete_steps(tmp_path)[0]).state
    assert state == {"step": 2, "prompts": {"drawn": [2]}, "metrics": {"eval/accuracy": 0.8}}


def test_the_best_on_a_set_that_is_evaluated_less_often(tmp_path: Path):
    settings = CheckpointConfig(keep=1, keep_best_metric="eval/aime/avg@8")
    checkpoints, policy = RunCheckpoints(tmp_path, settings, sets=["aime", "sums"]), FilePolicy()
    for step, value in enumerate([0.3, 0.8, None, 0.5], start=1):
        evaluated = {} if value is None else {"eval/aime/avg@8": value}
        checkpoints.save(policy, step, prompts={}, measured={"eval/accuracy": 0.1, "eval/sums/avg@8": 0.9} | evaluated)
    assert steps(tmp_path) == [2, 4]
    with pytest.raises(ValueError, match="rank 0 knows no such metric"):
        checkpoints.save(policy, 5, prompts={}, measured={"eval/aime/avg@4": 0.1})


def test_a_metric_that_nobody_knows_is_an_error_at_the_first_save(tmp_path: Path):
    checkpoints = RunCheckpoints(tmp_path, CheckpointConfig(keep_best_metric="train/rewards"))
    with pytest.raises(
        ValueError, match=r"'train/rewards': rank 0 knows no such metric; use one of \['train/reward'\]"
    ):
        checkpoints.save(FilePolicy(), 1, prompts={}, measured={"train/reward": 0.5})
    with pytest.raises(ValueError, match=r"keep_best_metric = 'accuracy': say of which record"):
        CheckpointConfig(keep_best_metric="accuracy")


def test_an_asynchronous_save_counts_once_it_is_written(tmp_path: Path):
    checkpoints, policy = RunCheckpoints(tmp_path, CheckpointConfig(keep=1, asynchronous=True)), FilePolicy()
    checkpoints.save(policy, 1, prompts={}, measured={})
    assert checkpoints.complete(wait=False) == 0 and steps(tmp_path) == []
    policy.begun[0].ready = True
    assert checkpoints.complete(wait=False) == 1 and steps(tmp_path) == [1]
    checkpoints.save(policy, 2, prompts={}, measured={})
    checkpoints.save(policy, 3, prompts={}, measured={})  # waits for 2
    assert steps(tmp_path) == [2]
    assert checkpoints.complete(wait=True) == 3 and steps(tmp_path) == [3]
