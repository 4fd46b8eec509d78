"""Engines that die, hang, start again, join and leave: against fake servers, and with real ones that are killed."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fiberpo_megatron.engines import client as client_module
from fiberpo_megatron.engines.client import EngineAddress, Sampling
from fiberpo_megatron.engines.connection import CONTROL_TIMEOUT_S
from fiberpo_megatron.engines.errors import EngineTimeout, EngineUnreachable
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.servers import Offer, StartedServers, make_servers
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.rollout import fleet as fleet_module
from fiberpo_megatron.rollout.fleet import Fleet, Member, TooFewEngines
from fiberpo_megatron.rollout.sampler import EngineSampler
from fiberpo_megatron.sources.handover import CUT_S
from fiberpo_megatron.weight_sync.distributed import DistributedPublisher
from fiberpo_megatron.weight_sync.ipc import IpcPublisher
from tests.engines.fake_server import FakeServers, response
from tests.trainer.toy import SingleLayout
from tests.weight_sync.joining import JoiningServers
from tests.weight_sync.sources import Tensors, context

PROMPT = [1, 2, 3]


@dataclass
class Fakes(FakeServers):
    """Servers that answer with the weights that were published to them. `dead` ones refuse connections, `hanging` ones
    say nothing."""

    dead: set[str] = field(default_factory=set)
    hanging: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__({"/generate": self.generate})

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = f"{request.url.host}:{request.url.port}"
        if host in self.hanging:
            self.calls.append((host, request.url.path, None))
            await asyncio.sleep(3600)
        if host in self.dead:
            raise httpx.ConnectError("connection refused")
        return await super().handle_async_request(request)

    def generate(self, host: str, body: Any) -> Any:
        version = self.version.get(host, "default")
        spans = [{"version": version, "start": 0, "end": 2}]
        return [response([5, 6], prompt, weight_versions=spans) for prompt in body["input_ids"]]

    def start_again(self, host: str) -> None:
        """A new process at the same address has the model's own weights."""
        self.version.pop(host, None)
        self.dead.discard(host)
        self.hanging.discard(host)

    def publish(self, pool: EnginePool, version: str) -> None:
        for address in pool.addresses:
            host = address.url.removeprefix("http://")
            if host in self.dead:
                raise EngineUnreachable(address.url, "no connection", "Start it")
            self.version[host] = version


class Places:
    """Where a test says that engines are."""

    def __init__(self, *hosts: str) -> None:
        self.found = {str(n): Offer(str(n), EngineAddress(f"http://{host}")) for n, host in enumerate(hosts)}
        self.replaced: list[tuple[str, int, str]] = []

    def offers(self) -> list[Offer]:
        return list(self.found.values())

    def replace(self, place: str, generation: int, why: str) -> None:
        self.replaced.append((place, generation, why))


@dataclass
class Run:
    """A run that publishes to a fleet and samples from it."""

    servers: Fakes
    places: Places
    pool: EnginePool
    fleet: Fleet
    sampler: EngineSampler
    noted: list[list[tuple[int, str]]]

    def publish(self, version: str, failed: Mapping[int, str] | None = None, before: Callable[[], None] = int) -> None:
        """What `EngineSource.publish` does."""
        with self.fleet.publication():
            before()
            while True:
                try:
                    self.servers.publish(self.pool, version)
                    break
                except EngineUnreachable as error:
                    if not self.fleet.goes_on_without(error):
                        raise
            self.fleet.published(version)
        self.fleet.verified(failed)

    def asked(self, groups: int = 6) -> set[str]:
        """The engines that answer requests now."""
        begin = len(self.servers.calls)

        async def ask() -> None:
            await asyncio.gather(*(self.sampler.sample(PROMPT, [g], priority=g) for g in range(1, groups + 1)))

        self.pool.run(ask())
        return {host for host, path, _ in self.servers.calls[begin:] if path == "/generate"}

    def states(self) -> dict[int, str]:
        return {member.number: member.state for member in self.fleet.members.values()}


