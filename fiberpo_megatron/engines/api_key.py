"""A server refuses requests without its key, which travels by file (mode 0600), never by command line or log."""

import os
import secrets
from pathlib import Path


def new_key() -> str:
    """Return a key of 256 random bits."""
    return secrets.token_urlsafe(32)


def write_key(path: Path, key: str) -> None:
    """Write the key to a new file that only its owner can read."""
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(f"{key}\n")


def read_key(path: Path) -> str:
    """Return the key in `path`. Raises ValueError when others may read the file, or when it holds no key."""
    try:
        mode, key = path.stat().st_mode, path.read_text().strip()
    except OSError as error:
        raise ValueError(f"the API key file {path} cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise ValueError(f"the API key file {path} has mode {mode & 0o777:o}: others can read it; run chmod 600 {path}")
    if not key.isascii() or not key.isprintable() or not key or " " in key:
        raise ValueError(f"the API key file {path} must hold one line of printable ASCII without blanks")
    return key
