"""Whatever goes wrong while saving or loading, earlier checkpoints stay whole and the message says what to do."""

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from fiberpo_megatron.certify.processes import collect_ranks, run_ranks
from fiberpo_megatron.mcore import checkpoint
from fiberpo_megatron.mcore.checkpoint import folders as checkpoint_folders
from fiberpo_megatron.mcore.checkpoint.folders import CheckpointError, partial_folder
from fiberpo_megatron.mcore.parallel.layout import start_layout
from fiberpo_megatron.mcore.policy import MegatronPolicy, build_policy
from tests.distributed.parity import QWEN3_MOE, make_config


def start(hf_config: dict[str, Any] = QWEN3_MOE, **sections: Any) -> MegatronPolicy:
    config = make_config(**sections)
    return build_policy(config, hf_config, start_layout(hf_config, config.parallel, config.run))


def weights_of(policy: MegatronPolicy) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for model in policy.models for p in model.parameters()])


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(moment: str) -> None:
    """Let this process die at a moment of the next save."""
    if moment == "while tensors are written":
        FileSystemWriter.write_data = die  # type: ignore[method-assign]
    elif moment == "before it is described":
        checkpoint_folders.Description.write = die  # type: ignore[method-assign]
    elif moment == "before it gets its name":
        replace = os.replace
        os.replace = lambda old, new: die() if Path(old).is_dir() else replace(old, new)
    else:
        threading.Timer(float(moment), die).start()


def save_and_die(root: Path, moment: str) -> None:
    policy = start(parallel={"expert": 2})
    for step in range(1, 1000):
        with torch.no_grad():
            for model in policy.models:
                for parameter in model.parameters():
                    parameter.fill_(step)
        if step == 2:
            kill_at(moment)
        policy.save(str(checkpoint.step_folder(root, step)), {"step": step})


def save_in_background_and_die(root: Path) -> None:
    """A complete checkpoint, and one that is on the disk but was not finished."""
    policy = start(parallel={"expert": 2})
    for step in (1, 2):
        with torch.no_grad():
            for model in policy.models:
                for parameter in model.parameters():
                    parameter.fill_(step)
        pending = policy.begin_save(str(checkpoint.step_folder(root, step)), {"step": step})
        if step == 1:
            pending.finish()
    while not pending.written():
        time.sleep(0.01)
    die()


def load_newest(roots: list[Path]) -> list[tuple[int, float, float]]:
    """Per root the step found, and the smallest and largest weight."""
    policy = start()
    found = []
    for root in roots:
        folder = checkpoint.latest(root)
        assert folder is not None
        state = policy.load(str(folder))
        weights = weights_of(policy)
        found.append((int(str(state["step"])), float(weights.min()), float(weights.max())))
    return found


def test_kill_while_saving_in_the_background(tmp_path: Path) -> None:
    outcomes = collect_ranks(2, save_in_background_and_die, tmp_path)
    assert all(outcome.error is not None for outcome in outcomes)
    [[(step, low, high)]] = run_ranks(1, load_newest, [tmp_path])
    assert low == high == step == 1
    assert partial_folder(checkpoint.step_folder(tmp_path, 2)).is_dir()


MOMENTS = ["while tensors are written", "before it is described", "before it gets its name", "0.07", "0.31"]


def test_kill_while_saving(tmp_path: Path) -> None:
    """kill -9 at a known stage of the second save, and at moments that fall anywhere."""
    roots = [tmp_path / moment for moment in MOMENTS]
    for root in roots:
        outcomes = collect_ranks(2, save_and_die, root, root.name)
        assert all(outcome.error is not None for outcome in outcomes)
        assert "SIGKILL" in str(outcomes[0].error)
    [found] = run_ranks(1, load_newest, roots)
    for root, (step, low, high) in zip(roots, found, strict=True):
        assert low == high == step  # the weights of the step that its name says
        if not root.name[0].isdigit():
            assert step == 1
            assert partial_folder(checkpoint.step_folder(root, 2)).is_dir()
        checkpoint.prune(root, keep=1)
        assert list(root.iterdir()) == [checkpoint.step_folder(root, step)]


def begin_and_finish(policy: MegatronPolicy, folder: Path) -> None:
    policy.begin_save(str(folder), {}).finish()


