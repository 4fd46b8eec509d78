"""Runs that were made by a version with data.tasks, [rollouts] and flat settings of the optimizer go on.

earlier/config.toml is the resolved config that its demo wrote into the run folder; earlier/checkpoint.json and
earlier/tensors.txt (names and shapes) describe a checkpoint of MODEL that it saved.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.config import load_config
from fiberpo_megatron.mcore.parallel.layout import start_layout
from fiberpo_megatron.mcore.policy import build_policy
from tests.distributed.parity import QWEN3_MOE, make_config

EARLIER = Path(__file__).parent / "earlier"
DEMO = Path(__file__).parents[2] / "examples/demo/train.toml"
MODEL = {**QWEN3_MOE, "num_hidden_layers": 1, "num_experts": 2, "vocab_size": 16}


def test_a_resolved_config_means_what_it_meant():
    """It is today's demo with the few settings that its command line had changed; the warning shows the new text."""
    with pytest.warns(UserWarning) as found:
        earlier = load_config(EARLIER / "config.toml")
    changed = ["--trainer.steps", "3", "--batch.prompts", "4", "--evaluation.prompts", "8"]
    changed += ["--evaluation.every_steps", "2", "--environments.0.options.held_out_every", "10"]
    today = load_config(DEMO, changed)
    assert earlier.optimizer.model_dump(exclude={"beta1", "eps"}) == today.optimizer.model_dump(
        exclude={"beta1", "eps"}
    )
    assert (earlier.optimizer.beta1, earlier.optimizer.eps) == (0.9, 1e-8)  # defaults that it had written out
    assert earlier.weight_sync.bucket_mib == 256
    assert earlier.algorithm.weighting == "seq-mean" and today.algorithm.weighting is None  # the objective's own
    assert earlier.algorithm.preset == "paper" and today.algorithm.preset == "recommended"
    assert earlier.algorithm.unclip_positive is False  # the default of then and of the bare form
    engine = earlier.rollout.engine
    timeouts = (earlier.weight_sync.timeout_s, engine.start_timeout_s, engine.request_timeout_s)
    assert timeouts == (300.0, 300.0, 600.0)  # as it had written them out
    rest = {
        "optimizer": True,
        "weight_sync": {"bucket_mib", "timeout_s"},
        "rollout": {"engine": {"start_timeout_s", "request_timeout_s", "max_running_requests"}},
        "algorithm": {"weighting", "preset", "unclip_positive"},
    }
    assert earlier.model_dump(exclude=rest) == today.model_dump(exclude=rest)
    (warning,) = found
    shown = tomllib.loads(str(warning.message).partition("\n\n")[2])
    assert shown["algorithm"] == {"preset": "paper"}
    assert shown["storage"] == {"dump": False, "unfinished": True}
    assert shown["environments"] == [
        {
            "name": "addition",
            "use": "examples.demo.environments:Addition",
            "weight": 1.0,
            "options": {"digits": 2, "held_out_every": 10},
        }
    ]


def save_and_resume(folder: str) -> dict[str, Any]:
    """Save a checkpoint, let the earlier version's description stand for it, and load it into another policy."""
    config = make_config()
    layout = start_layout(MODEL, config.parallel, config.run)
    saved = build_policy(config, MODEL, layout)
    saved.save(folder, {"step": 3, "prompts": {}, "metrics": {}})
    path = Path(folder) / "checkpoint.json"
    earlier = json.loads((EARLIER / "checkpoint.json").read_text())
    path.write_text(json.dumps(earlier | {"files": json.loads(path.read_text())["files"]}))
    resumed = build_policy(make_config(run={"seed": 1}), MODEL, layout)
    before = [parameter.detach().clone() for parameter in resumed.models[0].parameters()]
    state = resumed.load(folder)
    pairs = list(zip(saved.models[0].parameters(), resumed.models[0].parameters()))
    return {
        "state": state,
        "equal": all(torch.equal(ours, theirs) for ours, theirs in pairs),
        "differed": not all(torch.equal(old, ours) for old, (ours, _) in zip(before, pairs)),
    }


def test_a_checkpoint_has_the_same_tensors_and_is_resumed(tmp_path: Path):
    folder = tmp_path / "step-00000003"
    (found,) = run_ranks(1, save_and_resume, str(folder))
    assert found == {"state": {"step": 3, "prompts": {}, "metrics": {}}, "equal": True, "differed": True}
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    lines = [f"{name} {list(facts.size) if hasattr(facts, 'size') else 'bytes'}" for name, facts in stored.items()]
    assert sorted(lines) == sorted((EARLIER / "tensors.txt").read_text().splitlines())
