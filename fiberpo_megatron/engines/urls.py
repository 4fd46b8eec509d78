"""This module checks the addresses of servers that a run is given. It imports the standard library alone."""

import re
from ipaddress import IPv6Address
from urllib.parse import urlsplit

from fiberpo_megatron.printable import printable

SHOWN_CHARACTERS = 200
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_PATH = re.compile(r"(/(?!\.\.?(/|$))[A-Za-z0-9._~-]+)*/?")


def checked_url(url: object, key_setting: str = "rollout.engine.api_key_file") -> str:
    """Return the address of a server without a slash at its end. `key_setting`: where the config names its key.

    An address is http://host:port or https://host:port, with a path where a proxy needs one. Everything else raises
    ValueError: an address with a name and password, another scheme, control characters, spaces, a query. The message
    never shows what stands before an @ or behind a question mark, because secrets stand there.
    """
    if not isinstance(url, str):
        raise ValueError(f"an engine's address is a {type(url).__name__}; write a text like http://host:port")
    if "@" in url:
        raise _refused(url, "it holds a user's name or password", f"name the servers' key in {key_setting}")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise _refused(url, "it has a character that no address has (a control character, a space, or none of ASCII)")
    if "?" in url or "#" in url:
        raise _refused(url, "it has a query or a fragment", "remove everything from the question mark or the # on")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _refused(url, f"it cannot be read ({error})") from None
    if parts.scheme not in ("http", "https") or "//" not in url:
        raise _refused(url, "it does not begin with http:// or https://")
    if not host or not _is_host(parts.netloc, host):
        raise _refused(url, "it names no host")
    if port == 0 or parts.netloc.endswith(":"):
        raise _refused(url, "its port is not in 1 .. 65535")
    if not _PATH.fullmatch(parts.path):
        raise _refused(url, "its path has characters that a server's path must not have")
    return url.rstrip("/")


def _is_host(netloc: str, host: str) -> bool:
    if not netloc.startswith("["):
        return _HOST.fullmatch(host) is not None
    try:
        return bool(IPv6Address(host))
    except ValueError:
        return False


def _refused(url: str, why: str, fix: str = "write http://host:port") -> ValueError:
    before, at, after = url.rpartition("@")
    shown = f"...{at}{after}" if before or at else after
    shown = re.split(r"[?#]", shown, maxsplit=1)[0][:SHOWN_CHARACTERS]
    return ValueError(f"the engine address {printable(shown)!r} cannot be used: {why}; {fix}")
