"""Publishing against fake servers: the order of calls, several engines, refusals, and that nothing hangs."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from fiberpo_megatron.config import Config
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.errors import EngineError, EngineRefused, EngineTimeout, EngineUnreachable
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.plugins import PluginError
from fiberpo_megatron.weight_sync import base, session
from fiberpo_megatron.weight_sync import distributed as distributed_module
from fiberpo_megatron.weight_sync.choose import check_publisher, make_publisher
from fiberpo_megatron.weight_sync.disk import MARKER, DiskPublisher
from fiberpo_megatron.weight_sync.distributed import DistributedPublisher
from fiberpo_megatron.weight_sync.group import UpdateGroup
from fiberpo_megatron.weight_sync.settings import WeightSyncConfig
from tests.distributed.parity import make_config
from tests.engines.fake_server import FakeServers
from tests.weight_sync.joining import JoiningServers
from tests.weight_sync.sources import Tensors, context

ENGINES = [EngineAddress("http://127.0.0.1:1"), EngineAddress("http://127.0.0.1:2")]
WEIGHTS = {f"w{i}": torch.full((5,), float(i)) for i in range(4)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text("{}")
    save_file(WEIGHTS, folder / "model.safetensors")
    return folder


class Counted(Tensors):
    """Weights that know whether they were iterated to the end."""

    def __init__(self) -> None:
        super().__init__(WEIGHTS.items())
        self.drained = False

    def share(self, limit):
        yield from super().share(limit)
        self.drained = True


@contextmanager
def disk(
    model: Path, servers: FakeServers, folder: Path, timeout_s: float = 5, **options: Any
) -> Iterator[DiskPublisher]:
    with EnginePool(ENGINES, timeout_s=5, transport=servers) as pool:
        made = DiskPublisher(context(pool, model, folder.parent, timeout_s=timeout_s), folder=folder, **options)
        with closing(made):
            yield made


ONE_GROUP = pytest.mark.parametrize("one_group", [False, True], ids=["a group each", "one group"])
"""With NCCL all engines are in one group; here over gloo."""


@contextmanager
def distributed(
    model: Path, servers: FakeServers, timeout_s: float = 5, one_group: bool = False
) -> Iterator[DistributedPublisher]:
    with EnginePool(ENGINES, timeout_s=5, transport=servers) as pool:
        made = DistributedPublisher(context(pool, model, model, timeout_s=timeout_s), bucket_mib=1, backend="gloo")
        made._one_group = one_group
        with closing(made):
            yield made


def refusing(path: str, port: int) -> FakeServers:
    """The server at this port refuses `path`."""
    refused = httpx.Response(400, json={"success": False, "message": "not now"})

    def rule(host, body):
        return refused if host.endswith(f":{port}") else {"success": True, "message": "Success"}

    return FakeServers({path: rule})


def test_disk_writes_a_complete_folder_and_removes_older_ones(model, tmp_path):
    servers, folder = FakeServers(), tmp_path / "published"
    folder.mkdir()
    (folder / "notes").mkdir()
    with disk(model, servers, folder, shard_bytes=40) as publishing:
        publishing.publish(Tensors(WEIGHTS.items()), "1")
        assert servers.paths() == [
            *["/pause_generation"] * 2,
            *["/update_weights_from_disk"] * 4,
            *["/continue_generation"] * 2,
        ]
        publishing.publish(Tensors(WEIGHTS.items()), "2")
    assert {entry.name for entry in folder.iterdir()} == {"2", "notes"}, "foreign folders stay"
    written = folder / "2"
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 80 and set(index["weight_map"]) == set(WEIGHTS)
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 2
    loaded = {name: tensor for file in files for name, tensor in load_file(written / file).items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in WEIGHTS.items())
    assert json.loads((written / "config.json").read_text()) == {"model_type": "x"}
    assert (written / "tokenizer.json").exists() and not (written / "model.safetensors").exists()
    bodies = [body for _, path, body in servers.calls if path == "/update_weights_from_disk"]
    rounds = [str(written / "rounds" / number) for number in ("00000", "00001")]
    assert bodies[-4:] == [
        {"model_path": path, "weight_version": version, "load_format": "auto"}
        for path, version in zip(rounds, ("incomplete-2", "2"))
        for _ in ENGINES
    ]
    assert {path.name for path in Path(rounds[1]).iterdir()} == {"config.json", "tokenizer.json", files[1]}
    assert all(path.is_symlink() and path.exists() for path in Path(rounds[1]).iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_an_engine_of_another_user_can_read_what_the_umask_lets_it(model, tmp_path, umask):
    before = os.umask(umask)
    try:
        with disk(model, FakeServers(), tmp_path / "published") as publishing:
            publishing.publish(Tensors(WEIGHTS.items()), "1")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "published/1").iterdir() if path.is_file()}
    assert "model-00000-00000.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}, modes


def test_disk_refuses_to_replace_a_folder_that_is_not_its_own(model, tmp_path):
    (tmp_path / "published" / "1").mkdir(parents=True)
    (tmp_path / "published" / "1" / "notes").touch()
    with (
        disk(model, FakeServers(), tmp_path / "published") as publishing,
        pytest.raises(FileExistsError, match=r"published/1 was not published by this run"),
    ):
        publishing.publish(Tensors(WEIGHTS.items()), "1")


def test_two_runs_in_one_folder_leave_each_others_weights(model, tmp_path):
    """As in /dev/shm. Neither removes nor replaces what the other one published, and no code of the model is copied."""
    (model / "modeling_own.py").write_text("raise AssertionError")
    shared, published = tmp_path / "shared", []
    for run, version in (("first", "1"), ("second", "2"), ("first", "3")):
        with EnginePool(ENGINES, timeout_s=5, transport=FakeServers()) as pool, ExitStack() as stack:
            made = DiskPublisher(context(pool, model, tmp_path / run, timeout_s=5), folder=shared)
            stack.enter_context(closing(made)).publish(Tensors(WEIGHTS.items()), version)
            published.append(sorted(path.name for path in shared.iterdir()))
            if run == "second":
                with pytest.raises(FileExistsError, match="shared/1 was not published by this run"):
                    made.publish(Tensors(WEIGHTS.items()), "1")
    assert published == [["1"], ["1", "2"], ["2", "3"]]
    assert not list(shared.rglob("*.py"))


def test_a_link_in_the_folder_is_not_followed(model, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / MARKER).touch()
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "0").symlink_to(elsewhere)
    with disk(model, FakeServers(), tmp_path / "published") as publishing:
        publishing.publish(Tensors(WEIGHTS.items()), "1")
        with pytest.raises(FileExistsError, match="published/0 was not published by this run"):
            publishing.publish(Tensors(WEIGHTS.items()), "0")
    assert (elsewhere / MARKER).exists()


def test_a_refusal_names_the_engine_leaves_all_paused_and_keeps_the_older_folder(model, tmp_path):
    servers = FakeServers()
    with disk(model, servers, tmp_path / "published") as publishing:
        publishing.publish(Tensors(WEIGHTS.items()), "1")
        servers.rules = refusing("/update_weights_from_disk", 2).rules
        servers.calls.clear()
        weights = Counted()
        with pytest.raises(EngineRefused, match=r"127.0.0.1:2: .*not now"):
            publishing.publish(weights, "2")
        assert "/continue_generation" not in servers.paths() and weights.drained, "engine 1 may have loaded it"
        assert (tmp_path / "published" / "1").is_dir()
        servers.rules.clear()
        publishing.publish(Tensors(WEIGHTS.items()), "2")
        assert servers.paths()[-2:] == ["/continue_generation"] * 2
    assert [path.name for path in (tmp_path / "published").iterdir()] == ["2"]


def test_engines_that_hold_different_weights_after_a_publication_are_named(model, tmp_path):
    servers = FakeServers()
    servers.checksum["127.0.0.1:2"] = "other"
    with (
        disk(model, servers, tmp_path / "published") as publishing,
        pytest.raises(EngineError, match=r"127.0.0.1:2: .* checksum other, but http://127.0.0.1:1 .* checksum same"),
    ):
        publishing.publish(Tensors(WEIGHTS.items()), "1")
    assert "/continue_generation" not in servers.paths()


def test_a_refused_begin_sends_nothing(model):
    servers = JoiningServers(refusing("/begin_weight_update", 2).rules)
    weights = Counted()
    with distributed(model, servers) as publishing, pytest.raises(EngineRefused, match="127.0.0.1:2.*not now"):
        publishing.publish(weights, "1")
    assert "/update_weights_from_distributed" not in servers.paths()
    assert servers.paths().count("/begin_weight_update") == 4, "once more, after closing what may have been left open"
    assert servers.paths().count("/end_weight_update") == 4 and weights.drained
    assert servers.paths().count("/continue_generation") == 2


@ONE_GROUP
def test_an_engine_that_refuses_to_join_is_named_at_once(model, one_group):
    began = time.monotonic()
    with (
        distributed(model, refusing("/init_weights_update_group", 1), 60, one_group) as publishing,
        pytest.raises(EngineRefused, match="127.0.0.1:1: /init_weights_update_group was refused"),
    ):
        publishing.publish(Tensors(WEIGHTS.items()), "1")
    assert time.monotonic() - began < 20


class Joining(JoiningServers):
    """Counts the engines that are in the middle of joining. The first one refuses when the second one has begun."""

    def __init__(self, refuses: bool) -> None:
        super().__init__()
        self.refuses, self.begun, self.waiting = refuses, threading.Event(), 0

    def _join(self, host, body):
        if self.refuses and host.endswith(":1"):
            assert self.begun.wait(10)
            raise httpx.ReadError("connection reset")
        self.waiting += 1
        self.begun.set()
        try:
            super()._join(host, body)
        finally:
            self.waiting -= 1


@ONE_GROUP
def test_an_engine_that_joins_does_not_wait_for_one_that_died(model, one_group):
    """Its scheduler would do nothing else until the group's timeout."""
    servers = Joining(refuses=True)
    with distributed(model, servers, 60, one_group) as publishing:
        with pytest.raises(EngineUnreachable, match="127.0.0.1:1: the connection was lost"):
            publishing.publish(Tensors(WEIGHTS.items()), "1")
        deadline = time.monotonic() + 5
        while servers.waiting:
            assert time.monotonic() < deadline, "the second engine still waits for the group"
            time.sleep(0.05)
        servers.refuses = False
        publishing.publish(Tensors(WEIGHTS.items()), "2")
    for host in ("127.0.0.1:1", "127.0.0.1:2"):
        torch.testing.assert_close(servers.held[host], WEIGHTS, rtol=0, atol=0)


