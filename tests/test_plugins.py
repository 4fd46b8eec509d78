"""What options a plug-in takes is read from its constructors."""

import pytest

from fiberpo_megatron.environments import SingleTurn
from fiberpo_megatron.plugins import Plugin, PluginError, check_options, find, parameters
from fiberpo_megatron.trainer.given import environment_configs


class Numbers(SingleTurn):
    """A base class with options."""

    train_size = 1

    def __init__(self, low: int, high: int = 9, name: str = "numbers") -> None:
        self.range = (low, high, name)


class Even(Numbers):
    """A class that hands its other options to its base class, and sets one of them itself."""

    not_options = ("name",)

    def __init__(self, step: int = 2, **options: int) -> None:
        super().__init__(name="even", **options)
        self.step = step


class Anything(SingleTurn):
    """A class that takes any option, since none of its base classes has a constructor."""

    def __init__(self, low: int, **options: int) -> None:
        self.options = options


def check(target: type, **options: object) -> None:
    check_options(Plugin(f"here:{target.__name__}", target, None), options, "environments.numbers")


def test_a_constructor_with_further_options_takes_those_of_its_base_class() -> None:
    names, anything = parameters(Even)
    assert (list(names), anything) == (["step", "low", "high"], False)
    check(Even, low=1, high=4, step=3)
    with pytest.raises(PluginError, match=r"Even does not take the option 'hihg'; did you mean 'high'"):
        check(Even, low=1, hihg=4)
    with pytest.raises(PluginError, match=r"does not take the option 'name'"):
        check(Even, low=1, name="odd")
    with pytest.raises(PluginError, match=r"needs the option 'low'"):
        check(Even, step=3)


def test_a_constructor_with_further_options_and_no_base_class_takes_any() -> None:
    check(Anything, low=1, whatever=2)
    assert parameters(Anything)[1]


def test_options_of_an_object_are_those_that_it_was_made_with() -> None:
    [config] = environment_configs([Even(3, low=1, high=4)])
    assert config.options == {"step": 3, "low": 1, "high": 4}


@pytest.mark.parametrize(
    ("name", "option"),
    [("math", "reward"), ("judge", "max_turns"), ("code", "answer_after"), ("tools", "chat_template")],
)
def test_built_in_environments_refuse_options_of_chat_that_they_set_themselves(name: str, option: str) -> None:
    plugin = find("environments", name, "use")
    taken = parameters(plugin.target)[0]
    assert option not in taken and {"train", "held_out", "solve_rate_range", "difficulty"} <= set(taken)
