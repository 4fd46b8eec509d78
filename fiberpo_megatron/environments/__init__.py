"""This module holds the classes with which a person brings tasks, rewards and tools to a run.

An environment is one class in a file of yours, named in the config by its import path:

    from fiberpo_megatron.environments import Outcome, SingleTurn, Task, Turn

    class Sums(SingleTurn):
        train_size, held_out_size = 900, 100

        def train(self, index: int) -> Task:
            return Task(prompt=f"{index}+1=", answer=str(index + 1))

        def held_out(self, index: int) -> Task:
            return Task(prompt=f"{900 + index}+1=", answer=str(901 + index))

        def score(self, task: Task, turn: Turn) -> float:
            return float(turn.text.strip() == task.answer)

It runs in worker processes, apart from the trainer, perhaps in an interpreter of its own. Hence this module imports
the standard library alone. docs/extending.md walks through a complete example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Message = Mapping[str, Any]
"""A chat message as chat templates take it: `role`, `content` and whatever else the template reads."""
Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Task:
    """Holds one problem that the policy is asked to solve. Every value must be representable in JSON."""

    prompt: str | Sequence[Message]
    """A string is raw text; chat messages are written by the tokenizer's chat template."""
    answer: Any = None
    """The right answer, for the environment's own use. `fiberpo sft` trains on it and needs a string."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Facts about the task. They appear in the files of the run's rollouts."""
    id: str | None = None
    """A name that is stable over runs. Left out, it is made of the environment's name, the split and the index."""


@dataclass(frozen=True)
class ToolCall:
    """Holds a tool call that the engine found in the policy's text."""

    name: str
    arguments: str
    """The arguments as the policy wrote them, usually JSON."""
    id: str | None = None


