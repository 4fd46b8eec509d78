"""What an objective needs is compared with what a run supplies, before anything starts."""

import json
import tomllib
from pathlib import Path

import pytest

from fiberpo_megatron import plugins
from fiberpo_megatron.config import Config, ConfigError, dump_config
from fiberpo_megatron.fibration import FiberPO
from fiberpo_megatron.trainer.advantages import RLOO, BatchStandardised, GroupMean, LeaveOneOut
from fiberpo_megatron.trainer.given import with_given
from fiberpo_megatron.trainer.plugin_checks import (
    advice,
    check_plugins,
    make_advantage,
    make_objective,
    recorded,
    with_recorded_recipe,
)
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
    for levels in ([["turn"], ["trajectory"]], [["trajectory"], ["engine"]], [["trajectory"], ["version"]]):
        objective = make_objective(config(tmp_path, **chain(*levels)))
        assert objective.level_names == tuple("+".join(level) for level in levels)


def test_a_key_that_no_run_supplies_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"\[algorithm\]: level 'paragraph'.* needs the key 'paragraph'"):
        make_objective(config(tmp_path, **chain(["paragraph"], ["trajectory"])))


NAMED = [{"name": "code", "use": "chat"}, {"name": "math", "use": "chat"}]
TREE = {"by": "domain", "*": [["trajectory"], ["domain"]], "math": [["turn"], ["trajectory"], ["domain"]]}


def by_name(**budgets: object) -> dict[str, object]:
    return {
        "objective": "fiberpo-domain",
        "budgets": {**dict.fromkeys(("trajectory", "prompt_group"), [0.2, 0.1]), **budgets},
    }


def test_budgets_and_branches_name_domains(tmp_path: Path):
    """A file of settings and a record of the run hold names; the objective has ids."""
    table = {"*": [0.06, 0.05], "math": [0.1, 0.08]}
    given = config(tmp_path, environments=NAMED, algorithm=by_name(domain=table))
    for found in (given, Config.model_validate(tomllib.loads(dump_config(given)))):
        objective = make_objective(found)
        assert objective.tree.levels[-1].budget.of_id == {1: (0.1, 0.08)}
    budgets = {
        "math:turn": {"by": "turn", "*": [0.2, 0.1], "0": [0.3, 0.2]},
        "trajectory": [0.2, 0.1],
        "domain": [0.1, 0.08],
    }
    tree = make_objective(config(tmp_path, environments=NAMED, algorithm={"levels": TREE, "budgets": budgets}))
    assert tree.level_names == ("math:turn", "trajectory", "domain") and tree.branch_choice.of_id == {1: 1}
    assert tree.tree.levels[0].budget.of_id == {0: (0.3, 0.2)}


