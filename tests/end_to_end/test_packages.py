"""Sampled tokens of a real SGLang pass through reasoning-gym, verifiers and tools into an optimiser step."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from fiberpo_megatron.environments.builtin.verifiers import VERSION
from tests.end_to_end.test_training import records, run

pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed; run `make reasoning-gym`")
PYTHON = Path(sys.prefix) / f"verifiers-{VERSION}/bin/python"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}!{{ call['function']['name'] }}{% endfor %}"
    "{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.mark.sglang
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_tokens_pass_through_the_packages_into_a_step(model: Path, engine: Any, tmp_path: Path):
    """One run has a domain for each. A random model calls no tool; each turn of it with a digit or a letter e counts as
    a call that could not be read, which is answered, so that conversations have several turns. The rewards are coins,
    so that the step moves the weights."""
    model = Path(shutil.copytree(model, tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(json.dumps({"prompt": f"what is {i}?", "answer": str(i)}) for i in range(8)))
    gym = 'task = "chain_sum", config = {max_terms = 2}, extract = "text", levels = [0, 3], held_out_size = 4'
    tools = f'train = "{problems}", max_turns = 3, call_markers = {json.dumps([*"0123456789e"])}'
    parts = [
        f'{{name = "gym", use = "reasoning_gym", options = {{{gym}}}}}',
        f'{{name = "tools", use = "tools", options = {{{tools}}}}}',
    ]
    if PYTHON.exists():
        package = 'environment = "tests.environments.verifiers_arithmetic", arguments = {kind = "insist"}'
        python = f'python = "{PYTHON}", start_timeout_s = 600.0, workers = 1'
        parts.append(f'{{name = "vf", use = "verifiers", {python}, options = {{{package}}}}}')
    words = ["--rollout.engine.urls", f'["{engine.url}"]', "--weight_sync.method", "disk", "--trainer.steps", "1"]
    words += ["--evaluation.prompts", "0", "--data.random_reward", "true", "--rollout.max_response_tokens", "16"]
    words += ["--rollout.tool_call_parser", "qwen25", "--telemetry.rollouts_per_step", "64"]
    words += ["--rollout.return_routing", "false", "--algorithm.levels", '[["turn"], ["trajectory"]]']
    words += ["--algorithm.budgets", "{turn = [0.4, 0.3], trajectory = [0.4, 0.3]}"]
    done = run(model, tmp_path / "run", *words, "--environments", f"[{', '.join(parts)}]", timeout_s=800)
    assert done.returncode == 0, done.stderr
    (step,) = records(tmp_path / "run", "train")
    assert step["gradient_norm"] > 0 and step["rollout_diff/max"] < 1e-4  # float32 on both sides
    assert step["turns/mean"] > 1
    lines = (tmp_path / "run/rollouts/step_000000.jsonl").read_text().splitlines()
    rollouts = list(map(json.loads, lines))
    assert {rollout["domain"] for rollout in rollouts} == {"gym", "tools", *(["vf"] if PYTHON.exists() else [])}
    said = [rollout["response"] for rollout in rollouts if rollout["domain"] == "tools"]
    assert any("the tool call could not be read" in text for text in said)
    for name in ("gym", "tools", "vf")[: len(parts)]:
        assert f"environment/{name}/failures" not in step, "counts that are 0 are left out"
