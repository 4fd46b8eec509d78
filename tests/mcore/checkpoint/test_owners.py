"""Who could have written a checkpoint: owners, permissions, and file systems that have neither."""

import grp
import os
import pwd
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fiberpo_megatron.mcore.checkpoint.owners import keep_to_owner, untrusted

ME, OTHER, SHARED = 1234, 4321, 777


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as our umask makes it."""
    made = tmp_path / "step-00000001"
    (made / "inner").mkdir(parents=True)
    (made / "tensors").write_text("x")
    (made / "inner" / "more").write_text("x")
    keep_to_owner(made)
    return made


def judged(
    folder: Path,
    *,
    me: int = ME,
    new: int = ME,
    new_mode: int = 0o600,
    names: dict[int, str] | None = None,
    members: Sequence[str] = (),
    **files: dict[str, int],
) -> str:
    """What is said where files seem to have other owners, groups and modes than this test may give them.

    `new` and `new_mode` are what a new file gets; `names` those of users, none of them for a system without names.
    """
    lstat, fstat, known = Path.lstat, os.fstat, {ME: "ann", OTHER: "ben"} if names is None else names

    def changed(facts: os.stat_result, mode: int, owner: int, group: int) -> os.stat_result:
        return os.stat_result((stat.S_IFMT(facts.st_mode) | mode, *facts[1:4], owner, group, *facts[6:10]))

    def look(path: Path) -> os.stat_result:
        facts = files.get(path.name, {})
        return changed(lstat(path), facts.get("mode", 0o644), facts.get("owner", ME), facts.get("group", SHARED))

    def group(number: int) -> Any:
        return SimpleNamespace(gr_name={SHARED: "project", ME: "ann"}[number if known else -1], gr_mem=list(members))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: me)
        patch.setattr(os, "fstat", lambda number: changed(fstat(number), new_mode, new, SHARED))
        patch.setattr(Path, "lstat", look)
        patch.setattr(pwd, "getpwuid", lambda number: SimpleNamespace(pw_name=known[number]))
        patch.setattr(grp, "getgrgid", group)
        return str(untrusted(folder))


def test_ours_as_it_is_written(folder: Path) -> None:
    """With real files, whoever runs the test."""
    assert untrusted(folder) is None


def test_no_save_leaves_a_file_that_others_may_write(folder: Path) -> None:
    """As under an umask of 002 or 000."""
    for path in (folder, folder / "tensors", folder / "inner"):
        path.chmod(0o777)
    keep_to_owner(folder)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "tensors")] == [0o755, 0o755]
    (folder / "inner" / "more").chmod(0o666)
    assert "inner/more may be written by every user of the machine (mode 0666)" in str(untrusted(folder))
    assert f"chmod -R go-w {folder}" in str(untrusted(folder))


def test_another_owner(folder: Path) -> None:
    said = judged(folder, more={"owner": OTHER})
    assert "inner/more belongs to ben (user 4321), not to ann (user 1234) who runs this" in said
    assert "set checkpoint.trust_others = true, or resume from a copy of your own" in said


def test_root_is_trusted(folder: Path) -> None:
    """An administrator could write any file anyway."""
    assert judged(folder, more={"owner": 0}) == "None"


def test_an_owner_that_the_file_system_gives(folder: Path) -> None:
    """NFS with root_squash: what root writes in a container belongs to nobody (65534), also what it wrote before."""
    nobodys = {path.name: {"owner": 65534} for path in (folder, *folder.rglob("*"))}
    assert judged(folder, me=0, new=65534, **nobodys) == "None"
    assert "belongs to ben" in judged(folder, me=0, new=65534, **nobodys | {"more": {"owner": OTHER}})


def test_a_group_that_may_write(folder: Path) -> None:
    said = judged(folder, tensors={"mode": 0o664})
    assert "tensors may be written by the group project (mode 0664)" in said and "chmod -R go-w" in said


def test_a_group_of_its_owner_alone(folder: Path) -> None:
    """Most Linux systems give every user a group of their own and an umask of 002."""
    assert judged(folder, tensors={"mode": 0o664, "group": ME}) == "None"
    assert "may be written by the group ann" in judged(folder, tensors={"mode": 0o664, "group": ME}, members=["ben"])
    assert (
        judged(folder, tensors={"mode": 0o664, "group": 0}) == "None"
    )  # containers whose user is any number, in the group of root


def test_a_container_that_knows_no_names(folder: Path) -> None:
    assert judged(folder, names={}, tensors={"mode": 0o664, "group": ME}) == "None"
    assert "by the group 777" in judged(folder, names={}, tensors={"mode": 0o664, "group": SHARED})
    assert "belongs to user 4321, not to user 1234" in judged(folder, names={}, tensors={"owner": OTHER})


def test_a_file_system_without_permissions(folder: Path) -> None:
    """CIFS and some cloud disks show mode 0777 for every file, also for one that was made with 0600."""
    assert judged(folder, new_mode=0o777, tensors={"mode": 0o777}) == "None"


def test_a_folder_that_can_only_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert judged(folder) == "None"
    assert "by every user of the machine" in judged(folder, tensors={"mode": 0o666})


def test_permissions_that_cannot_be_changed_are_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("not here")

    (folder / "tensors").chmod(0o666)
    monkeypatch.setattr(Path, "chmod", refuse)
    keep_to_owner(folder)
    assert "the permissions of" in caplog.text and "not here" in caplog.text
