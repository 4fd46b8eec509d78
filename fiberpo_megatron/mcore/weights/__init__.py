"""Loads Hugging Face weights into a Megatron model in any layout, and exports them from it.

When loading, every rank finds in the weight table of the model's family which parts of which tensors make up its own
parameters, and reads only those. When exporting, the owners of a bucket's shards send them to rank 0 in one message
per owner and bucket; rank 0 puts the full tensors together one at a time. No rank ever holds the whole model.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from fiberpo_megatron.mcore.families import EMBEDDING, OUTPUT, Architecture, WeightTable, family_of
from fiberpo_megatron.mcore.families.weight_tables import Match, match_name
from fiberpo_megatron.mcore.weights.export import export_hf
from fiberpo_megatron.mcore.weights.files import HfFiles
from fiberpo_megatron.mcore.weights.local import LocalWeight, WeightLayout, local_weights
from fiberpo_megatron.mcore.weights.save import save_hf
from fiberpo_megatron.printable import printable

__all__ = ["export_hf", "load_hf", "save_hf"]


def load_hf(
    model_chunks: Sequence[nn.Module],
    hf_config: Mapping[str, object],
    folder: str | Path,
    layout: WeightLayout,
) -> None:
    """Fill the model with the safetensors weights of `folder`; each rank reads only its part.

    Every rank must call this. Values are cast to the parameters' type. Raises ValueError on every rank that names the
    tensors that are unknown, missing or of the wrong shape, or the parameters that the family's weight table does not
    describe. An optimizer that was built before has to refresh its main parameters
    (`optimizer.reload_model_params()`).
    """
    family = family_of(hf_config)
    architecture = family.read_architecture(hf_config)
    table = family.weights.for_model(architecture)
    error = None
    try:
        weights = local_weights(model_chunks, table, layout)
        files = HfFiles(Path(folder), table, architecture)
        _check_names(files, weights, table, architecture)
        for weight in weights:
            _fill(weight, files, table, architecture)
    except (ValueError, OSError) as caught:
        error = str(caught)
    layout.agree(error, f"loading weights from {folder}", raises=ValueError)


def _check_names(
    files: HfFiles, weights: Sequence[LocalWeight], table: WeightTable, architecture: Architecture
) -> None:
    """Raise ValueError when a tensor that this rank needs is missing, or a tensor exists that no rank needs."""
    used = {name for weight in weights for name in weight.hf_names}
    missing = sorted(used - set(files.names))
    problems = [f"missing: {_listed(missing)}"] if missing else []
    own = {weight.match for weight in weights}
    unused = (name for name in files.names if name not in used)
    strangers = [f"{name} ({files.place(name)})" for name in unused if _is_stranger(name, own, table, architecture)]
    if strangers:
        problems.append(f"unknown to the model: {_listed(sorted(strangers))}")
    if problems:
        raise ValueError(
            f"the files do not hold the weights of config.json; {'; '.join(problems)}: correct config.json, or take "
            "the files that belong to it"
        )


def _is_stranger(name: str, own: set[Match], table: WeightTable, architecture: Architecture) -> bool:
    """Return whether no rank has a use for a tensor that this rank does not use.

    This rank leaves a tensor of the table whose layer or expert belongs to another rank to that rank's judgement; an
    unused tensor of its own layers and experts has no place in the model as it was built.
    """
    if re.fullmatch(table.ignored, name) or name == table.tied_output:
        return False
    templates = (template for rule in table.rules for template in rule.hf)
    match = next(filter(None, (match_name(template, name) for template in templates)), None)
    experts = architecture.experts.count if architecture.experts else 1
    if match is None or (match.layer or 0) >= architecture.layers or (match.expert or 0) >= experts:
        return True
    if match.expert is None:
        return match.layer is not None and any(match.layer == other.layer for other in own)
    return match in own


def _listed(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(printable(name)[:200] for name in names[:limit]) + more


def _fill(weight: LocalWeight, files: HfFiles, table: WeightTable, architecture: Architecture) -> None:
    """Check the shapes of the tensors behind a parameter and copy this rank's part into it."""
    local, transform = tuple(weight.tensor.shape), weight.rule.transform
    try:
        wanted = transform.hf_shapes(local, weight.shard.size, architecture)
    except ValueError as error:
        raise ValueError(f"{weight.name}: {error}") from error
    for name, shape in zip(weight.hf_names, wanted, strict=True):
        files.check(name, shape)
    value = transform.load(files, weight.hf_names, local, weight.shard, architecture)
    assert value.shape == weight.tensor.shape, (weight.name, value.shape, weight.tensor.shape)
    with torch.no_grad():
        weight.tensor.copy_(value)
    copy = table.tied_output
    if weight.rule.megatron in (EMBEDDING, OUTPUT) and copy is not None and copy in files.names:
        stored = transform.load(files, [copy], local, weight.shard, architecture)
        if not torch.equal(stored, value):
            raise ValueError(
                f"{copy} differs from {weight.hf_names[0]} although config.json says "
                "tie_word_embeddings = true; set it to false if the model has its own output weights"
            )