@ONE_GROUP
def test_engines_that_say_they_joined_but_did_not(model, one_group):
    late = "engine http://127.0.0.1:1, http://127.0.0.1:2: the groups of rank 0 and 2 engine ranks was not complete"
    with (
        distributed(model, FakeServers(), 1, one_group) as publishing,
        pytest.raises(EngineTimeout, match=late),
    ):
        publishing.publish(Tensors(WEIGHTS.items()), "1")


@pytest.mark.parametrize("missing", [1, 2])
def test_the_one_of_two_engines_that_did_not_join_is_named(model, missing):
    class Half(JoiningServers):
        def _join(self, host, body):
            if not host.endswith(f":{missing}"):
                super()._join(host, body)

    with (
        distributed(model, Half(), timeout_s=1) as publishing,
        pytest.raises(EngineTimeout, match=f"engine http://127.0.0.1:{missing}: the groups"),
    ):
        publishing.publish(Tensors(WEIGHTS.items()), "1")


@pytest.mark.parametrize("method", ["disk", "distributed"])
def test_the_engine_that_does_not_answer_is_named(model, tmp_path, monkeypatch, method):
    """One before it has answered. Its requests end before its update is closed."""
    monkeypatch.setattr(session, "QUICK_S", 0.2)
    monkeypatch.setattr(distributed_module, "QUICK_S", 0.2)

    class Hangs(JoiningServers):
        open = 0

        async def _usual(self, host, path, body):
            if host.endswith(":2") and path in ("/update_weights_from_distributed", "/update_weights_from_disk"):
                self.open += 1
                try:
                    await asyncio.sleep(3600)
                finally:
                    self.open -= 1
            if path == "/end_weight_update":
                assert not self.open, "a request of the publication that failed is still open"
            return await super()._usual(host, path, body)

    servers = Hangs()
    # the request itself has a little more time, so that it is the publisher that gives up
    monkeypatch.setattr(base.Deadline, "left", lambda self, left=base.Deadline.left: left(self) + 0.5)
    made = disk(model, servers, tmp_path / "published", timeout_s=1) if method == "disk" else None
    with made or distributed(model, servers, timeout_s=1) as publishing:
        with pytest.raises(EngineTimeout, match=r"engine http://127.0.0.1:2: publishing weights 1 was not complete"):
            publishing.publish(Tensors(WEIGHTS.items()), "1")
        deadline = time.monotonic() + 2
        while servers.open:
            assert time.monotonic() < deadline, "a request of the publication that failed is still open"
            time.sleep(0.01)


