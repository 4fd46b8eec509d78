"""Rollouts as bytes and back."""

from dataclasses import replace

import numpy as np

from fiberpo_megatron.mcore.parallel import exchange
from fiberpo_megatron.types import RolloutBatch, flatten, join_batches, named_arrays
from tests.distributed.parity import make_batch


def assert_equal(one: RolloutBatch, other: RolloutBatch) -> None:
    found, wanted = named_arrays(one), named_arrays(other)
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert array.dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def everything() -> RolloutBatch:
    """A batch with every array that only some runs have."""
    batch, rng = make_batch(), np.random.default_rng(0)
    count, tokens = len(batch.lengths), len(batch.tokens)
    return replace(
        batch,
        routing_rows=np.arange(tokens, dtype=np.int32),
        held_rows=np.arange(1, tokens),
        routed_experts=rng.integers(0, 300, (tokens - 1, 3, 2)).astype(np.int16),
        weight_versions=rng.integers(-1, 9, tokens),
        engines=rng.integers(-1, 3, tokens).astype(np.int16),
        failed=rng.random(count) < 0.5,
        reward_parts={"größe/a b": np.full(count, np.nan, np.float32)},
        environment_metrics={"calls": rng.random(count).astype(np.float32), "none": np.zeros(count, np.float32)},
    )


def test_round_trip():
    for batch in (make_batch(), everything()):
        assert_equal(exchange.decode(exchange.encode(batch)), batch)


def test_an_empty_share():
    empty = flatten([])
    assert_equal(exchange.decode(exchange.encode(empty)), empty)
    for batch in (make_batch(), everything()):
        assert_equal(join_batches([empty, batch, exchange.decode(exchange.encode(empty))]), batch)


def test_groups_are_renumbered():
    batch = make_batch()
    shifted = replace(batch, groups=batch.groups * 5 + 2)
    joined = join_batches([exchange.decode(exchange.encode(shifted))] * 2)
    np.testing.assert_array_equal(joined.groups, np.concatenate([batch.groups, batch.groups + batch.groups.max() + 1]))


def test_text():
    for text in ("", "grüße", "a" * 10_000):
        assert exchange.bytes_to_text(exchange.text_to_bytes(text)) == text
