import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with the demo's tokenizer (both have 64 tokens)."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(checkpoint, folder)
    for path in (ROOT / "examples/demo/model").glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder
