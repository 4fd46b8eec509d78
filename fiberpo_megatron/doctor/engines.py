"""These checks look at rollout engines: free ports for those that a run starts, and what running servers can do."""

from typing import Any

import httpx
from packaging.version import InvalidVersion

from fiberpo_megatron.config import Config
from fiberpo_megatron.doctor.report import Finding
from fiberpo_megatron.doctor.software import ENGINE, requirement_of
from fiberpo_megatron.engines.addresses import free_ports, is_free
from fiberpo_megatron.engines.answers import CONTROL_BYTES, parsed
from fiberpo_megatron.engines.api_key import read_key
from fiberpo_megatron.engines.client import EngineAddress

HOST = "127.0.0.1"
TIMEOUT_S = 10.0
COMMON = (
    "/generate",
    "/model_info",
    "/server_info",
    "/pause_generation",
    "/continue_generation",
    "/flush_cache",
    "/weights_checker",
)
OF_METHOD = {
    "disk": ("/update_weights_from_disk",),
    "ipc": ("/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"),
    "distributed": (
        "/init_weights_update_group",
        "/begin_weight_update",
        "/update_weights_from_distributed",
        "/end_weight_update",
        "/destroy_weights_update_group",
    ),
}
"""Endpoints that the modules of `engines/` call; a test compares them with its source."""
SCORING = ("/generate", "/server_info", "/v1/detokenize")
"""Endpoints of servers that score trajectories."""


def ports(config: Config) -> list[Finding]:
    """Check that the engines' ports are free or, if none are set, that enough free ports can be found."""
    engine = config.rollout.engine
    if engine.urls:
        return []
    if engine.port is None:
        try:
            free_ports(2 * engine.count, HOST)
        except RuntimeError as error:
            return [Finding("ports", "fail", str(error), "Stop servers on this machine")]
        return [Finding("ports", "pass", f"{2 * engine.count} free ports were found")]
    busy = [port for port in range(engine.port, engine.port + engine.count) if not is_free(port, HOST)]
    if busy:
        seen = f"{', '.join(map(str, busy))} is in use by another process"
        return [Finding("ports", "fail", seen, "Stop it, or change rollout.engine.port")]
    return [Finding("ports", "pass", f"{engine.port} to {engine.port + engine.count - 1} are free")]


def servers(config: Config) -> list[Finding]:
    """Check that every engine of `rollout.engine.urls`, and every server that scores trajectories, answers, has the
    supported version and offers the needed endpoints."""
    engine = config.rollout.engine
    key = read_key(engine.api_key_file) if engine.api_key_file and engine.urls else None
    needed = (*COMMON, *OF_METHOD.get(config.weight_sync.method.use, ()))
    found = [_server(EngineAddress(url.rstrip("/"), api_key=key), needed) for url in engine.urls]
    for section, scoring in config.scoring_servers.values():
        key = read_key(scoring.api_key_file) if scoring.api_key_file else None
        addresses = [EngineAddress(url.rstrip("/"), api_key=key, section=section) for url in scoring.urls]
        found += [_server(address, SCORING) for address in addresses]
    return found


def _server(address: EngineAddress, needed: tuple[str, ...]) -> Finding:
    name = f"engine {address.url}"
    headers = {"Accept-Encoding": "identity", **address.headers}
    try:
        with httpx.Client(base_url=address.url, timeout=TIMEOUT_S, trust_env=False, headers=headers) as http:
            info = _answer(http, "/server_info")
            if info is None:
                return Finding(name, "fail", "the server asks for another API key", address.key_fix)
            version = str(info.get("version", "unknown"))
            offered = (_answer(http, "/openapi.json") or {})["paths"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        seen = f"no SGLang server answers ({type(error).__name__}: {error})"
        return Finding(name, "fail", seen, f"Start it, or correct {address.section}.urls or api_key_file")
    missing = [path for path in needed if path not in offered]
    if missing:
        fix = f"Start it with the supported {ENGINE} version"
        return Finding(name, "fail", f"version {version} lacks {', '.join(missing)}", fix)
    return _compare(name, version)


def _answer(http: httpx.Client, path: str) -> dict[str, Any] | None:
    """Return the JSON object that a server answers with, or None if it asks for another key.

    Raises httpx.HTTPError, and ValueError for anything that is no object or larger than `CONTROL_BYTES`.
    """
    with http.stream("GET", path) as answer:
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            return None
        answer.raise_for_status()
        body = bytearray()
        for chunk in answer.iter_raw(1 << 16):
            body += chunk
            if len(body) > CONTROL_BYTES:
                raise ValueError(f"its answer to {path} has more than {CONTROL_BYTES} bytes")
    found = parsed(body)
    if not isinstance(found, dict):
        raise ValueError(f"its answer to {path} is no JSON object")
    return found


def _compare(name: str, version: str) -> Finding:
    wanted = requirement_of(ENGINE)
    try:
        tested = wanted.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        tested = False
    if tested:
        return Finding(name, "pass", f"version {version} offers all endpoints")
    seen = f"version {version} was not tested; {wanted.specifier} was"
    return Finding(name, "warn", seen, "Start it with the tested version")
