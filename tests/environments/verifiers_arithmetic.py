"""These environments are written for the verifiers package, with its own classes; its interpreter imports this file."""

import verifiers as vf
from datasets import Dataset


def same(parser: vf.Parser, completion: list, answer: str) -> float:
    """Return 1 for a right answer."""
    return float((parser.parse_answer(completion) or "").strip() == answer)


def brevity(completion: list) -> float:
    """Return 1 for a short answer."""
    return float(len(str(completion[-1].content)) < 100)


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


class Insist(vf.MultiTurnEnv):
    """Asks once more after every answer, up to `max_turns`."""

    async def env_response(self, messages, state, **kwargs):
        return [vf.UserMessage(content="Are you sure?")]


class Rewrite(Insist):
    """Begins each turn with a prompt of its own, as an environment does that sums up what was said."""

    async def get_prompt_messages(self, state):
        summary = f"You have said {len(state['trajectory'])} answers. Go on."
        return [vf.SystemMessage(content="Add."), vf.UserMessage(content=summary)]


def compare(completions: list) -> list[float]:
    """Rank the samples of a task."""
    return [float(i) for i in range(len(completions))]


def load_environment(kind: str = "single", evaluation: bool = True):
    """Return an environment of the package."""
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(20)]
    dataset, held_out = Dataset.from_list(rows), Dataset.from_list([{"question": "What is 70 + 1?", "answer": "71"}])
    rubric = vf.Rubric(funcs=[same, brevity], weights=[1.0, 0.5])
    options = {"dataset": dataset, "rubric": rubric, "system_prompt": "Add."}
    if evaluation:
        options["eval_dataset"] = held_out
    if kind == "tools":
        return vf.ToolEnv(tools=[add], max_turns=4, **options)
    if kind == "group":
        return vf.SingleTurnEnv(**{**options, "rubric": vf.Rubric(funcs=[compare])})
    if kind in ("insist", "rewrite"):
        return {"insist": Insist, "rewrite": Rewrite}[kind](max_turns=3, **options)
    return vf.SingleTurnEnv(**options)
