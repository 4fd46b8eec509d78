"""Sampled tokens of a real SGLang pass through a sandbox, or a second SGLang that grades, into an optimiser step."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_training import records, run
from tests.environments.openai_server import TEMPLATE, openai_server

ENGINE = ["--rollout.engine.max_total_tokens", "2048", "--evaluation.prompts", "0", "--trainer.steps", "2"]


def chat_model(model: Path, folder: Path) -> Path:
    """The tiny model with a chat template, and with answers that are whole programs now and then: digits alone."""
    model = Path(shutil.copytree(model, folder / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return model


def trained(model: Path, engine: Any, folder: Path, use: str, options: str) -> list[dict[str, Any]]:
    environment = f'{{name = "{use}", use = "{use}", deadline_s = 120.0, options = {{{options}}}}}'
    words = ["--rollout.engine.urls", f'["{engine.url}"]', "--weight_sync.method", "disk", *ENGINE]
    words += ["--data.random_reward", "false", "--rollout.max_response_tokens", "4"]
    words += ["--environments", f"[{environment}]", "--telemetry.rollouts_per_step", "32"]
    done = run(model, folder, *words, timeout_s=900)
    assert done.returncode == 0, done.stderr
    assert f"environment {use}: " in done.stderr, "it is said how programs run, and who grades"
    steps = records(folder, "train")
    assert len(steps) == 2 and all(f"environment/{use}/failures" not in step for step in steps)
    assert steps[0]["gradient_norm"] > 0, "rewards differ within groups, so that the step moves the weights"
    assert all(step["rollout_diff/max"] < 1e-4 for step in steps)
    return steps


@pytest.mark.sglang
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_programs_of_the_policy_run_in_a_sandbox(model: Path, engine: Any, tmp_path: Path):
    """A random model writes no programs, but its text of four characters is one now and then, and some end without an
    error. The test asks for no output, so that these are right."""
    problems = tmp_path / "problems.jsonl"
    lines = [{"prompt": f"print nothing {n}", "tests": [{"input": "", "output": ""}]} for n in range(8)]
    problems.write_text("\n".join(map(json.dumps, lines)))
    options = f'train = "{problems}", needs_fence = false, instruction = ""'
    steps = trained(chat_model(model, tmp_path), engine, tmp_path / "run", "code", options)
    assert all(step["environment/has_program/mean"] == 1.0 for step in steps)
    assert all(0 < step["reward/mean"] < 1 for step in steps)
    assert all(step["environment/sandbox_s/mean"] > 0 for step in steps)


@pytest.mark.sglang
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_answers_of_the_policy_are_graded(model: Path, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"what is {n}?"}) for n in range(8)))
    monkeypatch.setenv("JUDGE_KEY", "hunter2")
    with openai_server(model, tmp_path, key="hunter2") as address:
        options = f'train = "{prompts}", address = "{address}", model = "judge", api_key_env = "JUDGE_KEY", '
        options += f'cache = "{tmp_path / "judge.sqlite"}", attempts = 20, price_input = 1.0, '
        options += 'template = "grade {response}", instruction = "", score_pattern = "([0-9])", score_range = [0, 9], '
        options += "parameters = {temperature = 1.0, max_tokens = 32}"
        steps = trained(chat_model(model, tmp_path), engine, tmp_path / "run", "judge", options)
    assert all(0 < step["reward/judge/mean"] < 1 for step in steps)
    assert all(step["environment/judge_price/mean"] > 0 for step in steps)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), f"{path} holds the key"
