"""These tests cut frames, share a page and check values."""

import json
import math

import pytest

from fiberpo_megatron.environments import Outcome, wire
from fiberpo_megatron.environments.wire import FrameReader, InvalidReply, Kind


def test_frames_survive_any_cut():
    frames = [(int(Kind.SAY), 1, b"abc"), (int(Kind.DONE), 2**63, b""), (int(Kind.RUN), 3, b"x" * 1000)]
    stream = b"".join(wire.frame(Kind(kind), job, payload) for kind, job, payload in frames)
    for size in (1, 7, 16, 17, len(stream)):
        reader = FrameReader()
        parts = [stream[begin : begin + size] for begin in range(0, len(stream), size)]
        assert [found for part in parts for found in reader.feed(part)] == frames


def test_a_header_is_checked_before_its_payload():
    class Refused(Exception):
        pass

    def check(kind, job, length):
        if length > 10:
            raise Refused(job)

    reader = FrameReader(check)
    assert list(reader.feed(wire.frame(Kind.DONE, 1, b"short"))) == [(Kind.DONE, 1, b"short")]
    with pytest.raises(Refused, match="2"):
        list(reader.feed(wire.HEADER.pack(2, Kind.DONE, 2**32 - 1)))


def test_the_page_names_the_holder():
    page = wire.Page.create()
    assert page.holder() is None and page.last_beat() == 0 and page.traceback() == ""
    page.hold(2**64 - 1, 12, 5)
    page.beat(77)
    other = wire.Page(page.descriptor)
    assert other.holder() == (2**64 - 1, 12, 5) and other.last_beat() == 77
    page.hold(0, 0, 0)
    assert other.holder() is None
    page.close()


def test_plain_values_survive_json():
    value = {"a": (1, 2.5, None, True, "\ud800é"), "b": [{}]}
    assert json.loads(wire.encode(wire.plain(value, "x"))) == {"a": [1, 2.5, None, True, "\ud800é"], "b": [{}]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {2}]}, r"x\['a'\]\[1\] is a set, which JSON cannot represent"),
        ({1: 2}, "x has the key 1; names must be strings"),
        ([math.nan], r"x\[0\] is nan; it must be finite"),
        (b"x", "x is a bytes"),
    ],
)
def test_what_json_lacks_is_named(value, message):
    with pytest.raises(InvalidReply, match=message):
        wire.plain(value, "x")


def test_scalars_of_numpy_and_torch_are_numbers():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    outcome = Outcome(numpy.float32(0.5), {"a": torch.tensor(2)}, numpy.bool_(True), {"b": numpy.int64(3)})
    checked = wire.checked_outcome(outcome, "score()", bare=True)
    assert checked == Outcome(0.5, {"a": 2.0}, True, {"b": 3.0}) and type(checked.reward) is float
    assert checked.correct is True
    assert wire.checked_outcome(torch.tensor(1.5), "score()", bare=True) == Outcome(1.5)
    with pytest.raises(InvalidReply, match="must be a number or an Outcome"):
        wire.checked_outcome(torch.ones(2), "score()", bare=True)


@pytest.mark.parametrize("value", [1e39, -1e300, 3.5e38, 10**400])
def test_a_reward_that_the_trainer_cannot_keep_is_refused(value):
    """As a float32 it would be infinite, and every advantage of its group nan."""
    with pytest.raises(InvalidReply, match=r"`reward` of score\(\) is .*; it must be"):
        wire.checked_outcome(Outcome(value), "score()", bare=False)
    assert wire.number(wire.LARGEST, "x") == wire.LARGEST == 3.4028234663852886e38
