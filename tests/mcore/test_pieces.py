"""Boxes of a flattened range: together they are the range, in its order, for every shape and every range."""

import itertools

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from fiberpo_megatron.mcore.optimizers.pieces import boxes, pieces


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 1, 6), (4, 1), ()])
def test_boxes_are_the_range_in_order(shape: tuple[int, ...]):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for begin, end in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        found = list(boxes(shape, begin, end))
        parts = [whole[tuple(slice(a, a + n) for a, n in zip(at, size))] for at, size in found]
        joined = torch.cat([part.reshape(-1) for part in parts]) if parts else whole.new_empty(0)
        assert joined.tolist() == list(range(begin, end))
        assert len(found) <= max(1, 2 * len(shape) - 1)


def test_pieces_of_shards_fill_the_whole_tensor():
    """Rank 1 of 2 along the second dimension of expert 3 of 4, whose state is cut into three shards."""
    weight = torch.randn(6, 5)
    about = ShardedTensor.from_rank_offsets("w", weight, (0, 3, 4), (2, 1, 2), replica_id=(0, 0, 7), prepend_axis_num=1)
    whole = torch.full((4, 6, 10), torch.nan)
    for begin, end in ((0, 7), (7, 22), (22, 30)):
        for piece in pieces(about, "state", weight.reshape(-1)[begin:end], begin):
            assert piece.key == "state.w" and piece.replica_id == (0, 0, 0) and piece.global_shape == whole.shape
            whole[tuple(slice(at, at + size) for at, size in zip(piece.global_offset, piece.local_shape))] = piece.data
    assert torch.equal(whole[3, :, 5:], weight)
    assert int(whole.isnan().sum()) == whole.numel() - weight.numel()


def test_a_transposed_parameter_is_refused():
    def transposed(key: str, data: torch.Tensor, replica: object, _: object) -> list[ShardedTensor]:
        return [ShardedTensor.from_rank_offsets(key, data.T, replica_id=(0, 0, 0))]

    about = ShardedTensorFactory("w", torch.zeros(2, 3), transposed, lambda found: found)
    with pytest.raises(ValueError, match=r"state\.w have another order"):
        pieces(about, "state", torch.zeros(6), 0)