def test_an_objective_that_is_given_from_python_has_ids(tmp_path: Path):
    given = FiberPO(budgets={"trajectory": {"by": "trajectory", "*": (0.2, 0.1)}})
    kept = FiberPO(
        levels=[["trajectory"], ["domain"]],
        budgets={"trajectory": (0.2, 0.1), "domain": {1: (0.3, 0.2), "*": (0.2, 0.1)}},
    )
    found = with_given(config(tmp_path, environments=NAMED), objective=kept)
    assert make_objective(Config.model_validate(tomllib.loads(dump_config(found)))).tree == kept.tree
    with pytest.raises(ConfigError, match="go by 'trajectory', whose ids mean another trajectory in each mini-batch"):
        make_objective(with_given(config(tmp_path), objective=given))


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (
            by_name(domain={"*": [0.1, 0.08], "maths": [0.1, 0.08]}),
            "domain 'maths', which is unknown; the names of domain are 'code', 'math'",
        ),
        (by_name(domain={"by": "engine", "*": [0.1, 0.08]}), "'engine', which is no key of level 'domain'"),
        (
            by_name(domain=[0.1, 0.08], prompt_group={"*": [0.1, 0.08]}),
            "go by 'prompt_group', whose ids mean another prompt_group",
        ),
        ({"objective": "apc", "budgets": {"state": {"*": [0.1, 0.1]}}}, r"budgets\['state'\] is .*; pass a pair"),
        (
            {"levels": TREE | {"biology": [["trajectory"]]}},
            "levels has an entry for domain 'biology', which is unknown",
        ),
        ({"levels": {"by": "domain", "math": [["trajectory"]]}}, "levels by 'domain' has no chain for code"),
        ({"levels": {"by": "turn", "0": [["trajectory"]]}}, "levels by 'turn' has no chain for all others"),
        (
            {"levels": [["engine"]], "budgets": {"engine": {"*": [0.1, 0.08], "1": [0.1, 0.08]}}},
            "list engine 1, but the run has engine 0 to 0",
        ),
        (
            {
                "objective": "fiberpo-expert-global",
                "budgets": dict.fromkeys(("trajectory+expert", "prompt_group+expert", "domain+expert"), [0.1, 0.08])
                | {"expert": {"2": [0.1, 0.08]}},
            },
            "list expert 2, but the run has expert 0 to 0",
        ),
    ],
)
def test_budgets_and_branches_of_what_a_run_does_not_have_are_refused(tmp_path: Path, algorithm: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        make_objective(config(tmp_path, environments=NAMED, algorithm=algorithm))


def test_a_model_without_experts_has_no_expert_level_and_no_routing(tmp_path: Path):
    with pytest.raises(ConfigError, match="needs the key 'expert'"):
        _check_keys(config(tmp_path, algorithm={"objective": "fiberpo-expert"}))
    _check_keys(config(tmp_path, algorithm={"objective": "fiberpo-domain"}))
    with pytest.raises(ConfigError, match="routing was asked for, but a llama model has no experts"):
        _check_routing(config(tmp_path, rollout={"return_routing": True}))


def test_only_plug_ins_from_outside_are_recorded_by_their_path(tmp_path: Path):
    environments = [{"name": "a", "use": "chat"}, {"name": "b", "use": "numbers_of_mine"}]
    found = recorded(
        config(tmp_path, environments=environments),
        [
            ("fiberpo_megatron.environments.builtin.chat:Chat", "fiberpo-megatron 0.1.0"),
            ("mine.numbers:Numbers", "mine 1.2"),
        ],
    ).environments
    assert [(e.use, e.version) for e in found] == [("chat", None), ("mine.numbers:Numbers", "mine 1.2")]


@pytest.mark.parametrize(
    ("algorithm", "weighting"),
    [
        ({"objective": "apc"}, "token-mean"),
        ({"objective": "grpo"}, "seq-mean"),
        ({"objective": "apc", "weighting": "seq-mean"}, "seq-mean"),
    ],
)
def test_the_token_weights_that_the_objective_chose_are_recorded(tmp_path: Path, algorithm, weighting: str):
    assert recorded(config(tmp_path, algorithm=algorithm), []).algorithm.weighting == weighting


@pytest.mark.parametrize(
    ("algorithm", "estimator"),
    [
        ({"objective": "fiberpo"}, GroupMean()),
        ({"objective": "dapo"}, GroupMean()),
        ({"objective": "drgrpo"}, GroupMean(normalise_std=False)),
        ({"objective": "drgrpo", "advantage": "group-mean"}, GroupMean(normalise_std=False)),
        ({"objective": "drgrpo", "normalise_std": True}, GroupMean()),
        ({"objective": "rloo"}, RLOO()),
        ({"objective": "grpo", "advantage": "rloo"}, RLOO()),
        ({"objective": "grpo", "advantage": "leave-one-out"}, LeaveOneOut()),
        ({"objective": "reinforce++"}, BatchStandardised()),
        (
            {
                "objective": "reinforce++",
                "advantage": {"use": "reinforce++", "options": {"baseline": "group-mean"}},
            },
            BatchStandardised(baseline="group-mean"),
        ),
    ],
    ids=str,
)
def test_the_advantage_is_the_papers_unless_the_config_says_otherwise(tmp_path: Path, algorithm, estimator):
    """The recorded config, which names it, makes the same one and overrides nothing that the first did not."""
    given = config(tmp_path, algorithm=algorithm)
    assert make_advantage(given, make_objective(given)) == estimator
    again = recorded(given, [])
    assert again.algorithm.advantage is not None
    assert make_advantage(again, make_objective(again)) == estimator
    assert advice(again) == advice(given)


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ({"objective": "dapo"}, None),
        ({"objective": "dapo", "weighting": "token-mean", "advantage": "group-mean", "normalise_std": True}, None),
        (
            {"objective": "dapo", "weighting": "seq-mean"},
            'algorithm.weighting = "seq-mean": the paper of dapo (arXiv:2503.14476) has "token-mean"',
        ),
        (
            {"objective": "rloo", "advantage": "group-mean"},
            'algorithm.advantage = "group-mean": the paper of rloo (arXiv:2402.14740) has "rloo"',
        ),
        (
            {"objective": "drgrpo", "normalise_std": True},
            "algorithm.normalise_std = true: the paper of drgrpo (arXiv:2503.20783) does not divide by the group's "
            "standard deviation",
        ),
        ({"objective": "reinforce", "weighting": "token-mean", "advantage": "none"}, None),
        (
            {"objective": "dapo", "epsilon": [0.3, 0.1]},
            "algorithm.epsilon = [0.3, 0.1]: a pair is (high, low), the width for positive advantages first; write "
            "{low = 0.1, high = 0.3}",
        ),
        ({"objective": "dapo", "epsilon": {"low": 0.1, "high": 0.3}}, None),
    ],
)
def test_a_run_says_once_what_overrides_the_paper(tmp_path: Path, algorithm, words: str | None):
    assert advice(config(tmp_path, algorithm=algorithm)) == ([] if words is None else [words])


