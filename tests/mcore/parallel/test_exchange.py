"""Rollouts as bytes and back."""

from dataclasses import fields, replace

import numpy as np

from fiberpo_megatron.mcore.parallel import exchange
from fiberpo_megatron.types import RolloutBatch
from tests.distributed.parity import make_batch


def assert_equal(one: RolloutBatch, other: RolloutBatch) -> None:
    for field in fields(RolloutBatch):
        found, wanted = getattr(one, field.name), getattr(other, field.name)
        assert found.dtype == wanted.dtype, field.name
        np.testing.assert_array_equal(found, wanted, err_msg=field.name)


def test_round_trip():
    batch = make_batch()
    assert_equal(exchange.decode(exchange.encode(batch)), batch)


def test_an_empty_share():
    batch = make_batch()
    empty = RolloutBatch(**{field.name: getattr(batch, field.name)[:0] for field in fields(RolloutBatch)})
    assert_equal(exchange.decode(exchange.encode(empty)), empty)
    assert_equal(exchange.join([empty, batch, empty]), batch)


def test_groups_are_renumbered():
    batch = make_batch()
    shifted = replace(batch, groups=batch.groups * 5 + 2)
    joined = exchange.join([shifted, shifted])
    np.testing.assert_array_equal(joined.groups, np.concatenate([batch.groups, batch.groups + batch.groups.max() + 1]))


def test_text():
    for text in ("", "grüße", "a" * 10_000):
        assert exchange.bytes_to_text(exchange.text_to_bytes(text)) == text
