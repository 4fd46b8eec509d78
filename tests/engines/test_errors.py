"""What an engine and its log say is a part of messages, and never steers a terminal."""

from fiberpo_megatron.engines.errors import EngineRefused, log_tail

ODD = "\x1b[2J\x1b]0;title\x07\x85\u2028\u202e\ud83d"


def test_a_message_with_the_end_of_the_log(tmp_path):
    log = tmp_path / "engine_0.log"
    log.write_bytes(f"loading\n{ODD}\ttab\rlast".encode("utf-8", "surrogatepass"))
    error = EngineRefused("http://h:1", f"it answered {ODD}", "See its log", log)
    lines = str(error).split("\n")
    assert lines[0] == r"engine http://h:1: it answered \x1b[2J\x1b]0;title\x07\x85\u2028\u202e\ud83d. See its log"
    assert lines[1] == f"--- end of {log} ---"
    assert (
        lines[2] == "loading" and lines[3].startswith(r"\x1b[2J\x1b]0;title\x07\x85\u2028\u202e") and lines[4] == "last"
    )
    assert error.what == r"it answered \x1b[2J\x1b]0;title\x07\x85\u2028\u202e\ud83d"


def test_a_log_that_is_empty_or_gone(tmp_path):
    (tmp_path / "empty.log").touch()
    assert log_tail(tmp_path / "empty.log") == f"(its log {tmp_path / 'empty.log'} is empty)"
    assert (
        log_tail(tmp_path / "gone.log")
        == f"(its log {tmp_path / 'gone.log'} cannot be read: No such file or directory)"
    )
