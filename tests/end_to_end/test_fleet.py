"""A run with two engines of its own, one of which is killed: two Megatron ranks, real SGLang servers."""

import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from fiberpo_megatron.cli.main import main as fiberpo
from fiberpo_megatron.telemetry.engine_states import EngineState, read_engine_states
from tests.end_to_end.test_training import ROOT, command, processes_of, records

STOPPED = 85


def engines(folder: Path) -> tuple[EngineState, ...]:
    states = read_engine_states(folder)
    return () if states is None else states.engines


def server(address: str) -> psutil.Process:
    """The process that listens at an address."""
    port = int(address.rsplit(":", 1)[1])
    (found,) = {c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    return psutil.Process(found)


@pytest.mark.exhaustive
@pytest.mark.sglang
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("staleness", "method"), [("0", "distributed"), ("1", "disk"), ("0", "ipc")])
def test_a_run_loses_an_engine_and_gets_its_successor(
    model: Path, tmp_path: Path, staleness: str, method: str, capsys: pytest.CaptureFixture[str]
):
    """No step is lost. Every publication is compared with the trainer to 1e-4 in both engines, the successor's too."""
    folder = tmp_path / "run"
    options = ["--trainer.steps", "1000", "--evaluation.prompts", "0", "--rollout.engine.count", "2"]
    options += ["--rollout.staleness", staleness, "--weight_sync.method", method]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(model, folder, *options), cwd=ROOT, stdout=log, stderr=log)
    deadline = time.monotonic() + 600

    def wait_for(what: str, steps: int, number: int, state: str, generation: int) -> None:
        while True:
            found = [e for e in engines(folder) if (e.number, e.state, e.generation) == (number, state, generation)]
            if found and (folder / "metrics.jsonl").exists() and len(records(folder, "train")) >= steps:
                return
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, f"{what}: {engines(folder)}"
            time.sleep(0.1)

    try:
        wait_for("both engines serve", 2, 1, "serving", 0)
        before = len(records(folder, "train"))
        server(engines(folder)[1].address).kill()
        wait_for("the other one goes on alone", before + 2, 1, "starting", 0)
        assert fiberpo(["engines", str(folder)]) == 1
        assert re.search(
            r"engine 1: (its process ended with signal SIGKILL|the connection was lost)", capsys.readouterr().out
        )
        wait_for("its successor serves", before + 3, 1, "serving", 1)
        joined = len(records(folder, "train"))
        wait_for("the successor samples", joined + 2, 1, "serving", 1)
        assert fiberpo(["engines", str(folder)]) == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == STOPPED, (tmp_path / "log").read_text()
    finally:
        process.kill()  # its ranks and engines end with it
        process.wait()
    told = (tmp_path / "log").read_text()
    assert re.search("Engine 1 .* is .*(SIGKILL|connection).*; the run goes on without it", told)
    assert re.search(r"Engine 1 \(http://\S+\) holds weights \d+, was verified, and serves", told)
    steps = records(folder, "train")
    assert [record["step"] for record in steps] == list(range(len(steps)))
    assert all(record["rollout_diff/max"] < 1e-4 for record in steps if record["lag/max"] == 0)
    serving = [record["engines/serving"] for record in steps]
    assert serving[0] == serving[-1] == 2 and 1 in serving and steps[-1]["engines/restarts"] == 1
    assert not processes_of(folder)
