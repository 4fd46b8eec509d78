"""The recipes of docs/objectives.md load, and make what their papers have."""

import re
import tomllib
from pathlib import Path

import pytest

from fiberpo_megatron.config import Config
from fiberpo_megatron.fibration import OBJECTIVES
from fiberpo_megatron.trainer.advantages import GroupMean
from fiberpo_megatron.trainer.plugin_checks import advice, make_advantage, make_objective, recorded

PAGE = (Path(__file__).parents[2] / "docs/objectives.md").read_text()
SNIPPETS = dict(re.findall(r"^([\w.-]+)(?: \([^\n]*\))?:\n\n```toml\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))
EXPECTED = {
    "DAPO": ("dapo", (0.28, 0.2), "token-mean", True),
    "GSPO": ("gspo", (4e-4, 3e-4), "seq-mean", True),
    "CISPO": ("cispo", (4.0, 1.0), "token-mean", True),
    "Dr.GRPO": ("drgrpo", (0.2, 0.2), "constant", False),
    "DeepSeek-V3.2": ("grpo", (0.2, 0.2), "seq-mean", False),
}


def test_the_page_has_every_recipe_and_every_objective():
    assert SNIPPETS.keys() == EXPECTED.keys()
    assert not [name for name in OBJECTIVES if not re.search(rf"`{re.escape(name)}`", PAGE) and "fiberpo-" not in name]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_is_what_its_paper_has(tmp_path: Path, name: str):
    values = tomllib.loads(SNIPPETS[name])
    given = Config.model_validate({"model": {"path": tmp_path}, "run": {"folder": tmp_path}, **values})
    objective = make_objective(given)
    use, bounds, weighting, divides = EXPECTED[name]
    assert (objective.name, objective.bounds) == (use, bounds)
    assert make_advantage(given, objective) == GroupMean(normalise_std=divides)
    algorithm = recorded(given, []).algorithm
    assert (algorithm.weighting, algorithm.normalise_std) == (weighting, divides)
    assert len(SNIPPETS[name].strip().splitlines()) <= 6  # the header and five settings
    overridden = [
        "algorithm.normalise_std = false: the paper of grpo (arXiv:2402.03300) divides by the group's standard"
    ]
    said = advice(given)
    assert len(said) == (name == "DeepSeek-V3.2") and all(line.startswith(overridden[0]) for line in said)


def test_the_terms_of_the_recipes_are_on(tmp_path: Path):
    def algorithm(name: str):
        return Config.model_validate({"model": {"path": tmp_path}, **tomllib.loads(SNIPPETS[name])}).algorithm

    assert algorithm("DAPO").truncated == "leave_out"
    assert algorithm("Dr.GRPO").normaliser == 3000
    deepseek = algorithm("DeepSeek-V3.2")
    assert (deepseek.kl.estimator, deepseek.kl.coefficient, deepseek.off_policy_mask.delta) == ("unbiased", 0.001, 0.05)
    assert deepseek.routing_replay == "rollout"
