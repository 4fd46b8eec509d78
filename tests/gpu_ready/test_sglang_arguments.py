"""SGLang's own parser takes every argument that we set on a GPU, and chooses what we expect (docs/gpu.md)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fiberpo_megatron.config import Config
from fiberpo_megatron.engines.command import CPU_STAND_INS, PLUGIN, Server, server_command
from fiberpo_megatron.engines.sizing import sized_engine

ROOT = Path(__file__).parents[2]
HOPPER = Path(__file__).with_name("hopper.py")
CASES = {
    "separate": {"tensor": 2},
    "colocated": {"tensor": 1, "colocated": True},
    "deterministic": {"tensor": 1},
}


def config(engine: dict[str, object]) -> Config:
    return Config.model_validate(
        {"model": {"path": "m"}, "batch": {"prompts": 256, "samples_per_prompt": 8}, "rollout": {"engine": engine}}
    )


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What SGLang resolves for each case, in one process that takes eight H100 for granted."""
    model = tmp_path_factory.mktemp("qwen3_30b_a3b")
    shutil.copy(ROOT / "examples/planning/qwen3_30b_a3b/config.json", model)
    commands = []
    for name, engine in CASES.items():
        server = Server(
            model=model,
            dtype="bfloat16",
            host="127.0.0.1",
            port=30000,
            internal_port=30001,
            seed=3,
            gpu=True,
            first_gpu=4,
            routed_experts=name == "separate",
            deterministic=name == "deterministic",
        )
        commands.append(server_command(server, sized_engine(config(engine), gpu=True)[0])[3:])
    path = os.pathsep.join(map(str, (PLUGIN, CPU_STAND_INS)))
    done = subprocess.run(
        [sys.executable, str(HOPPER)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1])))


def test_every_argument_arrives(chosen: dict[str, dict[str, object]]):
    for found in chosen.values():
        assert found["device"] == "cuda" and found["dtype"] == "bfloat16" and found["base_gpu_id"] == 4
        assert found["skip_tokenizer_init"] and found["skip_server_warmup"] and found["sleep_on_idle"]
        assert found["grammar_backend"] == "none" and found["load_format"] == "dummy"
        assert found["mem_fraction_static"] == 0.8 and not found["disable_radix_cache"]
    separate, colocated, deterministic = chosen.values()
    assert (separate["tp_size"], colocated["tp_size"]) == (2, 1)
    assert separate["enable_return_routed_experts"] and not colocated["enable_return_routed_experts"]
    assert colocated["enable_memory_saver"] and not separate["enable_memory_saver"]
    assert deterministic["enable_deterministic_inference"] and not separate["enable_deterministic_inference"]


def test_the_backends_of_a_hopper(chosen: dict[str, dict[str, object]]):
    for name in ("separate", "colocated"):
        assert (chosen[name]["attention_backend"], chosen[name]["sampling_backend"]) == ("fa3", "flashinfer")
        assert chosen[name]["moe_runner_backend"] == "auto", "SGLang chooses the kernels of experts when it builds them"
    exact = chosen["deterministic"]
    assert (exact["attention_backend"], exact["sampling_backend"]) == ("fa3", "pytorch")


def test_the_sizes_of_the_batch(chosen: dict[str, dict[str, object]]):
    separate, colocated, _ = chosen.values()
    assert separate["max_running_requests"] == 2048  # 256 x 8 responses, one engine
    graphs = {name: found["cuda_graph_config"]["decode"] for name, found in chosen.items()}
    assert graphs["separate"]["max_bs"] == 512 and max(graphs["separate"]["bs"]) == 512
    assert (separate["chunked_prefill_size"], colocated["chunked_prefill_size"]) == (8192, 4096)
