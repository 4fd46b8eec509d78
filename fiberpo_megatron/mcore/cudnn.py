"""This module sees whether torch and Transformer Engine use one cuDNN: two of them in a process break its attention."""

import re
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch

_PLACES = ("CUDNN_HOME", "CUDNN_PATH")
"""Variables by which Transformer Engine finds cuDNN before it looks elsewhere."""
_LIBRARY = re.compile(r"(/\S*/libcudnn[^/\s]*\.so[^/\s]*)")


@dataclass(frozen=True)
class CudnnVersions:
    """Holds the versions of cuDNN that this process runs, such as 9.19.0; None when it cannot be asked for."""

    torch: str | None
    transformer_engine: str | None

    @property
    def differ(self) -> bool:
        """Return whether both are known and are two versions."""
        return None not in (self.torch, self.transformer_engine) and self.torch != self.transformer_engine

    def __str__(self) -> str:
        return f"torch runs cuDNN {self.torch}, Transformer Engine {self.transformer_engine}"


def cudnn_versions() -> CudnnVersions:
    """Ask torch, then Transformer Engine, which must have been imported before: loading it takes seconds."""
    try:
        number = torch.backends.cudnn.version()
    except RuntimeError:  # torch refuses one that is older than what it was built with
        number = None
    engine = sys.modules.get("transformer_engine.pytorch.utils")
    if number is None or engine is None:
        return CudnnVersions(None, None)
    return CudnnVersions(_text(number), ".".join(map(str, engine.get_cudnn_version())))


def _text(number: int) -> str:
    """Return the version that cudnnGetVersion() gives as a number: 91900 is 9.19.0, and 8907 was 8.9.7."""
    major, rest = divmod(number, 10000 if number >= 90000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def cudnn_folders(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Return the folders from which this process has loaded libraries of cuDNN; none without /proc."""
    try:
        lines = maps.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = (_LIBRARY.search(line) for line in lines)
    return list(dict.fromkeys(str(Path(match[1]).parent) for match in found if match))


def torch_cudnn(maps: Path = Path("/proc/self/maps")) -> Path | None:
    """Return the folder of the cuDNN that torch has loaded, or of the package that it was installed with.

    It is None for a torch without cuDNN. Once Transformer Engine has loaded a second one, it is the package.
    """
    loaded = cudnn_folders(maps)
    if len(loaded) == 1:
        return Path(loaded[0])
    folder = Path(torch.__file__).parent.parent / "nvidia/cudnn/lib"
    return folder if any(folder.glob("libcudnn.so*")) else None


def prefer_torch_cudnn(environment: MutableMapping[str, str]) -> None:
    """Have Transformer Engine load the cuDNN that torch loads; it must run before Transformer Engine is imported.

    Transformer Engine looks in CUDNN_HOME, CUDNN_PATH and the CUDA toolkit, then for the name `libcudnn.so`. Torch's
    package has `libcudnn.so.9` alone, so that a cuDNN of the system is found instead of it, whatever LD_LIBRARY_PATH
    says. Where the user has set one of the two variables, it stays.
    """
    folder = torch_cudnn()
    if folder is not None and not any(environment.get(name) for name in _PLACES):
        environment["CUDNN_HOME"] = str(folder)


def one_cudnn() -> str:
    """Return how to have one cuDNN."""
    folder = torch_cudnn()
    if folder is None:
        return "let both load one libcudnn.so.9: set CUDNN_HOME to the folder of the one that torch loads"
    return f"let both load one libcudnn.so.9: set CUDNN_HOME={folder} (torch's own), or remove the other cuDNN"
