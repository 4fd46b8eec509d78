"""Each check of the doctor on a real condition that it must notice, and on one that is in order."""

import json
import resource
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from fiberpo_megatron.config import Config, load_config
from fiberpo_megatron.doctor import engines, inputs, machine, report, software, storage
from fiberpo_megatron.doctor.report import Finding
from fiberpo_megatron.engines import client, weight_calls
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.telemetry.gpu import GIB, GpuMonitor
from tests.telemetry.test_gpu import FakeNvml

ROOT = Path(__file__).parents[2]


def config(*overrides: str) -> Config:
    return load_config(
        ROOT / "examples/demo/train.toml", ["--model.path", str(ROOT / "examples/demo/model"), *overrides]
    )


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    assert (finding.status == "pass") == (not finding.fix), "whatever is not a pass names its fix"
    return finding


@contextmanager
def limit(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_check_that_hangs_is_a_failure_with_its_name():
    began = time.monotonic()
    finding = only(report.examine("disk", lambda: time.sleep(60) or [], 0.2))
    assert time.monotonic() - began < 30
    assert (finding.check, finding.status) == ("disk", "fail") and "within 0.2 s" in finding.seen


def test_a_check_that_raises_is_a_failure_and_warnings_do_not_count():
    finding = only(report.examine("ports", lambda: [][0], 10))
    assert "IndexError" in finding.seen and report.exit_code([finding]) == 1
    assert report.exit_code([Finding("clocks", "warn", "off", "fix")]) == 0
    assert json.loads(report.as_json([finding]))["ok"] is False


def test_this_environment_is_supported():
    assert only(software.python_version()).status == "pass"
    assert only(software.packages(False, EngineConfig())).status == "pass"


def test_wrong_versions_and_missing_packages(monkeypatch: pytest.MonkeyPatch):
    declared = ["torch>=99", "no-such-package-anywhere>=1", "numpy", "also-missing; extra == 'wandb'"]
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    found = {finding.check: finding for finding in software.packages(False, EngineConfig())}
    assert set(found) == {"torch", "no-such-package-anywhere"}, "numpy is there; optional extras are not asked for"
    assert ">=99 is needed" in found["torch"].seen and found["torch"].status == "fail"
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": ">=3.99"})
    assert only(software.python_version()).status == "fail"


def test_an_engine_with_a_python_of_its_own(tmp_path: Path):
    """As in the CUDA image, where the trainer's Python has no SGLang. One without site-packages stands for another."""
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    other.chmod(0o755)
    finding = only(software.packages(False, EngineConfig(python=other)))
    assert finding.check == "sglang" and f"is not installed in {other}" in finding.seen
    assert finding.fix.startswith(f"{other} -m pip install 'sglang==")
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    assert only(software.packages(False, EngineConfig(python=other))).status == "pass"


def test_gpus_with_errors_and_slow_clocks():
    driver, *found = machine.gpus(GpuMonitor(FakeNvml()))
    assert driver.seen == "570.86"
    assert [(f.check, f.status) for f in found] == [("GPU 0", "fail"), ("GPU 0", "warn"), ("GPU 1", "pass")]
    assert "2 uncorrected" in found[0].seen and "temperature" in found[1].seen


def test_a_gpu_in_use_is_told():
    nvml = FakeNvml()
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=40 * GIB, total=80 * GIB)
    found = [f for f in machine.gpus(GpuMonitor(nvml)) if f.check == "GPU 1"]
    assert only(found).status == "warn" and "40.0 of 80 GiB" in found[0].seen


def test_without_a_gpu_it_says_so():
    class NoDriver(FakeNvml):
        def nvmlInit(self) -> None:
            raise self.NVMLError("driver not loaded")

    assert "none was found" in only(machine.gpus(GpuMonitor(NoDriver()))).seen


def test_open_files():
    with limit(resource.RLIMIT_NOFILE, 256):
        low = only(machine.open_files())
    assert low.status == "fail" and "limit 256" in low.seen and "ulimit -n" in low.fix
    with limit(resource.RLIMIT_NOFILE, 4096):
        assert only(machine.open_files()).status == "warn"


def test_shared_memory(tmp_path: Path):
    assert only(machine.shared_memory(tmp_path, 1)).status == "pass"
    assert only(machine.shared_memory(tmp_path, 1 << 60)).status == "warn"
    assert only(machine.shared_memory(tmp_path / "none")).status == "fail"


def test_disk(tmp_path: Path):
    folder = tmp_path / "not" / "yet"
    assert only(storage.free_disk(folder, 1)).status == "pass"
    assert only(storage.free_disk(folder, 1 << 60)).status == "fail"
    assert not folder.exists(), "the doctor makes no folders"
    assert storage.checkpoint_bytes(config()) > 0


