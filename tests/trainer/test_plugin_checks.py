"""What an objective needs is compared with what a run supplies, before anything starts."""

import json
from pathlib import Path

import pytest

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.trainer.plugin_checks import make_objective, recorded
from fiberpo_megatron.trainer.preflight import _check_keys, _check_routing

DENSE = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
    "vocab_size": 64,
}  # fmt: skip


def config(folder: Path, **sections: object) -> Config:
    (folder / "config.json").write_text(json.dumps(DENSE))
    return Config.model_validate({"model": {"path": folder}, **sections})


def chain(*levels: list[str]) -> dict[str, object]:
    names = {"+".join(level): [0.1, 0.1] for level in levels}
    return {"algorithm": {"levels": list(levels), "budgets": names}}


def test_turns_versions_and_engines_are_keys_that_a_run_supplies(tmp_path: Path):
    for levels in ([["turn"], ["trajectory"]], [["trajectory"], ["engine"]], [["trajectory"], ["weight_version"]]):
        objective = make_objective(config(tmp_path, **chain(*levels)))
        assert objective.level_names == tuple("+".join(level) for level in levels)


def test_a_key_that_no_run_supplies_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"\[algorithm\]: level 'paragraph'.* needs the key 'paragraph'"):
        make_objective(config(tmp_path, **chain(["paragraph"], ["trajectory"])))


def test_a_model_without_experts_has_no_expert_level_and_no_routing(tmp_path: Path):
    with pytest.raises(ConfigError, match="needs the key 'expert'"):
        _check_keys(config(tmp_path, algorithm={"objective": "fiberpo-expert"}))
    _check_keys(config(tmp_path, algorithm={"objective": "fiberpo-domain"}))
    with pytest.raises(ConfigError, match="routing was asked for, but a llama model has no experts"):
        _check_routing(config(tmp_path, rollout={"return_routing": True}))


def test_only_plug_ins_from_outside_are_recorded_by_their_path(tmp_path: Path):
    environments = [{"name": "a", "use": "jsonl"}, {"name": "b", "use": "numbers_of_mine"}]
    found = recorded(
        config(tmp_path, environments=environments),
        [("fiberpo_megatron.environments.jsonl:Jsonl", "fiberpo-megatron 0.1.0"), ("mine.numbers:Numbers", "mine 1.2")],
    ).environments
    assert [(e.use, e.version) for e in found] == [("jsonl", None), ("mine.numbers:Numbers", "mine 1.2")]
