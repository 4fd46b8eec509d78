"""This module is the HTTP server of the gateway: one in each worker of the environment, for all of its trajectories.

Every request needs the key of a trajectory that is running; nothing else is served. It needs starlette and uvicorn.
"""

from __future__ import annotations

import asyncio
import contextvars
import hmac
import json
import secrets
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from fiberpo_megatron.environments import Conversation
from fiberpo_megatron.environments.builtin.agent_process import AgentFailed
from fiberpo_megatron.environments.builtin.gateway_answers import completion_of, error_of, models_of, stream_of
from fiberpo_megatron.environments.builtin.gateway_branches import AgentConversation
from fiberpo_megatron.environments.builtin.gateway_messages import BadRequest
from fiberpo_megatron.environments.builtin.gateway_requests import ChatRequest, parse_request

BODY_S = 30.0
"""How long a client may take to send the body of a request."""
CONNECTIONS = 1024
"""Connections at the same time; further ones get the status 503."""
KEEP_ALIVE_S = 75
"""How long an idle connection is kept: longer than clients keep theirs, so that none is closed while it is used."""


class _Server(uvicorn.Server):
    """Leaves the signals to the worker."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Session:
    """Holds what the agent of one trajectory may ask for, and what it has asked.

    max_requests: the requests of one trajectory; one more is a failure of the agent. max_parallel: those at the same
    time; one more gets the status 429, and clients ask again.
    """

    def __init__(self, policy: Conversation, max_requests: int, max_parallel: int) -> None:
        self.key = f"sk-{secrets.token_urlsafe(32)}"
        self.conversation = AgentConversation(policy)
        self.sampling = policy.sampling
        self.counts: Counter[str] = Counter()
        """Numbers of requests, of refused ones, and of those whose sampling parameters were ignored."""
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets AgentFailed as its exception when the agent has asked too often."""
        self._max_requests, self._max_parallel = max_requests, max_parallel
        self._running: set[asyncio.Task[Any]] = set()
        self._asked = False

    @property
    def quiet(self) -> bool:
        """Return whether the agent has asked nothing since this was looked up last."""
        asked, self._asked = self._asked, False
        return not (asked or self._running)

    def admit(self) -> Response | None:
        """Count a request; return the answer to one that is too much."""
        self.counts["requests"] += 1
        if self.counts["requests"] > self._max_requests:
            message = f"the agent sent more than max_requests = {self._max_requests} requests"
            if not self.failure.done():
                self.failure.set_exception(AgentFailed(message))
            return refusal(429, message, "requests", "rate_limit_exceeded")
        if len(self._running) >= self._max_parallel:
            message = f"max_parallel = {self._max_parallel} requests are being answered; ask again"
            return refusal(429, message, "requests", "rate_limit_exceeded")
        return None

    async def answer(self, request: ChatRequest, model: str) -> Response:
        """Return the policy's answer. It is sampled to its end even if the client goes away meanwhile."""
        work = asyncio.ensure_future(self.conversation.answer(request))
        self._running.add(work)
        try:
            turn, message = await work
        finally:
            self._running.discard(work)
            self._asked = True
        if request.stream:
            events = stream_of(turn, message, model, include_usage=request.include_usage)
            return StreamingResponse(_all(events), media_type="text/event-stream")
        return _json(completion_of(turn, message, model))

    def close(self) -> None:
        """End the requests that are being answered."""
        for work in self._running:
            work.cancel()
        if self.failure.done():
            self.failure.exception()  # it was looked at, whoever did it
        self.failure.cancel()


async def _all(events: Iterator[bytes]) -> Any:
    for one in events:
        yield one


