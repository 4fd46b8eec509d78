"""Engines on other machines become known to a run through files in a folder that all machines see."""

import glob
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fiberpo_megatron import durable
from fiberpo_megatron.engines.api_key import read_key
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.errors import EngineStartError
from fiberpo_megatron.engines.servers import Offer
from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.printable import json_line, printable

KEY = "api_key"
POLL_S = 0.2
SLACK_S = 60.0
"""Added to the servers' own deadline, so that a server that is late can report this first."""


@dataclass(frozen=True)
class Registry:
    """Reads and writes the folder of one job, in which the hosts that start engines report to the run.

    `hosts` names these machines, one per line; `api_key` (mode 0600) holds the servers' key until the run ends. For
    each host that has finished starting there is <host>.json, with the addresses of its healthy servers or with the
    error. A host that is not in `hosts` may join later, with a file of its own, and any may leave.
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

    def register(self, host: str, servers: Sequence[Offer]) -> None:
        """Record the servers of `host`; each is healthy, or says why it is not."""
        self._write(host, {"engines": [_written(server) for server in servers]})

    def fail(self, host: str, error: str) -> None:
        """Record why `host` has no servers, or no longer has them."""
        self._write(host, {"error": error})

    def leave(self, host: str) -> None:
        """Record that `host` takes its servers out of the run."""
        self._write(host, {"left": True, "engines": []})

    def replace(self, place: str, generation: int, why: str) -> None:
        """Ask the host of a place, which watches `replacements`, for another server than that of `generation`."""
        host, number = place.rsplit("/", 1)
        with durable.replaced(self.folder / f"{host}.replace.{number}", text=True) as file:
            file.write(json_line({"generation": generation, "why": why}))

    def replacements(self, host: str) -> dict[str, tuple[int, str]]:
        """Return the places of `host` for which another server is asked, with the generation that is to go and the
        reason, and forget them."""
        found = {}
        for path in self.folder.glob(f"{glob.escape(host)}.replace.*"):
            asked = read_object(path)
            found[path.name.rsplit(".", 1)[1]] = int(asked["generation"]), printable(str(asked["why"]))
            path.unlink()
        return found

    def offers(self) -> list[Offer]:
        """Return the places of all hosts that have registered, those in `hosts` first. It waits for none of them."""
        found, first = list[Offer](), self.hosts()
        known = [path.stem for path in sorted(self.folder.glob("*.json"))]
        for host in [*first, *(host for host in known if host not in first)]:
            try:
                offers = self._offers(host, self._read(host) or {"engines": []})
            except EngineStartError as error:
                offers = [Offer(f"{host}/{n}", None, detail=error.what) for n in range(self._counts.get(host, 0))]
            self._counts[host] = len(offers)
            found += offers
        return found

    def close(self) -> None:
        """Delete the file with the key: no host may join any more."""
        (self.folder / KEY).unlink(missing_ok=True)

    def _write(self, host: str, record: dict[str, object]) -> None:
        with durable.replaced(self.folder / f"{host}.json", text=True) as file:  # readers see it whole or not yet
            file.write(json_line(record))

    def wait(self, timeout_s: float) -> list[EngineAddress]:
        """Return the servers of all hosts, in the order of `hosts`.

        The run that calls this has the lock of its folder, so key files of other jobs in it are deleted: they belong to
        jobs that were killed.

        Raises EngineStartError when a host reports a failure, and when some have reported nothing after `timeout_s`.
        """
        hosts = self.hosts()
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
            if path != self.folder / KEY:
                path.unlink(missing_ok=True)
        offers = [offer for host in hosts for offer in self._offers(host, self._read(host) or {})]
        return [offer.address for offer in offers if offer.address is not None]

    def _offers(self, host: str, record: Mapping[str, Any]) -> list[Offer]:
        """Return what a host's file says. Raises EngineStartError when it says it in another way."""
        try:
            return [self._offer(f"{host}/{number}", of) for number, of in enumerate(record["engines"])]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise self._odd(host, f"{type(error).__name__}: {error}") from error

    def _offer(self, place: str, of: Mapping[str, Any]) -> Offer:
        url, log = of["url"], of["log"]
        address = None if url is None else EngineAddress(url, Path(log) if log else None, self._key)
        detail, generation = printable(str(of.get("detail", ""))), int(of.get("generation", 0))
        return Offer(place, address, generation, detail, starting=of.get("starting") is True)

    @cached_property
    def _key(self) -> str:
        return self.key()

    @cached_property
    def _counts(self) -> dict[str, int]:
        """How many servers each host had."""
        return {}

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


def _written(server: Offer) -> dict[str, object]:
    """Return what stands in a host's file of one server. The key does not."""
    address = server.address
    log = None if address is None or address.log is None else str(address.log.resolve())
    url = None if address is None else address.url
    return {
        "url": url,
        "log": log,
        "generation": server.generation,
        "detail": server.detail,
        "starting": server.starting,
    }
