"""The server refuses other names, other pages, other methods and paths out of the run folder; and it writes nothing."""

import os
import socket
from pathlib import Path
from urllib.parse import quote

import pytest

from fiberpo_megatron.watch.inside import Outside, inside
from fiberpo_megatron.watch.server import PortTaken, keys_of, names_of, open_port
from tests.watch.serving import ask, get_json, served, write_run

SECRET = "this text is outside of the run folder"
API = (
    *("api/runs", "api/panels?run=0", "api/step?run=0", "api/phases?run=0", "api/summary?run=0", "api/config?run=0"),
    *("api/alarms?run=0", "api/engines?run=0"),
    "api/curves?run=0&curve=" + quote('{"kind":"train","metric":"entropy"}'),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text(SECRET)
    return write_run(tmp_path / "run", 4)


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Size, time of the last change and inode of everything below a folder."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        state = path.lstat()
        found[str(path)] = (state.st_size, state.st_mtime_ns, state.st_ino)
    return found


def test_a_crawl_of_everything_changes_nothing(run: Path, tmp_path: Path):
    before = snapshot(tmp_path)
    with served({"0": run}) as port:
        for path in ("", "app.js", "style.css", "views/registry.js", "uplot/uPlot.esm.js", *API):
            status, headers, body = ask(port, f"/{path}")
            assert status == 200 and body, path
            assert "default-src 'none'" in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8420", "127.0.0.1.evil.example", "", "[::2]", "a b"])
def test_another_host_is_refused(run: Path, host: str):
    with served({"0": run}) as port:
        for path in ("/", "/api/runs", "/app.js"):
            assert ask(port, path, Host=host)[0] in (400, 421)
        assert ask(port, "/api/runs", Host=f"localhost:{port + 1}")[0] == 200  # a tunnel changes the port


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost.evil.example"]
)
def test_a_page_of_another_origin_is_refused(run: Path, origin: str):
    with served({"0": run}) as port:
        assert ask(port, "/api/runs", Origin=origin)[0] == 403
        assert ask(port, "/api/runs", Origin=f"http://127.0.0.1:{port}")[0] == 200
        assert ask(port, "/api/runs", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403
        assert ask(port, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200  # a link in a chat


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT"])
def test_only_reading_is_answered(run: Path, method: str):
    with served({"0": run}) as port:
        status, headers, _ = ask(port, "/api/runs", method)
        assert status in (400, 405)
        assert ask(port, "/api/runs", "HEAD")[0] == 200


def test_without_its_token_nothing_is_shown(run: Path):
    with served({"0": run}, token="correct-horse", hosts=names_of("0.0.0.0")) as port:
        for path in ("/", "/api/runs", "/app.js", "/correct-hors/api/runs", "/correct-horse2/", "/wrong/api/runs"):
            status, _, body = ask(port, path)
            assert status == 403 and b"token" in body, path
        assert ask(port, "/correct-horse/api/runs")[0] == 200
        assert ask(port, "/correct-horse/")[2].startswith(b"<!doctype html>")
        status, headers, _ = ask(port, "/correct-horse")
        assert status == 307 and headers["location"] == "/correct-horse/"
        assert ask(port, "/correct-horse/api/runs", Host="10.1.2.3:80")[0] == 200  # an address cannot be rebound
        assert ask(port, "/correct-horse/api/runs", Host="evil.example")[0] == 421


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/static/..%2f..%2f..%2fsecret.txt",
        "/%252e%252e%252fsecret.txt",
        "/..%5csecret.txt",
        "//etc/passwd",
        "/%2fetc%2fpasswd",
        "/....//secret.txt",
        "/views/../../app.py",
        "/views/%2e%2e/%2e%2e/app.py",
        "/app.js%00.html",
    ],
)
def test_no_path_leads_out_of_the_page(run: Path, path: str):
    with served({"0": run}) as port:
        status, _, body = ask(port, path)
        assert status in (400, 404)
        assert SECRET.encode() not in body and b"root:" not in body and b"Starlette" not in body


@pytest.mark.parametrize("key", ["../run", "%2e%2e", "/etc", "1", "0/..", ""])
def test_a_run_is_found_by_its_key_alone(run: Path, key: str):
    with served({"0": run}) as port:
        for path in ("api/step", "api/config", "api/alarms", "api/engines", "api/summary", "api/panels"):
            status, _, body = ask(port, f"/{path}?run={key}")
            assert status == 404 and SECRET.encode() not in body


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "alarms.jsonl", "engines.json", "lock"])
def test_a_link_out_of_the_folder_is_not_followed(run: Path, tmp_path: Path, name: str):
    outside = tmp_path / "outside"
    if name == "lock":
        outside.mkdir()
        (outside / "00000001").write_text(SECRET)
    elif name == "metrics.jsonl":
        outside.write_text('{"step": 0, "kind": "train", "' + SECRET + '": 1}\n')
    else:
        outside.write_text(f'text = "{SECRET}"\n')
    if (run / name).exists():
        (run / name).unlink()
    (run / name).symlink_to(outside)
    with served({"0": run}, follow=False) as port:
        for path in API:
            _, _, body = ask(port, f"/{path}")
            assert SECRET.encode() not in body, path
    with pytest.raises(Outside):
        inside(run, name)


def test_a_link_inside_the_folder_is_followed(run: Path):
    (run / "metrics.jsonl").rename(run / "first.jsonl")
    (run / "metrics.jsonl").symlink_to("first.jsonl")
    with served({"0": run}, follow=False) as port:
        assert get_json(port, "/api/runs")[0]["kinds"]["train"]["records"] == 4


@pytest.mark.parametrize("parts", [("..", "x"), ("/etc/passwd",), ("a", "..", "..", "x"), ("a\0b",)])
def test_words_do_not_lead_outside(run: Path, parts: tuple[str, ...]):
    with pytest.raises(Outside):
        inside(run, *parts)
    assert inside(run, "tokens", "..", "metrics.jsonl") == (run / "metrics.jsonl").resolve()


def test_a_pipe_in_the_place_of_a_file_does_not_hold_the_server_up(run: Path):
    (run / "config.toml").unlink()
    os.mkfifo(run / "config.toml")
    with served({"0": run}, follow=False) as port:
        assert get_json(port, "/api/config?run=0")["config"] == {}


def test_folders_and_ports_are_checked_before_anything_is_served(run: Path, tmp_path: Path):
    assert keys_of([run, tmp_path]) == {"0": run, "1": tmp_path}
    with pytest.raises(ValueError, match="is given twice"):
        keys_of([run, run / "."])
    with pytest.raises(ValueError, match="is not a folder"):
        keys_of([tmp_path / "nothing"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=f"--port {port} cannot be opened.*choose another"):
            open_port("127.0.0.1", port)
