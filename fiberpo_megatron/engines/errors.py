"""These errors say what can go wrong with an engine; every message has the server, what was seen and the fix."""

from pathlib import Path

from fiberpo_megatron.printable import printable, tail

LOG_TAIL_LINES = 25


class EngineError(RuntimeError):
    """An engine did not do what it was asked to; `url` names it, `what` and `fix` make the message.

    What an engine or its log says is a part of the message, with all but line feeds and tabs escaped.
    """

    def __init__(self, url: str, what: str, fix: str, log: Path | None = None) -> None:
        what = printable(what, keep="\n\t")
        self.url, self.what, self.fix, self.log = url, what, fix, log
        message = f"engine {url}: {what}. {fix}"
        if log is not None:
            message += f"\n{log_tail(log)}"
        super().__init__(message)


class EngineUnreachable(EngineError):
    """The connection was refused, reset or lost before the answer was complete."""


class EngineTimeout(EngineError):
    """There was no answer before the deadline."""


class EngineReplaced(EngineError):
    """It serves weights that this run has never published."""


class EngineRefused(EngineError):
    """The server has answered with an HTTP error or `success: false`; `status` is that of the answer, where known."""

    status: int | None = None


class EngineAnswerError(EngineError):
    """The answer lacks a field, or its parts do not fit each other."""


class EngineAborted(EngineError):
    """The engine ended a response before its end."""


class EngineStartError(EngineError):
    """A server process could not be started or did not become healthy."""


def log_tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines of a log, safe to print, under a heading that names the file, or a line that says why there
    are none."""
    try:
        last = tail(log, lines)
    except OSError as error:
        return f"(its log {log} cannot be read: {error.strerror})"
    return "\n".join([f"--- end of {log} ---", *last] if last else [f"(its log {log} is empty)"])
