import torch

from fiberpo_megatron.weight_sync.buckets import buckets


def cut(weights, limit):
    return [(bucket.names, last) for bucket, last in buckets(iter(weights), limit)]


def test_buckets_respect_the_limit_and_know_the_last():
    weights = [(name, torch.zeros(10)) for name in "abcde"]  # 40 bytes each
    assert cut(weights, 80) == [(["a", "b"], False), (["c", "d"], False), (["e"], True)]
    assert cut(weights, 1000) == [(list("abcde"), True)]
    assert cut(weights, 1) == [([name], name == "e") for name in "abcde"]
    assert cut([], 10) == []


def test_a_bucket_is_the_bytes_of_its_tensors():
    tensors = [torch.randn(3, 2), torch.arange(4, dtype=torch.int32), torch.randn(2, 5).T]
    ((bucket, last),) = buckets(iter(zip("abc", tensors)), 1000)
    flat = bucket.flat(torch.device("cpu"))
    assert last and flat.dtype == torch.uint8 and flat.numel() == bucket.bytes == 24 + 16 + 40
    assert bucket.dtypes == ["float32", "int32", "float32"] and bucket.shapes == [[3, 2], [4], [5, 2]]
    offset = 0
    for tensor in tensors:
        received = flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        assert torch.equal(received, tensor)
        offset += tensor.nbytes


def test_a_tensor_that_would_lie_across_an_element_begins_a_new_bucket():
    odd, float32 = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2)
    assert cut([("a", odd), ("b", float32)], 1000) == [(["a"], False), (["b"], True)]
    assert cut([("a", torch.zeros(4, dtype=torch.bfloat16)), ("b", float32)], 1000) == [(["a", "b"], True)]
