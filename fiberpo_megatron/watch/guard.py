"""This module refuses requests that the page itself does not make, before any of them reaches a run folder.

A page of another site that is open in the same browser can send requests to 127.0.0.1, and can by DNS rebinding even
read the answers: its name then leads to this machine. Such requests carry the name of that page as Host or Origin, by
which they are recognised. Where the server listens for other machines, the address has a random token as well.
"""

import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
METHODS = ("GET", "HEAD")
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""What the browser may load and run: files of this server alone, and no script or style that stands in a text."""
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)


class Guard:
    """Wraps an application: it answers only GET and HEAD of its own page, at its own names, behind its token."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] = LOOPBACK, token: str = "") -> None:
        """Guard `app`.

        Args:
            hosts: names by which the server may be asked for, without a port: a tunnel changes the port.
            token: first part of every path; an empty one asks for none. With a token every IP address is a valid name
                too, because DNS rebinding needs a name.
        """
        self._app, self._hosts, self._token = app, frozenset(hosts), token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [*message.get("headers", ())]
                cache = [] if any(name == b"cache-control" for name, _ in own) else [(b"cache-control", b"no-cache")]
                message["headers"] = [*own, *cache, *HEADERS]
            await send(message)

        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")  # the server then closes the connection
        answer = self._refusal(scope)
        if answer is None and self._token:
            scope = {**scope, "root_path": f"/{self._token}"}
        await (self._app if answer is None else answer)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> PlainTextResponse | RedirectResponse | None:
        """Return the answer to a request that is not passed on."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if not self._knows(_host_name(host)):
            return PlainTextResponse("This server does not have the name that was asked for (Host).", 421)
        if "origin" in headers and headers["origin"].partition("://")[2] != host:
            return PlainTextResponse("Pages of other sites may not read from this server (Origin).", 403)
        crossing = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if crossing and headers.get("sec-fetch-mode") != "navigate":
            return PlainTextResponse("Pages of other sites may not read from this server.", 403)
        if scope["method"] not in METHODS:
            return PlainTextResponse(
                "This server is only read from: GET or HEAD.", 405, headers={"allow": ", ".join(METHODS)}
            )
        if not self._token:
            return None
        first, slash, _ = scope["path"].removeprefix("/").partition("/")
        if not hmac.compare_digest(first.encode(), self._token.encode()):
            return PlainTextResponse(
                "The address lacks its token: use the whole address that `fiberpo watch` printed.", 403
            )
        return None if slash else RedirectResponse(f"/{self._token}/")  # the page's own links are relative

    def _knows(self, name: str) -> bool:
        return name in self._hosts or (bool(self._token) and _is_address(name))


def _host_name(host: str) -> str:
    """Return the name in a Host header, in lower case and without the port; empty if it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "") if not set(host) & set("/?#@\\ ") else ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
