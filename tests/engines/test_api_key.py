import os
import subprocess
import sys
from pathlib import Path

import pytest

from fiberpo_megatron.engines.api_key import key_pipe, new_key, read_key


def test_a_key_comes_back_from_a_file_that_only_the_owner_reads(tmp_path: Path):
    key = new_key()
    assert len(key) == 43 and key != new_key()
    path = tmp_path / "key"
    path.write_text(f"{key}\n")
    path.chmod(0o600)
    assert read_key(path) == key


def test_a_pipe_gives_the_key_to_one_process_once():
    """Nothing of it stays when the run is killed, and a second reader gets nothing."""
    reader = key_pipe("secret")
    code = "import os, sys; print(os.fdopen(int(sys.argv[1])).readline(), end='')"
    said = [
        subprocess.run([sys.executable, "-c", code, str(reader)], pass_fds=[reader], capture_output=True, timeout=60)
        for _ in range(2)
    ]
    os.close(reader)
    assert [done.stdout for done in said] == [b"secret\n", b""]


def test_what_is_refused(tmp_path: Path):
    path = tmp_path / "key"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_key(path)
    path.write_text("secret")
    path.chmod(0o640)
    with pytest.raises(ValueError, match=f"has mode 640: others can read it; run chmod 600 {path}") as refused:
        read_key(path)
    assert "secret" not in str(refused.value)
    for bad in ("", "two words", "line\nbreak"):
        path.write_text(bad)
        path.chmod(0o600)
        with pytest.raises(ValueError, match="one line of printable ASCII"):
            read_key(path)
