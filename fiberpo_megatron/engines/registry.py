"""How engines on other machines become known to a run: files in a folder that all of them see."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiberpo_megatron.engines.api_key import read_key
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.errors import EngineStartError

POLL_S = 0.2
SLACK_S = 60.0
"""Added to the servers' own deadline, so that a server that is late says so itself."""


@dataclass(frozen=True)
class Registry:
    """A folder of one job: `hosts` (one name a line: who starts engines), `api_key` (mode 0600), and for each host
    that is through <host>.json with the addresses of its healthy servers, or with the error."""

    folder: Path

    def key(self) -> str:
        return read_key(self.folder / "api_key")

    def hosts(self) -> list[str]:
        path = self.folder / "hosts"
        try:
            return path.read_text().split()
        except OSError as error:
            raise ValueError(f"{path}, which names the engines' hosts, cannot be read: {error.strerror}") from error

    def register(self, host: str, engines: list[EngineAddress]) -> None:
        """Say that all servers of `host` are healthy."""
        servers = [{"url": e.url, "log": str(e.log.resolve()) if e.log else None} for e in engines]
        self._write(host, {"engines": servers})

    def fail(self, host: str, error: str) -> None:
        """Say why `host` has none, or no more."""
        self._write(host, {"error": error})

    def _write(self, host: str, record: dict[str, object]) -> None:
        path = self.folder / f"{host}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record))
        os.replace(part, path)  # readers see all of it or nothing

    def wait(self, timeout_s: float) -> list[EngineAddress]:
        """The servers of all hosts, in the order of `hosts`.

        Raises EngineStartError when a host says that it failed, and when some have said nothing after `timeout_s`.
        """
        hosts, key = self.hosts(), self.key()
        deadline = time.monotonic() + timeout_s
        while missing := [host for host in hosts if self._read(host) is None]:
            if time.monotonic() > deadline:
                raise EngineStartError(
                    ", ".join(missing),
                    f"{len(missing)} of {len(hosts)} hosts have registered no engine after {timeout_s:.0f} s",
                    f"See their logs in {self.folder.parent}; raise rollout.engine.start_timeout_s if they still load",
                )
            time.sleep(POLL_S)
        return [engine for host in hosts for engine in self._engines(host, key)]

    def _engines(self, host: str, key: str) -> list[EngineAddress]:
        record = self._read(host)
        assert record is not None, "waited for"
        return [EngineAddress(s["url"], Path(s["log"]) if s["log"] else None, key) for s in record["engines"]]

    def _read(self, host: str) -> dict[str, Any] | None:
        try:
            record = json.loads((self.folder / f"{host}.json").read_text())
        except FileNotFoundError:
            return None
        if "error" in record:
            raise EngineStartError(f"on {host}", record["error"], "Its log has more")
        return dict(record)
