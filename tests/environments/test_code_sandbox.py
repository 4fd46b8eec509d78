"""Hostile programs in the sandboxes of this machine: what they reach, what they use up, and what is left of them."""

import asyncio
import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from fiberpo_megatron.environments.builtin import sandbox as module
from fiberpo_megatron.environments.builtin.sandbox import LAUNCHER, Bounds, ProgramRun, Sandbox, SandboxError
from fiberpo_megatron.environments.builtin.system_calls import AARCH64, X86_64, seccomp_filter
from tests.variations import varied

ROOT = Path(__file__).parents[2]
SMALL = Bounds(wall_s=30.0, program_s=60.0, memory_mib=256, processes=8, output_kib=64, folder_mib=8)
"""Bounds that are soon reached, except for the time: on a busy machine a good program may take seconds."""
ISOLATED = [kind for kind in ("bubblewrap", "namespaces") if kind == "namespaces" or shutil.which("bwrap")]
"""Namespaces are part of every kernel; bubblewrap is a package."""


@pytest.fixture(scope="module")
def sandboxes() -> dict[str, Sandbox]:
    return {kind: Sandbox(kind, SMALL) for kind in ISOLATED}


def run_all(sandbox: Sandbox, program: str, inputs: list[str], **options: Any) -> list[ProgramRun]:
    async def scenario() -> list[ProgramRun]:
        given = [{"stdin": text} for text in inputs]
        return [run async for run in sandbox.runs(textwrap.dedent(program), given, **options)]

    return asyncio.run(scenario())


def run_one(sandbox: Sandbox, program: str) -> ProgramRun:
    (run,) = run_all(sandbox, program, [""])
    return run


@pytest.fixture(autouse=True)
def elders() -> Iterator[None]:
    """Remember the processes that other tests keep, such as an engine."""
    _elders.update(psutil.Process().children(recursive=True))
    yield
    _elders.clear()


_elders: set[psutil.Process] = set()


def children() -> set[psutil.Process]:
    """Processes below this one that the test has started, those of daemons included, which the runner adopts."""
    deadline = time.monotonic() + 5
    while (found := set(psutil.Process().children(recursive=True)) - _elders) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


# ---- what a program reaches ----

PROBE = """
import ctypes, json, os, signal, socket

def tried(function):
    try:
        return str(function())
    except BaseException as error:
        return type(error).__name__

def connected():
    with socket.create_connection(("127.0.0.1", PORT), timeout=1):
        return "connected"

def linked():
    os.symlink(SECRET, "link")
    return open("link").read()

libc = ctypes.CDLL(None)
print(json.dumps({
    "secret": tried(lambda: open(SECRET).read()),
    "link": tried(linked),
    "through the runner's root": tried(lambda: open("/proc/1/root" + SECRET).read()),
    "home": tried(lambda: os.listdir(os.path.dirname(SECRET))),
    "write /usr": tried(lambda: open("/usr/here", "w")),
    "write /": tried(lambda: open("/here", "w")),
    "write /dev": tried(lambda: open("/dev/here", "w")),
    "write the interpreter": tried(lambda: open(os.__file__, "a")),
    "write the runner": tried(lambda: open(RUNNER, "a")),
    "the runner's memory": tried(lambda: open("/proc/1/mem", "rb")),
    "the runner's output": tried(lambda: os.listdir("/proc/1/fd")),
    "descriptors": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
    "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
    "variables": sorted(os.environ),
    "network": tried(connected),
    "unix socket": tried(lambda: socket.socket(socket.AF_UNIX)),
    "interfaces": tried(lambda: [line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]]),
    "namespaces": libc.unshare(0x10000000),
    "memory without a limit": libc.memfd_create(b"x", 0),
    "shared memory": libc.shmget(0, 4096, 0o1600),
    "mount": libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
    "kill the runner": tried(lambda: os.kill(1, signal.SIGKILL)),
    "kill all": tried(lambda: os.kill(-1, signal.SIGKILL)),
}))
"""


