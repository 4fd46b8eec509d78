"""Records of failures: the file stays bounded, and a disk that takes none of them does not end a run."""

import asyncio
import json
import shutil
from pathlib import Path

from fiberpo_megatron.environments import Turn
from fiberpo_megatron.environments.failure_log import FailureLog
from fiberpo_megatron.environments.results import Failure
from tests.environments.pools import pool_of, task


def test_the_file_stops_growing_and_says_so(tmp_path: Path):
    path = tmp_path / "failures.jsonl"
    log = FailureLog(path, limit_bytes=200)
    for number in range(100):
        assert log.write({"number": number})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.stat().st_size < 300 and lines[0] == {"number": 0} and "the file is full" in lines[-1]["note"]
    again = FailureLog(path, limit_bytes=200)  # a resumed run
    assert again.write({"number": 100}) and path.read_text().splitlines()[-1] == json.dumps(lines[-1])


def test_a_record_that_cannot_be_written_is_reported_once(tmp_path: Path, capsys):
    log = FailureLog(tmp_path / "removed" / "failures.jsonl")
    assert not log.write({"number": 0}) and not log.write({"number": 1})
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1 and "failures.jsonl cannot be written (No such file or directory)" in said
    (tmp_path / "removed").mkdir()
    assert log.write({"number": 2}), "it is tried again, because the folder may come back"


def test_without_a_path_nothing_is_kept():
    assert FailureLog(None).write({"number": 0})


def test_a_failure_that_cannot_be_recorded_is_a_failure_all_the_same(tmp_path: Path, capsys):
    """Its caller once waited for ever."""

    async def scenario():
        async with pool_of("Scored", tmp_path / "environments", workers=1) as pool:
            shutil.rmtree(tmp_path / "environments")
            async with asyncio.timeout(20):
                return await pool.score(task("raise"), Turn("x"), seed=0), pool.take_counts()

    result, counts = asyncio.run(scenario())
    assert isinstance(result, Failure) and result.kind == "exception"
    assert counts["failures"] == counts["failures/not_written"] == 1
    assert "failures.jsonl cannot be written" in capsys.readouterr().err
