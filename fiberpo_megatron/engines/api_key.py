"""A server refuses requests without its key, which no command line, environment or log shows.

A server that a run starts gets its key through a pipe. Keys in files (mode 0600) are those of given servers, and of the
engines of a SLURM job, which are on other machines.
"""

import os
import secrets
from pathlib import Path


def new_key() -> str:
    """Return a key of 256 random bits."""
    return secrets.token_urlsafe(32)


def key_pipe(key: str) -> int:
    """Return a file descriptor from which one process can read the key once, as a line; close it after the start of
    that process."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        file.write(f"{key}\n")  # a pipe takes it at once: it is far shorter than what the kernel holds for a reader
    return reader


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
