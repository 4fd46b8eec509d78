"""Registry of verifiers: (right answer, response text) -> whether the response is right."""

from collections.abc import Callable

from fiberpo_megatron.data.settings import AdditionTask, JsonlTask, SortTask
from fiberpo_megatron.rewards.math_answers import MathVerifier

Task = AdditionTask | SortTask | JsonlTask
Verifier = Callable[[str, str], bool]


def exact(answer: str, response: str) -> bool:
    """The response, without white space at its ends, is the answer character by character."""
    return response.strip() == answer.strip()


VERIFIERS: dict[str, Callable[[], Verifier]] = {"exact": lambda: exact, "math_verify": MathVerifier}
"""Verifier makers by name. A maker may start processes; a verifier that does has `close()`."""


def verifier_name(task: Task) -> str:
    """Verifier of a task: `reward` of a JSONL task; the procedural tasks have one right string."""
    return task.reward if isinstance(task, JsonlTask) else "exact"


def build_verifier(name: str) -> Verifier:
    """ValueError naming the known ones for an unknown name, or the package to install."""
    if name not in VERIFIERS:
        raise ValueError(f"unknown verifier {name!r}; use one of {', '.join(sorted(VERIFIERS))}")
    return VERIFIERS[name]()
