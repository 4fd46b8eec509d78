"""This module defines the settings of the prompts: [data]."""

from typing import Literal

from pydantic import Field

from fiberpo_megatron.settings import Section


class DataConfig(Section):
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longest prompt, in tokens."""
    long_prompts: Literal["error", "skip"] = "error"
    """What happens when a training task's prompt is longer. error: the run stops and names file and line; skip: the
    next task of the environment that fits takes its place, which is counted. A held-out prompt that is longer always
    stops the run."""
    checked_prompts: int = Field(10_000, ge=1)
    """Tasks of each split, evenly spread over it, that are read and tokenised before the start, so that bad ones are
    found at once. The others are checked when they are drawn. Of an environment whose tasks do not stand in files, only
    the first task is checked."""
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