@dataclass(frozen=True)
class Turn:
    """Holds what the policy said in one turn."""

    text: str
    """The text without the tokens that end a turn. Where tool calls were found, what stands around them."""
    finish_reason: str = "stop"
    """stop: the policy ended its turn; length: the turn was cut at its limit of tokens."""
    token_ids: tuple[int, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_tokens: int = 0
    """Number of tokens before the turn: what the policy read. 0 where it is not known."""

    @property
    def truncated(self) -> bool:
        """Return whether the turn was cut at its limit of tokens."""
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Outcome:
    """Says what a trajectory earned."""

    reward: float
    """The number that training maximises. It must be finite."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Components of the reward by name. They are logged as `reward/NAME/mean` and have no effect on training."""
    correct: bool | None = None
    """Whether the task was solved, for the accuracy in metrics. None: a reward above 0 counts as solved."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name. They are logged as `environment/NAME/mean`."""
    answer: str | None = None
    """The final answer in one way of writing, such as "1/2" for 0.5 and 2/4: samples with equal ones vote together in
    maj@n, and an empty one abstains. None: the whole stripped text votes."""


@dataclass(frozen=True)
class Trajectory:
    """Holds a finished trajectory as `score_group` gets it."""

    turns: tuple[Turn, ...]
    outcome: Outcome
    """What `score` or `run` said about it."""


class Conversation(Protocol):
    """Speaks for the policy in `Environment.run`."""

    @property
    def seed(self) -> int:
        """Return a number that depends only on the run's seed, the prompt and which of its samples this is."""
        ...

    @property
    def sampling(self) -> Mapping[str, float]:
        """Return how the policy is sampled: `temperature`, `top_p` and `max_tokens`, the limit of each turn."""
        ...

    async def say(
        self,
        new: str | Message | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
    ) -> Turn:
        """Say something to the policy and get its answer.

        `new` holds only what was added since the last call: at first the prompt (usually `task.prompt`), later one
        or more messages, or a text that is appended as it is. Never pass earlier answers: the tokens that the policy
        sampled stay as they were sampled. The calls of one trajectory follow each other; two at the same time raise
        RuntimeError.

        tools: descriptions for the chat template; they must be given with the first call and stay the same.
        max_tokens: a limit for this turn below `rollout.max_response_tokens`.
        stop: single characters at which this turn ends, besides those of `rollout.stop`.

        Raises ValueError for a message that cannot follow, such as one after a turn that was cut.
        """
        ...

    def fork(self, turns: int = 0) -> Conversation:
        """Return another branch of the trajectory, which has the first `turns` turns of this conversation in common.

        It is a conversation of its own: it may go on beside this one, also at the same time, and shares the reward.
        Where `turns` is 0 its first `say` takes a whole prompt. Otherwise the branch goes on behind the tokens of
        those turns, which are context there and are trained on here alone. A branch in which nothing is said costs
        nothing.

        Raises ValueError for more turns than this conversation has.
        """
        ...


class Environment:
    """Brings tasks, and decides what happens between a task and its outcome. Subclass it and define what follows.

    The options of the config are the arguments of `__init__`. One instance lives in each worker process.
    """

    train_size: int
    """Number of training tasks."""
    held_out_size: int = 0
    """Number of tasks that are kept for evaluation; they must not be among the training tasks."""
    check_all_tasks: bool = False
    """True has every task read and its prompt tokenised before the run starts: for tasks that stand in files, where one
    line may be wrong. Otherwise the first task of each split is checked."""
    deterministic: bool = False
    """True promises that `run` does the same whenever it gets the same turns. After the crash of a worker the turns
    that were recorded are then used again; otherwise the trajectory starts anew, which is counted in a metric."""
    single_turn: bool | None = None
    """Whether the policy answers once and `score` or `score_group` rates the answer, so that `run` is not needed.
    Unset: true for a SingleTurn that does not define `run` itself. An instance may set it according to its options."""
    about: str = ""
    """One sentence about how this instance works, where the options leave that open. A run prints it when it starts."""
    not_options: Sequence[str] = ()
    """Options of a base class that this one sets itself. They count where its constructor ends in `**options` and hands
    those to the base class; users can then give all options of both but these."""
    chat_template_kwargs: Mapping[str, Any] = {}
    """Variables for the tokenizer's chat template, as its makers document them (`enable_thinking`, ...)."""

    constructor_arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
    """Arguments that the constructor got. A run from Python sends them to the workers."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Remember the constructor's arguments."""
        self = super().__new__(cls)
        self.constructor_arguments = (args, options)
        return self

    def train(self, index: int) -> Task:
        """Return the training task at `index` of range(train_size); it must always be the same."""
        raise NotImplementedError(f"{type(self).__name__} defines no train(index)")

    def held_out(self, index: int) -> Task:
        """Return the held-out task at `index` of range(held_out_size). The first few should be a fair sample."""
        raise NotImplementedError(f"{type(self).__name__} defines no held_out(index)")

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        """Hold the conversation about `task` and say what it earned."""
        raise NotImplementedError(f"{type(self).__name__} defines no run(task, policy)")

    # A subclass may also define
    #     def score_group(self, task: Task, trajectories: Sequence[Trajectory]) -> Sequence[Outcome]
    # which gets all samples of one task that did not fail, and returns their final outcomes in the same order.


class SingleTurn(Environment):
    """This is an environment in which the policy answers once and the answer is scored."""

    def score(self, task: Task, turn: Turn) -> float | Outcome:
        """Return the reward of an answer, or its outcome; may be an `async def`.

        A worker runs one call at a time.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no score(task, turn)")

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        """Hold the one-turn conversation. The trainer samples the answers of a prompt together and calls `score`."""
        outcome = self.score(task, await policy.say(task.prompt))
        if hasattr(outcome, "__await__"):
            outcome = await outcome
        return outcome if isinstance(outcome, Outcome) else Outcome(outcome)


__all__ = [
    "Conversation",
    "Environment",
    "Message",
    "Outcome",
    "SingleTurn",
    "Split",
    "Task",
    "ToolCall",
    "Trajectory",
    "Turn",
]
