"""Fixtures that several folders use: a tiny random Qwen3-MoE and one SGLang server for the whole session."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_model import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder of a random Qwen3-MoE: 2 layers, hidden 64, 4 experts top-2, 64 tokens, float32."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with the demo's tokenizer (both have 64 tokens)."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(checkpoint, folder)
    for path in (Path(__file__).parent.parent / "examples/demo/model").glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["EngineAddress"]:  # noqa: F821
    """A real SGLang server, started once (10-20 s). Use `engine`, which restores its weights."""
    from fiberpo_megatron.engines.servers import engines
    from fiberpo_megatron.engines.settings import EngineConfig

    config = EngineConfig(max_running_requests=256)
    folder = tmp_path_factory.mktemp("engines")
    with engines(config, checkpoint, folder, dtype="float32", gpu=False, routed_experts=True) as addresses:
        yield addresses[0]


@pytest.fixture
def engine(server: "EngineAddress", checkpoint: Path) -> "EngineAddress":  # noqa: F821
    """The session's server with the weights of `checkpoint`, version "checkpoint"."""
    from fiberpo_megatron.engines.client import EngineClient

    async def restore() -> None:
        async with EngineClient(server, timeout_s=60) as client:
            await client.update_weights_from_disk(checkpoint, "checkpoint", timeout_s=60)

    asyncio.run(restore())
    return server