def test_write_speed(tmp_path: Path):
    assert only(storage.write_speed(tmp_path)).status in ("pass", "warn")
    assert "cannot be written" in only(storage.write_speed(Path("/proc"))).seen
    with limit(resource.RLIMIT_FSIZE, 1 << 20):  # as when a quota is used up in mid-file
        assert only(storage.write_speed(tmp_path)).status == "fail"
    assert list(tmp_path.iterdir()) == []


def test_model_files(checkpoint: Path, tmp_path: Path):
    whole = only(inputs.model_files(config("--model.path", str(checkpoint))))
    assert whole.status == "pass" and "1 weight files" in whole.seen
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot read" in only(inputs.model_files(config("--model.path", str(broken)))).seen
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002" in only(inputs.model_files(config("--model.path", str(broken)))).seen
    assert only(inputs.model_files(config("--model.path", str(tmp_path)))).status == "fail"
    assert only(inputs.model_files(config())).status == "fail", "no weights, and none to be drawn"


def test_tokenizer(tmp_path: Path):
    assert only(inputs.tokenizer(config())).status == "pass"
    (tmp_path / "config.json").write_text("{}")
    assert "holds no tokenizer" in only(inputs.tokenizer(config("--model.path", str(tmp_path)))).seen


def test_layout():
    assert only(inputs.layout(config(), 2)).status == "pass"
    wrong = only(inputs.layout(config("--parallel.tensor", "3", "--parallel.expert", "1"), 3))
    assert wrong.status == "fail" and "does not divide" in wrong.seen and "use one of" in wrong.fix


def test_environments_are_started():
    finding = only(inputs.environments(config()))
    assert (finding.check, finding.status) == ("environment addition", "pass")
    assert finding.seen == "9010 training tasks, 990 held-out tasks"
    missing = '[{name = "math", use = "chat", options = {name = "math", train = "nowhere.jsonl"}}]'
    finding = only(inputs.environments(config("--environments", missing)))
    assert (finding.check, finding.status) == ("environment math", "fail")
    assert "nowhere.jsonl" in finding.seen and "correct the path" in finding.fix


def test_ports():
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert only(engines.ports(config("--rollout.engine.port", str(port)))).status == "fail"
    assert only(engines.ports(config("--rollout.engine.port", str(port)))).status == "pass"
    assert only(engines.ports(config())).status == "pass"


def test_endpoints_are_those_that_the_client_calls():
    source = "".join(Path(module.__file__).read_text() for module in (client, weight_calls))
    assert all(
        f'"{path}"' in source for path in (*engines.COMMON, *engines.SCORING, *sum(engines.OF_METHOD.values(), ()))
    )


@pytest.mark.sglang
def test_a_real_engine_has_what_is_needed(engine: EngineAddress, tmp_path: Path):
    words = ["--rollout.engine.urls", f'["{engine.url}"]']
    if engine.api_key:
        key = tmp_path / "key"
        key.write_text(engine.api_key)
        key.chmod(0o600)
        words += ["--rollout.engine.api_key_file", str(key)]
    finding = only(engines.servers(config(*words)))
    assert finding.status == "pass", finding


@pytest.mark.parametrize(
    ("paths", "version", "status", "seen"),
    [
        ([], "0.5.23", "fail", "lacks /generate"),
        ([*engines.COMMON, *engines.OF_METHOD["distributed"]], "0.4.1", "warn", "was not tested"),
        ([*engines.COMMON, *engines.OF_METHOD["distributed"]], "of my own", "warn", "version of my own was not tested"),
        (None, "0.5.23", "fail", "asks for another API key"),
        ([], "x" * (1 << 16), "fail", "its answer to /server_info has more than 4096 bytes"),
    ],
)
def test_engines_of_another_version(
    paths: list[str] | None, version: str, status: str, seen: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engines, "CONTROL_BYTES", 4096)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = {"version": version} if self.path == "/server_info" else {"paths": dict.fromkeys(paths or [], {})}
            text = json.dumps(body).encode()
            self.send_response(200 if paths is not None else 401)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        finding = only(engines.servers(config("--rollout.engine.urls", f'["{url}"]')))
    finally:
        server.shutdown()
        server.server_close()
    assert finding.status == status and seen in finding.seen and finding.check == f"engine {url}"
    assert "no SGLang server answers" in only(engines.servers(config("--rollout.engine.urls", f'["{url}"]'))).seen


def test_what_a_check_saw_is_shown_as_it_is(capsys):
    """Neither markup of the table nor control characters in it have an effect."""
    report.print_table([Finding("[/inputs]\x07", "fail", "[/nothing] [red]x\x1b[2J", "see \u202e")])
    assert "[/nothing] [red]x\\x1b[2J" in (said := capsys.readouterr().out) and "\x1b" not in said and r"\u202e" in said
    assert r"[/inputs]\x07" in said
