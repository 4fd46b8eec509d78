"""This module knows which engines belong to a run, and lets them come and go between two versions of the weights.

Rank 0 decides: it asks where engines come from (servers that it has started, addresses of the config, the job's
registry), and each engine whether it answers; the other ranks take its list over. That happens at publications alone.
An engine that dies in between loses its requests to the others. One that joins, or that was started again, gets the
weights with the publication, and requests only after it has been found to compute what the trainer computes.
"""

import asyncio
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fiberpo_megatron.engines.client import EngineAddress, EngineClient
from fiberpo_megatron.engines.errors import EngineError, EngineTimeout, EngineUnreachable
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.router import RouterClient
from fiberpo_megatron.engines.servers import Offer
from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.printable import printable
from fiberpo_megatron.telemetry.engine_states import State
from fiberpo_megatron.together import together

PROBE_S = 20.0
"""Seconds within which an engine answers before a publication, or is taken for lost."""


class Places(Protocol):
    """It says where engines are; `engines.servers` and `engines.registry` implement it."""

    def offers(self) -> list[Offer]:
        """Return every place for an engine, whether there is one now or not. It must not wait for one."""
        ...

    def replace(self, place: str, generation: int, why: str) -> None:
        """Have the engine in a place started again, where somebody can, if it is still that of `generation`."""
        ...


class Requests(Protocol):
    """These are a leader's requests; `rollout.sampler.EngineSampler` implements it."""

    def serve(self, engines: Collection[int], version: str | None = None, watched: bool = True) -> None:
        """Send requests to these engines alone. `version`: weights that they have from now on. `watched`: whether an
        engine that says nothing is given up."""
        ...


class TooFewEngines(EngineError):
    """This is raised when fewer engines than `rollout.engine.min_healthy` hold the current weights."""


@dataclass
class Member:
    """It is what is known of an engine, on rank 0."""

    number: int
    """The engine's number, which stays with its place."""
    place: str
    state: State = "starting"
    address: EngineAddress | None = None
    generation: int = -1
    """How often it has joined again; -1 until it first does."""
    offered: int = 0
    """The generation of the server that is in its place (`Offer.generation`)."""
    since: float = field(default_factory=time.time)
    """When it came into its state (s since 1970)."""
    detail: str = ""
    """Why it serves nothing, in one sentence."""
    version: str | None = None
    """Version of the weights that it got last."""

    def now(self, state: State, detail: str = "") -> None:
        """Bring it into a state."""
        if state != self.state:
            self.state, self.since = state, time.time()
        self.detail = detail


