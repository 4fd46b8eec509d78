"""A checkpoint in which somebody planted code, links or permissions: nothing runs, and one clear error says why."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore import checkpoint
from fiberpo_megatron.mcore.checkpoint.folders import DESCRIPTION, CheckpointError, Description, describe, mark_all
from fiberpo_megatron.mcore.parallel.layout import start_layout
from fiberpo_megatron.mcore.policy import build_policy
from tests.distributed.parity import QWEN3_MOE, make_config


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def in_item(name: str, planted: bytes) -> Callable[[Path], None]:
    """Put other bytes in the place of the items whose names contain `name`: at the end of a .distcp file."""

    def plant(folder: Path) -> None:
        path = folder / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        changed = [index for index in metadata.storage_data if name in index.fqn]
        assert changed
        for index in changed:
            place = metadata.storage_data[index]
            file = folder / place.relative_path
            place.offset, place.length = file.stat().st_size, len(planted)
            file.write_bytes(file.read_bytes() + planted)
        path.write_bytes(pickle.dumps(metadata))

    return plant


def replace(name: str, planted: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(planted) and None


def attacks(ran: Path) -> dict[str, Callable[[Path], None]]:
    """By name, what somebody who may write a checkpoint changes in it."""
    pickled, packed = pickle.dumps(Payload(ran)), saved([Payload(ran)])

    def outside(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        for place in metadata.storage_data.values():
            place.relative_path = "../../secret"
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return {
        "description": replace(".metadata", pickled),
        "description of a rank": lambda folder: (folder / ".metadata").rename(folder / "__0.metadata") and None,
        "common state": replace("common.pt", packed),
        "common state as a plain pickle": replace("common.pt", pickled),
        "strategy": replace("metadata.json", b'{"sharded_backend": "zarr", "common_backend": "zarr"'),
        "random generators": in_item("random_state", packed),
        "extra state": in_item("linear_qkv._extra_state", packed),
        "tensor": in_item("embedding", packed),
        "tensor as a plain pickle": in_item("embedding", pickled),
        "another file": outside,
    }


def load_attacked(root: Path) -> dict[str, str]:
    """What a load says of each attacked copy of a checkpoint, whose sizes and checksums the attacker has corrected."""
    config = make_config()
    policy = build_policy(config, QWEN3_MOE, start_layout(QWEN3_MOE, config.parallel, config.run))
    good = checkpoint.step_folder(root, 1)
    policy.save(str(good), {"step": 1})
    ran = root / "ran"

    def tried(name: str, attack: Callable[[Path], Any], again: bool = True, **options: Any) -> str:
        folder = checkpoint.step_folder(root / name.replace(" ", "_"), 2)
        shutil.copytree(good, folder)
        attack(folder)
        if again:
            fields = {**describe(good).__dict__, "files": mark_all(folder)}
            (folder / DESCRIPTION).unlink()
            Description(**fields).write(folder)
        try:
            checkpoint.load(policy, folder, **options)
        except CheckpointError as error:
            return str(error)
        return "loaded"

    said = {name: tried(name, attack) for name, attack in attacks(ran).items()}
    assert not ran.exists()

    def linked(folder: Path) -> None:
        (folder / "common.pt").rename(root / "elsewhere.pt")
        (folder / "common.pt").symlink_to(root / "elsewhere.pt")

    said["link"] = tried("link", linked, again=False)
    said["pipe"] = tried("pipe", lambda folder: os.mkfifo(folder / "pipe"), again=False)
    said["writable"] = tried("writable", lambda folder: (folder / "common.pt").chmod(0o666), again=False)
    said["trusted"] = tried(
        "trusted", lambda folder: (folder / "common.pt").chmod(0o666), again=False, trust_others=True
    )
    pickled_state = saved([torch.frombuffer(bytearray(pickle.dumps(Payload(ran))), dtype=torch.uint8)])
    said["pickle in a tensor"] = tried("inner", in_item("linear_qkv._extra_state", pickled_state))
    assert not ran.exists()
    policy.load(str(good))
    pickle.loads(pickle.dumps(Payload(ran)))
    assert ran.exists()  # the payload works
    return said


def test_nothing_in_a_checkpoint_runs(tmp_path: Path) -> None:
    [said] = run_ranks(1, load_attacked, tmp_path)
    runs_code = "the file was made to run code"
    assert runs_code in said["description"] and ".metadata" in said["description"]
    assert ".metadata is missing" in said["description of a rank"]
    for name in ("common state", "random generators", "extra state", "tensor"):
        assert "which only code could rebuild" in said[name], (name, said[name])
    for name in ("common state as a plain pickle", "tensor as a plain pickle"):
        assert "is not in torch's format" in said[name], said[name]
    assert "loading the checkpoint" in said["strategy"]
    assert "refers to '../../secret', which is not a file of the checkpoint" in said["another file"]
    assert "common.pt is a symbolic link" in said["link"] and "pipe is a symbolic link or another" in said["pipe"]
    assert "common.pt may be written by every user of the machine (mode 0666)" in said["writable"]
    assert said["trusted"] == "loaded"
    assert said["pickle in a tensor"] == "loaded"  # Transformer Engine's state begins anew


def save_with_open_modes(root: Path) -> str:
    before = os.umask(0)
    try:
        config = make_config(parallel={"expert": 2})
        policy = build_policy(config, QWEN3_MOE, start_layout(QWEN3_MOE, config.parallel, config.run))
        policy.save(str(root / "step-00000001"), {})
        policy.load(str(root / "step-00000001"))
    finally:
        os.umask(before)
    return "loaded"


@pytest.mark.exhaustive
def test_a_checkpoint_of_ours_is_trusted_under_any_umask(tmp_path: Path) -> None:
    """Two ranks: what each of them wrote loses the permissions of the umask that others must not have."""
    assert run_ranks(2, save_with_open_modes, tmp_path) == ["loaded", "loaded"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "step-00000001").iterdir()}
    assert set(modes.values()) == {0o644}, modes
