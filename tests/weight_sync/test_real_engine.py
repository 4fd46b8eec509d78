"""Both ways of publishing against a real SGLang server."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.engines.client import EngineAddress, EngineClient, Sampling
from fiberpo_megatron.engines.errors import EngineError
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.weight_sync.base import LeaderPublisher
from fiberpo_megatron.weight_sync.compare import WeightMismatch, compare_log_probs
from fiberpo_megatron.weight_sync.disk import DiskPublisher
from fiberpo_megatron.weight_sync.distributed import DistributedPublisher
from tests.tiny_model import hugging_face_weights, load, log_probs, moved
from tests.weight_sync.per_rank import publish_from_megatron
from tests.weight_sync.sources import Tensors, context
from tests.weight_sync.trainer_rank import publish_as_rank

pytestmark = pytest.mark.sglang
ROUNDING = 1e-4
"""float32 on both sides; other summation orders were seen to move log-probs by 5e-6."""
PROBE = [5, 9, 2, 33, 12, 60, 4]


@contextmanager
def publisher(method: str, engine: EngineAddress, checkpoint: Path, folder: Path) -> Iterator[LeaderPublisher]:
    made: LeaderPublisher
    with EnginePool([engine], timeout_s=30) as pool:
        given = context(pool, checkpoint, folder)
        if method == "disk":
            made = DiskPublisher(given, folder=folder, shard_bytes=40_000)
        else:
            made = DistributedPublisher(given, backend="gloo")
        with closing(made):
            yield made


def scores(engine: EngineAddress) -> np.ndarray:
    with EnginePool([engine], timeout_s=30) as pool:
        return pool.run(pool.clients[0].score(PROBE))


@pytest.mark.parametrize("method", ["disk", "distributed"])
def test_the_engine_computes_with_the_published_weights(method, engine, checkpoint, tmp_path):
    old = log_probs(load(checkpoint), PROBE)
    np.testing.assert_allclose(scores(engine), old, atol=ROUNDING)
    with publisher(method, engine, checkpoint, tmp_path / "published") as publishing:
        for seed in (1, 2):
            model = moved(checkpoint, seed)
            publishing.publish(Tensors(hugging_face_weights(model)), str(seed))
            new = log_probs(model, PROBE)
            assert np.abs(new - old).mean() > 100 * ROUNDING
            np.testing.assert_allclose(scores(engine), new, atol=ROUNDING)
            compare_log_probs(new, scores(engine), tolerance=ROUNDING, engine="it", version=str(seed))
            with pytest.raises(WeightMismatch, match="mean .* max"):
                compare_log_probs(old, scores(engine), tolerance=ROUNDING, engine="it", version=str(seed))
    if method == "disk":
        assert [folder.name for folder in (tmp_path / "published").iterdir()] == ["2"]
        assert len(list((tmp_path / "published" / "2").glob("*.safetensors"))) > 1


def test_many_small_buckets_carry_the_same_weights(engine, checkpoint):
    model = moved(checkpoint)
    with publisher("distributed", engine, checkpoint, Path()) as publishing:
        assert isinstance(publishing, DistributedPublisher)
        publishing.bucket_bytes = 20_000
        publishing.publish(Tensors(hugging_face_weights(model)), "1")
    np.testing.assert_allclose(scores(engine), log_probs(model, PROBE), atol=ROUNDING)


def test_what_a_killed_trainer_left_behind_does_not_stop_the_next(engine, checkpoint):
    async def leave_behind() -> None:
        async with EngineClient(engine, timeout_s=60) as client:
            await client.pause()
            await client.begin_weight_update(30)

    asyncio.run(leave_behind())
    model = moved(checkpoint)
    with publisher("distributed", engine, checkpoint, Path()) as publishing:
        publishing.publish(Tensors(hugging_face_weights(model)), "1")
    np.testing.assert_allclose(scores(engine), log_probs(model, PROBE), atol=ROUNDING)


@pytest.mark.parametrize("method", ["disk", "distributed"])
def test_a_response_across_a_publication_names_both_versions(method, engine, checkpoint, tmp_path):
    model = moved(checkpoint)
    with (
        EnginePool([engine], timeout_s=60) as pool,
        publisher(method, engine, checkpoint, tmp_path) as publishing,
    ):
        publishing.publish(Tensors(hugging_face_weights(load(checkpoint))), "first")
        running = pool.submit(pool.clients[0].generate([[3, 4, 5]] * 4, Sampling(300), seeds=range(4)))
        time.sleep(0.5)
        publishing.publish(Tensors(hugging_face_weights(model)), "second")
        completions = running.result(60)
    longest = max(completions, key=lambda c: len(c.token_ids))
    assert [span.version for span in longest.weight_spans] == ["first", "second"]
    first, second = longest.weight_spans
    assert first.start == 0 and first.end == second.start and second.end == len(longest.token_ids)
    tokens = [3, 4, 5, *longest.token_ids]
    for span, weights in ((first, load(checkpoint)), (second, model)):
        expected = log_probs(weights, tokens)[2:]
        np.testing.assert_allclose(
            longest.log_probs[span.start : span.end], expected[span.start : span.end], atol=ROUNDING
        )


@pytest.mark.parametrize("method", ["disk", "distributed"])
def test_a_bad_export_leaves_the_old_weights(method, engine, checkpoint, tmp_path):
    def wrong_shape():
        for name, tensor in hugging_face_weights(moved(checkpoint)):
            yield name, tensor[:3] if name == "model.norm.weight" else tensor

    def dies():
        for index, item in enumerate(hugging_face_weights(moved(checkpoint))):
            if index == 9:
                raise FloatingPointError("the trainer's own failure")
            yield item

    model = moved(checkpoint)
    with publisher(method, engine, checkpoint, tmp_path) as publishing:
        with pytest.raises(ValueError, match=r"model.norm.weight has shape \(3,\), .* \(64,\)"):
            publishing.publish(Tensors(wrong_shape()), "bad")
        with pytest.raises(FloatingPointError, match="own failure"):
            publishing.publish(Tensors(dies()), "bad")
        np.testing.assert_allclose(scores(engine), log_probs(load(checkpoint), PROBE), atol=ROUNDING)
        publishing.publish(Tensors(hugging_face_weights(model)), "good")
    np.testing.assert_allclose(scores(engine), log_probs(model, PROBE), atol=ROUNDING)


def test_a_half_loaded_publication_says_so_and_can_be_repeated(engine, checkpoint):
    """SGLang itself fails at the second bucket: this side's check of shapes is taken out."""

    def transposed():
        for name, tensor in hugging_face_weights(moved(checkpoint)):
            yield name, torch.zeros(7) if name == "model.norm.weight" else tensor

    model = moved(checkpoint)
    with publisher("distributed", engine, checkpoint, Path()) as publishing:
        assert isinstance(publishing, DistributedPublisher) and publishing._manifest is not None
        publishing._manifest.shapes = None
        publishing.bucket_bytes = 20_000
        with pytest.raises(EngineError, match="Attempted to load weight") as raised:
            publishing.publish(Tensors(transposed()), "1")
        assert "mixture of weights" in str(raised.value.__notes__)
        publishing._manifest.shapes = None
        publishing.publish(Tensors(hugging_face_weights(model)), "2")
    np.testing.assert_allclose(scores(engine), log_probs(model, PROBE), atol=ROUNDING)


