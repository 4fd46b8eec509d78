"""This module gives out a policy's current weights under Hugging Face names, as full tensors or as local shards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

from torch import Tensor, nn

from fiberpo_megatron.interfaces import LocalShard, NamedShape
from fiberpo_megatron.mcore.families import Architecture, GateUp, Qkv, Split, Vocabulary, Whole, family_of
from fiberpo_megatron.mcore.weights.export import Export
from fiberpo_megatron.mcore.weights.local import LocalWeight, WeightLayout, local_weights


class MegatronWeights:
    """Gives out the weights of a Megatron model. This is the `interfaces.WeightSource` of `MegatronPolicy`.

    `model_chunks` are this rank's parts of the model, `hf_config` the values of config.json. Each call yields the
    weights as they are at that moment, so that one source serves a whole run. `ready` waits until the parameters of
    the last optimiser step are all here, where they travel beside other work.
    """

    def __init__(
        self,
        model_chunks: Sequence[nn.Module],
        hf_config: Mapping[str, object],
        layout: WeightLayout,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._chunks, self._hf_config, self._layout, self._ready = model_chunks, hf_config, layout, ready

    @cached_property
    def _export(self) -> Export:
        """What the ranks have to know of each other's shards; every rank builds it at its first export."""
        return Export(self._chunks, self._hf_config, self._layout)

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and full tensors, one at a time. Every rank must iterate to the end.

        Rank 0 gets the tensors, on the model's device and in its type; the others get empty ones.
        """
        self._ready()
        return self._export.full()

    def rounds(self, limit: int) -> list[list[list[NamedShape]]]:
        """Return the full tensors that `share` yields, by round and rank. Every rank makes the first call."""
        return self._export.rounds(limit)

    def share(self, limit: int) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the names and full tensors that fall to this rank, a list for each round, on the model's device.

        Every rank must iterate to the end; the ranks of a tensor-parallel group exchange what they hold.
        """
        self._ready()
        return self._export.share(limit)

    def local(self) -> Iterator[LocalShard]:
        """Yield the parts of Hugging Face tensors that this rank holds, without communication.

        A parameter that Megatron fuses out of several tensors (query, key and value; gate and up projection) is yielded
        in its parts, which are copies. All others are views of the parameters: do not change them, and do not keep them
        beyond the next optimiser step. A part is a contiguous block of the full tensor, cut in at most one dimension.
        Ranks that are replicas of each other yield the same parts: all data-parallel ranks for what is not an expert's,
        all tensor-parallel ranks for norms and routers. The rows by which Megatron pads the vocabulary are left out, so
        that a part may have no rows. Raises ValueError for a tensor-parallel model whose family has transforms of its
        own, because the blocks that these cut are not known.
        """
        self._ready()
        family = family_of(self._hf_config)
        model = family.read_architecture(self._hf_config)
        for weight in local_weights(self._chunks, family.weights.for_model(model), self._layout):
            if weight.rule.exported:
                yield from _shards(weight, model)


def _shards(weight: LocalWeight, model: Architecture) -> Iterator[LocalShard]:
    """Yield the parts of Hugging Face tensors in one parameter."""
    transform, tensor = weight.rule.transform, weight.tensor.detach()
    shapes = transform.hf_shapes(tuple(tensor.shape), weight.shard.size, model)
    as_stored = isinstance(transform, Whole | Split | Vocabulary)
    if weight.shard.size > 1 and not (as_stored or isinstance(transform, GateUp | Qkv)):
        raise ValueError(
            f"{weight.name}: under tensor parallelism {type(transform).__name__}, a transform of the model's family, "
            "may spread this rank's part over several blocks of a tensor, which a shard is not; use a publisher "
            "that takes full tensors, or parallel.tensor = 1 (for experts parallel.expert_tensor = 1)"
        )
    parts = [tensor] if as_stored else transform.merge([tensor], model)
    for name, shape, part in zip(weight.hf_names, shapes, parts, strict=True):
        cut = [d for d, (whole, mine) in enumerate(zip(shape, part.shape, strict=True)) if whole != mine]
        if isinstance(transform, Vocabulary):
            cut = [0]  # also where the padding makes a part as large as the whole
        if len(cut) > 1:
            raise ValueError(f"{weight.name}: this rank's part of {name} is cut in dimensions {cut}, not in one")
        offset = [0] * len(shape)
        for dimension in cut:
            size = part.shape[dimension]
            offset[dimension] = min(weight.shard.rank * size, shape[dimension])
            part = part.narrow(dimension, 0, min(size, shape[dimension] - offset[dimension]))
        yield LocalShard(name, part, tuple(shape), tuple(offset))
