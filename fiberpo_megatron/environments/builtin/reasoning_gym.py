"""The environment "reasoning_gym" offers the tasks of the reasoning-gym package, which makes and scores them.

The package draws each problem from a seed and an index, so that any number of training tasks needs no files. It is
imported when the environment is made: this module itself needs the standard library alone.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from fiberpo_megatron.environments import Message, Outcome, SingleTurn, Split, Task, Turn
from fiberpo_megatron.environments.builtin.expression_guard import is_harmless_expression

TRIES = 100
"""Training problems that are looked at, until one is not among the held-out ones."""
KEPT = 256
"""Problems that a worker remembers, because a prompt has several answers to be scored."""
LITERALS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
"""Tasks whose scoring passes the answer to `eval`, to read a list."""
EXPRESSIONS = ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration")
"""Tasks whose scoring passes the answer to sympy's `parse_expr`, which evaluates it."""
UNREADABLE = "("
"""What is scored in place of an expression that must not be evaluated: an answer that no parser reads."""


class Dataset(Protocol):
    """This is what the environment needs of a data set of the package."""

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float: ...


class ReasoningGym(SingleTurn):
    """Offers one task of the reasoning-gym package, or a composite of several; the package scores the answers.

    task: the name of a task of the package, such as "chain_sum", or "composite".
    config: parameters of the task's own configuration, such as {max_terms = 3}. Of a composite it is
        {datasets = [{name = "chain_sum", weight = 1, config = {}}, ...]}.
    levels: difficulties of the package's own curriculum of this task, from easy to hard. A number sets all its
        attributes to that level; a table sets attributes by name, such as {num_terms = 3}, and leaves the others at
        their first level. Training tasks with a low index have the first difficulty, those with a high index the last,
        in equal parts. `config` holds the parameters that the curriculum does not set. Unset: `config` decides alone.
    train_size: number of training tasks.
    held_out_size: number of tasks for evaluation. No training task has the question of one of them.
    seed: chooses the tasks: training and held-out ones are drawn from different seeds that depend on it.
    extract: tags: what is scored stands between the last <answer> and </answer>, and an answer without them is scored
        as none; text: the whole response is scored, without white space at its ends.
    system_prompt: the name of one of the package's system prompts ("default", "simple", "direct", "DeepSeekZero",
        "chain_of_draft"), or a text of your own; "" for none. Unset: "default" with tags, and none with the whole text.
    template: the user's message, in which {question} stands for the question.
    chat_template: write the messages by the tokenizer's chat template; false: system prompt and message are raw text.
    chat_template_kwargs: variables of the chat template, as its makers document them (enable_thinking, ...).
    partial: true: the reward is the package's score, between 0 and 1 for answers that are nearly right; false: it is 1
        for a score of 1, else 0. In both cases an answer counts as correct with a score of 1.

    Raises ValueError that names the option, its value and the fix.
    """

    deterministic = True

    def __init__(
        self,
        task: str,
        config: Mapping[str, Any] | None = None,
        levels: Sequence[int | Mapping[str, int]] = (),
        train_size: int = 10000,
        held_out_size: int = 200,
        seed: int = 0,
        extract: str = "tags",
        system_prompt: str | None = None,
        template: str = "{question}",
        chat_template: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        partial: bool = True,
    ) -> None:
        self._package = _import_package()
        known = self._package.factory.DATASETS
        if task not in known:
            raise ValueError(
                f"task = {task!r} is unknown to reasoning-gym; its {len(known)} tasks are {', '.join(sorted(known))}"
            )
        if extract not in ("tags", "text"):
            raise ValueError(f'extract = {extract!r} is unknown; use "tags" or "text"')
        if "{question}" not in template:
            raise ValueError(f"template = {template!r} lacks {{question}}, the place of the question; add it")
        if train_size < 1 or held_out_size < 0:
            raise ValueError(
                f"train_size = {train_size} and held_out_size = {held_out_size}: at least 1 and 0 are needed"
            )
        for name in ("seed", "size"):
            if name in (config or {}):
                raise ValueError(f"config sets {name!r}, which this environment sets; use its options seed, train_size")
        if system_prompt is None:
            system_prompt = "default" if extract == "tags" else ""
        self.train_size, self.held_out_size = train_size, held_out_size
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._system_prompt = self._package.utils.SYSTEM_PROMPTS.get(system_prompt, system_prompt)
        self._tags, self._template, self._chat, self._partial = extract == "tags", template, chat_template, partial
        choices: Sequence[int | Mapping[str, int] | None] = list(levels) or [None]
        sizes = {"train": train_size, "held_out": held_out_size}
        self._datasets: dict[Split, list[Dataset]] = {"train": [], "held_out": []}
        for number, split in enumerate(self._datasets):
            for level in choices:
                size = max(1, -(-sizes[split] // len(choices)))
                # the package draws problem i of a data set with the random seed (seed + i)
                first = seed + number * train_size
                self._datasets[split].append(self._make(task, config or {}, level, first, size))
        self._entry = lru_cache(KEPT)(self._make_entry)
        self._held_out_questions: frozenset[str] | None = None

    def train(self, index: int) -> Task:
        """Return the training task at `index`; where `levels` are given, later ones are as hard or harder."""
        return self._task("train", index)

    def held_out(self, index: int) -> Task:
        """Return a task for evaluation; neighbours have different levels, so that the first few are a fair sample."""
        return self._task("held_out", index)

    def score(self, task: Task, turn: Turn) -> Outcome:
        """Return what the package's own `score_answer` says about an answer.

        An answer for which it raises earns 0, and is counted in the metric `scoring_errors` and written to the log.
        """
        dataset, entry = self._entry(task.metadata["split"], task.metadata["index"])
        answer: str | None = turn.text.strip()
        if self._tags:
            answer = self._package.utils.extract_answer(turn.text)
        source = entry["metadata"].get("source_dataset")
        if source in EXPRESSIONS and answer is not None:
            answer = answer.strip() if is_harmless_expression(answer) else UNREADABLE
        try:
            score, failed = float(dataset.score_answer(answer, entry)), False
        except Exception as error:  # some tasks raise for an answer that they cannot read, instead of scoring it
            print(f"{source}: scoring {answer!r:.200} failed with {type(error).__name__}: {error}", file=sys.stderr)
            score, failed = 0.0, True
        correct = score >= 1.0
        metrics = {"answered": float(bool(answer)), "scoring_errors": float(failed)}
        return Outcome(score if self._partial else float(correct), correct=correct, metrics=metrics)

    def _task(self, split: Split, index: int) -> Task:
        _, entry = self._entry(split, index)
        message = self._template.replace("{question}", entry["question"])
        system = self._system_prompt
        prompt: str | list[Message] = "\n".join(filter(None, (system, message)))
        if self._chat:
            prompt = [{"role": "system", "content": system}] if system else []
            prompt.append({"role": "user", "content": message})
        answer = entry["answer"]
        if isinstance(answer, str) and self._tags:
            answer = f"<answer>{answer}</answer>"
        metadata = {"split": split, "index": index, "task": entry["metadata"].get("source_dataset")}
        if len(self._datasets[split]) > 1:
            metadata["level"] = self._place(split, index)[0]
        return Task(prompt, answer if isinstance(answer, str) else None, metadata)

    def _place(self, split: Split, index: int) -> tuple[int, int]:
        """Return (number of the level, index inside of its data set)."""
        count = len(self._datasets[split])
        if split == "held_out":
            place, level = divmod(index, count)
            return level, place
        level = index * count // self.train_size
        return level, index - -(-level * self.train_size // count)

    def _make_entry(self, split: Split, index: int) -> tuple[Dataset, dict[str, Any]]:
        """Return a problem of the package with its data set; a training problem is none of the held-out ones."""
        level, first = self._place(split, index)
        dataset = self._datasets[split][level]
        if split == "held_out":
            return dataset, dataset[first]
        size = -(-self.train_size // len(self._datasets[split]))
        for attempt in range(TRIES):
            entry = dataset[(first + attempt * 7919) % size]  # a prime, so that neighbours get different substitutes
            if entry["question"] not in self._questions():
                return dataset, entry
        raise ValueError(
            f"{TRIES} training problems in a row are also among the {self.held_out_size} held-out ones: with this "
            "`config` the task has too few different problems; lower held_out_size, or widen the parameters in `config`"
        )

    def _questions(self) -> frozenset[str]:
        """Return the questions of the held-out tasks."""
        if self._held_out_questions is None:
            entries = (self._entry("held_out", index)[1] for index in range(self.held_out_size))
            self._held_out_questions = frozenset(entry["question"] for entry in entries)
        return self._held_out_questions

    def _make(
        self, task: str, config: Mapping[str, Any], level: int | Mapping[str, int] | None, seed: int, size: int
    ) -> Dataset:
        """Return a data set of the package. Raises ValueError for parameters that it refuses."""
        made, settings_class = self._package.factory.DATASETS[task]
        fields = {**config, "seed": seed, "size": size}
        if task == "composite":
            fields["datasets"] = [
                self._package.composite.DatasetSpec(**_spec(one)) for one in config.get("datasets", ())
            ]
        try:
            settings = settings_class(**fields) if level is None else self._curriculum(task, level, fields)
            if hasattr(settings, "validate"):
                settings.validate()
            dataset: Dataset = made(settings)
        except (AssertionError, TypeError, ValueError, KeyError) as error:
            names = ", ".join(name for name in settings_class.__dataclass_fields__ if name not in ("seed", "size"))
            where = f"config = {dict(config)!r}" + ("" if level is None else f" with level {level!r}")
            raise ValueError(
                f"{where} was refused by the task {task!r}: {error}; its parameters are {names}"
            ) from error
        for one in getattr(dataset, "datasets", {task: dataset}).values():
            _evaluate_literals_only(one)
        return dataset

    def _curriculum(self, task: str, level: int | Mapping[str, int], fields: Mapping[str, Any]) -> Any:
        """Return the settings that the package's curriculum has for a level."""
        if not self._package.factory.has_curriculum(task):
            raise ValueError("reasoning-gym has no curriculum for it; leave `levels` out")
        curriculum = self._package.factory.create_curriculum(task)
        if isinstance(level, int):
            if level < 0:
                raise ValueError("a level is at least 0")
            curriculum.set_global_level(level)  # attributes with fewer levels stay at their highest
        else:
            for name, value in level.items():
                if name not in curriculum.attributes:
                    raise ValueError(
                        f"its curriculum has no attribute {name!r}, only {', '.join(curriculum.attributes)}"
                    )
                curriculum.set_attr_level(name, value)
        return curriculum.generate_configuration(dict(fields))


def _spec(one: Any) -> dict[str, Any]:
    """Return the fields of one part of a composite, with the package's names."""
    if not isinstance(one, Mapping) or "name" not in one or set(one) - {"name", "weight", "config"}:
        raise ValueError(f"config.datasets holds {one!r}; write {{name = ..., weight = 1.0, config = {{...}}}}")
    return {"name": one["name"], "weight": one.get("weight", 1.0), "config": dict(one.get("config", {}))}


def _evaluate_literals_only(dataset: Dataset) -> None:
    """Have the module of a data set read lists of the model by `literal_eval`, where it would call `eval`."""
    module = sys.modules[type(dataset).__module__]
    if getattr(module, "DATASET_NAME", None) in LITERALS:
        vars(module)["eval"] = ast.literal_eval


def _import_package() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(
            f"the environment needs the package reasoning-gym ({error}); run `pip install reasoning-gym==0.1.25` for "
            f"{sys.executable}, or `pip install fiberpo-megatron[reasoning-gym]`"
        ) from error
    return reasoning_gym
