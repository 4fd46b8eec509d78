"""This module starts a worker: it reads the settings, makes the environment, bounds the process and serves jobs."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import resource
import sys
from typing import Any

from fiberpo_megatron import plugins
from fiberpo_megatron.environments import wire
from fiberpo_megatron.environments.loading import load
from fiberpo_megatron.environments.wire import Kind
from fiberpo_megatron.environments.worker import Worker


def main(commands: int, replies: int, page_descriptor: int) -> None:
    """Read the settings, make the instance, say what it offers and serve jobs."""
    for descriptor in (commands, replies, page_descriptor):
        os.set_inheritable(descriptor, False)
    faulthandler.enable()
    page = wire.Page(page_descriptor)
    os.lseek(page_descriptor, wire.Page.TRACEBACK_AT, os.SEEK_SET)
    faulthandler.register(wire.TRACEBACK_SIGNAL, file=page_descriptor, all_threads=True)
    settings = _read_settings(commands)
    _bound(settings["memory_gib"])
    try:
        environment, description = load(settings)
        kind, payload = Kind.READY, wire.encode(description)
    except plugins.PluginError as error:
        kind, payload = Kind.REFUSED, wire.encode({"message": str(error)})
    rest = memoryview(wire.frame(kind, 0, payload))
    while rest:
        rest = rest[os.write(replies, rest) :]
    if kind == Kind.READY:
        asyncio.run(Worker(environment, settings, page, commands, replies).serve())


def _read_settings(commands: int) -> dict[str, Any]:
    """Wait for the first frame."""
    reader = wire.FrameReader()
    while True:
        data = os.read(commands, wire.READ_BYTES)
        if not data:
            sys.exit("the trainer closed the pipe before it sent the settings")
        for _, _, payload in reader.feed(data):
            settings: dict[str, Any] = json.loads(payload)
            return settings


def _bound(memory_gib: float) -> None:
    """Bound what this process and each of its children may allocate, and write no core dumps."""
    size = int(memory_gib * 2**30)
    for limit, value in ((resource.RLIMIT_DATA, size), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
