"""What the engines' plugin reads out of memory that this process shares; an engine would be another process."""

import json
import os
from pathlib import Path

import pytest
import torch

from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.command import PLUGIN
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.interfaces import NamedShape
from fiberpo_megatron.weight_sync.base import Deadline, PublisherContext
from fiberpo_megatron.weight_sync.buckets import bucket
from fiberpo_megatron.weight_sync.ipc import MAGIC, IpcPublisher
from fiberpo_megatron.weight_sync.rounds import Round
from fiberpo_megatron.weight_sync.shared_memory import SharedBuffer

CPU = torch.device("cpu")


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(PLUGIN)
    import fiberpo_weights

    fiberpo_weights._open.clear()
    yield fiberpo_weights
    fiberpo_weights._open.clear()


def described(buffer: SharedBuffer, *tensors, **changes) -> bytes:
    handle = {**buffer.handle, **changes}
    return MAGIC + json.dumps({"buffers": [[handle]], "tensors": tensors, "keep": []}).encode()


def test_tensors_are_views_of_the_memory(plugin):
    buffer = SharedBuffer(64, CPU)
    buffer.bytes.copy_(torch.arange(64))
    payload = described(buffer, ["a", "int32", [2, 3], 0, 8], ["b", "bfloat16", [], 0, 6])
    (a_name, a), (b_name, b) = plugin.tensors(payload, CPU)
    assert (a_name, b_name) == ("a", "b") and plugin.MAGIC == MAGIC
    assert torch.equal(a, buffer.bytes[8:32].view(torch.int32).view(2, 3)) and b.shape == ()
    buffer.bytes.zero_()
    assert not a.any(), "a later round is written into the same memory"
    buffer.close()
    buffer.close()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (["a", "int32", [3], 0, 60], "12 bytes from 60 on are not in a buffer of 64"),
        (["a", "int32", [1], 0, 2], "4 bytes from 2 on"),
        (["a", "int32", [-1], 0, 0], "is no whole number in range"),
        (["a", "int32", [1], 1, 0], "is no whole number in range"),
        (["a", "int32", [1], 0, -4], "is no whole number in range"),
        (["a", "load", [1], 0, 0], "the type 'load' is not one of"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(plugin, entry, said):
    buffer = SharedBuffer(64, CPU)
    with pytest.raises(plugin.BadDescription, match=said):
        plugin.tensors(described(buffer, entry), CPU)


def test_other_memory_is_not_opened(plugin):
    buffer = SharedBuffer(64, CPU)
    with pytest.raises(plugin.BadDescription, match="is not the memory that was announced"):
        plugin.tensors(described(buffer, token="another"), CPU)
    with pytest.raises(plugin.BadDescription, match="is not the memory that was announced"):
        plugin.tensors(described(buffer, descriptor=0), CPU)
    with pytest.raises(plugin.BadDescription, match="has 64 bytes"):
        plugin.tensors(described(buffer, bytes=65), CPU)
    with pytest.raises(plugin.BadDescription, match=r"no training rank shares memory of cpu \(cpu\)"):
        plugin.tensors(described(buffer, device="GPU-1"), CPU)


def test_memory_of_an_earlier_publication_is_released(plugin):
    first, second = SharedBuffer(64, CPU), SharedBuffer(64, CPU)
    plugin.tensors(described(first, ["a", "uint8", [64], 0, 0]), CPU)
    plugin.tensors(described(second, ["a", "uint8", [64], 0, 0]), CPU)
    assert set(plugin._open) == {second.token}


def test_host_memory_is_mapped_once_for_all_publications(plugin):
    buffer = SharedBuffer(64, CPU)
    payload = described(buffer, ["a", "uint8", [64], 0, 0])
    ((_, first),) = plugin.tensors(payload, CPU)
    plugin.release()
    ((_, second),) = plugin.tensors(payload, CPU)
    assert first.data_ptr() == second.data_ptr()


def test_the_memory_has_no_name_in_a_file_system():
    """So that it ends with its process, however that ends."""
    buffer = SharedBuffer(4096, CPU)
    where = os.readlink(f"/proc/self/fd/{buffer.handle['descriptor']}")
    assert where.startswith("/memfd:fiberpo-") and where.endswith(" (deleted)")
    buffer.close()
    assert not os.path.exists(f"/proc/self/fd/{buffer.handle['descriptor']}")


def test_every_publication_shares_the_same_two_buffers(tmp_path: Path):
    """Torch takes memory back that was opened exactly as often as it was shared; buffers of every publication stayed
    allocated on an H200, one or both of them, depending on the number of engines."""
    (tmp_path / "config.json").write_text("{}")
    with EnginePool([EngineAddress("http://127.0.0.1:9")], timeout_s=5) as pool:  # nothing is asked of it
        made = IpcPublisher(PublisherContext(pool, tmp_path, 0, 1, tmp_path, 5.0))
        plan = [Round(i, i == 2, [bucket([NamedShape(f"w{i}", (4,), torch.float32)])]) for i in range(3)]
        tokens = []
        for version in ("1", "2"):
            made.begin(plan, version, Deadline(5.0))
            tokens.append([slot.token for slot in made._slots])
            made.released()
        assert len(tokens[0]) == 2 and tokens[0] == tokens[1]
        made.close()
        assert not made._slots
