"""One run at a time in a folder: on one machine, across machines, and whatever ends a holder."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fiberpo_megatron import process_identity, run_lock
from fiberpo_megatron.process_identity import this_process
from fiberpo_megatron.run_lock import RunLocked, RunLockLost, refuse, take

QUICK = {"beat_s": 0.02, "poll_s": 0.01, "watch_s": 0.4}
"""Twenty beats, as short as a busy machine allows."""


def never(loss: RunLockLost) -> None:
    raise AssertionError(f"the lock was lost: {loss}")


def quick(folder: Path, lost=never, **more):
    return take(folder, "train", lost, **QUICK | {"say": lambda text: None} | more)


@pytest.fixture(autouse=True)
def no_container(monkeypatch):
    """The tests say the same when they run in a container themselves."""
    monkeypatch.setattr(process_identity, "_INITIAL_NAMESPACE", this_process().namespace)


@pytest.fixture
def another(monkeypatch):
    """Has every later lock name another process that runs, and returns its number."""
    text = run_lock._text
    with subprocess.Popen(["sleep", "600"]) as child:
        identity = replace(this_process(), pid=child.pid, started=process_identity._stat(child.pid)[1])

        def of_the_child(*words):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(run_lock, "this_process", lambda: identity)
                return text(*words)

        monkeypatch.setattr(run_lock, "_text", of_the_child)
        yield child.pid
        child.kill()


@pytest.fixture
def elsewhere(monkeypatch):
    """Has every later holder seem to run on another machine, so that only its beats show that it lives."""
    monkeypatch.setattr(run_lock, "this_process", lambda: replace(this_process(), host="n7", boot="another"))


def only(folder: Path) -> Path:
    """The lock file, which is the only file in its folder."""
    [path] = (folder / "lock").iterdir()
    return path


def test_a_held_folder_is_refused_and_a_released_one_is_free(tmp_path, monkeypatch, another):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with quick(tmp_path / "run") as lock:
        lock.check()
        for enter in (quick, refuse):
            with pytest.raises(RunLocked) as refused:
                enter(tmp_path / "run")
            said = str(refused.value)
            assert f"run.folder = {tmp_path / 'run'} is in use by `fiberpo train` on host {this_process().host}" in said
            assert f"process {another}, SLURM job 77, since 2" in said
            assert "stop it (scancel 77), or choose another folder with --run.folder" in said
    refuse(tmp_path / "run")
    lock.close()
    with quick(tmp_path / "run", say=lambda text: pytest.fail(text)):
        assert only(tmp_path / "run").name == "00000002", "numbers never go down"


def test_without_a_job_the_fix_is_kill(tmp_path, monkeypatch, another):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with quick(tmp_path), pytest.raises(RunLocked, match=rf"stop it \(kill {another} on "):
        quick(tmp_path)


def test_a_number_inside_of_a_container_is_said_to_be_one(tmp_path, monkeypatch):
    """`kill 1` outside of it would be a disaster."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with monkeypatch.context() as inside:
        inside.setattr(run_lock, "this_process", lambda: replace(this_process(), namespace="pid:[1]", pid=1))
        lock = quick(tmp_path)
    with pytest.raises(RunLocked, match=r"process 1 of a container, since .*\(kill 1 inside of its container on "):
        quick(tmp_path, watch_s=60)
    lock.close()


