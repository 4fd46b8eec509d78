"""Temporary folders of engines: those of dead launchers go, those of living ones stay, containers included."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from fiberpo_megatron.engines import temporary
from fiberpo_megatron.engines.temporary import make_temporary, remove_leftovers

ROOT = str(Path(__file__).parents[2])
OWN = f"""
import sys
sys.path.insert(0, {ROOT!r})
from fiberpo_megatron.engines.temporary import make_temporary
folder = make_temporary()
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def in_a_container() -> list[str]:
    """The words that start a process in a PID namespace of its own; the temporary folder is shared."""
    words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("PID namespaces cannot be made here")
    return words


@pytest.mark.parametrize("container", [False, True], ids=["same namespace", "container"])
def test_the_folder_of_a_launcher_stays_until_it_is_killed(container: bool):
    words = [*(in_a_container() if container else []), sys.executable, "-c", OWN]
    owner = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdin is not None
    folder = Path(owner.stdout.readline().strip())
    assert folder.stat().st_mode & 0o777 == 0o700
    remove_leftovers()
    assert folder.is_dir()
    (folder / "socket").touch()
    owner.kill()
    owner.wait()
    owner.stdout.read()  # the process in the namespace has ended as well
    remove_leftovers()
    assert not folder.exists()
    owner.stdout.close()
    owner.stdin.close()


def test_a_container_leaves_the_folder_of_a_launcher_outside():
    folder = make_temporary()
    code = f"import sys; sys.path.insert(0, {ROOT!r}); from fiberpo_megatron.engines.temporary import remove_leftovers"
    subprocess.run([*in_a_container(), sys.executable, "-c", f"{code}; remove_leftovers()"], check=True)
    assert folder.path.is_dir()
    folder.remove()
    assert not folder.path.exists()
    folder.remove()


def test_folders_of_other_machines_and_other_programs_stay(place: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(temporary, "boot_id", lambda: "0123456789abcdef")
        theirs = make_temporary()
        os.close(theirs.handle)  # as if no process of this machine had it open
    other = place / "fiberpo-check-model-x"
    other.mkdir()
    (place / f"{temporary.prefix()}link").symlink_to(other)
    remove_leftovers()
    assert theirs.path.is_dir() and other.is_dir()


def test_without_a_boot_id_nothing_is_removed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(temporary, "boot_id", lambda: "")
    folder = make_temporary()
    os.close(folder.handle)
    remove_leftovers()
    assert folder.path.is_dir()


def test_a_folder_that_is_being_made_is_never_lost():
    """Others look for leftovers between its creation and its lock."""
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            remove_leftovers()

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        made = [make_temporary() for _ in range(200)]
        assert all(folder.path.is_dir() for folder in made)
    finally:
        stop.set()
        sweeper.join()
    for folder in made:
        folder.remove()