@ONE_GROUP
def test_distributed_sends_buckets_to_all_engines_and_the_version_with_the_last(model, one_group):
    servers = JoiningServers()
    with distributed(model, servers, one_group=one_group) as publishing:
        publishing.limit = 40
        publishing.publish(Tensors(WEIGHTS.items()), "1")
        buffers = [slot.data_ptr() for slot in publishing._slots]
        publishing.publish(Tensors(WEIGHTS.items()), "2")
        assert len(buffers) == 2 and buffers == [slot.data_ptr() for slot in publishing._slots], "they are kept"
    for host in ("127.0.0.1:1", "127.0.0.1:2"):
        torch.testing.assert_close(servers.held[host], WEIGHTS, rtol=0, atol=0)
        updates = [b for h, p, b in servers.calls if (h, p) == (host, "/update_weights_from_distributed")]
        assert [u.get("weight_version") for u in updates] == ["incomplete-1", "1", "incomplete-2", "2"]
        assert [u["names"] for u in updates[:2]] == [["w0", "w1"], ["w2", "w3"]]
    joins = [body for _, path, body in servers.calls if path == "/init_weights_update_group"]
    places = [(j["rank_offset"], j["world_size"]) for j in joins]
    assert places == ([(1, 3), (2, 3)] if one_group else [(1, 2), (1, 2)])
    assert len({j["group_name"] for j in joins}) == (1 if one_group else 2)
    assert servers.paths().count("/destroy_weights_update_group") == 2 and not servers.groups


