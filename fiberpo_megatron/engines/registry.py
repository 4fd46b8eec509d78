"""Engines on other machines become known to a run through files in a folder that all machines see."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiberpo_megatron import durable
from fiberpo_megatron.engines.api_key import read_key
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.errors import EngineStartError
from fiberpo_megatron.printable import json_line

KEY = "api_key"
POLL_S = 0.2
SLACK_S = 60.0
"""Added to the servers' own deadline, so that a server that is late can report this first."""


@dataclass(frozen=True)
class Registry:
    """Reads and writes the folder of one job, in which the hosts that start engines report to the run.

    `hosts` names these machines, one per line; `api_key` (mode 0600) holds the servers' key until all of them and the
    run have read it. For each host that has finished starting there is <host>.json, with the addresses of its healthy
    servers or with the error.
    """

    folder: Path

    def key(self) -> str:
        return read_key(self.folder / KEY)

    def hosts(self) -> list[str]:
        path = self.folder / "hosts"
        try:
            return path.read_text().split()
        except OSError as error:
            raise ValueError(f"{path}, which names the engines' hosts, cannot be read: {error.strerror}") from error

    def register(self, host: str, engines: list[EngineAddress]) -> None:
        """Record that all servers of `host` are healthy."""
        servers = [{"url": e.url, "log": str(e.log.resolve()) if e.log else None} for e in engines]
        self._write(host, {"engines": servers})

    def fail(self, host: str, error: str) -> None:
        """Record why `host` has no servers, or no longer has them."""
        self._write(host, {"error": error})

    def _write(self, host: str, record: dict[str, object]) -> None:
        with durable.replaced(self.folder / f"{host}.json", text=True) as file:  # readers see it whole or not yet
            file.write(json_line(record))

    def wait(self, timeout_s: float) -> list[EngineAddress]:
        """Return the servers of all hosts, in the order of `hosts`, and delete the file with their key.

        The run that calls this has the lock of its folder, so key files of other jobs in it are deleted as well: they
        belong to jobs that were killed.

        Raises EngineStartError when a host reports a failure, and when some have reported nothing after `timeout_s`.
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
        for path in self.folder.parent.parent.glob(f"*/{self.folder.name}/{KEY}"):
            path.unlink(missing_ok=True)
        return [engine for host in hosts for engine in self._engines(host, key)]

    def _engines(self, host: str, key: str) -> list[EngineAddress]:
        record = self._read(host)
        assert record is not None, "waited for"
        try:
            return [EngineAddress(s["url"], Path(s["log"]) if s["log"] else None, key) for s in record["engines"]]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise self._odd(host, f"{type(error).__name__}: {error}") from error

    def _read(self, host: str) -> dict[str, Any] | None:
        try:
            record = json.loads((self.folder / f"{host}.json").read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise self._odd(host, f"{type(error).__name__}: {error}") from error
        if not isinstance(record, dict):
            raise self._odd(host, f"it holds {record!r:.80} and no JSON object")
        if "error" in record:
            raise EngineStartError(f"on {host}", str(record["error"]), "Its log has more")
        return record

    def _odd(self, host: str, why: str) -> EngineStartError:
        path = self.folder / f"{host}.json"
        return EngineStartError(f"on {host}", f"{path} does not say where its servers are ({why})", "Submit again")
