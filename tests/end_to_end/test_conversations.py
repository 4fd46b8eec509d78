"""Conversations of several turns with Megatron and a real SGLang."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fiberpo_megatron.data.tokenizer import load_tokenizer
from tests.end_to_end.test_training import records, run

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.mark.sglang
def test_wrong_answers_are_tried_again(model: Path, engine: Any, tmp_path: Path):
    """The problems stand in a parquet file, and one is too long. A random model ends a turn now and then. The engine's
    log-probs of a later turn are those of the trainer after the whole conversation, and so are its experts: the turns
    stand where the trainer thinks they stand."""
    model = Path(shutil.copytree(model, tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    problems = tmp_path / "problems.parquet"
    rows = [{"question": f"what is {i}+{i}?" * (40 if i == 2 else 1), "gold": {"sum": 2 * i}} for i in range(8)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), problems)
    options = f'train = "{problems}", prompt = "question", answer = "gold.sum", difficulty = "gold.sum"'
    options = f'{options}, max_turns = 3, retry_message = "no, again"'
    curriculum = "curriculum_steps = 2, curriculum_start = 0.5"
    sums = f'{{name = "sums", use = "chat", {curriculum}, options = {{{options}}}}}'
    words = ["--rollout.engine.urls", f'["{engine.url}"]', "--evaluation.prompts", "0", "--trainer.steps", "1"]
    words += ["--rollout.max_response_tokens", "32", "--rollout.return_routing", "true"]
    words += ["--telemetry.rollouts_per_step", "32", "--environments", f"[{sums}]"]
    words += ["--data.max_prompt_tokens", "60", "--data.long_prompts", "skip"]
    done = run(model, tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path / "run", "train")
    assert 1.1 < record["turns/mean"] < 3
    assert record["rollout_diff/max"] < 1e-4  # float32 on both sides
    assert record["routing_agreement/mean"] > 0.99  # an exact tie of two router scores may fall either way

    tokenizer = load_tokenizer(model)
    between = tokenizer.encode("u:no, again<eos>a:", add_special_tokens=False)
    lines = (tmp_path / "run/rollouts/step_000000.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in lines} == {"0", "1", "3"}, "of the first half, all but the long one"
    assert record["environment/sums/long_prompts"] >= 1
    conversations = [rollout for rollout in map(json.loads, lines) if "loss_mask" in rollout]
    assert conversations
    for rollout in conversations:
        written = [i for i, sampled in zip(rollout["token_ids"], rollout["loss_mask"]) if not sampled]
        turns = len(rollout["weight_versions"])
        assert written == between * (turns - 1) and 2 <= turns <= 3
        assert "no, again" in rollout["response"]
        for _, _, end in rollout["weight_versions"][:-1]:
            assert rollout["token_ids"][end - 1] == tokenizer.eos_token_id
        assert all((value < 0) == bool(sampled) for value, sampled in zip(rollout["log_probs"], rollout["loss_mask"]))