def test_an_update_that_a_killed_trainer_left_open_is_closed(model):
    """SGLang keeps one session, and refuses to begin another."""
    open_at = {"127.0.0.1:2"}

    def begin(host, body):
        if host in open_at:
            return httpx.Response(400, json={"success": False, "message": "a session is already open"})
        open_at.add(host)
        return {"success": True, "message": "Success"}

    def end(host, body):
        open_at.discard(host)
        return {"success": True, "message": "Success"}

    servers = JoiningServers({"/begin_weight_update": begin, "/end_weight_update": end})
    with distributed(model, servers) as publishing:
        publishing.publish(Tensors(WEIGHTS.items()), "1")
    assert not open_at and set(servers.held) == {"127.0.0.1:1", "127.0.0.1:2"}


@ONE_GROUP
def test_engines_with_several_ranks_get_ranks_of_their_own(model, one_group):
    servers = FakeServers({"/server_info": lambda host, body: {"tp_size": 4, "dp_size": 1}})
    with (
        distributed(model, servers, 0.5, one_group) as publishing,
        pytest.raises(EngineTimeout, match="8 engine ranks"),
    ):
        publishing.publish(Tensors(WEIGHTS.items()), "1")
    joins = [body for _, path, body in servers.calls if path == "/init_weights_update_group"]
    assert [(j["rank_offset"], j["world_size"]) for j in joins] == ([(1, 9), (5, 9)] if one_group else [(1, 5)] * 2)


@ONE_GROUP
def test_an_engine_that_takes_no_part_does_not_hang_the_broadcast(model, one_group):
    servers = JoiningServers(deaf=2)
    began = time.monotonic()
    with distributed(model, servers, 60, one_group) as publishing:
        with pytest.raises(EngineRefused, match="127.0.0.1:2: /update_weights_from_distributed .*no such group"):
            publishing.publish(Tensors(WEIGHTS.items()), "1")
        assert servers.paths().count("/end_weight_update") == 2, "of the publication that failed"
        assert "/continue_generation" not in servers.paths(), "they may hold a mixture, and stay paused"
        assert not servers.groups, "no engine stays in a group that is not used again"
    assert time.monotonic() - began < 20