@contextmanager
def a_run(*hosts: str, min_healthy: int = 1, silence_s: float = 0.0) -> Iterator[Run]:
    servers, places, noted = Fakes(), Places(*hosts), list[list[tuple[int, str]]]()

    def changed(members: Collection[Member]) -> None:
        noted.append([(member.number, member.state) for member in members])

    addresses = [EngineAddress(f"http://{host}") for host in hosts]
    with EnginePool(addresses, timeout_s=60, transport=servers) as pool:
        sampler = EngineSampler(pool, Sampling(2), max_concurrent=64, vocabulary=32, silence_s=silence_s)
        fleet = Fleet(
            SingleLayout(), pool, places, sampler, min_healthy=min_healthy, changed=changed  # type: ignore[arg-type]
        )  # fmt: skip
        yield Run(servers, places, pool, fleet, sampler, noted)


def test_engines_serve_after_the_first_publication_and_not_before():
    with a_run("a:1", "b:1") as run:
        with run.fleet.publication():
            waiting = run.pool.submit(run.sampler.sample(PROMPT, [0], priority=9))
            time.sleep(0.2)
            assert not waiting.done() and not [path for _, path, _ in run.servers.calls if path == "/generate"]
            waiting.cancel()
            run.servers.publish(run.pool, "0")
            run.fleet.published("0")
        waiting = run.pool.submit(run.sampler.sample(PROMPT, [0], priority=9))
        time.sleep(0.2)
        assert not waiting.done(), "they have weights, but no rank has compared them with the trainer's"
        run.fleet.verified()
        assert len(waiting.result(10)) == 1
        assert run.asked() == {"a:1", "b:1"} and run.states() == {0: "serving", 1: "serving"}
        assert run.noted[-1] == [(0, "serving"), (1, "serving")]


def test_a_dead_engine_is_left_out_and_joins_again_with_the_weights():
    with a_run("a:1", "b:1") as run:
        run.publish("0")
        run.servers.dead.add("b:1")
        assert run.asked() == {"a:1"}, "its requests are asked elsewhere"
        run.publish("1")
        assert run.states() == {0: "serving", 1: "not answering"} and run.pool.numbers == [0]
        assert [place for place, _, _ in run.places.replaced] == ["1"]
        run.servers.start_again("b:1")
        assert run.asked() == {"a:1"}, "it answers, but nobody knows what with"
        seen: list[Any] = []

        def before() -> None:
            seen.append((run.states(), run.asked()))

        run.publish("2", before=before)
        assert seen == [({0: "serving", 1: "joining"}, {"a:1"})], "not before it has the weights"
        assert run.servers.version == {"a:1": "2", "b:1": "2"}
        assert run.asked() == {"a:1", "b:1"} and run.fleet.members[1].generation == 1


def test_an_engine_that_dies_during_a_publication_does_not_end_it():
    with a_run("a:1", "b:1", "c:1") as run:
        run.publish("0")
        run.publish("1", before=lambda: run.servers.dead.add("b:1"))
        assert run.servers.version["a:1"] == run.servers.version["c:1"] == "1"
        assert run.states() == {0: "serving", 1: "not answering", 2: "serving"}
        assert run.asked() == {"a:1", "c:1"}


def test_an_error_of_a_publication_that_no_engine_explains_is_raised():
    with a_run("a:1", "b:1") as run:
        run.publish("0")
        assert not run.fleet.goes_on_without(EngineTimeout("http://a:1", "was not complete in time", "Look"))
        assert not run.fleet.goes_on_without(ValueError("no weights"))
        assert run.states() == {0: "serving", 1: "serving"}


