"""A real SGLang with a tokenizer and a key, as somebody else would run it: a judge behind OpenAI's interface."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from fiberpo_megatron.engines.addresses import free_ports
from fiberpo_megatron.engines.command import Server, server_command, server_environment
from fiberpo_megatron.engines.settings import EngineConfig

START_S = 240.0
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@contextmanager
def openai_server(model: Path, folder: Path, *, key: str) -> Iterator[str]:
    """Start a server of a model under the name "judge", and yield its address with /v1."""
    model = Path(shutil.copytree(model, folder / "judge_model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    config = EngineConfig()
    port, internal = free_ports(2, "127.0.0.1")
    server = Server(model, "float32", "127.0.0.1", port, internal, seed=0, gpu=False)
    command = [word for word in server_command(server, config) if word != "--skip-tokenizer-init"]
    command += ["--served-model-name", "judge", "--api-key", key]
    log = folder / "judge.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env=server_environment(os.environ, config, server, None),
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
