"""What all processes that the package starts have in common."""

import signal

import pytest

from fiberpo_megatron.subprocesses import exit_text


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-signal.SIGKILL, "signal SIGKILL"),
        (-int(signal.SIGRTMIN) - 6, f"signal {signal.SIGRTMIN + 6}"),
    ],
)
def test_exit_codes_in_words_real_time_signals_among_them(code: int, words: str) -> None:
    assert exit_text(code) == words