def test_a_second_run_of_the_same_process_is_named_as_such(tmp_path):
    with quick(tmp_path), pytest.raises(RunLocked, match=r"stop it \(it is a run of this process: close it\)"):
        quick(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from fiberpo_megatron.run_lock import take
lock = take(Path(sys.argv[1]), "train", print)
print("held", flush=True)
time.sleep(600)
"""


def test_a_killed_holder_of_this_machine_is_replaced_at_once(tmp_path):
    program = HOLD.format(root=str(Path(__file__).parents[1]))
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(RunLocked, match=f"process {holder.pid}"):
        quick(tmp_path)
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(RunLocked, match=f"process {holder.pid}"):  # stopped is not dead
        quick(tmp_path)
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a launcher may not have taken note of its end
    said = []
    with take(tmp_path, "train", never, watch_s=600, say=said.append):
        assert len(said) == 1 and f"process {holder.pid}" in said[0] and "without releasing it" in said[0]
    holder.wait()
    holder.stdout.close()


def test_a_holder_elsewhere_is_known_by_its_beats(tmp_path, elsewhere):
    with quick(tmp_path):
        began = time.monotonic()
        with pytest.raises(RunLocked, match="on host n7"):
            quick(tmp_path, watch_s=60)
        assert time.monotonic() - began < 30, "the first beat is enough"
    refuse(tmp_path)


def test_a_silent_holder_elsewhere_is_replaced_and_stops_before_it_writes(tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(run_lock, "PROGRESS_S", 0.1)
    losses, noticed = [], threading.Event()
    frozen = quick(tmp_path, lambda loss: (losses.append(loss), noticed.set()), beat_s=3600)
    refuse(tmp_path)  # it cannot know
    said = []
    with quick(tmp_path, say=said.append) as lock:
        assert said[0].endswith("watching for a sign of life for 0 s") and "on host n7" in said[0]
        assert sum("no sign of life from the holder for" in line for line in said) >= 3
        assert said[-1].endswith("is dead")
        with pytest.raises(RunLockLost) as loss:
            frozen.check()
        for part in (f"run.folder = {tmp_path}", "`fiberpo train` on host n7", "took over", "stops before it writes"):
            assert part in str(loss.value)
        frozen._beat_s = 0.01  # it wakes
        thread = threading.Thread(target=frozen._run)
        thread.start()
        assert noticed.wait(10) and str(losses[0]) == str(loss.value)
        thread.join(10)
        frozen.close()
        lock.check()
        with pytest.raises(RunLocked):
            quick(tmp_path)


SUSPENDED = """
import os, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {root!r})
from fiberpo_megatron import run_lock
here = run_lock.this_process
run_lock.this_process = lambda: replace(here(), host="n7")
def leave(loss):
    print(loss, flush=True)
    os._exit(3)
lock = run_lock.take(Path(sys.argv[1]), "train", leave, beat_s=0.02)
print("held", flush=True)
while True:
    time.sleep(1)
"""


def test_a_process_that_was_suspended_ends_when_it_wakes(tmp_path):
    program = SUSPENDED.format(root=str(Path(__file__).parents[1]))
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(RunLocked, match="on host n7"):
        quick(tmp_path, watch_s=60)
    os.kill(holder.pid, signal.SIGSTOP)
    with quick(tmp_path) as lock:
        os.kill(holder.pid, signal.SIGCONT)
        said, _ = holder.communicate(timeout=60)
        assert holder.returncode == 3 and "this run no longer has run.folder" in said and "took over" in said
        lock.check()


def test_a_holder_whose_lock_was_deleted_stops(tmp_path):
    lock = quick(tmp_path, beat_s=3600)
    only(tmp_path).unlink()
    with pytest.raises(RunLockLost, match="somebody deleted its lock"):
        lock.check()
    lock.close()


def dead(folder: Path) -> None:
    """Leave the lock of a holder elsewhere that was killed."""
    quick(folder, beat_s=3600)


@pytest.mark.parametrize("before", [None, dead], ids=["fresh", "dead holder"])
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_of_many_newcomers_one_wins(tmp_path, elsewhere, monkeypatch, before, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    if before:
        before(tmp_path)
    start = threading.Barrier(8)

    def enter(_):
        start.wait()
        try:
            return quick(tmp_path)
        except RunLocked as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(enter, range(8)))
    locks = [item for item in got if isinstance(item, run_lock.RunLock)]
    assert len(locks) == 1, got
    locks[0].check()
    only(tmp_path)
    locks[0].close()


def test_a_newcomer_that_slept_through_a_whole_run_undoes_nothing(tmp_path, elsewhere, monkeypatch):
    """It had found the first holder dead, and links its lock only after two others came and went."""
    dead(tmp_path)
    made, link = [], run_lock._link

    def late(path, content, token):
        monkeypatch.setattr(run_lock, "_link", link)
        quick(tmp_path).close()
        made.append(quick(tmp_path))
        return link(path, content, token)

    monkeypatch.setattr(run_lock, "_link", late)
    with pytest.raises(RunLocked):
        quick(tmp_path)
    made[0].check()
    assert only(tmp_path).name == "00000003"
    made[0].close()


def test_a_link_that_nfs_reports_as_failed_though_it_was_made(tmp_path, monkeypatch):
    link = os.link

    def repeated(source, target):
        link(source, target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", repeated)
    with quick(tmp_path) as lock:
        lock.check()


def test_clocks_decide_nothing(tmp_path, elsewhere, monkeypatch):
    """Neither the holder's clock nor that of the file server can make a live holder look dead, or a dead one live."""
    with quick(tmp_path) as lock:
        for seconds in (0, 4_000_000_000):
            os.utime(only(tmp_path), (seconds, seconds))
            with pytest.raises(RunLocked):
                quick(tmp_path, watch_s=60)
        lock.check()
    dead(tmp_path)
    os.utime(only(tmp_path), (4_000_000_000, 4_000_000_000))
    quick(tmp_path).close()


