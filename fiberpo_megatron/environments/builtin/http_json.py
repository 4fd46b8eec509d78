"""This module sends JSON to an HTTP server and reads its answer, on an asyncio event loop and with one deadline.

It serves environments whose workers have the standard library alone. Every request has a connection of its own, so
that a cancelled one leaves nothing behind; proxies are not used.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fiberpo_megatron.printable import printable


class HttpError(Exception):
    """A server did not answer a request as HTTP does: it is down, too slow, or sends something else."""


@dataclass(frozen=True)
class Address:
    """Holds where a server is. `parse` makes it of a URL."""

    tls: bool
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: object, option: str) -> Address:
        """Return the address that an option gives. Raises ValueError that names the option, the value and the fix."""
        example = "write it as http://host:port/path or https://host/path"
        if not isinstance(url, str) or not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError(f"{option} = {printable(repr(url))} is no address; {example}")
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise ValueError(f"{option} holds a name or password before the host; give a key by its own option instead")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
            raise ValueError(f"{option} = {url!r} is no address; {example}")
        tls = parts.scheme == "https"
        return cls(tls, parts.hostname, port or (443 if tls else 80), parts.path.rstrip("/"))

    def __str__(self) -> str:
        return f"http{'s' * self.tls}://{self.authority}{self.path}"

    @property
    def authority(self) -> str:
        """Return host and port, as the header `Host` has them."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True)
class Answer:
    """Holds what a server answered."""

    status: int
    headers: Mapping[str, str]
    """By lower-case names."""
    body: bytes

    def text(self) -> str:
        """Return the beginning of the body, safe to print."""
        return printable(self.body[:300].decode(errors="replace").strip())


async def request_json(
    address: Address,
    path: str,
    value: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float,
    limit_bytes: int,
) -> Answer:
    """Post a value as JSON (or get, where it is None) and return the answer.

    path: what follows the path of the address. timeout_s: the time from the connection to the last byte.
    limit_bytes: the longest body that is read.

    Raises HttpError that says what happened, without the address and without headers.
    """
    try:
        return await asyncio.wait_for(_request(address, path, value, headers or {}, limit_bytes), timeout_s)
    except asyncio.TimeoutError:  # noqa: UP041 (another class before Python 3.11)
        raise HttpError(f"it did not answer within {timeout_s:g} s") from None
    except ssl.SSLError as error:
        raise HttpError(f"the TLS connection failed: {error.reason}") from None
    except OSError as error:
        raise HttpError(f"the connection failed: {error.strerror or error}") from None
    except (asyncio.IncompleteReadError, ValueError) as error:
        raise HttpError(f"it answered with something that is not HTTP ({printable(str(error))})") from None


async def _request(address: Address, path: str, value: Any, headers: Mapping[str, str], limit_bytes: int) -> Answer:
    body = b"" if value is None else json.dumps(value).encode()
    lines = [f"{'GET' if value is None else 'POST'} {address.path}{path} HTTP/1.1", f"Host: {address.authority}"]
    lines += ["Connection: close", "Accept: application/json", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}", *(f"{name}: {text}" for name, text in headers.items())]
    context = ssl.create_default_context() if address.tls else None
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context, limit=1 << 16)
    try:
        writer.write("\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body)
        await writer.drain()
        return await _answer(reader, limit_bytes)
    finally:
        writer.close()
        with suppress(OSError, asyncio.CancelledError):
            writer.transport.abort()


async def _answer(reader: asyncio.StreamReader, limit_bytes: int) -> Answer:
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, status = head[0].split(" ")[:2]
        if not version.startswith("HTTP/1."):
            raise ValueError(head[0][:80])
        if status != "100":
            break
    headers = {
        name.strip().lower(): text.strip() for name, _, text in (line.partition(":") for line in head[1:] if line)
    }
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = await _chunks(reader, limit_bytes)
    elif "content-length" in headers:
        length = int(headers["content-length"])
        if not 0 <= length <= limit_bytes:
            raise ValueError(f"a body of {length} bytes, above the limit of {limit_bytes}")
        body = await reader.readexactly(length)
    else:
        body = b""
        while part := await reader.read(1 << 16):
            body += part
            _check_length(len(body), limit_bytes)
    return Answer(int(status), headers, body)


async def _chunks(reader: asyncio.StreamReader, limit_bytes: int) -> bytes:
    body = b""
    while True:
        size = int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16)
        _check_length(len(body) + size, limit_bytes)
        body += await reader.readexactly(size)
        await reader.readexactly(2)
        if size == 0:
            return body


def _check_length(length: int, limit_bytes: int) -> None:
    if length > limit_bytes:
        raise ValueError(f"a body above the limit of {limit_bytes} bytes")
