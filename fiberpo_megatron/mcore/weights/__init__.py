"""Hugging Face weights into and out of a Megatron model in any layout.

Loading: every rank finds, by its family's table, which parts of which tensors make up its own parameters, and
reads only those. Exporting: the owners of a bucket's shards send them to rank 0, one message per owner and
bucket, where the full tensors are put together one at a time. No rank ever holds the whole model.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from fiberpo_megatron.mcore.families.transforms import Dimensions
from fiberpo_megatron.mcore.families.weight_tables import HF_EMBEDDING, HF_OUTPUT, Family, Match, family_of, match_name
from fiberpo_megatron.mcore.weights.export import export_hf
from fiberpo_megatron.mcore.weights.files import HfFiles
from fiberpo_megatron.mcore.weights.local import LocalWeight, WeightLayout, local_weights
from fiberpo_megatron.mcore.weights.save import save_hf

__all__ = ["export_hf", "load_hf", "save_hf"]


def load_hf(
    model_chunks: Sequence[nn.Module],
    hf_config: Mapping[str, object],
    folder: str | Path,
    layout: WeightLayout,
) -> None:
    """Fill the model with the safetensors weights of `folder`, each rank reading only its part.

    Every rank calls it. Values are cast to the parameters' type. Raises ValueError, on every rank, naming the
    tensors that are unknown, missing or of the wrong shape, or the parameters that the family's table does
    not fill. An optimizer that was built before has to refresh its main parameters
    (`optimizer.reload_model_params()`).
    """
    dims = Dimensions.from_hf(hf_config)
    error = None
    try:
        family = family_of(hf_config, dims)
        weights = local_weights(model_chunks, family, dims, layout)
        files = HfFiles(Path(folder), family, dims)
        _check_names(files, weights, family, dims)
        for weight in weights:
            _fill(weight, files, dims)
    except (ValueError, OSError) as caught:
        error = str(caught)
    layout.agree(error, f"loading weights from {folder}", raises=ValueError)


def _check_names(files: HfFiles, weights: Sequence[LocalWeight], family: Family, dims: Dimensions) -> None:
    """Every tensor that this rank needs is there, and none is there that nobody needs."""
    used = {name for weight in weights for name in weight.hf_names}
    missing = sorted(used - set(files.names))
    problems = [f"missing: {_listed(missing)}"] if missing else []
    own = {weight.match for weight in weights}
    unused = (name for name in files.names if name not in used)
    strangers = [f"{name} ({files.place(name)})" for name in unused if _is_stranger(name, own, family, dims)]
    if strangers:
        problems.append(f"unknown to the model: {_listed(sorted(strangers))}")
    if problems:
        raise ValueError(
            f"the files do not hold the weights of config.json; {'; '.join(problems)}: correct config.json, or take "
            "the files that belong to it"
        )


def _is_stranger(name: str, own: set[Match], family: Family, dims: Dimensions) -> bool:
    """Whether no rank has a use for a tensor that this rank does not use.

    A tensor of the table with a layer or expert of another rank is that rank's to judge; one of this rank's own
    layers and experts has no place in the model as it was built.
    """
    if re.fullmatch(family.ignored, name) or (dims.tied_embeddings and name == HF_OUTPUT):
        return False
    templates = (template for rule in family.rules for template in rule.hf)
    match = next(filter(None, (match_name(template, name) for template in templates)), None)
    if match is None or (match.layer or 0) >= dims.layers or (match.expert or 0) >= max(dims.experts, 1):
        return True
    if match.expert is None:
        return match.layer is not None and any(match.layer == other.layer for other in own)
    return match in own


def _listed(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _fill(weight: LocalWeight, files: HfFiles, dims: Dimensions) -> None:
    """Check the shapes of the tensors behind a parameter and copy this rank's part into it."""
    local = tuple(weight.tensor.shape)
    try:
        wanted = weight.rule.transform.hf_shapes(local, weight.shard.size, dims)
    except ValueError as error:
        raise ValueError(f"{weight.name}: {error}") from error
    for name, shape in zip(weight.hf_names, wanted, strict=True):
        files.check(name, shape)
    value = weight.rule.transform.load(files, weight.hf_names, local, weight.shard, dims)
    assert value.shape == weight.tensor.shape, (weight.name, value.shape, weight.tensor.shape)
    with torch.no_grad():
        weight.tensor.copy_(value)
    if dims.tied_embeddings and weight.hf_names == [HF_EMBEDDING] and HF_OUTPUT in files.names:
        stored = weight.rule.transform.load(files, [HF_OUTPUT], local, weight.shard, dims)
        if not torch.equal(stored, value):
            raise ValueError(
                f"{HF_OUTPUT} differs from {HF_EMBEDDING} although config.json says "
                "tie_word_embeddings = true; set it to false if the model has its own output weights"
            )
