import pytest
import torch

from fiberpo_megatron.interfaces import NamedShape
from fiberpo_megatron.weight_sync.buckets import bucket

TENSORS = {
    "a": torch.randn(3, 2),
    "b": torch.zeros(3, dtype=torch.bfloat16),
    "c": torch.arange(4, dtype=torch.int32),
    "d": torch.randn(2, 5).T,
}


def shapes(tensors):
    return [NamedShape(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def test_a_bucket_is_the_bytes_of_its_tensors_and_each_can_be_viewed_in_place():
    made = bucket(shapes(TENSORS))
    assert made.nbytes == 24 + 6 + 16 + 40 and made.padded_bytes == 96
    flat = torch.zeros(100, dtype=torch.uint8)
    made.fill(flat, list(TENSORS.items()))
    assert not flat[made.nbytes :].any()
    assert made.names == ["a", "c", "d", "b"], "large elements come first"
    assert made.dtypes == ["float32", "int32", "float32", "bfloat16"] and made.shapes == [[3, 2], [4], [5, 2], [3]]
    for name, offset in zip(made.names, made.offsets):
        tensor = TENSORS[name]
        assert torch.equal(flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape), tensor)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": torch.zeros(2, 3)}, r"announced .*name='a', shape=\(3, 2\).* but exported torch.float32 \[2, 3\]"),
        ({"a": torch.zeros(3, 2, dtype=torch.float16)}, r"exported torch.float16 \[3, 2\]"),
        ({}, "but exported nothing"),
        ({"a": torch.zeros(3, 2), "e": torch.zeros(1)}, "exported e, which it had not announced"),
    ],
)
def test_what_was_not_announced_is_refused(tensors, said):
    made = bucket(shapes({"a": TENSORS["a"]}))
    with pytest.raises(ValueError, match=said):
        made.fill(torch.empty(100, dtype=torch.uint8), list(tensors.items()))
