"""Parts that are given from Python become settings that name them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fiberpo_megatron.config import Config, ConfigError, dump_config, load_config
from fiberpo_megatron.environments import SingleTurn, Task, Turn
from fiberpo_megatron.fibration import Chunk, GatedChunk, TokenObjective, build_objective
from fiberpo_megatron.mcore.optimizers import TorchOptimizer
from fiberpo_megatron.trainer.advantages import LeaveOneOut
from fiberpo_megatron.trainer.given import with_given
from fiberpo_megatron.trainer.plugin_checks import make_advantage, make_objective, recorded

HERE = __name__


class Sums(SingleTurn):
    train_size, held_out_size = 5, 0

    def __init__(self, digits: int, partial: float = 0.5) -> None:
        self.places = digits

    def train(self, index: int) -> Task:
        return Task(f"{index}=", str(index))

    def score(self, task: Task, turn: Turn) -> float:
        return 0.0


@dataclass(frozen=True)
class Doubled(TokenObjective):
    """Doubles every ratio."""

    factor: float = 2.0

    def gate(self, chunk: Chunk) -> GatedChunk:
        ratio = self.factor * chunk.ratio
        return GatedChunk(ratio, chunk.weights * chunk.advantages * ratio)


class Forgetful(TorchOptimizer):
    def __init__(self, speed: float = 1.0) -> None:
        self.velocity = speed

    def torch_optimizer(self, groups):
        return torch.optim.SGD(groups)

    def fresh_state(self, parameter):
        return {}


def config(**sections: object) -> Config:
    return Config.model_validate({"model": {"path": Path("unused")}, **sections})


def test_environments_are_named_with_their_arguments():
    found = with_given(config(), environments={"sums": Sums(3, partial=0.1), "more": Sums}).environments
    assert [(e.name, e.use, e.options) for e in found] == [
        ("sums", f"{HERE}:Sums", {"digits": 3, "partial": 0.1}),
        ("more", f"{HERE}:Sums", {}),
    ]
    assert [e.name for e in with_given(config(), environments=[Sums(1)]).environments] == ["Sums"]


def test_what_no_other_process_can_find_is_refused():
    class Local(Sums):
        pass

    with pytest.raises(ConfigError, match=r"environments\.x: .*Local is defined inside a function"):
        with_given(config(), environments={"x": Local})
    with pytest.raises(ConfigError, match="is no Environment"):
        with_given(config(), environments={"x": Doubled})
    with pytest.raises(ConfigError, match="no JSON values"):
        with_given(config(), environments={"x": Sums(object())})
    with pytest.raises(ConfigError, match=r"optimizer: Forgetful does not keep its argument 'speed'"):
        with_given(config(), optimizer=Forgetful(2.0))


def test_the_config_makes_the_same_objective_again(tmp_path: Path):
    given = with_given(config(algorithm={"epsilon": 0.1}), objective=Doubled(factor=3.0), advantage=LeaveOneOut())
    assert make_objective(given) == Doubled(factor=3.0)
    assert make_advantage(given, make_objective(given)) == LeaveOneOut()
    path = tmp_path / "config.toml"
    path.write_text(dump_config(recorded(given, [])))
    again = load_config(path)
    assert make_objective(again) == Doubled(factor=3.0)
    assert make_advantage(again, make_objective(again)) == LeaveOneOut()
    built_in = with_given(config(), objective=build_objective("grpo", epsilon=0.15))
    assert make_objective(built_in) == build_objective("grpo", epsilon=0.15)


def test_a_class_takes_the_options_of_the_config():
    given = with_given(config(algorithm={"epsilon": 0.1}), objective=type(build_objective("ppo")))
    assert make_objective(given) == build_objective("ppo", epsilon=0.1)
    with pytest.raises(ConfigError, match="epsilon"):  # an option that it does not have
        make_objective(with_given(config(algorithm={"epsilon": 0.1}), objective=Doubled))
