"""What a track notes of a trajectory, with a clock that the tests move."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from fiberpo_megatron.engines.client import EngineAddress, Sampling
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.rollout.sampler import EngineSampler
from fiberpo_megatron.tracks import MOST, Timeline, Track
from tests.engines.fake_server import FakeServers, response


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_strongest_phase_counts_and_all_phases_together_are_the_whole_life():
    """An environment works for seven seconds, in which two branches of its agent sample."""
    clock = Clock()
    track = Track("sums/1", 2, clock)
    clock.now += 1
    with track.phase("environment"):
        clock.now += 1
        with track.phase("queued"):
            clock.now += 1
            with track.request(0) as first:
                clock.now += 1
                with track.request(1) as second:
                    second.tokens, second.versions, second.finish = 5, ("3", "4"), "stop"
                    clock.now += 1
                first.tokens, first.finish = 2, "length"
                clock.now += 1
        clock.now += 1
    clock.now += 0.5
    track.end()
    facts = track.facts()
    assert facts["seconds"] == {"idle": 1.5, "environment": 2, "queued": 1, "sampling": 3}
    assert sum(facts["seconds"].values()) == facts["ended"] - facts["began"] == 7.5
    assert facts["stretches"] == [
        ("idle", 100, 101), ("environment", 101, 102), ("queued", 102, 103), ("sampling", 103, 106),
        ("environment", 106, 107), ("idle", 107, 107.5),
    ]  # fmt: skip
    assert facts["segments"] == [(1, 104, 105, 5, ("3", "4"), "stop"), (0, 103, 106, 2, (), "length")]
    assert (facts["name"], facts["sample"], facts["tokens"], facts["requests"]) == ("sums/1", 2, 7, 2)


def test_a_request_that_fails_names_its_error_and_a_cancelled_trajectory_has_no_end():
    clock = Clock()
    track = Track(clock=clock)
    with pytest.raises(KeyError), track.request(3):
        clock.now += 2
        raise KeyError
    facts = track.facts()
    assert facts["segments"] == [(3, 100, 102, 0, (), "KeyError")] and facts["ended"] is None


def test_a_moment_between_two_segments_separates_nothing():
    clock = Clock()
    track = Track(clock=clock)
    for _ in range(3):
        with track.phase("queued"):
            clock.now += 0.0001
            with track.request(0):
                clock.now += 1
    facts = track.facts()
    ((phase, begin, end),) = facts["stretches"]
    assert phase == "sampling" and end - begin == pytest.approx(3.0002) and len(facts["segments"]) == 3
    assert facts["seconds"]["queued"] == pytest.approx(0.0003)


def test_a_trajectory_of_thousands_of_turns_keeps_its_first_and_its_last_ones_and_counts_all():
    clock = Clock()
    track = Track(clock=clock)
    for turn in range(5000):
        with track.request(turn % 2) as answer:
            answer.tokens = turn
            clock.now += 1
        with track.phase("environment"):
            clock.now += 1
    facts = track.facts()
    assert facts["seconds"] == {"idle": 0, "sampling": 5000, "environment": 5000} and facts["requests"] == 5000
    kept = [segment[3] for segment in facts["segments"]]
    assert kept == [*range(MOST // 2), *range(5000 - MOST // 2, 5000)] and len(facts["stretches"]) == MOST
    assert [segment[3] for segment in track.facts(3)["segments"]] == [0, 1, 4999]


def test_a_timeline_gives_a_step_its_tracks_and_forgets_those_of_earlier_ones():
    timeline = Timeline(Clock())
    tracks = [timeline.begin(step, "a", i) for i, step in enumerate((4, 5, None, 4, 6))]
    assert timeline.take(5) == [tracks[1]]
    assert timeline.take(4) == [] and timeline.take(6) == [tracks[4]] and timeline.take(6) == []


@contextmanager
def sampler(
    answer: Callable[[str, dict[str, Any]], Any], slots: int, segment_tokens: int | None = None
) -> Iterator[EngineSampler]:
    addresses = [EngineAddress("http://a:1"), EngineAddress("http://b:2")]
    with EnginePool(addresses, timeout_s=5, transport=FakeServers({"/generate": answer}, delay_s=0.05)) as pool:
        yield EngineSampler(pool, Sampling(4), max_concurrent=slots, vocabulary=32, segment_tokens=segment_tokens)


def plain(host: str, body: dict[str, Any]) -> list[Any]:
    (prompt,) = body["input_ids"]
    tokens = [7] * body["sampling_params"][0]["max_new_tokens"]
    return [response(tokens, prompt)]


def run(engines: EngineSampler, tracks: Sequence[Track]) -> None:
    async def ask() -> None:
        await asyncio.gather(*(engines.sample([1 + i], [0], track=track) for i, track in enumerate(tracks)))

    engines.engines.run(ask())


def test_the_sampler_notes_waits_for_a_slot_and_every_segment():
    with sampler(plain, slots=1, segment_tokens=2) as engines:
        tracks = [Track(), Track()]
        run(engines, tracks)
    for track in tracks:
        segments = track.facts()["segments"]
        assert [segment[3:] for segment in segments] == [(2, ("7",), "length")] * 2 and track.tokens == 4
        assert all(end - begin > 0.04 for _, begin, end, *_ in segments)
        assert track.seconds["queued"] > 0.04, "there is one slot, and they take turns"
        assert 0.08 < track.seconds["sampling"] < 5


def test_the_sampler_notes_a_request_that_failed_and_was_asked_again():
    def dies_once(host: str, body: dict[str, Any]) -> Any:
        if host == "a:1":
            raise httpx.ConnectError("gone")
        return plain(host, body)

    with sampler(dies_once, slots=4) as engines:
        track = Track()
        run(engines, [track])
    failed, answered = track.facts()["segments"]
    assert failed[0] == 0 and failed[3:] == (0, (), "EngineUnreachable")
    assert answered[0] == 1 and answered[3:] == (4, ("7",), "length") and track.tokens == 4
