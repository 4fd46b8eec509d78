"""All ways of publishing to a real SGLang server that is itself tensor-parallel: each of its ranks holds its shards."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.servers import engines
from fiberpo_megatron.engines.settings import EngineConfig
from tests.tiny_model import hugging_face_weights, log_probs, moved
from tests.weight_sync.sources import Tensors
from tests.weight_sync.test_real_engine import (
    METHODS,
    PROBE,
    ROUNDING,
    after_a_full_load,
    publisher,
    scores,
    slightly_changed,
)

pytestmark = [pytest.mark.sglang, pytest.mark.exhaustive]


@pytest.fixture(scope="module")
def sharded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineAddress]:
    """A server of two ranks; it starts in some 20 s."""
    config = EngineConfig(max_running_requests=16, tensor=2)
    with engines(config, checkpoint, tmp_path_factory.mktemp("sharded"), dtype="float32", gpu=False) as addresses:
        yield addresses[0]


@pytest.mark.parametrize("method", METHODS)
def test_each_rank_of_the_engine_takes_its_shard(method: str, sharded: EngineAddress, checkpoint: Path, tmp_path: Path):
    models = [moved(checkpoint, 1), moved(checkpoint, 2), slightly_changed(moved(checkpoint, 2))]
    with publisher(method, sharded, checkpoint, tmp_path / "published") as publishing:
        for version, model in enumerate(models):
            before = scores(sharded)
            publishing.publish(Tensors(hugging_face_weights(model)), str(version))
            new = log_probs(model, PROBE)
            assert np.abs(new - before).mean() > 100 * ROUNDING
            np.testing.assert_allclose(scores(sharded), new, atol=ROUNDING)
            with EnginePool([sharded], timeout_s=30) as pool:
                assert pool.run(pool.clients[0].model_info()).weight_version == str(version)
                assert pool.run(pool.clients[0].tensor_parallel_size(30)) == 2
            of_ranks = publishing.checksums[0].split("-")
            assert len(of_ranks) == 2 and of_ranks[0] != of_ranks[1]
            assert publishing.checksums == [after_a_full_load(sharded, model, tmp_path)]
