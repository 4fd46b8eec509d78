"""A worker refuses what it cannot use and names the fix, runs in any interpreter, and leaves nothing behind."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fiberpo_megatron.environments import Outcome, Turn, loading
from fiberpo_megatron.environments.host import Description, EnvironmentPool, describe
from fiberpo_megatron.environments.process import BOOTSTRAP
from fiberpo_megatron.plugins import PluginError
from tests.environments.pools import pool_of, settings, task

ROOT = Path(__file__).parents[2]
CLASSES = """
import os, sys, time
from fiberpo_megatron.environments import Environment, Outcome, SingleTurn, Task

class Good(SingleTurn):
    train_size = 3
    def __init__(self, digits: int = 2, *, file=None, sleep=0.0, die=False):
        time.sleep(sleep)
        if file:
            open(file)
        if die:
            print("out of coffee")
            sys.stdout.flush()
            os._exit(9)
    def train(self, index):
        return Task("a")
    def score(self, task, turn):
        return 1.0

class Needy(Good):
    def __init__(self, digits): ...
class NoTrain(SingleTurn):
    train_size = 1
    def score(self, task, turn): ...
class NoHeldOut(Good):
    held_out_size = 1
class NoScore(SingleTurn):
    train_size = 1
    def train(self, index): ...
class NoRun(Environment):
    train_size = 1
    def train(self, index): ...
class NoSize(Good):
    def __init__(self): ...
    train_size = property(lambda self: self.absent)
class HalfSize(Good):
    train_size = 1.5
class NegativeSize(Good):
    held_out_size = -1
class Empty(Good):
    train_size = 0
class Stranger:
    train_size = 1
class OddTemplate(Good):
    chat_template_kwargs = {"tools": {1, 2}}
class Quits(Good):
    def __init__(self):
        sys.exit("no licence")
class Conversing(SingleTurn):
    train_size, deterministic, check_all_tasks = 1, True, True
    chat_template_kwargs = {"enable_thinking": False}
    def __init__(self, turns=1):
        self.single_turn = turns == 1
    def train(self, index): ...
    def score(self, task, turn): ...
    async def run(self, task, policy): ...