def test_the_constant_of_token_weights_is_recorded_and_a_resumed_run_keeps_it(tmp_path: Path):
    run = {"folder": tmp_path}
    given = config(tmp_path, run=run, algorithm={"objective": "drgrpo"}, rollout={"max_response_tokens": 300})
    kept = recorded(given, [])
    assert (kept.algorithm.weighting, kept.algorithm.normaliser) == ("constant", 300)
    (tmp_path / "config.toml").write_text(dump_config(kept))
    longer = config(tmp_path, run=run, algorithm={"objective": "drgrpo"}, rollout={"max_response_tokens": 400})
    resumed = with_recorded_recipe(longer, resume=True).algorithm
    assert (resumed.normaliser, resumed.normalise_std) == (300, False)
    assert with_recorded_recipe(longer, resume=False) == longer
    other = config(tmp_path, run=run, algorithm={"objective": "grpo"})
    assert with_recorded_recipe(other, resume=True).algorithm.weighting is None


def test_normalise_std_is_refused_where_the_advantage_does_not_read_it(tmp_path: Path):
    given = config(tmp_path, algorithm={"objective": "reinforce++", "normalise_std": True})
    with pytest.raises(ConfigError, match="normalise_std"):
        make_advantage(given, make_objective(given))


def test_a_run_resumes_with_the_versions_that_it_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The optimizer's package was upgraded since: the message names both versions, and how to accept the new one."""
    (tmp_path / "mine_of_version.py").write_text(
        "from fiberpo_megatron.mcore.optimizers import TorchOptimizer\n\n\n"
        "class Plain(TorchOptimizer):\n"
        "    def torch_optimizer(self, groups):\n        raise NotImplementedError\n\n"
        "    def fresh_state(self, parameter):\n        return {}\n"
    )
    (tmp_path / "numbers.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    monkeypatch.syspath_prepend(tmp_path)
    version = {"mine_of_version": "mine 1.0"}
    monkeypatch.setattr(plugins, "package_version", lambda module: version.get(module))
    options = {"train": str(tmp_path / "numbers.jsonl")}
    wanted = config(
        tmp_path,
        run={"folder": tmp_path / "run"},
        optimizer={"kind": "mine_of_version:Plain"},
        environments=[{"name": "numbers", "use": "chat", "options": options}],
    )
    check_plugins(wanted, resume=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(dump_config(recorded(wanted, [("fiberpo_megatron.x:X", None)])))
    check_plugins(wanted, resume=True)
    version["mine_of_version"] = "mine 2.0"
    check_plugins(wanted, resume=False)  # another run may take what is installed
    with pytest.raises(
        ConfigError, match=r"optimizer\.kind: the run was started with .* of mine 1\.0, .* has mine 2\.0"
    ):
        check_plugins(wanted, resume=True)