@pytest.mark.parametrize("kind", ISOLATED)
def test_a_program_sees_nothing_and_changes_nothing(sandboxes, tmp_path, kind, monkeypatch):
    (tmp_path / "secret").write_text("the key")
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        names = {"SECRET": str(tmp_path / "secret"), "PORT": server.getsockname()[1], "RUNNER": str(module.RUNNER)}
        lines = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        run, second = run_all(sandboxes[kind], lines + PROBE, ["", ""])
        with pytest.raises(TimeoutError):
            server.accept()
    assert run.status == second.status == "ok", run.stderr
    seen = json.loads(run.stdout)
    for place in ("secret", "link", "home"):
        assert seen[place] == "FileNotFoundError", place
    for place in ("write /usr", "write /", "write /dev", "write the interpreter", "write the runner"):
        assert seen[place] in ("OSError", "PermissionError"), (place, seen[place])
    for place in ("the runner's memory", "the runner's output", "through the runner's root"):
        assert seen[place] == "PermissionError", place
    assert seen["descriptors"] == [0, 1, 2]
    assert len(seen["processes"]) == 2 and seen["processes"][0] == 1
    assert "SECRET_KEY" not in seen["variables"] and set(seen["variables"]) <= {*module.VARIABLES, "PWD", "LC_CTYPE"}
    assert seen["network"] == seen["unix socket"] == "PermissionError"
    assert seen["interfaces"] == "['lo']", "the network is a namespace of its own, not only refused by the filter"
    for call in ("namespaces", "memory without a limit", "shared memory", "mount"):
        assert seen[call] == -1, call
    # process 1 of a namespace cannot be killed from inside: either it is another user's, or the kernel ignores it
    assert seen["kill the runner"] in ("PermissionError", "None")
    assert os.listdir(tmp_path) == ["secret"] and (tmp_path / "secret").read_text() == "the key"


# ---- what it can use up ----

BOMBS = {
    "forks": ("import os\nwhile True: os.fork()", {"error", "processes", "timeout"}),
    "threads": (
        "import threading, time\nfor i in range(99): threading.Thread(target=time.sleep, args=(9,)).start()",
        {"error", "processes"},
    ),
    "one large file": ("open('x', 'wb').write(bytes(100 << 20))", {"error"}),
    "many files": ("n = 0\nwhile True:\n  open(str(n), 'w').close()\n  n += 1", {"files", "error", "timeout"}),
    "memory": ("x = bytearray(1 << 30)", {"error"}),
    "memory of several processes": (
        "import os, time\nfor i in range(4):\n  if os.fork() == 0:\n    x = bytearray(120 << 20); time.sleep(9)\n"
        "time.sleep(9)",
        {"memory", "timeout"},
    ),
    "output": ("while True: print('x' * 10000)", {"output"}),
    "errors": ("import sys\nwhile True: sys.stderr.write('x' * 10000)", {"timeout"}),
    "time": ("while True: pass", {"timeout"}),
    "a pipe": ("import os\nos.read(os.pipe()[0], 1)", {"timeout"}),
    "signals": (
        "import signal, time\nfor n in (1, 2, 13, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: time.sleep(9)",
        {"timeout"},
    ),
    "a crash": ("import ctypes\nctypes.string_at(0)", {"error"}),
    "descriptors": ("import os\nx = [os.dup(0) for i in range(999)]", {"error"}),
}


@pytest.mark.parametrize("kind", varied(ISOLATED, ISOLATED[:1]))
@pytest.mark.parametrize("bomb", BOMBS)
def test_what_exceeds_a_bound_is_ended_with_all_it_started(sandboxes, kind, bomb):
    program, expected = BOMBS[bomb]
    sandbox = copy.copy(sandboxes[kind])
    sandbox.bounds = replace(SMALL, wall_s=1.0)
    began = time.monotonic()
    run = run_one(sandbox, program)
    assert run.status in expected, run
    assert time.monotonic() - began < 30, "it ends within its bounds, on a busy machine too"
    assert len(run.stdout) <= SMALL.output_kib << 10 and len(run.stderr) <= 4096
    assert not children()


