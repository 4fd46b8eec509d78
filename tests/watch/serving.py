"""A real server of the page in a thread, and raw requests to it."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from fiberpo_megatron.telemetry.sinks import JsonlSink
from fiberpo_megatron.watch.app import application
from fiberpo_megatron.watch.server import open_port


@contextmanager
def served(folders: dict[str, Path], **options: Any) -> Iterator[int]:
    """Serve run folders on a free port of 127.0.0.1 and give the port."""
    opened = open_port("127.0.0.1", 0)
    config = uvicorn.Config(
        application(folders, **options), http="h11", ws="none", loop="asyncio", log_level="error", access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[opened]), daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start within 10 s"
            time.sleep(0.01)
        yield opened.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        opened.close()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Send one request whose path is not touched by any client, and return status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in ({"Host": f"127.0.0.1:{port}"} | headers).items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def get_json(port: int, path: str) -> Any:
    """Return the JSON at a path, which must be there."""
    status, _, body = ask(port, path)
    assert status == 200, body
    return json.loads(body)


def write_run(folder: Path, steps: int, first: int = 0) -> Path:
    """Write a small run folder of `steps` steps."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text("[trainer]\nsteps = 20\n")
    sink = JsonlSink(folder / "metrics.jsonl")
    for step in range(first, first + steps):
        sink.write(step, "train", {"reward/mean": step / 10, "entropy": 2.0 - step / 20, "seconds/total": 2.0})
    sink.close()
    return folder
