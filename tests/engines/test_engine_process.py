"""Starting and stopping servers: what is refused, what a failed start says, and that nothing stays behind."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from fiberpo_megatron.engines.client import EngineAddress, Sampling
from fiberpo_megatron.engines.errors import EngineRefused, EngineStartError, EngineUnreachable
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.process import EngineProcess, check_reachable, stop_all
from fiberpo_megatron.engines.servers import engines
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.engines.temporary import make_temporary, remove_leftovers
from fiberpo_megatron.rollout.sampler import EngineSampler
from tests.rollout.in_order import in_order


def start(config: EngineConfig, model: Path, folder: Path) -> None:
    with engines(config, model, folder, dtype="float32", gpu=False):
        pytest.fail("the engine started")


def test_a_busy_port_is_said_before_anything_starts(checkpoint, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(EngineStartError, match=f"port {port} is in use .*rollout.engine.port"):
            start(EngineConfig(port=port - 1, count=2), checkpoint, tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(EngineStartError, match=f"{tmp_path} has no config.json. Set model.path"):
        start(EngineConfig(), tmp_path, tmp_path / "engines")


def test_given_addresses_are_checked(tmp_path):
    with pytest.raises(EngineUnreachable, match=r"127.0.0.1:9: no SGLang server answers .*rollout.engine.urls"):
        start(EngineConfig(urls=["http://127.0.0.1:9"]), tmp_path, tmp_path)


@pytest.fixture
def sleeper(tmp_path):
    """A "server" that never listens, with a child that ignores SIGTERM."""
    log = tmp_path / "engine_0.log"
    log.write_text("loading the model\n")
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(600)"
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, child], start_new_session=True)
    engine = EngineProcess(EngineAddress("http://127.0.0.1:9", log), process, make_temporary())
    yield engine
    stop_all([engine])


def test_a_server_that_is_not_healthy_in_time(sleeper):
    with pytest.raises(EngineStartError, match=r"not healthy after 0 s[\s\S]*loading the model"):
        sleeper.wait_until_healthy(time.monotonic() + 0.3)


def test_a_server_that_ends_while_starting_is_noticed_at_once(sleeper):
    os.kill(sleeper.process.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineStartError, match=r"ended with signal SIGKILL while starting[\s\S]*loading the model"):
        sleeper.wait_until_healthy(time.monotonic() + 60)
    assert time.monotonic() - began < 10


def test_stop_takes_the_whole_group(sleeper):
    group = sleeper.process.pid
    wait_for(lambda: len(members(group)) == 2)
    stop_all([sleeper])
    wait_for(lambda: not members(group))
    assert not sleeper.temporary.path.exists()


@pytest.mark.sglang
def test_a_failed_start_shows_the_end_of_the_log(checkpoint, tmp_path):
    config = EngineConfig(extra_args=["--no-such-flag"], start_timeout_s=120)
    with pytest.raises(EngineStartError, match=r"ended with exit code 2 [\s\S]*unrecognized arguments: --no-such-flag"):
        start(config, checkpoint, tmp_path / "engines")
    assert "--no-such-flag" in (tmp_path / "engines" / "engine_0.log").read_text()


KEY = "a-key-that-nobody-else-may-see"


def check_key(address: EngineAddress) -> None:
    """Only who has the key gets in, and it is nowhere to be seen."""
    for stranger, seen in (
        (None, "an API key is needed, but none was given"),
        ("guessed", "another API key is needed"),
    ):
        without = replace(address, api_key=stranger)
        with pytest.raises(EngineRefused, match="the server asks for another API key .*api_key_file"):
            check_reachable(without)
        with (
            EnginePool([without], timeout_s=60) as pool,
            pytest.raises(EngineRefused, match=f"{seen}.*api_key_file"),
        ):
            pool.run(pool.clients[0].generate([[2, 3]], Sampling(1)))
    with httpx.Client(base_url=address.url, trust_env=False, timeout=60) as http:
        for path in ("/health", "/health_generate"):  # SGLang leaves them open, although they have it generate
            assert http.get(path).status_code == httpx.codes.UNAUTHORIZED
            assert http.get(path, headers=address.headers).status_code == httpx.codes.OK
        assert http.get("/ready").status_code == httpx.codes.OK and http.get("/metrics").status_code == 404
    check_reachable(address)
    assert address.log is not None and KEY not in repr(address)
    log = address.log.read_text()
    assert "'api_key': '<redacted>'" in log and KEY not in log
    for pid in living():
        try:
            assert KEY not in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
            assert KEY not in Path(f"/proc/{pid}/environ").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


RUN = """
import sys, time
from pathlib import Path
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.engines.servers import engines
key = sys.stdin.readline().strip()
model, folder = Path(sys.argv[1]), Path(sys.argv[2])
with engines(EngineConfig(), model, folder, dtype="float32", gpu=False, api_key=key) as found:
    print(found[0].url, flush=True)
    time.sleep(600)
"""


@pytest.mark.sglang
def test_kill_9_of_the_run_takes_the_server_along_and_a_waiting_sampler_says_so(checkpoint, tmp_path):
    """Worth a server start of its own: a server that outlives its run keeps memory and ports for ever."""
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(checkpoint), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdin is not None and run.stdout is not None
    run.stdin.write(f"{KEY}\n")
    run.stdin.close()
    url = run.stdout.readline().strip()
    (server,) = children(run.pid)
    assert len(members(server)) >= 3, "server, scheduler and detokenizer"
    address = EngineAddress(url, tmp_path / "engine_0.log", KEY)
    check_key(address)
    temporary = Path(psutil.Process(server).environ()["TMPDIR"])
    listening = {c.laddr.ip for pid in members(server) for c in psutil.Process(pid).net_connections() if not c.raddr}
    assert listening == {"127.0.0.1"}
    threading.Timer(1.0, run.kill).start()
    with (
        EnginePool([address], timeout_s=60) as pool,
        pytest.raises(EngineUnreachable, match=rf"{url}: the connection was lost[\s\S]*engine_0.log ---"),
    ):
        in_order(EngineSampler(pool, Sampling(500), max_concurrent=64, vocabulary=64), [[2, 3, 4]] * 8, 4)
    run.wait()
    wait_for(lambda: not members(server))
    left = [path for path in temporary.rglob("*") if path.is_file()]
    assert temporary.is_dir() and not [path for path in left if KEY.encode() in path.read_bytes()]
    remove_leftovers()
    assert not temporary.exists()


def stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat after the name: state, parent, process group, .."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def living() -> dict[int, list[str]]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = stat(int(entry.name))
            except OSError:
                continue
            if fields[0] != "Z":
                found[int(entry.name)] = fields
    return found


def members(group: int) -> list[int]:
    return [pid for pid, fields in living().items() if int(fields[2]) == group]


def children(parent: int) -> list[int]:
    return [pid for pid, fields in living().items() if int(fields[1]) == parent]


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)
