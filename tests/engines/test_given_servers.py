"""Addresses of given servers and further arguments: what is refused while the config is loaded, and what is shown."""

import ast
import json
import subprocess
import sys
import tomllib
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fiberpo_megatron.config import Config, ConfigError, load_config
from fiberpo_megatron.engines.arguments import REFUSED
from fiberpo_megatron.engines.client import NEUTRAL, EngineAddress, Sampling
from fiberpo_megatron.engines.command import CPU_STAND_INS, PLUGIN, Server, server_command
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.engines.urls import checked_url

SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.7:1234",
        "https://node-3.cluster.example.org",
        "http://node_3:30000/",
        "http://[::1]:30000",
        "http://proxy:80/engine/0",
    ],
)
def test_addresses_of_servers(url):
    assert checked_url(url) == url.rstrip("/")
    assert EngineConfig(urls=[url]).urls == [url]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (f"http://user:{SECRET}@host:1", "name or password; name the servers' key in rollout.engine.api_key_file"),
        (f"user:{SECRET}@host:1", "name or password"),
        (f"http://host:1/?api_key={SECRET}", "a query"),
        (f"http://host:1/#{SECRET}", "a fragment"),
        (f"http://user:{SECRET}\r\n@host:1", "name or password"),
        ("file:///etc/passwd", "does not begin with http"),
        ("ftp://host:1", "does not begin with http"),
        ("host:30000", "does not begin with http"),
        ("127.0.0.1:30000", "does not begin with http"),
        ("//host:30000", "does not begin with http"),
        ("http:host:30000", "does not begin with http"),
        ("http://", "names no host"),
        ("http://:30000", "names no host"),
        ("http://-:1", "names no host"),
        ("http://[::1", "cannot be read"),
        ("http://[evil]:1", "(cannot be read|names no host)"),
        ("http://host:0", r"port is not in 1 \.\. 65535"),
        ("http://host:", "port is not in"),
        ("http://host:65536", "cannot be read .*out of range"),
        ("http://host:80x", "cannot be read"),
        ("http://host:1\r\nX-Evil: 1", "a character that no address has"),
        ("http://host:1\n", "a character that no address has"),
        (" http://host:1", "a character that no address has"),
        ("http://h\u00f6st:1", "a character that no address has"),
        ("http://host:1/\u2028", "a character that no address has"),
        ("http://host\\@evil:1", "name or password"),
        ("http://host\\evil:1", "names no host"),
        ("http://host:1/../admin", "its path"),
        ("http://host:1/a;b", "its path"),
        ("", "does not begin with http"),
        (7, "is a int"),
    ],
)
def test_what_is_no_address_is_refused(url, why):
    with pytest.raises(ValidationError, match=why) as refused:
        EngineConfig(urls=[url])
    assert SECRET not in str(refused.value)
    with pytest.raises(ValueError, match=why) as refused:
        EngineAddress(url)  # also what a registry file says, or a program
    assert SECRET not in str(refused.value) and str(refused.value).isprintable()


@given(st.text(max_size=40) | st.text(alphabet="htp:/@?#.[]%\\\r\n a0", max_size=20).map("http://h{}".format))
def test_any_text_is_an_address_or_refused(text):
    try:
        url = checked_url(text)
    except ValueError as error:
        assert str(error).isprintable()
    else:
        assert url.startswith(("http://", "https://", "HTTP")) and not set(url) & set("@?#\r\n \\")


def write(tmp_path: Path, engine: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\npath = "model"\n[rollout.engine]\n{engine}\n')
    return path


@pytest.mark.parametrize(
    "engine",
    [
        f'urls = ["http://good:1", "http://user:{SECRET}@host:1"]',
        f'urls = "http://user:{SECRET}@host:1"',
        f'extra_args = ["--api-key", "{SECRET}"]',
        f'extra_args = "--api-key {SECRET}"',
        f'extra_args = ["--api-key={SECRET}"]',
    ],
)
def test_no_message_shows_a_secret(tmp_path, engine):
    path = write(tmp_path, engine)
    values = tomllib.loads(path.read_text())
    with pytest.raises(ConfigError, match=r"rollout\.engine") as refused:
        load_config(path)
    assert SECRET not in str(refused.value)
    with pytest.raises(ConfigError, match=r"rollout\.engine") as refused:
        load_config(write(tmp_path, ""), [f"--rollout.engine.{engine.replace(' = ', '=', 1)}"])
    assert SECRET not in str(refused.value)
    with pytest.raises(ValidationError) as invalid:
        Config.model_validate(values)
    assert SECRET not in str(invalid.value)


def test_a_server_is_named_once():
    with pytest.raises(ValidationError, match="names a server twice"):
        EngineConfig(urls=["http://a:1", "http://a:1/"])


# ---- further arguments ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-key", SECRET], r"'--api-key': rollout\.engine\.api_key_file"),
        (["--log-level", "info", "--host=0.0.0.0"], "'--host': the run listens where its ranks are"),
        (["--port", "1"], r"'--port': set rollout\.engine\.port"),
        (["--api"], r"'--api' \(short for --api-key\)"),
        (["--hos", "0.0.0.0"], r"'--hos' \(short for --host\)"),
        (["--api_key", "x"], "'--api-key'"),
        (["--config", "args.yaml"], "'--config': the file could hold any other argument"),
        (["--conf=args.yaml"], r"short for --config"),
        (["--preferred-sampling-params", "{}"], r"set rollout\.temperature"),
        (["--mem", "0.5"], r"set rollout\.engine\.memory_fraction"),
        (["--tp", "2"], r"set rollout\.engine\.tensor"),
        (["--trust-remote-code"], "code of a model folder is never run"),
        (["--enable-custom-logit-processor"], "runs code that a request brings"),
        (["--delete-ckpt-after-loading"], "deletes the folder of model.path"),
        (["--"], "short for"),
    ],
)
def test_arguments_that_the_run_sets_are_refused(arguments, message):
    with pytest.raises(ValidationError, match=rf"rollout\.engine\.extra_args must not hold .*{message}") as refused:
        EngineConfig(extra_args=arguments)
    assert SECRET not in str(refused.value)