def test_engines_pause_beside_the_first_round_and_go_on_when_it_cannot_be_prepared(model, monkeypatch):
    """The pause takes longer than the preparation that fails: it must not come to an engine that was let go."""
    done = {"success": True, "message": "Success"}
    servers = JoiningServers({"/begin_weight_update": lambda host, body: done})
    servers.delay_s = 0.5
    prepared: list[int] = []

    def fails(this, tensors, version, deadline):
        end = time.monotonic() + 5
        while servers.paths().count("/begin_weight_update") < 2 and time.monotonic() < end:
            time.sleep(0.01)
        prepared.append(servers.paths().count("/begin_weight_update"))
        raise ValueError("the copy failed")

    with distributed(model, servers) as publishing:
        monkeypatch.setattr(publishing, "prepare", fails)
        weights = Counted()
        began = time.monotonic()
        with pytest.raises(ValueError, match="the copy failed"):
            publishing.publish(weights, "1")
        assert prepared == [2] and weights.drained
        assert time.monotonic() - began >= 0.5, "the engines' answers were waited for"
        of_pauses = [path for path in servers.paths() if "group" not in path]
        assert of_pauses == [
            path
            for path in ("/pause_generation", "/begin_weight_update", "/end_weight_update", "/continue_generation")
            for _ in ENGINES
        ]
        monkeypatch.undo()
        publishing.publish(Tensors(WEIGHTS.items()), "2")
    assert servers.held["127.0.0.1:1"].keys() == WEIGHTS.keys()


@ONE_GROUP
def test_a_failure_in_a_later_round_ends_the_publication_and_the_next_one_is_whole(model, one_group):
    """A broadcast that was refused may hang and read its buffer, which the next publication must not write into."""
    servers = JoiningServers(deaf=2, name="w1")
    weights = Counted()
    with distributed(model, servers, 60, one_group) as publishing:
        publishing.limit = 20
        with pytest.raises(EngineRefused, match="127.0.0.1:2: .*no such group") as raised:
            publishing.publish(weights, "1")
        assert "mixture of weights" in str(raised.value.__notes__) and weights.drained
        asked = [
            (body["names"], body.get("weight_version"))
            for host, path, body in servers.calls
            if path == "/update_weights_from_distributed" and host == "127.0.0.1:2"
        ]
        assert asked == [(["w0"], "incomplete-1"), (["w1"], None)], "nothing after the refusal"
        assert "/continue_generation" not in servers.paths() and publishing._slots == []
        servers.deaf = None
        servers.held.clear()
        publishing.publish(Tensors(WEIGHTS.items()), "2")
    for host in ("127.0.0.1:1", "127.0.0.1:2"):
        torch.testing.assert_close(servers.held[host], WEIGHTS, rtol=0, atol=0)
    assert servers.paths().count("/init_weights_update_group") == 4, "other groups"
    assert servers.paths().count("/continue_generation") == 2