def fail_to_write(root: Path, failing_rank: int, background: bool) -> str:
    """A save in which one rank may not write files of more than 20 kB; then one with room again."""
    policy = start(parallel={"expert": 2})
    policy.save(str(checkpoint.step_folder(root, 1)), {})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if policy.layout.rank == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    message = ""
    try:
        if background:
            begin_and_finish(policy, checkpoint.step_folder(root, 2))
        else:
            policy.save(str(checkpoint.step_folder(root, 2)), {})
    except RuntimeError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    policy.layout.barrier()
    assert checkpoint.latest(root) == checkpoint.step_folder(root, 1)
    assert [path.name for path in root.iterdir()] == ["step-00000001"]
    policy.layout.barrier()
    policy.save(str(checkpoint.step_folder(root, 2)), {})
    return message


@pytest.mark.parametrize(("failing_rank", "background"), [(0, False), (1, False), (1, True)])
def test_a_failed_write(failing_rank: int, background: bool, tmp_path: Path) -> None:
    for message in run_ranks(2, fail_to_write, tmp_path, failing_rank, background):
        assert "step-00000002 (earlier ones are untouched) failed on rank" in message
        assert "File too large" in message
    assert checkpoint.latest(tmp_path) == checkpoint.step_folder(tmp_path, 2)


def refused(policy: MegatronPolicy, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        policy.load(str(folder))
    return str(caught.value)


def damage(folder: Path, change: Callable[[bytes], bytes]) -> None:
    [tensors] = folder.glob("*.distcp")
    tensors.write_bytes(change(tensors.read_bytes()))


def refuse_checkpoints(root: Path) -> dict[str, str]:
    """Messages for checkpoints that cannot be loaded; what is seen before reading leaves the policy as it was."""
    policy = start()
    folders = {name: checkpoint.step_folder(root, step) for step, name in enumerate(("cut", "garbled", "good"))}
    for folder in folders.values():
        policy.save(str(folder), {"step": 0})
    damage(folders["cut"], lambda data: data[: len(data) // 2])
    damage(folders["garbled"], lambda data: data[:-9000] + bytes([data[-9000] ^ 1]) + data[-8999:])
    before = weights_of(policy)
    said = {"cut": refused(policy, folders["cut"])}
    said["missing"] = refused(policy, checkpoint.step_folder(root, 9))
    policy.hf_config = {**QWEN3_MOE, "num_experts": 4}
    said["other model"] = refused(policy, folders["good"])
    policy.hf_config = QWEN3_MOE
    said["garbled"] = refused(policy, folders["garbled"])
    assert torch.equal(weights_of(policy), before)
    policy.load(str(folders["good"]))
    assert torch.equal(weights_of(policy), before)
    return said


def test_messages(tmp_path: Path) -> None:
    [said] = run_ranks(1, refuse_checkpoints, tmp_path)
    assert "step-00000000 is damaged: __0_0.distcp has " in said["cut"]
    assert "take an earlier checkpoint" in said["cut"]
    assert "step-00000001 is damaged: __0_0.distcp has another checksum than when it was written" in said["garbled"]
    assert "no checkpoint at" in said["missing"]
    assert "step-00000002 was written for another model: experts.count 8 (this run: 4)" in said["other model"]


def resume_with_another_rate(root: Path) -> tuple[float, float]:
    policy = start(optimizer={"learning_rate": 1e-2})
    policy.scheduler.step(5)
    policy.save(str(root / "a"), {})
    other = build_policy(make_config(optimizer={"learning_rate": 3e-3}), QWEN3_MOE, policy.layout)
    other.load(str(root / "a"))
    return float(other.optimizer.param_groups[0]["lr"]), float(other.scheduler.num_steps)


def test_the_config_decides_the_learning_rate(tmp_path: Path) -> None:
    """A resumed run follows its own config; only the place in the schedule comes from the checkpoint."""
    assert run_ranks(1, resume_with_another_rate, tmp_path) == [(3e-3, 5.0)]


def save_twice(root: Path) -> float:
    """Seconds of the second save of a model of 0.8 million parameters."""
    hf_config = {**QWEN3_MOE, "hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 96}
    policy = start(hf_config, parallel={"expert": 2})
    policy.save(str(root / "a"), {})
    policy.layout.barrier()
    begin = time.monotonic()
    policy.save(str(root / "a"), {})
    return time.monotonic() - begin


def test_saving_is_quick(tmp_path: Path) -> None:
    """A demo saves after every step. 0.3 s on a quiet machine; writer processes would take several seconds."""
    assert max(run_ranks(2, save_twice, tmp_path)) < 3
