"""This module defines the settings of the prompts: [data]."""

from typing import Literal

from pydantic import Field

from fiberpo_megatron.settings import Section


class DataConfig(Section):
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longest prompt; a longer one stops the run with its line, before anything starts."""
    curriculum: Literal["none", "adaptive"] = "none"
    """none: environments are mixed by their `weight`; adaptive: by weight x max(curriculum_floor, 4 a (1 - a)), where a
    is the environment's running solve rate, so that what is solved about half of the time is drawn most."""
    curriculum_rate: float = Field(0.1, gt=0, le=1)
    """Share of a step's solve rate in the running one."""
    curriculum_floor: float = Field(0.1, gt=0, le=1)
    """Least factor of an environment that is always or never solved, relative to one that is solved half of the
    time."""
    random_reward: bool = False
    """Replace all rewards by fair coin flips that ignore the answer, for a control experiment."""
