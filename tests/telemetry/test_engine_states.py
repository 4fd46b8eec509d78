"""How engines are after a step: asked all at once, with a deadline, and written whole."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from fiberpo_megatron.cli.engines import table
from fiberpo_megatron.cli.main import main as fiberpo
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.rollout.fleet import Member
from fiberpo_megatron.sources.engine_watch import EngineWatch
from fiberpo_megatron.telemetry.engine_states import (
    ENGINES_FILE,
    EngineState,
    EngineStates,
    read_engine_states,
    write_engine_states,
)
from tests.engines.fake_server import FakeServers

LOAD = {
    "num_running_reqs": 3, "num_waiting_reqs": 2, "token_usage": 0.25, "cache_hit_rate": 0.5, "gen_throughput": 80.0
}  # fmt: skip


class Servers(FakeServers):
    """The server `hangs` never answers, `gone` is not there, `odd` answers what no SGLang answers."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.host == "hangs":
            await asyncio.sleep(60)
        if request.url.host == "gone":
            raise httpx.ConnectError("refused")
        return await super().handle_async_request(request)


def loads(host: str, body: Any) -> Any:
    return {"loads": [{"running": "many\x1b[31m"}]} if host.startswith("odd") else {"loads": [LOAD, LOAD]}


def test_engines_that_do_not_answer_are_named_and_cost_the_deadline_at_most(tmp_path: Path):
    names = ["fine", "hangs", "gone", "odd", "also-hangs"]
    addresses = [EngineAddress(f"http://{name.removeprefix('also-')}:{30000 + i}") for i, name in enumerate(names)]
    with EnginePool(addresses, timeout_s=60, transport=Servers({"/v1/loads": loads})) as pool:
        watch = EngineWatch(pool, tmp_path, deadline_s=0.3)
        began = time.perf_counter()
        metrics = watch(7)
        took = time.perf_counter() - began
    assert took < 2.0, "five engines, two of which hang, take one deadline"
    assert metrics == {
        "engines/serving": 1.0,
        "engines/not_answering": 4.0,
        "engines/queued": 4.0,
        "engines/restarts": 0,
    }
    found = read_engine_states(tmp_path)
    assert found is not None and found.step == 7 and [e.state for e in found.engines].count("serving") == 1
    fine, hangs, gone, odd, _ = found.engines
    assert (fine.running, fine.queued, fine.token_usage, fine.cache_hit_rate) == (6, 4, 0.25, 0.5)
    assert fine.generation_tokens_per_second == 160.0 and fine.weight_version is not None and fine.answered_in_s
    assert "within 0.3 s" in hangs.detail and "no connection" in gone.detail and "num_running_reqs" in odd.detail


def test_the_file_is_read_with_suspicion(tmp_path: Path):
    assert read_engine_states(tmp_path) is None
    path = tmp_path / ENGINES_FILE
    path.write_text(
        json.dumps({"step": 1, "time": 2.0, "engines": [{"address": "a\x1b", "state": "?", "running": "x"}]})
    )
    found = read_engine_states(tmp_path)
    assert found is not None and found.engines == (EngineState(r"a\x1b", "not answering"),)
    for bad in ('{"step": 1}', '{"step": 1, "time": 2, "engines": "none"}', '{"step": 1, "time": 2, "engines": [3]}'):
        path.write_text(bad)
        with pytest.raises(ValueError, match="does not hold the states of engines"):
            read_engine_states(tmp_path)


def test_a_file_that_cannot_be_written_does_not_end_the_run(tmp_path: Path):
    with EnginePool([EngineAddress("http://fine:1")], timeout_s=5, transport=Servers({"/v1/loads": loads})) as pool:
        assert EngineWatch(pool, tmp_path / "gone")(0)["engines/serving"] == 1.0


def test_what_the_fleet_knows_stands_beside_what_engines_say(tmp_path: Path):
    """Engines that start, were quarantined or have left are in the file, and only those that should serve count."""
    with EnginePool([EngineAddress("http://fine:1")], timeout_s=60, transport=Servers({"/v1/loads": loads})) as pool:
        watch = EngineWatch(pool, tmp_path, deadline_s=1)
        members = [
            Member(0, "0", "serving", EngineAddress("http://fine:1"), 2, version="7"),
            Member(1, "1", "starting", detail="its process ended with signal SIGKILL"),
            Member(2, "2", "left", EngineAddress("http://old:1"), 0),
        ]
        watch.changed(members)
        before = read_engine_states(tmp_path)
        assert before is not None and before.step == -1
        assert [(e.number, e.state, e.address, e.generation) for e in before.engines] == [
            (0, "serving", "http://fine:1", 2), (1, "starting", "", 0), (2, "left", "http://old:1", 0)
        ]  # fmt: skip
        assert watch(3) == {
            "engines/serving": 1.0, "engines/not_answering": 1.0, "engines/queued": 4.0, "engines/restarts": 2.0
        }  # fmt: skip
        written = (tmp_path / ENGINES_FILE).stat().st_mtime_ns
        watch.changed(members)
        found = read_engine_states(tmp_path)
        assert found is not None and found.engines[0].running == 6, "its load is kept while it serves"
        members[1].now("quarantined", "it computes something else")
        watch.changed(members)
        assert (tmp_path / ENGINES_FILE).stat().st_mtime_ns > written


def test_the_table_of_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        fiberpo(["engines"])
    assert fiberpo(["engines", str(tmp_path / "none")]) == 2 and "does not exist" in capsys.readouterr().err
    assert fiberpo(["engines", str(tmp_path)]) == 2 and "has no engines.json" in capsys.readouterr().err
    states = [
        EngineState("http://a:1", "serving", number=0, generation=0, since=1000.0, weight_version="12", running=16,
                    queued=3, token_usage=0.41, generation_tokens_per_second=812.4),
        EngineState("", "starting", "it died", number=1, generation=1, since=880.0),
        EngineState("http://c:1", "left", number=2, generation=0),
    ]  # fmt: skip
    lines = table(EngineStates(11, 1996.0, tuple(states)), 2000.0).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["engine", "address", "state", "for", "generation", "weights", "running", "queued", "cache", "tokens/s"],
        ["0", "http://a:1", "serving", "17", "min", "0", "12", "16", "3", "41%", "812"],
        ["1", "-", "starting", "19", "min", "1", "-", "-", "-", "-", "-"],
        ["2", "http://c:1", "left", "-", "0", "-", "-", "-", "-", "-"],
    ]
    assert lines[4:] == ["As of 4 s ago, after step 11.", "engine 1: it died"]
    write_engine_states(tmp_path, EngineStates(-1, 0.0, tuple(states)))
    assert fiberpo(["engines", str(tmp_path)]) == 1 and "before the first step" in capsys.readouterr().out
    write_engine_states(tmp_path, EngineStates(3, 0.0, (states[0], states[2])))
    assert fiberpo(["engines", str(tmp_path)]) == 0
