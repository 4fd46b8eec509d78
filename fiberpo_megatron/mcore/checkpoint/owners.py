"""This module says whether other users could have written a checkpoint.

Reading a checkpoint executes nothing, but whoever can write one decides the weights. Checksums do not help against
that: whoever changes a file can change the checksum beside it.
"""

import grp
import logging
import os
import pwd
import stat
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def keep_to_owner(folder: Path) -> None:
    """Take from group and others the permission to write a folder and what is in it; reading stays as it is.

    Under an umask of 002, as on many clusters, all members of a project's group could change a checkpoint otherwise.
    """
    try:
        for path in (folder, *folder.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & _OTHERS:
                path.chmod(mode & ~_OTHERS)
    except OSError as error:  # a file system without permissions; the checkpoint itself is whole
        _log.warning("the permissions of %s cannot be changed: %s", folder, error)


def untrusted(folder: Path) -> str | None:
    """Return a sentence on a file of a checkpoint that another user owns or may write to, or None.

    Trusted owners are this process's user, root, and the owner that a new file beside the checkpoint gets: NFS may give
    files another owner than the process that writes them (root_squash), and so may a container's mounts. Permissions
    are not compared on a file system that does not keep them. A group is taken as private if it has the name of its
    only member, as most Linux systems give one to every user.
    """
    own = {0, os.geteuid()}
    keeps_modes = True
    try:
        with tempfile.TemporaryFile(dir=folder.parent) as file:
            new = os.fstat(file.fileno())
    except OSError:  # a folder that can only be read
        pass
    else:
        own.add(new.st_uid)
        keeps_modes = not new.st_mode & 0o077  # the file was made with mode 0600
    for path in (folder, *sorted(folder.rglob("*"))):
        facts = path.lstat()
        if facts.st_uid not in own:
            return (
                f"{path} belongs to {_user(facts.st_uid)}, not to {_user(os.geteuid())} who runs this. Whoever can "
                "write a checkpoint decides the weights. If you trust that user, set checkpoint.trust_others = true, "
                "or resume from a copy of your own (cp -r)"
            )
        if not keeps_modes:
            continue
        if facts.st_mode & stat.S_IWOTH:
            return f"{path} may be written by every user of the machine ({_mode(facts)}). {_fix(folder)}"
        if facts.st_mode & stat.S_IWGRP and not _private(facts.st_gid, facts.st_uid):
            return f"{path} may be written by the group {_group(facts.st_gid)} ({_mode(facts)}). {_fix(folder)}"
    return None


def _fix(folder: Path) -> str:
    return (
        "Whoever can write a checkpoint decides the weights. Look whether its files are yours and as you left them, "
        f"then run `chmod -R go-w {folder}`; or, if you trust them all, set checkpoint.trust_others = true"
    )


def _mode(facts: os.stat_result) -> str:
    return f"mode {stat.S_IMODE(facts.st_mode):04o}"


def _private(group: int, owner: int) -> bool:
    """Return whether a group has no members but `owner` and root."""
    if group == 0:
        return True
    try:
        found, name = grp.getgrgid(group), pwd.getpwuid(owner).pw_name
    except KeyError:  # a container that knows no names: a private group has the number of its user
        return group == owner
    return found.gr_name == name and set(found.gr_mem) <= {name}


def _user(number: int) -> str:
    try:
        return f"{pwd.getpwuid(number).pw_name} (user {number})"
    except KeyError:
        return f"user {number}"


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
