"""How the errors of a user's class are described."""

import pytest

from fiberpo_megatron.environments.tracebacks import describe_error, trace_of
from fiberpo_megatron.environments.wire import InvalidReply

ODD, SHOWN = "\x1b[2J\x85\u202e\ud83d\n\tand", "\\x1b[2J\\x85\\u202e\\ud83d\n\tand"


@pytest.mark.parametrize(("kind", "text"), [(ValueError, f"ValueError: {SHOWN}"), (InvalidReply, SHOWN)])
def test_what_an_error_quotes_does_not_steer_a_terminal(kind, text):
    error = kind(ODD)
    assert describe_error(error) == text and "\x1b" not in trace_of(error) and SHOWN in trace_of(error)


def test_an_error_that_cannot_be_shown():
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert describe_error(Mute()) == "Mute, whose text raises RuntimeError"
    assert "Mute" in trace_of(Mute())
