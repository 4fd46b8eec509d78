"""Writing files so that neither a full disk nor a lost machine leaves half of one."""

import errno
import os
from pathlib import Path

import pytest

from fiberpo_megatron import durable


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "notes.txt"
    with durable.replaced(path, text=True) as file:
        file.write("é\u2028")
        file.flush()
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "é\u2028" and os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("when", ["while writing", "at the sync", "at the rename"])
def test_a_full_disk_leaves_the_older_file(tmp_path, monkeypatch, when):
    path = tmp_path / "notes.bin"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when != "while writing":
        monkeypatch.setattr(os, {"at the sync": "fsync", "at the rename": "replace"}[when], full)
    with pytest.raises(OSError, match="No space"), durable.replaced(path) as file:
        file.write(b"new")
        if when == "while writing":
            full()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["notes.bin"]


def test_the_folder_is_synced_after_the_rename(tmp_path, monkeypatch):
    """Without it the name may be lost with the machine, although the content was written."""
    deeds = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(handle):
        deeds.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def logged_replace(old, new):
        deeds.append(("rename", str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    with durable.replaced(tmp_path / "a") as file:
        file.write(b"1")
    assert deeds == [
        ("sync", str(tmp_path / ".a.partial")),
        ("rename", str(tmp_path / "a")),
        ("sync", str(tmp_path)),
    ]


def test_a_mode_holds_whatever_the_umask(tmp_path):
    with durable.replaced(tmp_path / "key", text=True, mode=0o600) as file:
        file.write("secret")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, r"No space left on device; \d+ MiB are free there\. Make room"),
        (errno.EDQUOT, "have the quota raised"),
        (errno.EROFS, rf"make it writable for user {os.geteuid()}"),
        (errno.EACCES, "make it writable"),
        (errno.ENOENT, "removed, moved or unmounted meanwhile: bring it back"),
        (errno.EIO, "look at the file system"),
    ],
)
@pytest.mark.parametrize("deed", ["replaced", "rename", "sync"])
def test_an_error_names_the_file_the_cause_and_the_fix(tmp_path, monkeypatch, number, fix, deed):
    """The kernel says no more than "No space left on device" when a write or a sync fails."""

    def failing(*_):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "notes.txt"
    path.write_text("old")
    monkeypatch.setattr(os, {"rename": "replace"}.get(deed, "fsync"), failing)
    with pytest.raises(durable.WriteFailed, match=fix) as failed:
        if deed == "replaced":
            with durable.replaced(path) as file:
                file.write(b"new")
        elif deed == "rename":
            durable.rename(path, tmp_path / "other")
        else:
            durable.sync(path)
    assert failed.value.errno == number and str(failed.value).endswith(f"{failed.value.filename!r}")
    assert Path(failed.value.filename).parent == tmp_path and path.read_text() == "old"


def test_a_failed_copy_names_its_target(tmp_path):
    """shutil names the file that was read before the one that could not be written."""
    with pytest.raises(durable.WriteFailed, match="Make room") as failed, durable.explained(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", "/model/config.json", None, "/run/config.json")
    assert failed.value.filename == "/run/config.json"


def test_an_error_of_somebody_else_keeps_its_words(tmp_path):
    with pytest.raises(FileExistsError, match="^notes was not written by this run$"), durable.explained(tmp_path):
        raise FileExistsError("notes was not written by this run")


def test_an_error_is_explained_once(tmp_path):
    with pytest.raises(durable.WriteFailed) as failed, durable.explained(tmp_path), durable.explained(tmp_path / "a"):
        open(tmp_path / "a" / "b")  # noqa: SIM115 - it fails
    assert str(failed.value).count("bring it back") == 1 and failed.value.filename == str(tmp_path / "a" / "b")


def test_a_folder_that_cannot_be_deleted_is_named(tmp_path, monkeypatch, caplog):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("x")
    durable.remove_tree(tmp_path / "old")
    assert not (tmp_path / "old").exists() and not caplog.text
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    durable.remove_tree(tmp_path / "kept")
    assert f"{tmp_path / 'kept'} could not be deleted and takes room" in caplog.text
