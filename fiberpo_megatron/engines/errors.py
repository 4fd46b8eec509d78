"""These errors say what can go wrong with an engine; every message has the server, what was seen and the fix."""

from pathlib import Path

LOG_TAIL_LINES = 25


class EngineError(RuntimeError):
    """An engine did not do what it was asked to; `url` names it, `what` and `fix` make the message."""

    def __init__(self, url: str, what: str, fix: str, log: Path | None = None) -> None:
        self.url, self.what, self.fix, self.log = url, what, fix, log
        message = f"engine {url}: {what}. {fix}"
        if log is not None:
            message += f"\n{log_tail(log)}"
        super().__init__(message)


class EngineUnreachable(EngineError):
    """The connection was refused, reset or lost before the answer was complete."""


class EngineTimeout(EngineError):
    """There was no answer before the deadline."""


class EngineRefused(EngineError):
    """The server has answered with an HTTP error or `success: false`."""


class EngineAnswerError(EngineError):
    """The answer lacks a field, or its parts do not fit each other."""


class EngineAborted(EngineError):
    """The engine ended a response before its end."""


class EngineStartError(EngineError):
    """A server process could not be started or did not become healthy."""


def log_tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines of a log under a heading that names the file, or a line that says why there are none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 200 * lines))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"(its log {log} cannot be read: {error.strerror})"
    tail = text.splitlines()[-lines:]
    return "\n".join([f"--- end of {log} ---", *tail] if tail else [f"(its log {log} is empty)"])
