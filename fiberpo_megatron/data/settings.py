"""Settings of the prompts: [data]."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fiberpo_megatron.settings import Section


class AdditionTask(Section):
    """Two-number addition at character level: `34+58=` is answered by `092`."""

    kind: Literal["addition"]
    name: str = "addition"
    """Domain name in metrics."""
    digits: int = Field(2, ge=1, le=6)
    """Digits of each operand."""
    held_out_every: int = Field(10, ge=2)
    """Every so many-th problem (by a fixed hash) is kept for evaluation."""
    weight: float = Field(1.0, gt=0)
    """Share of prompts drawn from this domain, relative to the others."""


class SortTask(Section):
    """Sorting digits at character level: `s:40213=` is answered by `01234`."""

    kind: Literal["sort"]
    name: str = "sort"
    """Domain name in metrics."""
    length: int = Field(5, ge=2, le=16)
    """Digits to sort."""
    held_out_every: int = Field(10, ge=2)
    """Every so many-th problem (by a fixed hash) is kept for evaluation."""
    weight: float = Field(1.0, gt=0)
    """Share of prompts drawn from this domain, relative to the others."""


class JsonlTask(Section):
    """Prompts from a file: one JSON object a line with `prompt` (string or chat messages) and `answer`."""

    kind: Literal["jsonl"]
    name: str
    """Domain name in metrics."""
    train: Path
    """Training prompts."""
    held_out: Path | None = None
    """Evaluation prompts. Unset: this domain is not evaluated."""
    reward: Literal["exact", "math_verify"] = "exact"
    """exact: the stripped response equals the answer; math_verify: the math-verify library compares them."""
    chat_template: bool = True
    """Wrap a plain string prompt into the tokenizer's chat template as a user message."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template, as its makers document them (enable_thinking, tools, ...)."""
    max_turns: int = Field(1, ge=1)
    """Turns of the policy in one trajectory. Above 1, `retry_message` follows a wrong answer as a user message; the
    last answer is scored."""
    retry_message: str = Field("That is not right. Try again.", min_length=1)
    """What the user says to a wrong answer that is not the last."""
    weight: float = Field(1.0, gt=0)
    """Share of prompts drawn from this domain, relative to the others."""

    @model_validator(mode="after")
    def turns_have_a_template(self) -> "JsonlTask":
        if self.max_turns > 1 and not self.chat_template:
            raise ValueError(
                f"data.tasks: task {self.name!r} has max_turns = {self.max_turns} and chat_template = false: only a "
                "chat template says where a turn ends; set chat_template = true or max_turns = 1"
            )
        return self


class DataConfig(Section):
    tasks: list[AdditionTask | SortTask | JsonlTask] = Field(min_length=1)
    """Domains from which prompts are drawn."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longest prompt; a longer one stops the run with its line, before anything starts."""
    curriculum: Literal["none", "adaptive"] = "none"
    """none: domains are mixed by their `weight`; adaptive: by weight x max(curriculum_floor, 4 a (1 - a)), where a is
    the domain's running solve rate, so that what is solved about half of the time is drawn most."""
    curriculum_rate: float = Field(0.1, gt=0, le=1)
    """Share of a step's solve rate in the running one."""
    curriculum_floor: float = Field(0.1, gt=0, le=1)
    """Least factor of a domain that is always or never solved, relative to one that is solved half of the time."""
    random_reward: bool = False
    """Control experiment: rewards are fair coin flips that ignore the answer."""

    @model_validator(mode="after")
    def names_differ(self) -> "DataConfig":
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data.tasks: the domain name {twice[0]!r} is used twice; give each task its own `name`")
        return self