def test_an_engine_whose_connection_is_lost_in_a_publication_joins_at_the_next_one():
    """It answers again, but what it holds is not known: another process may be at its address."""
    with a_run("a:1", "b:1") as run:
        run.publish("0")
        lost = [EngineUnreachable("http://b:1", "the connection was lost", "See its log")]
        publish = run.servers.publish

        def fails_once(pool: EnginePool, version: str) -> None:
            if lost:
                raise lost.pop()
            publish(pool, version)

        run.servers.publish = fails_once  # type: ignore[method-assign]
        run.publish("1")
        assert run.states() == {0: "serving", 1: "not answering"} and run.asked() == {"a:1"}
        run.publish("2")
        assert run.states() == {0: "serving", 1: "serving"} and run.fleet.members[1].generation == 1
    with a_run("a:1") as run:
        run.publish("0")
        assert not run.fleet.goes_on_without(EngineUnreachable("http://a:1", "the connection was lost", "See its log"))


def test_after_a_publication_that_failed_every_engine_is_verified(monkeypatch: pytest.MonkeyPatch):
    """While rank 0 waits for the one that hangs, another process may come to the address of any other."""
    monkeypatch.setattr(fleet_module, "PROBE_S", 0.3)
    with a_run("a:1", "b:1", "c:1") as run:
        run.publish("0")
        with run.fleet.publication():
            run.servers.hanging.add("c:1")
            assert run.fleet.goes_on_without(EngineUnreachable("http://b:1", "the connection was lost", "See its log"))
            assert run.fleet.joining == {0, 1} and list(run.pool.numbers) == [0, 1]
            run.servers.publish(run.pool, "1")
            run.fleet.published("1")
        run.fleet.verified({1: "it computes something else"})
        assert run.states() == {0: "serving", 1: "quarantined", 2: "not answering"} and run.asked() == {"a:1"}


def test_a_server_that_was_started_again_unseen_is_verified_like_one_that_joins():
    """It gets the weights with the publication, and requests once it has been compared with the trainer."""
    with a_run("a:1", "b:1") as run:
        run.publish("0")
        run.servers.start_again("b:1")
        with run.fleet.publication():
            assert run.states() == {0: "serving", 1: "joining"}
            run.servers.publish(run.pool, "1")
            run.fleet.published("1")
        assert run.asked() == {"a:1"}
        run.fleet.verified({1: "it computes something else"})
        assert run.states() == {0: "serving", 1: "quarantined"} and run.asked() == {"a:1"}


@pytest.mark.parametrize("method", ["distributed", "ipc"])
def test_a_server_that_was_started_again_at_its_address_gets_the_weights_of_the_next_publication(
    method: str, tmp_path: Path
):
    """It is in none of the process groups, and has opened no memory: what was agreed with its forerunner is void."""
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    weights = {f"w{i}": torch.full((5,), float(i)) for i in range(4)}
    save_file(weights, tmp_path / "model.safetensors")
    servers, hosts = JoiningServers(), ("127.0.0.1:1", "127.0.0.1:2")
    with EnginePool([EngineAddress(f"http://{host}") for host in hosts], timeout_s=5, transport=servers) as pool:
        fleet = Fleet(SingleLayout(), pool, Places(*hosts), None)  # type: ignore[arg-type]
        kind = DistributedPublisher if method == "distributed" else IpcPublisher
        with closing(kind(context(pool, tmp_path, tmp_path, timeout_s=20))) as publisher:
            for version, ended in (("1", False), ("2", True), ("3", False)):
                if ended:
                    servers.end("127.0.0.1:2")
                asked = len(servers.calls)
                with fleet.publication():
                    assert fleet.joining == ({0, 1} if version == "1" else {1} if ended else set())
                    publisher.publish(Tensors(weights.items()), version)
                    fleet.published(version)
                fleet.verified()
                agreed = ("/init_weights_update_group", "/end_weight_update")  # ipc asks whether memory can be opened
                again = [path for _, path, _ in servers.calls[asked:] if path == agreed[method == "ipc"]]
                assert len(again) == (2 if version != "3" else 0) + (2 if method == "ipc" else 0), again
                assert servers.version == dict.fromkeys(hosts, version)
                if method == "distributed":
                    for host in hosts:
                        torch.testing.assert_close(servers.held[host], weights, rtol=0, atol=0)


