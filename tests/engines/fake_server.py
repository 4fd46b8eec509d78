"""A SGLang server at the network seam: answers /generate by rule and takes the weight calls."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

Answer = dict[str, Any] | list[dict[str, Any]] | httpx.Response


def response(token_ids: list[int], prompt: list[int], **changes: Any) -> dict[str, Any]:
    """One element of a /generate answer; `changes` replace parts of meta_info (None removes)."""
    info: dict[str, Any] = {
        "finish_reason": {"type": "length", "length": len(token_ids)},
        "prompt_tokens": len(prompt),
        "output_token_logprobs": [[-0.5 * (i + 1), token, None] for i, token in enumerate(token_ids)],
        "weight_versions": [{"version": "7", "start": 0, "end": len(token_ids)}],
    }
    info |= changes
    return {"output_ids": token_ids, "meta_info": {k: v for k, v in info.items() if v is not None}}


class Pieces(httpx.AsyncByteStream):
    """A body that comes in pieces; `read` counts the bytes that were taken."""

    def __init__(self, content: bytes, size: int = 4096) -> None:
        self.content, self.size, self.read = content, size, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for begin in range(0, len(self.content), self.size):
            piece = self.content[begin : begin + self.size]
            self.read += len(piece)
            yield piece


class FakeServers(httpx.AsyncBaseTransport):
    """All fake servers of a test. `rules`: answers by path, in place of the usual ones; an exception is raised."""

    def __init__(self, rules: dict[str, Callable[[str, Any], Answer]] | None = None, delay_s: float = 0.0) -> None:
        self.rules, self.delay_s = rules or {}, delay_s
        self.calls: list[tuple[str, str, Any]] = []
        """(host:port, path, request)"""
        self.running = self.most_running = 0
        """Responses in flight, and the largest number of them."""
        self.version: dict[str, str] = {}
        self.checksum: dict[str, str] = {}

    def paths(self, skip: tuple[str, ...] = ("/model_info", "/server_info", "/weights_checker")) -> list[str]:
        return [path for _, path, _ in self.calls if path not in skip]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(await request.aread() or b"null")
        host, path = f"{request.url.host}:{request.url.port}", request.url.path
        self.calls.append((host, path, body))
        if path in self.rules:
            await asyncio.sleep(self.delay_s)
            answer = self.rules[path](host, body)
        else:
            answer = await self._usual(host, path, body)
        response = answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)
        if response.is_stream_consumed:  # made whole: it goes over the wire in pieces
            return httpx.Response(response.status_code, headers=response.headers, stream=Pieces(response.content))
        return response

    async def _usual(self, host: str, path: str, body: Any) -> Answer:
        if path == "/generate":
            self.running += len(body["input_ids"])
            self.most_running = max(self.most_running, self.running)
            await asyncio.sleep(self.delay_s)
            self.running -= len(body["input_ids"])
            # the first response token names the prompt's first token
            return [response([prompt[0], 3], prompt) for prompt in body["input_ids"]]
        if path == "/model_info":
            return {"model_path": "/m", "weight_version": self.version.get(host, "default")}
        if path == "/server_info":
            return {"tp_size": 1, "dp_size": 1, "enable_memory_saver": False}
        if path == "/weights_checker":
            return {"success": True, "ranks": [{"per_gpu_checksum": self.checksum.get(host, "same")}]}
        self.version[host] = (body or {}).get("weight_version") or self.version.get(host, "default")
        return {"success": True, "message": "Success"}
