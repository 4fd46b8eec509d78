"""An agent of another package is trained: its loop talks to the gateway, with a real SGLang and Megatron behind it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.test_training import records, run
from tests.rollout.test_gateway_engine import TEMPLATE


@pytest.mark.sglang
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_an_agent_of_smolagents_is_trained(model: Path, tmp_path: Path) -> None:
    """smolagents writes its memory anew at every step, so that most of its requests are branches. The trainer's
    log-probs of all of them are the engine's: each branch stands in the tokens that it was sampled in."""
    model = Path(shutil.copytree(model, tmp_path / "model"))
    for name, change in (
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
        ("config.json", {"max_position_embeddings": 4096}),
    ):
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(settings | change))
    tasks = 'tasks = {use = "tests.environments.agents:Words"}'
    options = f'{{{tasks}, agent = "tests.end_to_end.smolagents_agent:solve", sampling = "ignore"}}'
    agents = f'{{name = "agents", use = "gateway", deadline_s = 300.0, workers = 1, options = {options}}}'
    words = ["--evaluation.prompts", "0", "--trainer.steps", "1", "--environments", f"[{agents}]"]
    words += ["--rollout.max_response_tokens", "24", "--rollout.engine.max_total_tokens", "16384"]
    words += ["--data.max_prompt_tokens", "4000", "--batch.micro_batch_tokens", "4096", "--batch.prompts", "2"]
    words += ["--batch.samples_per_prompt", "2", "--batch.mini_batches", "1", "--telemetry.rollouts_per_step", "8"]
    done = run(model, tmp_path / "run", *words, timeout_s=800)
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path / "run", "train")
    assert record["environment/gateway_requests/mean"] >= 3 and record["environment/gateway_ignored/mean"] >= 2
    assert record["branches/mean"] > 1
    assert record["rollout_diff/max"] < 1e-4  # float32 on both sides
    rollouts = map(json.loads, (tmp_path / "run/rollouts/step_000000.jsonl").read_text().splitlines())
    branches = [branch for rollout in rollouts for branch in rollout.get("branches", ())]
    assert branches and all(branch["token_ids"] for branch in branches)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "run/hf"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
