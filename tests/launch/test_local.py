"""The local launcher with real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fiberpo_megatron.launch.local import launch_ranks

RANK = """
import os, sys, time
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
sys.path.insert(0, {root!r})
from fiberpo_megatron.cli.rank import die_with_launcher
die_with_launcher()
rank = int(os.environ["RANK"])
{body}
"""
ROOT = str(Path(__file__).parents[2])


def script(folder: Path, body: str) -> str:
    path = folder / "rank.py"
    path.write_text(RANK.format(root=ROOT, body=body))
    return str(path)


def test_ranks_meet_in_the_launchers_store(tmp_path: Path):
    body = f"""
import torch
dist.init_process_group("gloo")
total = torch.tensor([rank + 1]); dist.all_reduce(total)
open({str(tmp_path)!r} + f"/{{rank}}", "w").write(str(total.item()))
dist.destroy_process_group()
"""
    assert launch_ranks([script(tmp_path, body)], 3, tmp_path / "logs", {}) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["6"] * 3


def test_first_failing_rank_is_named_and_the_others_are_stopped(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    body = f"""
open({str(tmp_path)!r} + f"/pid{{rank}}", "w").write(str(os.getpid()))
if rank == 1:
    while not os.path.exists({str(tmp_path)!r} + "/pid0"): time.sleep(0.01)
    try:
        raise ValueError("the budget of level trajectory is -1; use a positive number")
    except ValueError as error:
        get_error_handler().record_exception(error)
        sys.exit(1)
time.sleep(600)
"""
    began = time.monotonic()
    assert launch_ranks([script(tmp_path, body)], 2, tmp_path / "logs", {}) == 1
    assert time.monotonic() - began < 300, "it waited for the other rank's own end"
    error = capfd.readouterr().err
    assert "fiberpo: rank 1: ValueError: the budget of level trajectory is -1" in error
    assert not psutil.pid_exists(int((tmp_path / "pid0").read_text()))


def test_killed_rank_is_named_with_the_signal(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    body = "import signal\nif rank == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    assert launch_ranks([script(tmp_path, body)], 2, tmp_path / "logs", {}) == 1
    assert "rank 0: was killed by signal SIGKILL" in capfd.readouterr().err


def test_message_of_a_crash_without_a_record_is_the_end_of_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    body = "if rank == 0: raise KeyError('nobody expected this')\ntime.sleep(60)"
    assert launch_ranks([script(tmp_path, body)], 2, tmp_path / "logs", {}) == 1
    error = capfd.readouterr().err
    assert "rank 0: stopped with exit code 1" in error and "nobody expected this" in error


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_rank_outlives_its_launcher(tmp_path: Path, how: signal.Signals):
    body = f'open({str(tmp_path)!r} + f"/pid{{rank}}", "w").write(str(os.getpid()))\ntime.sleep(600)'
    program = (
        f"import sys; sys.path.insert(0, {ROOT!r}); from pathlib import Path\n"
        "from fiberpo_megatron.launch.local import launch_ranks\n"
        f"sys.exit(launch_ranks([{script(tmp_path, body)!r}], 2, Path({str(tmp_path / 'logs')!r}), {{}}))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program])
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    deadline = time.monotonic() + 120
    while not all(f.exists() and f.read_text() for f in files):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    pids = [int(f.read_text()) for f in files]
    os.kill(launcher.pid, how)
    launcher.wait(timeout=60)
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_request_to_stop_reaches_every_rank_and_their_exit_code_comes_back(tmp_path: Path):
    """Rank 1 ends later than rank 0, as ranks do."""
    body = f"""
from fiberpo_megatron.trainer.stop import StopRequest
stop = StopRequest()
import signal
stop.listen(signal.SIGUSR1)
open({str(tmp_path)!r} + f"/ready{{rank}}", "w").close()
while not stop(): time.sleep(0.01)
time.sleep(1.5 * rank)
open({str(tmp_path)!r} + f"/saved{{rank}}", "w").close()
sys.exit(85)
"""
    program = (
        f"import sys; sys.path.insert(0, {ROOT!r}); from pathlib import Path\n"
        "from fiberpo_megatron.launch.local import launch_ranks\n"
        f"sys.exit(launch_ranks([{script(tmp_path, body)!r}], 2, Path({str(tmp_path / 'logs')!r}), {{}}))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 85 and "fiberpo: stopped by SIGTERM" in said
    assert all((tmp_path / f"saved{rank}").exists() for rank in range(2))
