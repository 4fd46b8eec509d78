from pathlib import Path

import pytest

from fiberpo_megatron.engines.api_key import new_key, read_key, write_key


def test_a_key_comes_back_from_a_file_that_only_the_owner_reads(tmp_path: Path):
    key = new_key()
    assert len(key) == 43 and key != new_key()
    write_key(tmp_path / "key", key)
    assert read_key(tmp_path / "key") == key and (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_what_is_refused(tmp_path: Path):
    path = tmp_path / "key"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_key(path)
    write_key(path, "secret")
    with pytest.raises(FileExistsError):
        write_key(path, "another")
    path.chmod(0o640)
    with pytest.raises(ValueError, match=f"has mode 640: others can read it; run chmod 600 {path}") as refused:
        read_key(path)
    assert "secret" not in str(refused.value)
    for bad in ("", "two words", "line\nbreak"):
        path.write_text(bad)
        path.chmod(0o600)
        with pytest.raises(ValueError, match="one line of printable ASCII"):
            read_key(path)
