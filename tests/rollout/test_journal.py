"""Segments on disk: a resumed run goes on behind them, whenever the run before was killed."""

import asyncio
import errno
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from fiberpo_megatron import durable
from fiberpo_megatron.engines.client import Sampling
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.rollout import finished as finished_module
from fiberpo_megatron.rollout.dump import Origin
from fiberpo_megatron.rollout.finished import FinishedGroups
from fiberpo_megatron.rollout.sampler import EngineSampler
from fiberpo_megatron.rollout.segment_records import Place, decode, encode, place_of, response_key
from fiberpo_megatron.types import Completion, WeightSpan
from tests.rollout.test_segments import ENGINES, Drawing

ORIGIN = Origin(1, "1", "prompts", {}, "run", "sampling")
PROMPTS = [[1, 2, 3], [4, 5], [6]]
SEEDS = [11, 12]
SEGMENT = Completion((5,), np.zeros(1, np.float32), "abort", ())


class Killed(BaseException):
    """The process is killed."""


class Dying(Drawing):
    """These servers kill whoever asks them for the `last` + 1st time; they note every segment that was asked for."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last
        self.answered: list[tuple[tuple[int, ...], int]] = []
        """Tokens that went in, and seeds, of the requests that were answered."""

    def draw(self, host: str, body: Any) -> list[dict[str, Any]]:
        if len(self.answered) >= self.last:
            raise Killed("while it waited for an answer")
        pairs = list(zip(body["input_ids"], body["sampling_params"], strict=True))
        self.answered += [(tuple(prompt), parameters["sampling_seed"]) for prompt, parameters in pairs]
        return [self.one(*pair) for pair in pairs]


def opened(folder: Path, rank: int = 0) -> FinishedGroups:
    return FinishedGroups(folder, ORIGIN, rank, [], [], lambda found: found == ORIGIN)


def sample(servers: Drawing, folder: Path, rank: int = 0) -> tuple[list[Completion], int]:
    """Return the responses to all prompts, and how many segments were found on disk."""
    with EnginePool(ENGINES, timeout_s=5, transport=servers) as pool, opened(folder, rank) as kept:
        sampler = EngineSampler(pool, Sampling(20), max_concurrent=3, vocabulary=64, segment_tokens=4)

        async def ask() -> list[list[Completion]]:
            asked = (sampler.sample(p, [s], priority=i, segments=kept) for i, p in enumerate(PROMPTS) for s in SEEDS)
            return await asyncio.gather(*asked)

        return [one for (one,) in pool.run(ask())], sampler.take_counts().get("resumed", 0)


def killed_after(requests: int, folder: Path, rank: int = 0) -> Dying:
    servers = Dying(requests)
    with pytest.raises(Killed, match="while it waited"):
        sample(servers, folder, rank)
    return servers


def same(found: Sequence[Completion], wanted: Sequence[Completion]) -> bool:
    """Whether responses agree in all but the engine, which depends on what else was asked for."""
    pairs = list(zip(found, wanted, strict=True))
    equal = all(a.token_ids == b.token_ids and a.weight_spans == b.weight_spans for a, b in pairs)
    return equal and all((a.log_probs == b.log_probs).all() and a.finish_reason == b.finish_reason for a, b in pairs)


def test_killed_after_any_request_no_finished_segment_is_asked_again(tmp_path: Path):
    """Two kills each: the second start goes on behind the first, and the third behind both."""
    whole = Dying(10**9)
    wanted, _ = sample(whole, tmp_path / "whole")
    total = len(whole.answered)
    assert total > 10
    for first in range(total):
        folder = tmp_path / f"{first}"
        servers = [killed_after(first, folder)]
        left = total - len(servers[0].answered)
        servers.append(killed_after(left // 2, folder, rank=1))  # another layout has other ranks
        last = Dying(10**9)
        found, resumed = sample(last, folder)
        assert same(found, wanted)
        answered = [one for of in [*servers, last] for one in of.answered]
        assert sorted(answered) == sorted(whole.answered), "each segment was asked for once, over all starts"
        assert resumed == sum(len(of.answered) for of in servers)


def test_what_belongs_to_other_weights_is_not_used(tmp_path: Path):
    wanted, _ = sample(Drawing(), tmp_path)
    other = FinishedGroups(tmp_path, ORIGIN, 0, [], [], lambda found: False)
    assert other.earlier(PROMPTS[0], SEEDS[0]) == []
    assert opened(tmp_path).earlier(PROMPTS[0], 99) == opened(tmp_path).earlier([9], SEEDS[0]) == []
    assert opened(tmp_path).earlier(PROMPTS[0], SEEDS[0])[0].token_ids == wanted[0].token_ids[:4]


def test_a_damaged_segment_is_sampled_again_with_what_follows_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    wanted, _ = sample(Drawing(), tmp_path)
    longest = max(range(6), key=lambda i: len(wanted[i].token_ids))
    prompt, seed = PROMPTS[longest // 2], SEEDS[longest % 2]
    (file,) = tmp_path.glob("rank_*")
    whole = opened(tmp_path).earlier(prompt, seed)
    assert len(whole) >= 3
    data = bytearray(file.read_bytes())
    second = data.index(encode(Place(response_key(prompt, seed), 4), whole[1]))
    data[second + 60] ^= 1
    file.write_bytes(data)
    assert [one.token_ids for one in opened(tmp_path).earlier(prompt, seed)] == [whole[0].token_ids]
    assert "damaged" in caplog.text
    found, resumed = sample(Drawing(), tmp_path)
    assert same(found, wanted) and resumed > 0


def test_a_segment_survives_with_experts_and_engines():
    random = np.random.default_rng(3)
    segment = Completion(
        (5, 6, 7),
        random.normal(size=3).astype(np.float32),
        "abort",
        (WeightSpan("3", 0, 2), WeightSpan("4", 2, 3)),
        random.integers(0, 99, (4, 2, 3)).astype(np.int16),
        engines=np.array([0, 1, 1], np.int16),
    )
    place = Place(response_key([1, 2], 2**40), 7)
    found = decode(encode(place, segment))
    assert place_of(encode(place, segment)) == place
    assert (found.token_ids, found.finish_reason, found.weight_spans) == ((5, 6, 7), "abort", segment.weight_spans)
    for name in ("log_probs", "routed_experts", "engines"):
        mine, theirs = getattr(segment, name), getattr(found, name)
        assert mine.dtype == theirs.dtype and (mine == theirs).all()
    with pytest.raises(ValueError, match="its description is of"):
        decode(encode(place, segment) + b"x")


def test_keys_tell_prompts_and_seeds_apart():
    keys = {response_key(prompt, seed) for prompt in ([1], [1, 0], [0, 1], [256]) for seed in (0, 1, -1, 2**63)}
    assert len(keys) == 16


class Watched(durable.Disk):
    """This disk has the size up to which each file was synced, and the files that were opened. It is full once a file
    has `room` bytes, and syncs no file whose sync `fails`."""

    def __init__(self, room: int = sys.maxsize, fails: str | None = None) -> None:
        self.synced: dict[str, int] = {}
        self.opened: list[IO[Any]] = []
        self._room, self._fails = room, fails

    def open(self, path: Path, mode: str) -> IO[Any]:
        self.opened.append(_Filling(path, mode.replace("b", ""), self._room))
        return self.opened[-1]

    def sync(self, handle: int, path: Path) -> None:
        if path.name == self._fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.synced[path.name] = os.fstat(handle).st_size


class _Filling(io.BufferedWriter):
    def __init__(self, path: Path, mode: str, room: int) -> None:
        super().__init__(io.FileIO(path, mode))
        self._room = room

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


async def keep(folder: Path, segments: int) -> None:
    with opened(folder) as kept:
        for begin in range(segments):
            kept.ended([1], 0, begin, SEGMENT)


def test_closing_does_not_wait_for_the_sync_that_is_due(tmp_path: Path):
    """A run that ends for another reason, and whose machine is lost later, has what was kept in its last second."""
    with durable.use(disk := Watched()):
        asyncio.run(keep(tmp_path, 3))
    assert disk.synced["rank_00000.0"] == (tmp_path / "rank_00000.0").stat().st_size > 0


def test_a_full_disk_leaves_what_was_kept_before_on_the_disk(tmp_path: Path):
    asyncio.run(keep(tmp_path / "one", 1))
    room = (tmp_path / "one" / "rank_00000.0").stat().st_size
    with durable.use(disk := Watched(room)), pytest.raises(OSError, match=r"No space left.*set storage.unfinished"):
        asyncio.run(keep(tmp_path / "step", 2))
    assert disk.synced["rank_00000.0"] == room and all(file.closed for file in disk.opened)
    assert opened(tmp_path / "step").earlier([1], 0)[0].token_ids == SEGMENT.token_ids


def test_a_sync_that_fails_when_the_file_is_closed_is_said_and_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING), durable.use(disk := Watched(fails="rank_00000.0")):
        asyncio.run(keep(tmp_path, 1))
    assert f"{tmp_path / 'rank_00000.0'} is perhaps not on the disk: Input/output error" in caplog.text
    assert [file.closed for file in disk.opened] == [True]


def test_nothing_is_kept_once_the_files_are_closed(tmp_path: Path):
    """A filter aborts groups; the last request of one of them may end all the same, when the step's folder is gone."""
    groups = opened(tmp_path / "step")
    groups.close()
    groups.ended([1], 0, 0, SEGMENT)
    groups.close()
    assert not (tmp_path / "step").exists()


def test_what_is_older_than_a_second_outlives_a_lost_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The names of file and folder are synced with the first record, and later ones together, beside the event loop."""
    monkeypatch.setattr(finished_module, "SYNC_S", 0.1)
    synced: list[tuple[str, int]] = []

    class Noting(durable.Disk):
        def sync(self, handle: int, path: Path) -> None:
            super().sync(handle, path)
            synced.append((path.name, path.stat().st_size if path.is_file() else 0))

    async def write() -> list[int]:
        sizes = []
        with opened(tmp_path / "step") as kept:
            for begin in range(3):
                for seed in range(5):
                    kept.ended([1], seed, begin, SEGMENT)
                sizes.append(next((tmp_path / "step").glob("rank_*")).stat().st_size)
                await asyncio.sleep(0.3)
        return sizes

    with durable.use(Noting()):
        sizes = asyncio.run(write())
    assert [name for name, _ in synced[:2]] == ["step", tmp_path.name]
    ends = [*sizes, sizes[-1]]  # one sync for all that came together, and one when the file is closed
    assert synced[2:] == [("rank_00000.0", size) for size in ends]
