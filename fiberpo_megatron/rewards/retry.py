"""Several attempts at a verifiable task: a wrong answer is answered by a message, up to the task's `max_turns`."""

from collections.abc import Sequence

from fiberpo_megatron.data.settings import JsonlTask
from fiberpo_megatron.rewards.reward import Reward
from fiberpo_megatron.rewards.verifiers import Task
from fiberpo_megatron.types import Prompt


class RetryEnvironment:
    """The environment of tasks with `max_turns` above 1; other tasks end after the first turn."""

    def __init__(self, tasks: Sequence[Task], reward: Reward) -> None:
        self._tasks = tuple(tasks)
        self._reward = reward

    def reply(self, prompt: Prompt, turns: Sequence[str], sample: int) -> str | None:
        """The task's `retry_message` after a wrong answer; None after a right one, or the last."""
        task = self._tasks[prompt.domain]
        if not isinstance(task, JsonlTask) or len(turns) >= task.max_turns:
            return None
        return None if self._reward.score(prompt, turns[-1], sample).correct else task.retry_message