"""


@pytest.fixture(autouse=True)
def classes(tmp_path, monkeypatch):
    """Put the classes above into the current folder, as a user has them."""
    (tmp_path / "my_classes.py").write_text(CLASSES)
    (tmp_path / "my_broken.py").write_text("import no_such_package\n")
    (tmp_path / "my_quitter.py").write_text("import sys\nsys.exit('no')\n")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_classes", "my_broken"):
        sys.modules.pop(name, None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def load(use, options=None, version=None):
    """Do in this process what a worker does at its start."""
    return loading.load({"name": "env", "use": use, "options": options or {}, "version": version, "memory_gib": 1.0})[1]


@pytest.mark.parametrize(
    ("use", "options", "message"),
    [
        ("my_class:Good", {}, "no module 'my_class', neither in the current folder .* correct the name"),
        ("my_broken:Good", {}, "needs the module 'no_such_package', which .* does not have; install it"),
        ("my_quitter:Good", {}, r"its module called sys.exit\(no\)"),
        ("my_classes:God", {}, "my_classes has no God; it defines Good, Needy, "),
        ("chta", {}, "did you mean 'chat'"),
        ("my_classes:Good", {"digts": 3}, "does not take the option 'digts'; did you mean 'digits'"),
        ("my_classes:Needy", {}, "needs the option 'digits'"),
        ("my_classes:NoTrain", {}, r"lacks the method train\(index\); define it"),
        ("my_classes:NoHeldOut", {}, r"lacks the method held_out\(index\); define it"),
        ("my_classes:NoScore", {}, r"lacks the method score\(task, turn\), or score_group"),
        ("my_classes:NoRun", {}, r"lacks the method run\(task, policy\); define it"),
        ("my_classes:NoSize", {}, "lacks `train_size`; set it to the number of its tasks"),
        ("my_classes:HalfSize", {}, "train_size of my_classes:HalfSize is 1.5; it must be a whole number"),
        ("my_classes:NegativeSize", {}, "held_out_size of .* is -1; it must be a whole number of at least 0"),
        ("my_classes:Empty", {}, "has no tasks: train_size and held_out_size are 0"),
        ("my_classes:Stranger", {}, "is no environment; derive it from Environment or SingleTurn"),
        ("my_classes:OddTemplate", {}, r"chat_template_kwargs\['tools'\] is a set"),
        ("my_classes:Quits", {}, "could not be made .*SystemExit: no licence"),
        ("my_classes:Good", {"file": "absent.txt"}, r"(?s)options = \{'file': 'absent.txt'\}: FileNotFoundError.*open"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused(use, options, message):
    with pytest.raises(PluginError, match=message) as refused:
        load(use, options)
    assert str(refused.value).startswith("environment 'env': use")


def test_another_version_than_the_recorded_one_is_refused():
    with pytest.raises(PluginError, match="started with .*Chat of fiberpo-megatron 0.0.9, this interpreter has"):
        load("chat", version="fiberpo-megatron 0.0.9")
    assert load("my_classes:Good", version=None)["version"] is None


def test_an_instance_may_choose_what_it_is():
    one, two = load("my_classes:Conversing"), load("my_classes:Conversing", {"turns": 2})
    assert one["single_turn"] and not two["single_turn"] and one["scores"]
    assert one["deterministic"] and one["check_all_tasks"] and one["chat_template_kwargs"] == {"enable_thinking": False}


def test_describe_asks_a_worker():
    assert describe(settings("my_classes:Good", options={"digits": 3})) == Description(
        path="my_classes:Good",
        version=None,
        train_size=3,
        held_out_size=0,
        single_turn=True,
        scores=True,
        scores_groups=False,
        deterministic=False,
        check_all_tasks=False,
        chat_template_kwargs={},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use": "my_classes:NoScore"}, "^environment 'env': use: my_classes:NoScore lacks the method score"),
        ({"options": {"sleep": 30}, "start_timeout_s": 1.0}, r"(?s)not ready in start_timeout_s = 1 s; .*__init__"),
        (
            {"options": {"die": True}},
            r"(?s)ended with exit code 9 before it was ready; its last output:\nout of coffee",
        ),
        ({"options": {"file": Path("x")}}, r"options\['file'\] is a PosixPath, which JSON cannot represent"),
        ({"python": Path("no/such/python")}, "python = 'no/such/python' is not an executable file; name a Python"),
        ({"python": Path("my_classes.py")}, "python = 'my_classes.py' is not an executable file"),
        ({"python": Path("old_python")}, r"old_python is Python 3.8; .* need Python 3.10 or newer"),
        ({"python": Path("/bin/true")}, "ended with exit code 0 before it was ready; its last output:\n.nothing"),
    ],
)
def test_a_worker_that_cannot_start_is_one_message(tmp_path, changes, message):
    pretend = f"import sys, runpy; sys.version_info = (3, 8); sys.executable = 'old_python'; sys.argv = ['{BOOTSTRAP}']"
    old = tmp_path / "old_python"
    old.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c \"{pretend}; runpy.run_path('{BOOTSTRAP}', None, '__main__')\"\n"
    )
    old.chmod(0o755)
    began = time.monotonic()
    with pytest.raises(PluginError, match=message):
        describe(settings(changes.pop("use", "my_classes:Good"), **changes))
    assert time.monotonic() - began < 30
    assert not [child for child in psutil.Process().children() if "bootstrap.py" in " ".join(child.cmdline())]


def interpreters():
    """Return this interpreter and others that the machine happens to have."""
    others = [shutil.which("python3.10"), shutil.which("python3.13")]
    for version in ("3.10", "3.13"):  # where pyenv puts them
        others += map(str, Path(sys.base_prefix).parent.glob(f"{version}.*/bin/python{version}"))
    works = [
        p for p in others if p and subprocess.run([p, "--version"], capture_output=True, check=False).returncode == 0
    ]
    return [sys.executable, *{Path(path).name: path for path in works}.values()]


SEEN = (ROOT / "tests/environments/misbehaving.py").read_text()


@pytest.mark.parametrize("base", interpreters(), ids=lambda path: Path(path).name)
def test_an_interpreter_that_has_nothing(tmp_path, monkeypatch, base):
    """It has neither torch nor pydantic nor this package, and a worker brings nothing but the standard library."""
    subprocess.run([base, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    (tmp_path / "my_seen.py").write_text(SEEN)
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1=", "answer": 2}\n')
    for name, value in (("RANK", "3"), ("TORCHELASTIC_RUN_ID", "x"), ("PYTHONPATH", os.pathsep.join(sys.path))):
        monkeypatch.setenv(name, value)
    python = tmp_path / "bare/bin/python"

    async def scenario():
        async with pool_of("my_seen:Seen", workers=1, python=python) as pool:
            seen = await pool.score(task("x"), Turn("x"), seed=1)
        options = {"name": "sums", "train": "sums.jsonl"}
        async with pool_of("chat", workers=1, python=python, options=options) as pool:
            (first,) = await pool.tasks("train", [0])
            return seen, first, await pool.score(first, Turn(" 2\n"), seed=1)

    seen, first, outcome = asyncio.run(scenario())
    assert seen.reward == os.getpid()
    metrics = dict(seen.metrics)
    version = subprocess.run(
        [python, "-I", "-c", "import sys; print(sys.version_info[1])"], capture_output=True, check=True
    )
    assert metrics.pop("python") == 300 + int(version.stdout) and metrics.pop("threads") >= 1
    assert not metrics.pop("site_packages") or not any((tmp_path / "bare").rglob("site-packages/*"))
    assert metrics == dict.fromkeys(metrics, 0.0), "launcher, gpus, stdin, torch, own_folder"
    assert first.metadata == {"source": "sums.jsonl, line 1"} and outcome == Outcome(1.0, correct=True)


def test_closing_leaves_no_process(tmp_path):
    before = set(psutil.Process().children(recursive=True))

    async def scenario():
        (tmp_path / "my_leaving.py").write_text(SEEN)
        async with pool_of("my_leaving:Leaving", workers=2) as pool:
            pids = [int((await pool.score(task("x"), Turn("x"), seed=n)).reward) for n in range(4)]
            assert all(psutil.pid_exists(pid) for pid in pids)
            assert len(set(psutil.Process().children(recursive=True)) - before) >= 2 + len(pids)
            return pids

    descriptors = len(os.listdir("/proc/self/fd"))
    pids = asyncio.run(scenario())
    assert not set(psutil.Process().children(recursive=True)) - before
    deadline = time.monotonic() + 5  # orphans that were killed are reaped by another process
    while time.monotonic() < deadline and any(map(running, pids)):
        time.sleep(0.05)
    assert not any(map(running, pids))
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_workers_die_with_the_trainer(tmp_path):
    script = f"""
import asyncio, os, sys
sys.path.insert(0, {str(ROOT)!r})
from fiberpo_megatron.environments.host import EnvironmentPool
from fiberpo_megatron.environments.settings import EnvironmentConfig
async def main():
    pool = EnvironmentPool(EnvironmentConfig(name="env", use="my_classes:Good", workers=2), folder=None)
    await pool.start()
    print(*(slot.process.pid for slot in pool._slots), flush=True)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = list(map(int, done.stdout.split()))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(running, pids)):
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(running, pids))


def test_a_pool_that_is_not_open_says_so():
    async def scenario():
        pool = EnvironmentPool(settings("my_classes:Good", workers=1), folder=None)
        with pytest.raises(RuntimeError, match="was not started"):
            await pool.tasks("train", [0])
        await pool.start()
        waiting = asyncio.create_task(pool.tasks("train", [0]))
        await pool.close()
        with pytest.raises(RuntimeError, match="pool of environment 'env' was closed"):
            await pool.score(task("x"), Turn("x"), seed=0)
        with pytest.raises(RuntimeError, match="was closed"):
            await waiting

    asyncio.run(scenario())