def test_only_reads_that_came_back_count_as_silence(tmp_path, elsewhere, monkeypatch):
    """A newcomer that was suspended, or whose file server hung, has not watched in that time."""
    dead(tmp_path)
    read, reads = run_lock._read, []

    def slow(path):
        reads.append(path)
        if len(reads) == 2:
            time.sleep(0.6)  # longer than the whole watch
        return read(path)

    monkeypatch.setattr(run_lock, "_read", slow)
    quick(tmp_path).close()
    assert sum(path.name == "00000001" for path in reads) >= 40


def test_a_copied_folder_is_not_locked_by_the_original(tmp_path):
    with quick(tmp_path / "run"):
        (tmp_path / "copy/lock").mkdir(parents=True)
        (tmp_path / "copy/lock/00000001").write_bytes(only(tmp_path / "run").read_bytes())
        refuse(tmp_path / "copy")
        quick(tmp_path / "copy").close()


HOSTILE = {
    "empty": b"",
    "torn": b'{"process": {"ho',
    "no object": b"[]\nbeat 1\n",
    "wrong types": b'{"token": "t", "process": {"host": 1, "boot": [], "namespace": "", "pid": "1", "started": 0}}\n',
    "deep": b"[" * 60_000,
    "binary": bytes(range(256)) * 300,
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_lock_that_cannot_be_read_is_watched_like_any_other(tmp_path, content):
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock/00000004").write_bytes(content)
    refuse(tmp_path)
    said = []
    with quick(tmp_path, say=said.append):
        assert "cannot be read" in said[0] and only(tmp_path).name == "00000005"


def test_what_another_user_wrote_into_the_lock_is_printed_escaped(tmp_path):
    with quick(tmp_path, beat_s=3600):
        path = only(tmp_path)
        first, _, state = path.read_text().partition("\n")
        path.write_text(json.dumps(json.loads(first) | {"command": "\x1b[2J\u202e", "job": "1\n2"}) + "\n" + state)
        with pytest.raises(RunLocked) as refused:
            refuse(tmp_path)
    assert str(refused.value).isprintable() and r"\x1b[2J\u202e" in str(refused.value)


def test_the_lock_of_another_user_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "lock").mkdir()
    monkeypatch.setattr(os, "listdir", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    refuse(tmp_path)  # leaves it to `take`
    with pytest.raises(OSError, match="Permission denied; make it writable for user .*/lock'"):
        quick(tmp_path)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_folder_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, links):
    synced = []

    def full(handle):
        synced.append(handle)
        if links or len(synced) == 2:  # the candidate, or the lock itself
            raise OSError(28, "No space left on device")

    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        quick(tmp_path)
    assert not list((tmp_path / "lock").iterdir())


def test_a_beat_that_cannot_be_written_is_said_once_and_tried_again(tmp_path, monkeypatch):
    said, failed, fsync = [], threading.Event(), os.fsync

    def full(handle):
        failed.set()
        raise OSError(5, "Input/output error")

    with quick(tmp_path, say=said.append) as lock:
        monkeypatch.setattr(os, "fsync", full)
        assert failed.wait(10)
        time.sleep(0.1)
        monkeypatch.setattr(os, "fsync", fsync)
        lock.check()
    assert len(said) == 1 and "cannot be renewed ([Errno 5] Input/output error)" in said[0]
    quick(tmp_path).close()