def test_a_server_that_does_not_say_what_it_holds_is_verified_like_one_that_joins():
    """Its process may have ended while it was asked, and another one have taken its place."""
    with a_run("a:1", "b:1") as run:
        run.publish("0")

        def late(host: str, body: Any) -> Any:
            if host == "b:1":
                raise httpx.ReadTimeout("it takes too long")
            return {"model_path": "/m", "weight_version": "0"}

        run.servers.rules["/model_info"] = late
        with run.fleet.publication():
            assert run.states() == {0: "serving", 1: "joining"}
            run.servers.publish(run.pool, "1")
            run.fleet.published("1")
        assert run.asked() == {"a:1"}
        run.fleet.verified()
        assert run.states() == {0: "serving", 1: "serving"}


def test_a_server_that_dies_while_it_is_asked_about_itself_does_not_end_the_run():
    with a_run("a:1", "b:1") as run:
        run.publish("0")
        run.places.found["2"] = Offer("2", EngineAddress("http://c:1"))

        def dies(host: str, body: Any) -> Any:
            raise httpx.ReadError("connection reset")

        run.servers.rules["/server_info"] = dies
        run.publish("1")
        assert run.states() == {0: "serving", 1: "serving", 2: "not answering"}


def test_an_engine_that_hangs_is_given_up_before_the_deadline_of_a_cut(monkeypatch: pytest.MonkeyPatch):
    """It answers no abort either. Its requests are asked elsewhere once they are sent again."""
    monkeypatch.setattr(client_module, "CONTROL_TIMEOUT_S", 0.3)
    with a_run("a:1", "b:1") as run:
        run.publish("0")
        run.servers.hanging.add("b:1")

        async def ask() -> list[Any]:
            return await asyncio.gather(*(run.sampler.sample(PROMPT, [g], priority=g) for g in range(1, 7)))

        asked = run.pool.submit(ask())
        while ("b:1", "/generate", None) not in run.servers.calls:
            time.sleep(0.01)
        run.sampler.hold()
        run.sampler.cut_short(0.3 * CUT_S / CONTROL_TIMEOUT_S)
        run.sampler.release()
        assert len(asked.result(10)) == 6


def test_a_request_in_flight_to_an_engine_that_leaves_is_asked_at_the_only_one_that_stays():
    with a_run("a:1", "b:1") as run:
        run.publish("0")
        run.servers.hanging.add("b:1")

        async def ask() -> list[Any]:
            return await asyncio.gather(*(run.sampler.sample(PROMPT, [g], priority=g) for g in range(1, 7)))

        asked = run.pool.submit(ask())
        while ("b:1", "/generate", None) not in run.servers.calls:
            time.sleep(0.01)
        run.places.found["1"] = Offer("1", None, 1, "its process ended", starting=True)
        run.publish("1")
        assert run.pool.numbers == [0] and len(asked.result(10)) == 6


def test_below_min_healthy_the_run_stops_and_says_who_is_missing():
    with a_run("a:1", "b:1", min_healthy=2) as run:
        run.publish("0")
        run.servers.dead.add("b:1")
        with pytest.raises(TooFewEngines, match=r"min_healthy = 2: engine 1 is not answering \(.*connection refused"):
            run.publish("1")
    with a_run("a:1", "b:1", min_healthy=2) as run:
        run.publish("0")
        with pytest.raises(TooFewEngines, match="1 hold the run's weights, but rollout.engine.min_healthy = 2"):
            run.publish("1", before=lambda: run.servers.dead.add("a:1"))


def test_a_server_that_was_started_again_unseen_samples_nothing():
    """It has the model's own weights, and its address is that of an engine that serves."""
    with a_run("a:1", "b:1") as run:
        run.publish("3")
        run.servers.start_again("b:1")

        async def ask() -> list[Any]:
            return await asyncio.gather(*(run.sampler.sample(PROMPT, [g], priority=g) for g in range(1, 7)))

        versions = {span.version for (completion,) in run.pool.run(ask()) for span in completion.weight_spans}
        assert versions == {"3"} and run.sampler.take_counts()["retried"] >= 1
        assert run.asked() == {"a:1"}
        run.publish("4")
        assert run.asked() == {"a:1", "b:1"}


