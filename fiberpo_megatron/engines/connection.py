"""This module sends requests to one SGLang server and bounds what comes back.

There are no retries: a failed generation is reported, and a weight update must never run twice unnoticed. What a server
answers is not trusted: it is read up to a size that follows from the request, and `answers.py` checks it.
"""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from fiberpo_megatron.engines import answers
from fiberpo_megatron.engines.answers import CONTROL_BYTES, RESPONSE_BYTES
from fiberpo_megatron.engines.errors import EngineAnswerError, EngineRefused, EngineTimeout, EngineUnreachable
from fiberpo_megatron.engines.urls import checked_url

CONTROL_TIMEOUT_S = 60.0
KEY_FIX = "Name the file with the servers' key in {section}.api_key_file"
KEEP_ALIVE_S = 3.0
"""Idle connections are dropped sooner than a server drops them (5 s, or `command.SERVER_KEEP_ALIVE_S`): none is used
while it closes."""


@dataclass(frozen=True)
class EngineAddress:
    """Says where a server is, and where its log is if this machine can read it. Raises ValueError for a url that is no
    address of a server."""

    url: str
    """http://host:port"""
    log: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    """Sent with every request (`Authorization: Bearer`); never shown."""
    section: str = "rollout.engine"
    """Section of the config that names the server, for messages."""

    def __post_init__(self) -> None:
        checked_url(self.url)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def key_fix(self) -> str:
        """Say where the key of the server is named."""
        return KEY_FIX.format(section=self.section)


class Connection:
    """Sends requests to one server. Use it inside one event loop, and close it (`async with`).

    `timeout_s` bounds one generation or scoring request, including its wait in the server's queue; `transport` replaces
    the network in tests.
    """

    def __init__(
        self,
        address: EngineAddress,
        timeout_s: float,
        max_connections: int = 256,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.address = address
        self.url = address.url.rstrip("/")
        self.timeout_s = timeout_s
        self.unanswered = 0
        """Commands, such as those that change weights, that the server has not answered yet."""
        limits = httpx.Limits(max_connections=max_connections, keepalive_expiry=KEEP_ALIVE_S)
        # trust_env=False: a proxy of the environment must not stand between trainer and engines
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={
                **address.headers,
                "Accept-Encoding": "identity",
            },  # a small answer must not unfold into a large one
            timeout=None,
            limits=limits,
            trust_env=False,
            transport=transport,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _command(self, path: str, request: Mapping[str, object], timeout_s: float) -> Any:
        """Send a request whose answer carries `success`."""
        self.unanswered += 1
        try:
            answer = await self._call("POST", path, request, timeout_s)
        finally:
            self.unanswered -= 1
        with self._answer_errors(path):
            if not answers.field(answer, "success", bool):
                raise self._refused(path, answers.short(answer.get("message", answer), 1000))
        return answer

    async def _call(
        self,
        method: str,
        path: str,
        request: Mapping[str, object] | None,
        timeout_s: float,
        limit: int = CONTROL_BYTES,
        json: bool = True,
        headers: Mapping[str, str] | None = None,
        accepted: bool = False,
    ) -> Any:
        """Return the decoded answer of one request, which may have `limit` bytes. `accepted`: the server may only say
        that it will do what it is asked to.

        Raises EngineError when there is none before the deadline, or none that can be used.
        """
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._http.stream(method, path, json=request, headers=headers) as response,
            ):
                fine = response.status_code == httpx.codes.OK or (
                    accepted and response.status_code == httpx.codes.ACCEPTED
                )
                body, size = await _read(response, limit if fine else RESPONSE_BYTES)
        except TimeoutError as error:
            raise EngineTimeout(
                self.url,
                f"no answer to {method} {path} within {timeout_s:g} s",
                "It hangs or is overloaded: see its log, lower the concurrency or raise the timeout",
                self.address.log,
            ) from error
        except httpx.ConnectError as error:
            raise EngineUnreachable(
                self.url,
                f"{method} {path}: no connection ({error})",
                "Check that the server runs and that the address is right",
                self.address.log,
            ) from error
        except httpx.TransportError as error:
            raise EngineUnreachable(
                self.url,
                f"the connection was lost during {method} {path} ({type(error).__name__}: {error})",
                "The server died or was stopped: see its log",
                self.address.log,
            ) from error
        if response.status_code == httpx.codes.UNAUTHORIZED:
            what = f"{path} was refused: {_key_seen(self.address)}"
            raise EngineRefused(self.url, what, self.address.key_fix)
        if not fine:
            refused = self._refused(path, f"HTTP {response.status_code}: {_reason(body)}")
            refused.status = response.status_code
            raise refused
        with self._answer_errors(path):
            if size > limit:
                raise ValueError(f"it has {size} bytes or more, but an answer to this request has {limit} at most")
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise ValueError(f"it is compressed ({answers.short(encoding)}), although the request forbids that")
            return answers.parsed(body) if json else None

    def _refused(self, path: str, reason: str) -> EngineRefused:
        return EngineRefused(self.url, f"{path} was refused: {reason:.1000}", "See the server's log")

    @contextmanager
    def _answer_errors(self, path: str) -> Iterator[None]:
        """Turns a ValueError about an answer into an EngineAnswerError that names the server."""
        try:
            yield
        except ValueError as error:
            what = f"bad answer to {path}: {error}"
            raise EngineAnswerError(self.url, what, "Check that it is an SGLang server of a tested version") from error


def _key_seen(address: EngineAddress) -> str:
    return "another API key is needed" if address.api_key else "an API key is needed, but none was given"


async def _read(response: httpx.Response, limit: int) -> tuple[bytearray, int]:
    """Return the answer's bytes as they were sent and how many were announced or seen; above `limit` it is cut off."""
    announced = response.headers.get("Content-Length", "")
    size = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
    body = bytearray()
    if size <= limit or response.status_code != httpx.codes.OK:
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > limit:
                break
    return body[: limit + 1], max(size, len(body))


def _reason(body: bytearray) -> str:
    """Return the message inside SGLang's error bodies, or the whole body, without control characters."""
    try:
        found = answers.parsed(body)
    except ValueError:
        return answers.short(body.decode(errors="replace"), 1000) or "no body"
    inner = found.get("error", found) if isinstance(found, dict) else found
    return answers.short(inner.get("message", inner) if isinstance(inner, dict) else inner, 1000)
