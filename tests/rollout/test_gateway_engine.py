"""Agents on a real SGLang, through the gateway: what is trained on is what the engine returned, token by token."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fiberpo_megatron.data.encoding import Encoder
from fiberpo_megatron.data.prompts import Place
from fiberpo_megatron.data.tokenizer import load_tokenizer
from fiberpo_megatron.engines.client import Sampling
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.rollout.environments import Environments
from fiberpo_megatron.rollout.generator import Generator
from fiberpo_megatron.rollout.sampler import EngineSampler
from fiberpo_megatron.types import Completion, flatten
from tests.tiny_model import VOCABULARY

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 12}


class Recording(EngineSampler):
    """Remembers what the engine returned, and to which tokens."""

    asked: list[tuple[tuple[int, ...], Completion]]

    async def sample(self, prompt: Any, seeds: Any, **limits: Any) -> list[Completion]:
        (completion,) = await super().sample(prompt, seeds, **limits)
        self.asked.append((tuple(prompt), completion))
        return [completion]


@pytest.mark.sglang
def test_the_rows_are_what_the_engine_returned(model: Path, engine: Any, tmp_path: Path) -> None:
    """Four trajectories at once. Each sampled token is in exactly one row, behind the tokens that it was sampled
    after, with the log-prob of the engine."""
    model = Path(shutil.copytree(model, tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    options = {"tasks": {"use": "tests.environments.agents:Words"}, "agent": "tests.environments.agents:several"}
    config = EnvironmentConfig(name="agents", use="gateway", options=options, workers=1)
    environments = Environments([config], folder=tmp_path / "environments", rank=0)
    try:
        encoder = Encoder(
            load_tokenizer(model),
            ["agents"],
            [{}],
            model=model,
            vocabulary=VOCABULARY,
            max_prompt_tokens=400,
            tools=True,
        )
        places = [Place(0, "train", index) for index in range(2)]
        prompts = environments.prompts(places, encoder)
        with EnginePool([engine], timeout_s=60, loop=environments.loop) as pool:
            sampling = Sampling(12, stop_token_ids=encoder.stop_ids)
            sampler = Recording(pool, sampling, max_concurrent=16, vocabulary=VOCABULARY)
            sampler.asked = []
            parse = partial(pool.clients[0].parse_tool_calls, parser="qwen25")
            generator = Generator(
                sampler, environments.running, encoder, environments.loop, 0, parse_tools=parse, sampling=SAMPLING,
                longest=500,
            )  # fmt: skip
            groups = [group for _, group in generator.groups(prompts, 2, "checkpoint", lambda: False)]
    finally:
        environments.close()

    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    assert len(trajectories) == 4 and len(sampler.asked) == 4 * 5
    assert all(t.metrics["gateway_requests"] == 5 for t in trajectories)
    assert all(3 <= len(t.sequences) <= 5 for t in trajectories), "a cut answer cannot be continued"
    batch = flatten(groups)
    rows = np.split(np.arange(len(batch.tokens)), batch.offsets[1:-1])
    found = []
    for row in rows:
        tokens, sampled = batch.tokens[row].tolist(), batch.response_mask[row]
        begins = np.flatnonzero(sampled & ~np.concatenate([[False], sampled[:-1]]))
        for begin in begins:
            end = begin + int(np.argmin([*sampled[begin:], False]))
            found.append(
                (tuple(tokens[:begin]), tuple(tokens[begin:end]), tuple(batch.rollout_log_probs[row][begin:end]))
            )
    returned = [(prompt, c.token_ids, tuple(c.log_probs)) for prompt, c in sampler.asked]
    assert sorted(found) == sorted(returned)
    assert batch.response_mask.sum() == sum(len(c.token_ids) for _, c in sampler.asked)