class Fleet:
    """These are the engines of a run. Every rank makes one and calls its methods alike.

    `places`: where engines come from, on rank 0; None elsewhere. `requests`: this leader's requests; None on ranks that
    have none. `min_healthy`: engines that must hold the weights after a publication. `router`: one before the engines,
    whose list of workers is kept. `changed` is called on rank 0 with all members when their states may have changed.
    """

    def __init__(
        self,
        layout: Layout,
        pool: EnginePool,
        places: Places | None,
        requests: Requests | None,
        *,
        min_healthy: int = 1,
        router: RouterClient | None = None,
        changed: Callable[[Sequence[Member]], None] = lambda members: None,
    ) -> None:
        self._layout, self._pool, self._places, self._requests = layout, pool, places, requests
        self._min_healthy, self._router, self._changed = min_healthy, router, changed
        self.members: dict[int, Member] = {}
        """All engines that the run has had, by number (rank 0)."""
        self._serving: set[int] = set()
        """Engines that hold the current weights and have been verified; equal on every rank."""
        self.joining: set[int] = set()
        """Members of the pool that have not been verified since they joined; equal on every rank."""
        self._version: str | None = None
        self._first: str | None = None
        """The version that was published first, after which every engine serves without being mentioned."""

    @contextmanager
    def publication(self) -> Iterator[None]:
        """Let engines come and go, and publish inside; requests still go to those that serve already."""
        self._gather()
        self._serve(watched=False)
        try:
            yield
        finally:
            self._serve(watched=bool(self._serving))  # where none serves yet, requests wait for those that join

    def published(self, version: str) -> None:
        """Note that all engines of the pool have weights `version`. Those that join do not serve yet."""
        self._version = version
        self._first = self._first or version
        for number in self._pool.numbers:
            if (member := self.members.get(number)) is not None:
                member.version = version

    def verified(self, failed: Mapping[int, str] | None = None) -> None:
        """Let the engines that join serve, except those in `failed`, by number with the reason, which is the same on
        every rank."""
        failed = failed or {}
        for number, why in failed.items():
            self._lose(number, "quarantined", why)
        self._serving.update(self.joining.difference(failed))
        self.joining.clear()
        for member in [self.members[number] for number in self._serving] if self._layout.rank == 0 else ():
            if member.state != "serving" and (member.generation or self._version != self._first):
                where = "" if member.address is None else f" ({member.address.url})"
                _say(f"Engine {member.number}{where} holds weights {self._version}, was verified, and serves")
            member.now("serving")
        self._require()
        self._serve()
        self._note()

    def goes_on_without(self, error: BaseException) -> bool:
        """Return whether a publication that has failed with `error` on this rank may be repeated, because rank 0 lost
        an engine that it published to. That engine is no member any more, and joins at the next publication if it
        answers by then: what it holds is not known. The others serve once they are verified. Every rank calls it."""
        silent: dict[int, str] = {}
        with together(self._layout, "looking for engines that do not answer"):
            if self._layout.rank == 0 and isinstance(error, EngineUnreachable | EngineTimeout):
                answers = self._probe({n: client.address for n, client in self._pool.members.items()})
                silent = {number: found[1] for number, found in answers.items() if found is not None}
                if not silent and isinstance(error, EngineUnreachable) and len(answers) > self._min_healthy:
                    silent = {n: error.what for n, client in self._pool.members.items() if client.url == error.url}
        lost = self._of_rank_0(silent)
        for number, why in lost.items():
            self._lose(number, "not answering", why)
        if lost:
            self.joining |= self._serving  # while rank 0 waited, other processes may have taken their places
            self._serving.clear()
            self._require()
            self._note()
        return bool(lost)

    def quarantine(self, engines: Mapping[int, str]) -> None:
        """Have nothing more sampled by some engines, by number with the reason; where somebody can, they are started
        again. Every rank calls it with the same engines."""
        found = [number for number in engines if number in self._serving]
        for number in found:
            self._lose(number, "quarantined", engines[number])
        if found:
            self._require()
            self._serve()
            self._note()

    # Who belongs to it

    def _gather(self) -> None:
        """Bring the pool of every rank up to date, in one broadcast."""
        listed: dict[int, tuple[str, str | None, str | None]] = {}
        error: Exception | None = None
        if self._places is not None:
            try:
                listed = self._look(self._places)
            except Exception as caught:  # every rank has to learn of it
                error = caught
        joining = [number for number in listed if self.members[number].state == "joining"]
        said = None if error is None else f"{type(error).__name__}: {error}"
        text = json.dumps([listed, joining, said]) if self._layout.rank == 0 else None
        places, joining, said = json.loads(self._layout.share_text(text))
        if said is not None:
            raise error or RuntimeError(f"looking for the rollout engines failed on rank 0: {said}")
        addresses = {
            int(number): EngineAddress(url, None if log is None else Path(log), key)
            for number, (url, key, log) in places.items()
        }
        self.joining = set(joining)
        self._serving = self._serving.intersection(addresses) - self.joining
        if len(addresses) >= self._min_healthy:
            self._pool.change(addresses, new=self.joining)  # what was agreed with a server that has gone must not stay
        self._note()
        self._require()

    def _look(self, places: Places) -> dict[int, tuple[str, str | None, str | None]]:
        """Return url, key and log of the engines that answer, by number."""
        offers = {offer.place: offer for offer in places.offers()}
        for place, offer in offers.items():
            self._offered(self._member(place), offer)
        for member in self.members.values():
            if member.place not in offers:
                self._tell(member, "left", "it is no longer among the engines of the run")
        asked = {
            member.number: member.address
            for member in self.members.values()
            if member.place in offers
            and offers[member.place].address is not None
            and member.state not in ("quarantined", "left")
        }
        listed: dict[int, tuple[str, str | None, str | None]] = {}
        answers = self._probe(asked)
        again = self._started_again([number for number, found in answers.items() if found is None])
        for number, found in answers.items():
            member = self.members[number]
            if found is not None:
                self._tell(member, *found)
                places.replace(member.place, member.offered, found[1])
                continue
            if member.state not in ("serving", "joining") or number in again:
                member.generation += 1
                member.now("joining")
            assert member.address is not None
            log = member.address.log
            listed[number] = (member.address.url, member.address.api_key, None if log is None else str(log))
        return listed

    def _offered(self, member: Member, offer: Offer) -> None:
        """Take over what is known of an engine's place."""
        moved = None not in (member.address, offer.address) and member.address != offer.address
        if moved or offer.generation != member.offered:  # another server
            member.offered = offer.generation
            if offer.address is not None:
                member.now("starting")
        if offer.address is None:
            self._tell(member, "starting" if offer.starting else "not answering", offer.detail)
        elif member.state == "left":
            member.now("starting")
        member.address = offer.address or member.address

    def _member(self, place: str) -> Member:
        """Return what is known of the engine in a place; a new place gets the next number."""
        for member in self.members.values():
            if member.place == place:
                return member
        number = len(self.members)
        self.members[number] = Member(number, place)
        return self.members[number]

    def _probe(self, addresses: Mapping[int, EngineAddress | None]) -> dict[int, tuple[State, str] | None]:
        """Ask engines whether they answer; return for each None, or the state that it is in, and why."""

        async def ask(number: int, address: EngineAddress | None) -> tuple[State, str] | None:
            known = self._pool.members.get(number)
            if known is not None and known.address == address:
                return await _silence(known)
            assert address is not None, "only engines with an address are asked"
            async with self._pool.client(address) as client:
                return await _silence(client) or await _fault(client)

        async def ask_all() -> list[tuple[State, str] | None]:
            return await asyncio.gather(*(ask(number, address) for number, address in addresses.items()))

        return dict(zip(addresses, self._pool.run(ask_all()), strict=True))

    def _started_again(self, numbers: Sequence[int]) -> set[int]:
        """Return which of these engines serve, but do not report the weights that they got last: another process may be
        at their address, and has to be verified like any that joins."""

        async def other_weights(number: int) -> bool:
            try:
                info = await self._pool.members[number].model_info(PROBE_S)
            except EngineError:
                return True  # while it said nothing, another process may have come; a dead one fails the publication
            return info.weight_version != self.members[number].version

        async def ask_all(serving: Sequence[int]) -> list[bool]:
            return await asyncio.gather(*map(other_weights, serving))

        serving = [number for number in numbers if self.members[number].state == "serving"]
        return {number for number, other in zip(serving, self._pool.run(ask_all(serving)), strict=True) if other}

    def _lose(self, number: int, state: State, why: str) -> None:
        """Take an engine out, on every rank."""
        self._serving.discard(number)
        self.joining.discard(number)
        left = {n: client.address for n, client in self._pool.members.items() if n != number}
        if left:
            self._pool.change(left)
        member = self.members.get(number)
        if member is not None and self._places is not None:
            self._tell(member, state, why)
            self._places.replace(member.place, member.offered, why)

    def _tell(self, member: Member, state: State, why: str) -> None:
        """Bring an engine into a state in which it serves nothing, and say so."""
        if member.state != state and (why or member.generation >= 0):
            where = "" if member.address is None else f" ({member.address.url})"
            _say(f"Engine {member.number}{where} is {state}: {why}; the run goes on without it")
        member.now(state, why)

    def _require(self) -> None:
        """Raise TooFewEngines, on every rank, when too few engines are left."""
        healthy = len(self._serving | self.joining)
        if healthy >= self._min_healthy:
            return
        missing = [m for m in self.members.values() if m.state not in ("serving", "joining")]
        texts = [f"engine {m.number} is {m.state}{f' ({m.detail})' if m.detail else ''}" for m in missing]
        said = self._of_rank_0({0: "; ".join(texts)})[0]
        raise TooFewEngines(
            "of the run",
            f"{healthy} hold the run's weights, but rollout.engine.min_healthy = {self._min_healthy}: {said}",
            "Look at their logs, start the missing ones and resume, or lower rollout.engine.min_healthy",
        )

    # What follows

    def _serve(self, watched: bool = True) -> None:
        if self._router is not None:
            with together(self._layout, "telling the router which engines serve"):
                if self._layout.rank == 0:
                    members = self._pool.members
                    self._pool.run(self._router.keep([members[n].url for n in sorted(self._serving)]))
        if self._requests is not None:
            self._requests.serve(self._serving, self._version, watched)

    def _of_rank_0(self, found: Mapping[int, str]) -> dict[int, str]:
        shared = self._layout.share_text(json.dumps(dict(found)) if self._layout.rank == 0 else None)
        return {int(number): text for number, text in json.loads(shared).items()}

    def _note(self) -> None:
        if self._layout.rank == 0:
            self._changed(list(self.members.values()))


