"""A server at a real socket that answers like SGLang with a toy model: a table of logits by token.

`python -m tests.soak.engine` prints its port, serves, and ends when its standard input does. What is no sampling and no
update of weights is answered by the fake servers of the tests of engines.
"""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.engines.fake_server import FakeServers, response

ROOT = Path(__file__).parents[2]
KEPT_HEADERS = {"authorization", "content-type", "connection"}


class TableServer(FakeServers):
    """Samples from the table that was published last; the same seed and table give the same response."""

    def __init__(self) -> None:
        super().__init__({"/generate": self._generate, "/update_weights_from_disk": self._load})
        self.table: NDArray[np.float64] = np.zeros((1, 1))
        """[vocabulary, vocabulary] logits of the next token by the last one."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.calls.clear()  # a long run must not fill this process
        return await super().handle_async_request(request)

    def _load(self, host: str, body: Any) -> dict[str, Any]:
        (self.table,) = (
            tensor.astype(np.float64)
            for file in Path(body["model_path"]).glob("*.safetensors")
            for tensor in load_file(file).values()
        )
        self.version[host] = body["weight_version"]
        return {"success": True, "message": "Success"}

    def _generate(self, host: str, body: Any) -> Any:
        ids, parameters = body["input_ids"], body["sampling_params"]
        if "logprob_start_len" in body:  # scoring: log-probs of a given text
            entries = [[None, ids[0], None]]
            entries += [[self._log_probs(a)[b], b, None] for a, b in zip(ids[:-1], ids[1:])]
            return {
                "output_ids": [],
                "meta_info": {"finish_reason": {"type": "length"}, "input_token_logprobs": entries},
            }
        each = parameters if isinstance(parameters, list) else [parameters] * len(ids)
        return [self._sample(host, prompt, one) for prompt, one in zip(ids, each)]

    def _sample(self, host: str, prompt: list[int], parameters: dict[str, Any]) -> dict[str, Any]:
        random = np.random.default_rng(parameters["sampling_seed"])
        tokens: list[int] = []
        log_probs: list[list[Any]] = []
        last, reason = prompt[-1], "length"
        while len(tokens) < parameters["max_new_tokens"]:
            row = self._log_probs(last, parameters["temperature"])
            last = min(int(np.searchsorted(np.exp(row).cumsum(), random.random())), len(row) - 1)
            tokens.append(last)
            log_probs.append([row[last], last, None])
            if last in parameters["stop_token_ids"]:
                reason = "stop"
                break
        spans = [{"version": self.version[host], "start": 0, "end": len(tokens)}]
        finish = {"type": reason}
        return response(tokens, prompt, finish_reason=finish, output_token_logprobs=log_probs, weight_versions=spans)

    def _log_probs(self, token: int, temperature: float = 1.0) -> NDArray[np.float64]:
        row = self.table[token] / temperature
        return row - np.logaddexp.reduce(row)


async def serve(servers: FakeServers) -> asyncio.Server:
    """Return an HTTP/1.1 server on a free loopback port that hands requests to the fake servers."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host = "{}:{}".format(*writer.get_extra_info("sockname"))
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                kept = {name: value for name, value in headers.items() if name in KEPT_HEADERS}
                request = httpx.Request(method, f"http://{host}{path}", headers=kept, content=body)
                answer = await servers.handle_async_request(request)
                content = await answer.aread()
                lines = f"HTTP/1.1 {answer.status_code} \r\ncontent-length: {len(content)}\r\n\r\n"
                writer.write(lines.encode() + content)
                await writer.drain()
                if headers.get("connection") == "close":
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has closed the connection
        finally:
            writer.close()

    return await asyncio.start_server(connection, "127.0.0.1", 0, limit=1 << 24)


async def _main() -> None:
    server = await serve(TableServer())
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent has gone
    server.close()


@contextmanager
def running_engine() -> Iterator[tuple[str, int]]:
    """Yield the address and the process number of a server in a process of its own."""
    command = [sys.executable, "-m", "tests.soak.engine"]
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=ROOT) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            port = process.stdout.readline().strip()
            if not port:
                raise RuntimeError(f"the toy engine ended with exit code {process.wait()} while it was starting")
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.stdin.close()


if __name__ == "__main__":
    asyncio.run(_main())
