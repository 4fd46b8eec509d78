"""Whether another process still runs: yes, no, or "that cannot be seen from here"."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fiberpo_megatron import process_identity
from fiberpo_megatron.process_identity import boot_id, this_process


@pytest.fixture
def child():
    with subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        yield child


def identity_of(pid: int) -> process_identity.ProcessIdentity:
    return replace(this_process(), pid=pid, started=process_identity._stat(pid)[1])


def test_a_process_runs_until_it_has_ended(child):
    other = identity_of(child.pid)
    assert this_process().runs() is True and other.runs() is True and other.started > 0
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still listed
    assert other.runs() is False
    child.wait()
    assert other.runs() is False


def test_a_number_that_was_used_again_is_another_process(child):
    assert replace(identity_of(child.pid), started=1).runs() is False
    assert replace(identity_of(child.pid), pid=10**30).runs() is False


@pytest.mark.parametrize("field", ["host", "boot", "namespace"])
def test_processes_of_other_machines_boots_and_containers_cannot_be_seen(child, field):
    assert replace(identity_of(child.pid), **{field: "another"}).runs() is None
    assert replace(identity_of(2**22), **{field: "another"}).runs() is None


def test_where_proc_hides_the_processes_of_others_nothing_is_claimed(child, monkeypatch):
    other = identity_of(child.pid)
    monkeypatch.setattr(process_identity, "_stat", lambda pid: ("", 0))
    assert other.runs() is None
    monkeypatch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError))
    assert other.runs() is None


def test_without_a_boot_id_no_process_can_be_seen(child, monkeypatch):
    other = replace(identity_of(child.pid), boot="")
    monkeypatch.setattr(process_identity, "boot_id", lambda: "")
    assert other.runs() is None
    assert this_process().boot == "" != boot_id()
