"""This module knows which tensors a publication must have.

The trainer's side checks this, because SGLang accepts missing and unknown tensors silently, and a wrong shape ends its
process.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fiberpo_megatron.interfaces import NamedShape
from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.printable import printable

Shape = tuple[int, ...]
TIED = "lm_head.weight"


class Manifest:
    """Holds names and shapes of a model's tensors: those of its safetensors, or else of the first publication."""

    def __init__(self, model: Path) -> None:
        self.shapes: Mapping[str, Shape] | None = folder_shapes(model) or None
        self.source = str(model)
        configuration = read_object(model / "config.json")
        self.tied = bool(configuration.get("tie_word_embeddings", False))
        """Whether the output layer shares the embedding's weight, so that it may be left out."""

    def check(self, tensors: Iterable[NamedShape]) -> None:
        """Raise ValueError when a tensor of a publication is unknown, missing, doubled or of the wrong shape."""
        seen: dict[str, Shape] = {}
        for tensor in tensors:
            if tensor.name in seen:
                raise ValueError(f"the weight {tensor.name} was exported twice")
            seen[tensor.name] = tensor.shape
            self._check(tensor.name, tensor.shape)
        if not seen:
            raise ValueError("the policy exported no weights")
        if self.shapes is None:
            self.shapes, self.source = seen, "the first publication"
        missing = sorted(name for name in self.shapes.keys() - seen.keys() if not self._may_differ(name))
        if missing:
            raise ValueError(
                f"{len(missing)} weights of {self.source} were not exported, the first is {missing[0]}; "
                "complete the policy's export"
            )

    def _check(self, name: str, shape: Shape) -> None:
        if self.shapes is None or self._may_differ(name):
            return
        if name not in self.shapes:
            raise ValueError(f"the exported weight {name} is not in {self.source}; correct the policy's export")
        if self.shapes[name] != shape:
            raise ValueError(
                f"the exported weight {name} has shape {shape}, in {self.source} it has {self.shapes[name]}; "
                "correct the policy's export"
            )

    def _may_differ(self, name: str) -> bool:
        return self.tied and name == TIED


def folder_shapes(folder: Path) -> dict[str, Shape]:
    """Return names and shapes in a folder's safetensors files, read from their headers.

    Raises ValueError for a file that cannot be read.
    """
    shapes: dict[str, Shape] = {}
    for file in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {file} ({printable(str(error))}); download it again") from error
    return shapes