def test_other_arguments_are_taken():
    arguments = ["--attention-backend", "fa3", "--ep-size=8", "--enable-metrics", "-1", "--disable-cuda-graph"]
    assert EngineConfig(extra_args=arguments).extra_args == arguments


def a_server(gpu: bool) -> Server:
    return Server(Path("/m"), "float32", "127.0.0.1", 1, 2, 3, gpu, routed_experts=True, deterministic=True)


def test_everything_that_the_run_sets_is_refused_or_comes_last():
    """SGLang takes the last of two; what stands before `extra_args` must not be given."""
    config = EngineConfig(colocated=True, max_total_tokens=7, extra_args=["--attention-backend", "fa3"])
    for gpu in (True, False):
        command = server_command(a_server(gpu), config)
        given = command.index("fa3")
        before = {word for word in command[: given - 1] if word.startswith("--")}
        # on a GPU users may ask for it themselves; it takes no value
        assert before - {"--enable-deterministic-inference"} <= set(REFUSED)
    assert command[command.index("--attention-backend", given) + 1] == "torch_native"


@pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not installed")
def test_health_asks_for_the_key_in_servers_that_a_run_starts():
    """SGLang's own rule lets everybody have a token generated by /health_generate."""
    spec = find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    rule = loaded(Path(spec.submodule_search_locations[0]) / "srt" / "utils" / "auth.py")
    plugin = loaded(PLUGIN / "fiberpo_sglang.py")

    def allowed(path: str, header: str | None, *, hooked: bool) -> bool:
        request = {"method": "GET", "path": path, "authorization_header": header, "api_key": "key"}
        request |= {"admin_api_key": None, "auth_level": rule.AuthLevel.NORMAL}
        decide = rule.decide_request_auth
        return (plugin._key_for_health(decide, **request) if hooked else decide(**request)).allowed

    for path in ("/health", "/health_generate"):
        assert allowed(path, None, hooked=False), "if SGLang closes them itself, the hook can go"
        assert not allowed(path, None, hooked=True) and not allowed(path, "Bearer guessed", hooked=True)
        assert allowed(path, "Bearer key", hooked=True)
    assert allowed("/ready", None, hooked=True) and not allowed("/generate", None, hooked=True)


def loaded(path: Path) -> Any:
    """Return the module of a file without importing the package around it."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


# ---- what requests say ----

INTERNAL = {"stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized"}
INTERNAL |= {"ebnf_full_assistant"}


@pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not installed")
def test_a_request_names_every_sampling_parameter_of_sglang():
    """SGLang takes what a request does not name from --preferred-sampling-params."""
    spec = find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "srt" / "sampling" / "sampling_params.py"
    (params,) = (
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "SamplingParams"
    )
    fields = {
        node.target.id: ast.unparse(node.value) if node.value else ""
        for node in params.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert set(Sampling(8).as_json(seed=1)) == set(fields) - INTERNAL
    assert {name: repr(value) for name, value in NEUTRAL.items()} == {name: fields[name] for name in NEUTRAL}
    assert {"preferred": 1, "min_p": 0.5} | Sampling(8).as_json() | {"preferred": 1} == {
        "preferred": 1,
        **Sampling(8).as_json(),
    }


@pytest.mark.exhaustive
@pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not installed")
def test_the_refused_arguments_are_those_of_sglangs_parser():
    """Every one exists, with all its other names, and none is the begin of an argument that may be given."""
    ask = (
        "import argparse, json; from sglang.srt.server_args import ServerArgs; p = argparse.ArgumentParser();"
        "ServerArgs.add_cli_args(p); print(json.dumps({o: a.dest for a in p._actions for o in a.option_strings}))"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(CPU_STAND_INS), "SGLANG_USE_CPU_ENGINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, timeout=300, check=True, env=environment
    )
    destinations: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert set(REFUSED) <= set(destinations)
    refused = {destinations[name] for name in REFUSED}
    assert {name for name, destination in destinations.items() if destination in refused} == set(REFUSED)
    allowed = set(destinations) - set(REFUSED)
    assert not [name for name in allowed if any(other.startswith(name) for other in REFUSED)]