class Slow(JoiningServers):
    """The second engine answers for the first round only when the first engine was asked for the second round."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead = threading.Event()

    def _receive(self, host, body):
        if body["names"] == ["w1"] and host.endswith(":1"):
            self.ahead.set()
        done = super()._receive(host, body)
        if body["names"] == ["w0"] and host.endswith(":2"):
            assert self.ahead.wait(20), "the first engine was not asked for w1 before the second had loaded w0"
        return done


def test_an_engine_goes_on_while_another_loads_and_each_takes_the_rounds_in_order(model):
    servers = Slow()
    with distributed(model, servers, timeout_s=60) as publishing:
        publishing.limit = 20
        publishing.publish(Tensors(WEIGHTS.items()), "1")
    for address in ("127.0.0.1:1", "127.0.0.1:2"):
        asked = [
            (body["names"], body.get("weight_version"))
            for host, path, body in servers.calls
            if path == "/update_weights_from_distributed" and host == address
        ]
        assert asked == [(["w0"], "incomplete-1"), (["w1"], None), (["w2"], None), (["w3"], "1")]
        torch.testing.assert_close(servers.held[address], WEIGHTS, rtol=0, atol=0)


def test_a_reported_version_that_is_not_the_published_one(model, tmp_path):
    answer = {"model_path": "/m", "weight_version": "elsewhere"}
    servers = FakeServers({"/model_info": lambda host, body: answer})
    with (
        disk(model, servers, tmp_path / "published") as publishing,
        pytest.raises(EngineError, match="weights '1' were published, but it reports weights 'elsewhere'"),
    ):
        publishing.publish(Tensors(WEIGHTS.items()), "1")


def test_the_group_listens_on_its_address_alone():
    before = listening()
    group = UpdateGroup("alone", "gloo", "127.0.0.1", 2, timeout_s=30)
    joined = threading.Thread(target=group.connect)
    joined.start()
    store: Any = dist.TCPStore("127.0.0.1", group.port)
    for prefix in ("alone", "alone/", "cpu/"):
        store = dist.PrefixStore(prefix, store)
    other = dist.ProcessGroupGloo(store, 1, 2, timedelta(seconds=30))
    joined.join(30)
    assert not joined.is_alive()
    opened = listening() - before
    assert ("127.0.0.1", group.port) in opened and {address for address, _ in opened} == {"127.0.0.1"}
    group.close()
    del other


def listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections("inet")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}


def test_the_pool_stays_open_for_the_others(model, tmp_path):
    with EnginePool(ENGINES, timeout_s=5, transport=FakeServers()) as pool:
        for made in (
            DiskPublisher(context(pool, model, tmp_path)),
            DistributedPublisher(context(pool, model, tmp_path), backend="gloo"),
        ):
            made.close()
            made.close()
        assert [info.weight_version for info in pool.on_all(lambda client: client.model_info())] == ["default"] * 2


def configured(model: Path, **weight_sync: Any) -> Config:
    return make_config(model={"path": model}, run={"folder": model}, weight_sync=weight_sync)


def test_settings_reach_the_publisher(model, tmp_path):
    with EnginePool(ENGINES, timeout_s=5, transport=FakeServers()) as pool:
        made: Any = make_publisher(configured(model), pool, 0, 1)
        assert type(made) is DistributedPublisher and made.limit == 256 * 2**20
        made = make_publisher(configured(model, bucket_mib=3), pool, 0, 1)
        assert made.limit == 3 * 2**20
        made = make_publisher(
            configured(model, method={"use": "distributed", "options": {"bucket_mib": 5}}), pool, 1, 2
        )
        assert made.limit == 5 * 2**20 and made.context.rank == 1
        made = make_publisher(configured(model, method="disk", bucket_mib=3), pool, 0, 1)  # of the other method
        assert made.folder == model / "published"
        made = make_publisher(configured(model, method="disk", folder=tmp_path / "own"), pool, 0, 1)
        assert made.folder == tmp_path / "own"
        bad = configured(model, method={"use": "disk", "options": {"shard_bytes": 0}})
        with pytest.raises(PluginError, match=r"weight_sync.method: .*DiskPublisher does not accept.*shard_bytes = 0"):
            make_publisher(bad, pool, 0, 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "dsik"}, r'weight_sync.method = "dsik" is neither .* did you mean \'disk\'\?'),
        ({"method": {"use": "disk", "options": {"context": 1}}}, "does not take the option 'context'"),
        ({"method": {"use": "disk", "options": {"shards": 1}}}, "does not take the option 'shards'"),
        ({"method": "tests.weight_sync.sources:Tensors"}, r"Tensors lacks the method publish\(\)"),
    ],
)
def test_what_is_wrong_is_said_before_a_run_starts(model, settings, said):
    with pytest.raises(PluginError, match=said):
        check_publisher(configured(model, **settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"folder": "a", "method": {"use": "disk", "options": {"folder": "b"}}},
            "weight_sync.folder = a and weight_sync.method.options.folder = b set the same",
        ),
        (
            {"bucket_mib": 4, "method": "my.module:Carrier"},
            'weight_sync.bucket_mib = 4, but weight_sync.method = "my.module:Carrier" does not read it',
        ),
    ],
)
def test_settings_without_a_reader_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        WeightSyncConfig(**settings)
