"""This module has simulated SGLang servers behind the HTTP client, and the places in which they are started again.

A server draws a token from its weights and a hash of the response's seed and the token's position, as SGLang does. It
outlives the trainer: a resumed run finds it with whatever it held.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.servers import Offer

Fault = Literal["dies", "dies later", "hangs", "late", "answer lost"]
FAULTS: tuple[Fault, ...] = ("dies", "dies later", "hangs", "late", "answer lost")
"""An engine that dies or hangs is started again after a while, with the model's own weights. `answer lost`: it does
what it is asked to, and its answer does not arrive, so that it is asked twice."""
OWN_WEIGHTS = "default"
"""What SGLang calls the weights of the model's folder."""


class Token(NamedTuple):
    """It is a token that an engine has sampled."""

    token: int
    log_prob: float
    version: str
    digest: str
    """Names the values of the weights."""
    verified: bool
    """Whether the engine had been verified by then."""


@dataclass
class _Request:
    """It is a request for tokens that an engine works on."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    aborted: bool = False


@dataclass
class Engine:
    """It is a place for a server, and the process in it."""

    number: int
    successors: bool
    """Whether another process takes a new address; else the server is started again at its own."""
    token_s: float
    """Time for a token (s)."""
    start_s: float
    """Time until a process that was started serves (s): more than a publication takes, as with real ones."""
    port: int
    life: int = -1
    """The process in it; engines count theirs together."""
    generation: int = 0
    ready_at: float | None = 0.0
    """When the process that is being started serves; None: none is."""
    hanging: bool = False
    paused: bool = False
    version: str = OWN_WEIGHTS
    tensors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    rows: NDArray[np.float64] | None = None
    """[vocabulary, vocabulary] log-probs; None until they are asked for."""
    requests: list[_Request] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"engine{self.number}:{self.port}"

    @property
    def digest(self) -> str:
        return digest(np.concatenate([self.tensors[name] for name in sorted(self.tensors)]))

    def interrupt(self) -> None:
        """Have every request look at what has changed."""
        for request in self.requests:
            request.changed.set()


def digest(table: NDArray[np.float32]) -> str:
    """Return the name of some weights."""
    return blake2b(table.tobytes(), digest_size=6).hexdigest()


def uniform(seed: int, position: int) -> float:
    """Return the draw from [0, 1) for the token at a position."""
    hashed = blake2b(f"{seed} {position}".encode(), digest_size=7).digest()
    return int.from_bytes(hashed, "big") / 2**56


class _Body(httpx.AsyncByteStream):
    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._content


class Engines(httpx.AsyncBaseTransport):
    """They are all engines of a simulation, as `engines.pool.EnginePool` reaches them.

    `fault`: is asked at every request which fault happens, and for how long (s). `note`: gets what happens. `own`: the
    model's own weights, by name. `stop`: the token that ends a response.
    """

    def __init__(
        self,
        engines: Collection[Engine],
        own: dict[str, NDArray[np.float32]],
        stop: int,
        fault: Callable[[Engine, str], tuple[Fault, float] | None],
        note: Callable[..., None],
    ) -> None:
        self.engines = list(engines)
        self._own, self._stop, self._fault, self._note = own, stop, fault, note
        self._lives = 0
        self._now: Callable[[], float] = lambda: 0.0
        self.sampled: dict[tuple[int, ...], set[Token]] = {}
        """All tokens that were ever sampled, by the tokens before them."""
        self.scored: set[tuple[int, str]] = set()
        """(life, digest) of processes that have scored a text with these weights."""
        self.verified: set[int] = set()
        """Lives of the processes that the trainer has verified."""
        for engine in self.engines:
            self._begin(engine)

    def attach(self, now: Callable[[], float], fresh: bool) -> None:
        """Serve another process of the trainer, whose clock is `now`: the requests of the one before have gone. A run
        begins once its engines answer. `fresh`: it has started all of them itself."""
        self._now = now
        self.verified.clear()
        for engine in self.engines:
            engine.requests = []
            if fresh or engine.hanging or not self.alive(engine):
                self.end(engine, starts=True)
                self._begin(engine)

    @property
    def addresses(self) -> list[EngineAddress]:
        return [EngineAddress(f"http://{engine.host}") for engine in self.engines]

    # Processes

    def end(self, engine: Engine, starts: bool) -> None:
        """End the process of an engine; with `starts` another one is started."""
        engine.ready_at = self._now() + engine.start_s if starts else None
        engine.life, engine.hanging, engine.paused = -1, False, False
        engine.generation += 1
        if engine.successors:
            engine.port += 1
        self._note("engine ended", engine=engine.number)
        engine.interrupt()

    def alive(self, engine: Engine) -> bool:
        """Return whether a process is in a place; one whose time has come begins."""
        if engine.life < 0 and engine.ready_at is not None and engine.ready_at <= self._now():
            self._begin(engine)
        return engine.life >= 0

    def _begin(self, engine: Engine) -> None:
        engine.life, engine.ready_at = self._lives, 0.0
        self._lives += 1
        engine.version, engine.tensors, engine.rows = OWN_WEIGHTS, dict(self._own), None
        self._note("engine began", engine=engine.number, life=engine.life)

    # `rollout.fleet.Places`

    def offers(self) -> list[Offer]:
        """Return the places of all engines."""
        found = []
        for engine in self.engines:
            place, address = str(engine.number), EngineAddress(f"http://{engine.host}")
            if not engine.successors:
                found.append(Offer(place, address))
                continue
            alive = self.alive(engine)
            detail = "" if alive else "its process ended"
            found.append(Offer(place, address if alive else None, engine.generation, detail, starting=not alive))
        return found

    def replace(self, place: str, generation: int, why: str) -> None:
        """Start a server again where the run has started it; others are started again by their owner."""
        engine = self.engines[int(place)]
        if engine.successors and engine.generation == generation:
            self.end(engine, starts=True)

    # HTTP

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(await request.aread() or b"null")
        engine = next((e for e in self.engines if e.host == f"{request.url.host}:{request.url.port}"), None)
        path = request.url.path
        await asyncio.sleep(NETWORK_S)
        if engine is None or not self.alive(engine):
            raise httpx.ConnectError("connection refused")
        life, found = engine.life, self._fault(engine, path)
        if found is not None:
            await self._suffer(engine, *found)
        while engine.hanging and engine.life == life:
            await self._changed(engine, _Request(), None)
        answer = await self._answer(engine, life, path, body) if engine.life == life else None
        if engine.life != life or (found is not None and found[0] == "answer lost"):
            raise httpx.ReadError("connection reset")
        await asyncio.sleep(NETWORK_S)
        return httpx.Response(200, stream=_Body(json.dumps(answer).encode()))

    async def _suffer(self, engine: Engine, fault: Fault, seconds: float) -> None:
        if fault == "late":
            await asyncio.sleep(seconds)
        elif fault == "hangs":
            engine.hanging = True
            self._later(seconds, engine, lambda: self.end(engine, starts=True))
        elif fault == "dies":
            self.end(engine, starts=True)
        elif fault == "dies later":
            self._later(seconds, engine, lambda: self.end(engine, starts=True))

    def _later(self, seconds: float, engine: Engine, call: Callable[[], None]) -> None:
        life = engine.life
        asyncio.get_running_loop().call_later(seconds, lambda: call() if engine.life == life else None)

    async def _changed(self, engine: Engine, request: _Request, timeout_s: float | None) -> None:
        """Wait until something about an engine has changed, or for so many seconds."""
        engine.requests.append(request)
        try:
            async with asyncio.timeout(timeout_s):
                await request.changed.wait()
        except TimeoutError:
            pass
        finally:
            request.changed.clear()
            if request in engine.requests:
                engine.requests.remove(request)

    async def _answer(self, engine: Engine, life: int, path: str, body: Any) -> Any:
        if path == "/generate":
            if isinstance(body["input_ids"][0], int):
                return await self._score(engine, life, body)
            work = zip(body["input_ids"], body["sampling_params"])
            return await asyncio.gather(*(self._generate(engine, life, list(ids), sampling) for ids, sampling in work))
        if path == "/v1/loads":
            row = {"num_running_reqs": 0, "num_waiting_reqs": 0, "token_usage": 0.0}
            return {"loads": [row | {"cache_hit_rate": 0.0, "gen_throughput": 0.0}]}
        if path == "/model_info":
            return {"model_path": "simulated", "weight_version": engine.version}
        if path == "/weights_checker":
            return {"success": True, "ranks": [{"per_gpu_checksum": engine.digest}]}
        if path == "/update_weights_from_disk":
            return await self._load(engine, life, body)
        if path == "/abort_request":
            for request in engine.requests:
                request.aborted = True
            engine.interrupt()
        elif path in ("/pause_generation", "/continue_generation"):
            engine.paused = path == "/pause_generation"
            engine.interrupt()
        return {"success": True, "tp_size": 1, "dp_size": 1}

    async def _load(self, engine: Engine, life: int, body: Any) -> Any:
        await asyncio.sleep(LOAD_S)
        if engine.life != life:
            return None
        found: dict[str, NDArray[np.float32]] = {}
        for file in sorted(Path(body["model_path"]).glob("*.safetensors")):
            found |= load_file(file)
        if not found:
            return {"success": False, "message": "the folder has no weights"}
        engine.tensors |= found
        engine.rows, engine.version = None, body.get("weight_version", engine.version)
        engine.interrupt()
        return {"success": True, "message": ""}

    async def _generate(self, engine: Engine, life: int, ids: list[int], sampling: Any) -> Any:
        """Sample a response: all tokens that the present weights give, until something changes."""
        tokens: list[int] = []
        log_probs: list[float] = []
        versions: list[str] = []
        request, began = _Request(), self._now()
        reason = "length"
        while not request.aborted and engine.life == life:
            if engine.paused:
                await self._changed(engine, request, None)
                began = self._now()
                continue
            ahead = self._ahead(engine, [*ids, *tokens], sampling["max_new_tokens"] - len(tokens), sampling)
            began = self._now()
            await self._changed(engine, request, engine.token_s * len(ahead))
            done = min(len(ahead), int((self._now() - began) / engine.token_s + 1e-6))
            for token in ahead[:done]:
                self.sampled.setdefault((*ids, *tokens), set()).add(token)
                tokens.append(token.token)
                log_probs.append(token.log_prob)
                versions.append(token.version)
            if tokens and tokens[-1] == self._stop:
                reason = "stop"
            if reason == "stop" or len(tokens) == sampling["max_new_tokens"]:
                break
        else:
            reason = "abort"
        spans = [{"version": version, "start": i, "end": i + 1} for i, version in enumerate(versions)]
        info = {
            "finish_reason": {"type": reason},
            "prompt_tokens": len(ids),
            "output_token_logprobs": [[value, token, None] for value, token in zip(log_probs, tokens)],
            "weight_versions": spans,
        }
        return {"output_ids": tokens, "meta_info": info}

    def _ahead(self, engine: Engine, ids: list[int], most: int, sampling: Any) -> list[Token]:
        """Return the tokens that an engine's weights give behind some tokens."""
        rows, named = self._rows(engine), engine.digest
        found: list[Token] = []
        last, position = ids[-1], len(ids)
        while len(found) < most and (not found or found[-1].token != self._stop):
            row = rows[last]
            drawn = uniform(sampling["sampling_seed"], position) * np.exp(row).sum()
            last = min(int(np.searchsorted(np.cumsum(np.exp(row)), drawn, "right")), len(row) - 1)
            found.append(Token(last, float(np.float32(row[last])), engine.version, named, engine.life in self.verified))
            position += 1
        return found

    def _rows(self, engine: Engine) -> NDArray[np.float64]:
        if engine.rows is None:
            table = np.concatenate([engine.tensors[name] for name in sorted(engine.tensors)]).astype(np.float64)
            engine.rows = table - np.log(np.exp(table).sum(-1, keepdims=True))
        return engine.rows

    async def _score(self, engine: Engine, life: int, body: Any) -> Any:
        request = _Request()
        while engine.paused and engine.life == life:
            await self._changed(engine, request, None)
        ids, first = body["input_ids"], body["logprob_start_len"] + 1
        rows = self._rows(engine)
        scores = [[float(rows[a, b]), b, None] for a, b in zip(ids[first - 1 : -1], ids[first:])]
        self.scored.add((engine.life, engine.digest))
        info = {"finish_reason": {"type": "length"}, "input_token_logprobs": [[None, ids[first - 1], None], *scores]}
        return {"output_ids": [], "meta_info": info}


NETWORK_S = 0.001
"""Time for a message between trainer and engine (s)."""
LOAD_S = 0.05
"""Time to load weights (s)."""