class GatewayServer:
    """Serves /v1/chat/completions and /v1/models to the agents of one worker.

    opened: a socket that listens. url: what agents get as the base address. model: the name of the policy.
    ignore_sampling: see `parse_request`. max_body: bytes of a request. max_messages: messages of a request.
    """

    def __init__(
        self,
        opened: socket.socket,
        url: str,
        model: str,
        *,
        ignore_sampling: bool,
        max_body: int,
        max_messages: int,
    ) -> None:
        self.url = url
        self._opened = opened
        self._model, self._ignore_sampling = model, ignore_sampling
        self._max_body, self._max_messages = max_body, max_messages
        self._sessions: dict[str, Session] = {}
        self._server: asyncio.Task[None] | None = None
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{name:path}", self._model_named, methods=["GET"]),
            ],
            exception_handlers={404: _unknown, 405: _unknown},
        )

    @contextmanager
    def session(self, session: Session) -> Iterator[None]:
        """Accept the key of a trajectory while the context lasts. The first one starts the server."""
        if self._server is None or self._server.done():
            # outside of the trajectory's context: the server's work belongs to no trajectory, and outlives this one
            self._server = contextvars.Context().run(asyncio.get_running_loop().create_task, self._serve())
        self._sessions[session.key] = session
        try:
            yield
        finally:
            del self._sessions[session.key]
            session.close()

    async def _serve(self) -> None:
        config = uvicorn.Config(
            self._guarded,
            http="h11",
            ws="none",
            loop="none",
            interface="asgi3",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        await _Server(config).serve(sockets=[self._opened])

    async def _guarded(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request that has the key of a running trajectory; refuse all others before anything is read."""
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        session = self._session_of(scope)
        if session is None:
            answer = refusal(
                401,
                "the key in the header Authorization is not that of a running trajectory",
                "invalid_request_error",
                "invalid_api_key",
            )
            await answer(scope, receive, send)
            return
        scope["session"] = session
        await self.app(scope, receive, send)

    def _session_of(self, scope: Any) -> Session | None:
        """Return the session of the request's key. All keys are compared, each in constant time."""
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        found = None
        for own, session in self._sessions.items():
            if hmac.compare_digest(own.encode(), key) and scheme.lower() == b"bearer":
                found = session
        return found

    async def _models(self, request: Request) -> Response:
        return _json(models_of(self._model))

    async def _model_named(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._model:
            return refusal(
                404,
                f"there is no model {name!r:.80}; the policy is {self._model!r}",
                "invalid_request_error",
                "model_not_found",
            )
        return _json(models_of(self._model)["data"][0])

    async def _complete(self, request: Request) -> Response:
        session: Session = request.scope["session"]
        refused = session.admit()
        if refused is not None:
            session.counts["refused"] += 1
            return refused
        try:
            body = await asyncio.wait_for(self._body(request), BODY_S)
            parsed = parse_request(
                json.loads(body),
                session.sampling,
                ignore_sampling=self._ignore_sampling,
                max_messages=self._max_messages,
            )
            session.counts["ignored"] += bool(parsed.ignored)
            return await session.answer(parsed, self._model)
        except BadRequest as error:
            answer = refusal(400, str(error), "invalid_request_error", error.code, error.param)
        except _TooLarge as error:
            answer = refusal(413, str(error), "invalid_request_error", "request_too_large")
        except TimeoutError:  # another class than TimeoutError on Python 3.10
            answer = refusal(408, f"the body did not arrive within {BODY_S:g} s", "invalid_request_error")
        except (ValueError, RecursionError) as error:  # no JSON, or the policy's side refuses the messages
            answer = refusal(400, str(error), "invalid_request_error")
        except ClientDisconnect:
            answer = refusal(400, "the connection was closed before the body had arrived", "invalid_request_error")
        except RuntimeError as error:  # nothing more can be said, for example because the trajectory was cut
            answer = refusal(503, str(error), "server_error")
        except asyncio.CancelledError:
            if session.key in self._sessions:  # the server ends, not the trajectory
                raise
            answer = refusal(503, "the trajectory has ended", "server_error")
        session.counts["refused"] += 1
        return answer

    async def _body(self, request: Request) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > self._max_body:
                raise _TooLarge(f"the body has more than max_body_kib = {self._max_body // 1024} KiB")
            parts.append(part)
        return b"".join(parts)


class _TooLarge(Exception):
    """Is raised when the body of a request is above its bound."""


def refusal(status: int, message: str, kind: str, code: str | None = None, param: str | None = None) -> Response:
    """Return an error in OpenAI's form."""
    return _json(error_of(message, kind, param, code), status)


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


async def _unknown(request: Request, error: Exception) -> Response:
    return refusal(
        getattr(error, "status_code", 404),
        f"{request.method} {request.url.path} is not served; there are POST /v1/chat/completions and GET /v1/models",
        "invalid_request_error",
        "unknown_url",
    )


def open_socket(host: str, ports: Sequence[int]) -> socket.socket:
    """Return a socket that listens at the first free port of `ports`. Raises ValueError that names host and ports."""
    why: OSError | None = None
    for port in ports:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            opened = socket.socket(family, kind, protocol)
            try:
                opened.bind(address)
                opened.listen(CONNECTIONS)
            except OSError:
                opened.close()
                raise
            return opened
        except OSError as error:
            why = error
    raise ValueError(f"host = {host!r}: none of the ports {list(ports)!r:.80} can be listened on ({why})")
