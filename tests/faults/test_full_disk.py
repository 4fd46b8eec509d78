"""A real file system that is full: wherever the room ends, the run says so and is resumed once it has room."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.faults.test_writes import FIX, Case, case, reference, torn, warnings  # noqa: F401 - fixtures

KIB = (8, 24, 36, 44, 52, 60, 68, 76, 84, 92, 104, 120, 140)
"""Sizes of the disk. A run of two steps writes some 100 KiB: config, lock, samples, checkpoints, weights, metrics."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Yield the mount point of a small file system in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this user cannot mount a file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", disk], check=True)


@pytest.mark.parametrize("kib", [pytest.param(k, marks=() if k == 60 else pytest.mark.exhaustive) for k in KIB])
def test_a_disk_without_room(case: Case, reference, disk: Path, kib: int, warnings: Callable[[], str]):  # noqa: F811
    resize(disk, kib)
    folder = disk / "run"
    said: Exception | None = None
    try:
        case.run(folder)
    except Exception as error:
        said = error
    if said is not None:
        text = str(said)
        assert str(folder) in text and "No space left on device" in text and FIX.search(text), repr(said)
    elif kib < KIB[-1]:
        assert "WARNING" in (warned := warnings()) or "not written" in warned, "the disk was full, and nobody said so"
    resize(disk, 16 * 1024)
    assert not torn(folder)
    assert torch.equal(case.run(folder, resume=True), reference[0])
