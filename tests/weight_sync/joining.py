"""Fake servers that take weights as SGLang does, in process groups."""

import asyncio
from datetime import timedelta

import httpx
import torch
import torch.distributed as dist

from tests.engines.fake_server import FakeServers


class JoiningServers(FakeServers):
    """Fake servers whose "engines" are threads that really join the gloo group and receive the broadcasts.

    `deaf`: the port of one that refuses updates, and so never takes part in a broadcast; with `name`, only those with
    this tensor.
    """

    def __init__(self, rules=None, deaf: int | None = None, name: str | None = None) -> None:
        super().__init__(rules)
        self.deaf, self.name = deaf, name
        self.groups: dict[tuple[str, str], dist.ProcessGroupGloo] = {}
        self.held: dict[str, dict[str, torch.Tensor]] = {}
        self.failures: list[str] = []

    def end(self, host: str) -> None:
        """End the engine's process: its sockets close, and another one at its address is in no group."""
        for key in [key for key in self.groups if key[0] == host]:
            del self.groups[key]
        self.version.pop(host, None)
        self.held.pop(host, None)

    async def _usual(self, host, path, body):
        refused = None
        if path == "/init_weights_update_group":
            await asyncio.to_thread(self._join, host, body)
        if path == "/destroy_weights_update_group" and self.groups.pop((host, body["group_name"]), None) is None:
            refused = "The group to be destroyed does not exist."
        if path == "/update_weights_from_distributed":
            if host.endswith(f":{self.deaf}") and (self.name is None or self.name in body["names"]):
                refused = "no such group"
            elif (host, body["group_name"]) not in self.groups:
                refused = f"Group {body['group_name']} not in the groups of this engine"
            elif not await asyncio.to_thread(self._receive, host, body):
                refused = "receive failed"
        if refused is not None:
            return httpx.Response(400, json={"success": False, "message": refused})
        return await super()._usual(host, path, body)

    def _join(self, host, body):
        store = dist.TCPStore(body["master_address"], body["master_port"], body["world_size"], False)
        name = body["group_name"]
        for prefix in (name, f"{name}/", "cpu/"):
            store = dist.PrefixStore(prefix, store)
        group = dist.ProcessGroupGloo(store, body["rank_offset"], body["world_size"], timedelta(seconds=60))
        self.groups[host, name] = group

    def _receive(self, host, body):
        size = sum(torch.Size(shape).numel() for shape in body["shapes"]) * 4
        flat = torch.empty(size, dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            self.groups[host, body["group_name"]].broadcast([flat], options).wait()
        except RuntimeError as error:
            self.failures.append(f"{host}: {error}")
            return False
        values = flat.view(torch.float32).split([torch.Size(shape).numel() for shape in body["shapes"]])
        self.held.setdefault(host, {}).update(zip(body["names"], values, strict=True))
        return True
