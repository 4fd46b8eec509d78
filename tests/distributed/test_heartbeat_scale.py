"""What ranks ask of the rendezvous store when a run fails: it must grow with the ranks, not with their square."""

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from fiberpo_megatron.mcore.parallel import heartbeat
from fiberpo_megatron.mcore.parallel.heartbeat import _Beats
from tests.counting_store import CountingStore

RANKS, PREFIX = 1024, "a start"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> CountingStore:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    found = CountingStore()
    monkeypatch.setattr(_Beats, "_connect", lambda self: found)
    return found


def ranks(count: int = RANKS) -> list[_Beats]:
    """Ranks that have all beaten once."""

    def phase(rank: int) -> tuple[str, float]:
        return ("generate" if rank == 511 else "train"), 3.0

    made = [_Beats(rank, count, 60.0, partial(phase, rank), lambda error: None, PREFIX) for rank in range(count)]
    for rank in made:
        rank._beat(rank._connect())
    return made


def test_1024_ranks_that_fail_together_read_every_beat_once(store: CountingStore):
    found = ranks()
    store.calls = 0
    with ThreadPoolExecutor(64) as pool:
        said = list(pool.map(lambda rank: rank.everyone(), found))
    assert store.calls <= 6 * RANKS, f"{store.calls} calls"
    assert len(set(said)) == 1 and said[0].startswith("what the ranks were doing: rank ")
    assert "1015 other ranks: train for 3 to 3 s, said " in said[0] and len(said[0]) < 2000
    assert re.search(r"rank 511 \(.*\): generate for 3 s", said[0]), "which the others wait for"


def test_ranks_that_have_not_begun_or_have_ended_are_named(store: CountingStore):
    found = ranks(4)
    del store.values[found[0]._key(2)]
    store.values[found[0]._key(3)] = b""
    said = found[0].everyone()
    assert "rank 1 (" in said and "rank 3 (" not in said
    assert "not started or ended: rank 2, 3" in said


def test_the_rank_that_reads_dies(store: CountingStore, monkeypatch: pytest.MonkeyPatch):
    """The others still end, and say which rank was to tell them."""
    monkeypatch.setattr(heartbeat, "_REPORT_S", 0.1)
    found = ranks(3)
    store.add(found[1]._report("reader"), 1)
    store.set(found[1]._report("rank"), "1")
    said = found[0].everyone()
    assert "rank 1, which was to report what the ranks were doing, did not within 0.1 s" in said


def test_a_store_that_is_gone_is_said(store: CountingStore, monkeypatch: pytest.MonkeyPatch):
    [rank, _] = ranks(2)

    def gone(*_: object) -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(store, "add", gone)
    assert "is gone as well: Connection reset by peer" in rank.everyone()


def test_keys_of_one_start_are_not_those_of_another(monkeypatch: pytest.MonkeyPatch):
    """torchrun's store outlives its restarts of the ranks, with what an earlier start left there."""
    seen = {heartbeat._next_prefix(), heartbeat._next_prefix()}
    monkeypatch.setattr(heartbeat, "_starts", iter(range(2)))  # the ranks are new processes
    first = heartbeat._next_prefix()
    monkeypatch.setattr(heartbeat, "_starts", iter(range(2)))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert len(seen | {first, heartbeat._next_prefix()}) >= 3 and heartbeat._next_prefix() != first


def test_a_rank_that_went_silent_is_listed_in_a_large_run():
    beats = [{"host": "n1", "pid": 1, "phase": "train", "seconds": 3.0, "count": 1000} for _ in range(100)]
    beats[70]["count"] -= 100
    said = list(heartbeat._described([*beats, None], interval=5.0))
    assert [line for line in said if line.startswith("rank 70 (n1, pid 1): train for 3 s, said 500 s ago")]
    assert len(said) == 10 and said[-1] == "not started or ended: rank 100"