def test_an_engine_joins_that_was_not_there_and_another_leaves():
    with a_run("a:1", "b:1") as run:
        run.publish("0")
        run.places.found["2"] = Offer("2", EngineAddress("http://c:1"))
        del run.places.found["0"]
        run.publish("1")
        assert run.states() == {0: "left", 1: "serving", 2: "serving"} and run.pool.numbers == [1, 2]
        assert run.asked() == {"b:1", "c:1"}
        run.places.found["0"] = Offer("0", EngineAddress("http://a:1"))
        run.publish("2")
        assert run.asked() == {"a:1", "b:1", "c:1"} and run.fleet.members[0].generation == 1


def test_a_successor_at_another_address_takes_the_number_over():
    with a_run("a:1", "b:1") as run:
        run.publish("0")
        run.places.found["1"] = Offer("1", None, 1, "its process ended with signal SIGKILL", starting=True)
        run.publish("1")
        assert run.states() == {0: "serving", 1: "starting"} and run.asked() == {"a:1"}
        run.places.found["1"] = Offer("1", EngineAddress("http://b:9"), 1)
        run.publish("2")
        assert run.states() == {0: "serving", 1: "serving"} and run.asked() == {"a:1", "b:9"}
        assert run.fleet.members[1].generation == 1 and run.places.replaced == []


def test_an_engine_that_fails_its_verification_never_serves():
    with a_run("a:1", "b:1") as run:
        run.publish("0")
        run.places.found["2"] = Offer("2", EngineAddress("http://c:1"))
        run.publish("1", failed={2: "it computes something else"})
        assert run.states()[2] == "quarantined" and run.asked() == {"a:1", "b:1"}
        run.publish("2")
        assert run.states()[2] == "quarantined" and run.servers.version["c:1"] == "1", "nor is it published to"
        run.places.found["2"] = Offer("2", EngineAddress("http://c:9"), 1)
        run.publish("3")
        assert run.states()[2] == "serving" and run.asked() == {"a:1", "b:1", "c:9"}


def test_a_quarantined_engine_gets_nothing_more_from_then_on():
    with a_run("a:1", "b:1") as run:
        run.publish("0")
        run.fleet.quarantine({1: "its log-probs are not the trainer's"})
        assert run.asked() == {"a:1"} and run.places.replaced == [("1", 0, "its log-probs are not the trainer's")]
        with pytest.raises(TooFewEngines, match=r"engine 1 is quarantined \(its log-probs"):
            run.fleet.quarantine({0: "nor are these"})


def test_requests_of_an_engine_that_hangs_are_asked_elsewhere():
    with a_run("a:1", "b:1", silence_s=0.5) as run:
        run.publish("0")
        run.servers.hanging.add("b:1")
        began = time.monotonic()
        assert run.asked() == {"a:1", "b:1"}
        assert 0.4 < time.monotonic() - began < 10 and run.sampler.take_counts()["retried"] >= 1


def test_one_that_is_slow_but_says_so_is_waited_for():
    with a_run("a:1", silence_s=0.3) as run:
        run.publish("0")
        run.servers.delay_s = 1.0  # three times as long as an engine may be silent; its load is answered meanwhile
        assert run.asked() == {"a:1"} and not run.sampler.take_counts()


def test_a_publication_is_no_silence():
    with a_run("a:1", silence_s=0.2) as run:
        run.publish("0")
        run.servers.delay_s = 0.8
        work = run.pool.submit(run.sampler.sample(PROMPT, [0], priority=1))
        time.sleep(0.05)
        run.sampler.serve([0], watched=False)
        run.servers.hanging.add("a:1")  # it loads weights
        time.sleep(0.6)
        run.servers.hanging.clear()
        run.sampler.serve([0], watched=True)
        assert len(work.result(10)) == 1