def test_a_publication_under_another_version_is_noticed(engine, checkpoint, tmp_path):
    class Forgetful(DiskPublisher):
        def send(self, weights, version, deadline):
            super().send(weights, "other", deadline)

    with (
        EnginePool([engine], timeout_s=30) as pool,
        closing(Forgetful(context(pool, checkpoint, tmp_path))) as publishing,
        pytest.raises(EngineError, match="weights '1' were published, but it reports weights 'other'"),
    ):
        publishing.publish(Tensors(hugging_face_weights(load(checkpoint))), "1")


def test_a_trainer_of_two_ranks_publishes_beside_its_own_group(engine, checkpoint, tmp_path):
    model = moved(checkpoint)
    torch.save([(name, tensor.clone()) for name, tensor in hugging_face_weights(model)], tmp_path / "weights.pt")
    torch.multiprocessing.spawn(publish_as_rank, args=(str(tmp_path), engine, checkpoint), nprocs=2)
    np.testing.assert_allclose(scores(engine), log_probs(model, PROBE), atol=ROUNDING)


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"expert": 2}, {"pipeline": 2}], ids=str)
def test_a_publisher_from_outside_the_package_carries_the_shards_of_two_megatron_ranks(
    parallel, engine, checkpoint, tmp_path
):
    model = moved(checkpoint)
    new = tmp_path / "new"
    model.save_pretrained(new)
    run_ranks(2, publish_from_megatron, parallel, engine, new, tmp_path / "run")
    np.testing.assert_allclose(scores(engine), log_probs(model, PROBE), atol=ROUNDING)
