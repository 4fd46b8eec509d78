"""This is a stand-in for an SGLang server, which takes weights as a server does and has no model.

tools/bench_publish.py starts it.

It loads with the code of our SGLang plugin and copies every tensor into memory of its own, as a model's loader does: on
the first GPU where torch sees one, else in host memory.
usage: bench_publish_engine.py PORT
"""

import asyncio
import base64
import hashlib
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from fiberpo_megatron.engines.command import PLUGIN

sys.path.append(str(PLUGIN))
import fiberpo_delta  # noqa: E402
import fiberpo_weights  # noqa: E402

HASHING = 8
"""Threads that hash tensors; weights of gigabytes would otherwise take longer to compare than to publish."""


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 checksum of the names and all bytes of the tensors, on any device, whatever their order."""

    def one(name: str) -> str:
        content = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return f"{name} {hashlib.sha256(memoryview(content)).hexdigest()}"

    with ThreadPoolExecutor(HASHING) as threads:
        return hashlib.sha256("\n".join(threads.map(one, sorted(tensors))).encode()).hexdigest()


class Weights:
    """Holds the parameters, and takes updates by the name of SGLang's endpoint."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.held: dict[str, torch.Tensor] = {}
        self.version = "default"
        self.groups: dict[str, Any] = {}
        self.received = torch.empty(0, dtype=torch.uint8)
        self.taking = threading.Lock()
        """It is held by the request in progress. As in SGLang, a second one waits until the first has been taken."""

    def load(self, tensors: Any) -> None:
        for name, tensor in tensors:
            if name not in self.held:
                self.held[name] = torch.empty_like(tensor, device=self.device)
            self.held[name].copy_(tensor)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the trainer writes into the same memory again

    def handle(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {"success": True, "message": ""}
        match path:
            case "/model_info":
                return {"model_path": "none", "weight_version": self.version}
            case "/server_info":
                return {"tp_size": 1, "dp_size": 1}
            case "/weights_checker":
                return {**answer, "ranks": [{"per_gpu_checksum": checksum(self.held)}]}
            case "/update_weights_from_tensor":
                payload = base64.b64decode(body["serialized_named_tensors"][0])
                try:
                    self.load(fiberpo_weights.tensors(payload, self.device))
                finally:
                    if body.get("weight_version") is not None:  # as the plugin does in `fiberpo_weights.update`
                        fiberpo_weights.release()
            case "/update_weights_from_disk":
                request = SimpleNamespace(model_path=body["model_path"])
                found = asyncio.run(fiberpo_delta.update_from_disk(self._files, None, request))
                answer = {"success": found[0], "message": found[1]}
            case "/init_weights_update_group":
                self._join(body)
            case "/update_weights_from_distributed":
                self._receive(body)
        self.version = body.get("weight_version") or self.version
        return answer

    async def _files(self, manager: None, request: SimpleNamespace) -> tuple[bool, str, int]:
        for file in sorted(Path(request.model_path).glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self.load((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118 - no mapping
        return True, "", 0

    def _join(self, body: dict[str, Any]) -> None:
        store: Any = dist.TCPStore(body["master_address"], body["master_port"], body["world_size"], False)
        name = body["group_name"]
        for prefix in (name, f"{name}/", "cpu/"):
            store = dist.PrefixStore(prefix, store)
        self.groups[name] = dist.ProcessGroupGloo(store, body["rank_offset"], body["world_size"], timedelta(seconds=60))

    def _receive(self, body: dict[str, Any]) -> None:
        kinds = [getattr(torch, name) for name in body["dtypes"]]
        shapes = [torch.Size(shape) for shape in body["shapes"]]
        sizes = [shape.numel() * kind.itemsize for shape, kind in zip(shapes, kinds, strict=True)]
        if sum(sizes) > len(self.received):  # as a GPU's allocator does, it keeps the memory for the next round
            self.received = torch.empty(sum(sizes), dtype=torch.uint8)
        flat = self.received[: sum(sizes)]
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self.groups[body["group_name"]].broadcast([flat], options).wait()
        parts = flat.split(sizes)
        described = zip(body["names"], parts, kinds, shapes, strict=True)
        self.load((name, part.view(kind).view(shape)) for name, part, kind, shape in described)


def main() -> None:
    torch.set_num_threads(1)
    weights = Weights()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # An answer in two small packets would wait 40 ms for the client's delayed acknowledgement of the first.
        wbufsize = -1
        disable_nagle_algorithm = True

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"null") or {}
            status = 200
            try:
                with weights.taking:
                    answer = weights.handle(self.path, body)
            except Exception as error:
                status, answer = 400, {"success": False, "message": f"{type(error).__name__}: {error}"}
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _answer  # noqa: N815 - the names that http.server wants

        def log_message(self, *arguments: object) -> None:
            """Write nothing for a request."""

    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