def test_before_a_publication_a_hanging_engine_is_taken_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fleet_module, "PROBE_S", 0.3)
    with a_run("a:1", "b:1") as run:
        run.publish("0")
        run.servers.hanging.add("b:1")
        run.publish("1")
        assert run.states() == {0: "serving", 1: "not answering"}
        assert "no answer" in run.fleet.members[1].detail


@pytest.mark.sglang
@pytest.mark.parametrize("method", ["distributed", pytest.param("disk", marks=pytest.mark.exhaustive)])
def test_one_of_two_engines_is_killed_and_its_successor_answers_nothing_before_its_weights(
    method: str, checkpoint: Path, tmp_path: Path
):
    """The requests of the killed one are asked elsewhere, and its successor joins with a later publication. With
    "distributed" the weights travel in process groups of which one member has died."""
    from tests.tiny_model import hugging_face_weights, log_probs, moved
    from tests.weight_sync.sources import Tensors, context
    from tests.weight_sync.trainer_rank import made_publisher

    config = EngineConfig(count=2, restarts=1, start_timeout_s=180)
    with (
        make_servers(config, checkpoint, tmp_path / "engines", dtype="float32", gpu=False, api_key="key") as servers,
        EnginePool(servers.addresses, timeout_s=120) as pool,
    ):
        assert isinstance(servers, StartedServers)
        sampler = EngineSampler(pool, Sampling(60), max_concurrent=64, vocabulary=64, silence_s=60)
        fleet = Fleet(SingleLayout(), pool, servers, sampler)  # type: ignore[arg-type]
        version = 0

        def publish(publisher: Any) -> None:
            """Publish other weights each time, as a training run does."""
            nonlocal version
            version += 1
            weights = Tensors(hugging_face_weights(moved(checkpoint, version)))
            with fleet.publication():
                while True:
                    try:
                        publisher.publish(weights, str(version))
                        break
                    except Exception as error:
                        if not fleet.goes_on_without(error):
                            raise
                fleet.published(str(version))
            fleet.verified()

        def sample() -> list[Any]:
            async def ask() -> list[Any]:
                groups = range(1, 9)
                return await asyncio.gather(*(sampler.sample([3, 4, 5], [g, g + 50], priority=g) for g in groups))

            return [completion for group in pool.run(ask()) for completion in group]

        def seen(completions: list[Any]) -> tuple[set[int], set[str]]:
            engines = {int(engine) for c in completions for engine in c.engines}
            return engines, {span.version for c in completions for span in c.weight_spans}

        with closing(made_publisher(method, context(pool, checkpoint, tmp_path))) as publisher:
            publish(publisher)
            whole = sample()
            assert seen(whole) == ({0, 1}, {"1"})
            process = servers._processes[1]
            assert process is not None
            work = pool.submit(_soon(sampler))
            os.kill(process.process.pid, signal.SIGKILL)
            assert len(work.result(120)) == 8, "all of the killed engine's requests were answered elsewhere"
            again = sample()
            assert [c.token_ids for c in again] == [c.token_ids for c in whole], "whoever samples it"
            assert seen(again) == ({0}, {"1"})
            publish(publisher)  # the dead one is found out here, and started again
            deadline = time.monotonic() + 180
            while fleet.members[1].state != "serving":
                assert time.monotonic() < deadline and fleet.members[1].state == "starting"
                assert seen(sample()) == ({0}, {str(version)})
                time.sleep(2)
                publish(publisher)
            assert seen(sample()) == ({0, 1}, {str(version)})
            expected = log_probs(moved(checkpoint, version), [3, 4, 5, 6])
            for log_prob in sampler.score([3, 4, 5, 6]).values():
                np.testing.assert_allclose(log_prob, expected, atol=1e-4)
        assert fleet.members[1].generation == 1
        assert {path.name for path in (tmp_path / "engines").glob("engine_1*")} == {
            "engine_1.log", "engine_1_restart_1.log"
        }  # fmt: skip


async def _soon(sampler: EngineSampler) -> list[Any]:
    """Long requests that are in flight when an engine is killed."""
    return await asyncio.gather(*(sampler.sample([g, 4, 5], [g], priority=100 + g) for g in range(1, 9)))