@pytest.mark.parametrize("kind", varied(ISOLATED, ISOLATED[:1]))
def test_processes_are_counted_where_the_kernel_does_not(sandboxes, kind, monkeypatch):
    """As on kernels before 5.14, which count all processes of a user together."""
    counted = Bounds.for_runner
    monkeypatch.setattr(
        Bounds, "for_runner", lambda self, **counts: counted(self, **counts | {"count_by_kernel": False})
    )
    assert run_one(sandboxes[kind], BOMBS["forks"][0]).status == "processes"
    assert not children()


DAEMON = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(1000)
    os._exit(0)
time.sleep(0.1)
print("done")
"""


@pytest.mark.parametrize("kind", ISOLATED)
def test_a_daemon_is_ended_and_counted_before_the_next_input(sandboxes, kind):
    runs = run_all(sandboxes[kind], DAEMON, ["", ""])
    assert [(run.status, run.stdout) for run in runs] == [("ok", "done\n")] * 2
    assert [run.left >= 1 for run in runs] == [True, True]
    assert not children()


def test_the_time_of_all_inputs_together_is_bounded(sandboxes):
    sandbox = Sandbox(ISOLATED[0], Bounds(wall_s=5.0, program_s=0.5))
    runs = run_all(sandbox, "import time\ntime.sleep(0.4)", [""] * 4)
    assert [run.status for run in runs][0] == "ok" and [run.status for run in runs][-1] == "ended"
    assert "longer than program_s = 0.5 s" in runs[-1].stderr


def test_a_runner_that_ends_is_the_programs_failure(sandboxes, monkeypatch, tmp_path):
    """Whatever breaks a sandbox from inside costs the program its remaining tests, and nobody else anything."""
    runner = tmp_path / "code_runner.py"
    runner.write_text(
        module.RUNNER.read_text().replace("        return watch(", "        os._exit(3)\n        return watch(")
    )
    monkeypatch.setattr(module, "RUNNER", runner)
    assert [run.status for run in run_all(sandboxes["namespaces"], "print(1)", ["", ""])] == ["ended", "ended"]


def test_a_sandbox_that_does_not_start_is_no_failure_of_the_program(sandboxes, monkeypatch, tmp_path):
    (tmp_path / "code_runner.py").write_text("raise SystemExit('no interpreter today')")
    monkeypatch.setattr(module, "RUNNER", tmp_path / "code_runner.py")
    with pytest.raises(SandboxError, match=r"did not start: no interpreter today"):
        run_one(sandboxes["namespaces"], "print(1)")


@pytest.mark.parametrize("kind", ISOLATED)
def test_kill_9_of_the_worker_takes_its_sandboxes_along(kind):
    script = f"""
        import asyncio
        from fiberpo_megatron.environments.builtin.sandbox import Sandbox
        async def main():
            async with Sandbox({kind!r}).program("import time; time.sleep(60)") as program:
                print("started", flush=True)
                await program.run()
        asyncio.run(main())
    """
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, cwd=ROOT)
    assert worker.stdout is not None and worker.stdout.readline() == b"started\n"
    below = psutil.Process(worker.pid).children(recursive=True)
    assert below
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive


# ---- the choice ----


def test_without_bubblewrap_namespaces_are_used(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Sandbox("auto", SMALL).kind == "namespaces"
    assert "namespaces of the kernel" in Sandbox("auto", SMALL).description
    with pytest.raises(SandboxError, match=r"bubblewrap: there is no bwrap.*apt-get install bubblewrap"):
        Sandbox("bubblewrap", SMALL)


def test_where_nothing_works_it_is_refused_with_every_reason(monkeypatch, tmp_path):
    launcher = tmp_path / "launcher.py"
    launcher.write_text("raise SystemExit('unshare: Operation not permitted')")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "LAUNCHER", launcher)
    reasons = r"bubblewrap: there is no bwrap; namespaces: unshare: Operation not permitted\).*rlimits.*by name"
    with pytest.raises(SandboxError, match=reasons):
        Sandbox("auto", SMALL)
    with pytest.raises(SandboxError, match=r"'chroot' is unknown; use \"auto\", \"bubblewrap\""):
        Sandbox("chroot", SMALL)


@pytest.mark.skipif(os.geteuid() != 0, reason="this user is not root")
def test_limits_alone_are_refused_to_root():
    with pytest.raises(SandboxError, match="this process is root, and so would the programs be"):
        Sandbox("rlimits", SMALL)


@pytest.mark.parametrize("machine", [X86_64, AARCH64])
def test_the_filter_of_every_processor_is_complete(machine):
    filter_bytes = seccomp_filter(machine)
    steps = [filter_bytes[place : place + 8] for place in range(0, len(filter_bytes), 8)]
    assert len(filter_bytes) % 8 == 0 and steps[-1] == b"\x06\x00\x00\x00\x00\x00\xff\x7f"  # what is left is allowed
    for number, step in enumerate(steps):
        if step[0] & 0x07 == 0x05:  # a jump: both ways stay inside
            assert number + 1 + max(step[2], step[3]) < len(steps)
    with pytest.raises(ValueError, match="no list of system calls is known for the processor 'sparc'"):
        seccomp_filter("sparc")


# ---- as an ordinary user ----

AS_USER = """
import asyncio, json, sys
from fiberpo_megatron.environments.builtin.sandbox import Bounds, Sandbox
programs = json.loads(sys.argv[2])
sandbox = Sandbox(sys.argv[1], Bounds(**json.loads(sys.argv[3])))
found = {name: asyncio.run(sandbox.run(program)) for name, program in programs.items()}
print(json.dumps({name: [run.status, run.stdout, run.left] for name, run in found.items()}))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="this user is an ordinary one, as all tests above have shown")
@pytest.mark.skipif(not os.access("/usr/bin/python3", os.X_OK), reason="needs an interpreter that every user can read")
@pytest.mark.parametrize("kind", varied([*ISOLATED, "rlimits"], ["namespaces"]))
def test_an_ordinary_user_has_the_same_sandbox(kind, tmp_path):
    """The other tests run as root here. Without root a user namespace takes the place of another user's rights."""
    package = tmp_path / "fiberpo_megatron"
    shutil.copytree(ROOT / "fiberpo_megatron/environments", package / "environments")
    for name in ("__init__.py", "printable.py"):
        shutil.copy(ROOT / "fiberpo_megatron" / name, package)
    (tmp_path / "home").mkdir(mode=0o777)
    for path in (tmp_path, *tmp_path.parents[:3]):  # that of a test worker is one deeper
        with suppress(PermissionError):
            path.chmod(path.stat().st_mode | 0o055)
    programs = {
        "works": "print('works')",
        "daemon": DAEMON,
        "output": BOMBS["output"][0],
        "network": "import socket\nsocket.socket()",
        "the runner": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
        "the runner's memory": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')",
    }
    bounds = {"wall_s": 30.0, "program_s": 60.0, "processes": 8, "output_kib": 64}
    command = ["/usr/bin/python3", "-c", AS_USER, kind, json.dumps(programs), json.dumps(bounds)]
    done = subprocess.run(
        command, user=65534, group=65534, extra_groups=[], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["works"] == ["ok", "works\n", 0]
    assert found["daemon"][:2] == ["ok", "done\n"] and found["daemon"][2] >= 1
    assert found["output"][0] == "output"
    assert found["network"][0] == found["the runner's memory"][0] == "error"
    # limits alone do not keep a program from killing the process that watches it; it loses its tests by that
    assert found["the runner"][0] == ("ended" if kind == "rlimits" else "ok")
    assert not os.listdir(tmp_path / "home"), "its temporary folder is gone"
    left = [p for p in psutil.process_iter(["uids", "status"]) if p.info["uids"] and p.info["uids"].real == 65534]
    assert all(process.info["status"] == psutil.STATUS_ZOMBIE for process in left)


def test_the_launcher_is_a_script_of_its_own():
    assert LAUNCHER.read_text().count("fiberpo_megatron") == 0
