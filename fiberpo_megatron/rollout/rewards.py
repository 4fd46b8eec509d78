"""This module makes one reward of the components that an environment gave (`reward_weights` of [[environments]])."""

from fiberpo_megatron.environments import Outcome
from fiberpo_megatron.environments.host import EnvironmentFailed
from fiberpo_megatron.environments.settings import EnvironmentConfig

OWN = "reward"
"""The name in `reward_weights` that stands for the environment's own reward."""


def weighted_reward(config: EnvironmentConfig, task: str | None, outcome: Outcome) -> float:
    """Return the weighted sum of an outcome's components, or its own reward where no weights are set.

    Every component needs a weight and every weight a component, so that a misspelt name is found at the first outcome.
    The environment's own reward is the component "reward", whose weight may be left out, which is 0.

    Raises EnvironmentFailed that names the environment, the task and the component, whatever `on_failure` says: no
    other trajectory could be rewarded either.
    """
    weights = config.reward_weights
    if weights is None:
        return outcome.reward
    components = {OWN: outcome.reward, **outcome.rewards}
    for name in weights:
        if name not in components:
            raise EnvironmentFailed(
                f"environment {config.name!r}: reward_weights has {name!r}, but the outcome of task {task} has no such "
                f"component, only {', '.join(components)}; correct reward_weights or the environment"
            )
    for name in outcome.rewards:
        if name not in weights:
            raise EnvironmentFailed(
                f"environment {config.name!r}: the outcome of task {task} has the component {name!r}, for which "
                f"reward_weights has no weight; add `{name} = 0.0` if it shall not count"
            )
    return sum(weight * components[name] for name, weight in weights.items())