def _say(text: str) -> None:
    """Print a line for the person at the terminal; what ranks write to stderr is in files."""
    print(printable(text, keep="\n\t"), flush=True)


class FixedFleet:
    """These are engines that neither come nor go; it has the methods of `Fleet` that a source calls."""

    joining: Collection[int] = ()

    @contextmanager
    def publication(self) -> Iterator[None]:
        yield

    def published(self, version: str) -> None:
        return

    def verified(self, failed: Mapping[int, str] | None = None) -> None:
        return

    def goes_on_without(self, error: BaseException) -> bool:
        return False

    def quarantine(self, engines: Mapping[int, str]) -> None:
        return


async def _fault(client: EngineClient) -> tuple[State, str] | None:
    """Return why an engine that wants to join must not sample; None when it may."""
    try:
        await client.check_preferences()
    except (EngineUnreachable, EngineTimeout) as error:
        return "not answering", error.what
    except EngineError as error:
        return "quarantined", error.what
    return None


async def _silence(client: EngineClient) -> tuple[State, str] | None:
    """Return why an engine does not answer; None when it does, be it with a refusal."""
    try:
        await client.load(PROBE_S)
    except (EngineUnreachable, EngineTimeout) as error:
        return "not answering", error.what
    except EngineError:
        return None
    return None
