"""The environments of a run as its leaders see them: tasks at places, their prompts, and the checks at the start."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from examples.demo.environments import Addition, Sort
from fiberpo_megatron.config import ConfigError
from fiberpo_megatron.data.encoding import Encoder
from fiberpo_megatron.data.prompts import Place
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.rollout import environments as module
from fiberpo_megatron.rollout.environments import Environments
from tests.data import templates
from tests.data.characters import CharacterTokenizer
from tests.data.templates import templated

ADDITION = {"use": "examples.demo.environments:Addition"}


@contextmanager
def started(*tables: dict[str, Any]) -> Iterator[Environments]:
    configs = [EnvironmentConfig(**{"name": f"e{i}", "workers": 1, **table}) for i, table in enumerate(tables)]
    environments = Environments(configs, folder=None, rank=0)
    try:
        yield environments
    finally:
        environments.close()


def encoder(environments: Environments, tokenizer: Any = None, limit: int = 50) -> Encoder:
    names = [environment.config.name for environment in environments.running]
    options = [facts.chat_template_kwargs for facts in environments.facts]
    return Encoder(
        tokenizer or CharacterTokenizer(),
        names,
        options,
        model=Path("/nowhere"),
        vocabulary=300,
        max_prompt_tokens=limit,
    )


def lines(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_tasks_and_prompts_stand_at_their_places(monkeypatch):
    monkeypatch.setattr(module, "BATCH", 4)  # so that one environment's tasks take several requests
    places = [Place(i % 2, "held_out" if i % 3 == 0 else "train", (7 * i) % 50) for i in range(40)]
    addition, sort = Addition(digits=3), Sort()
    wanted = [
        (split := (addition, sort)[p.domain].held_out if p.split == "held_out" else (addition, sort)[p.domain].train)
        and split(p.index)
        for p in places
    ]
    with started({**ADDITION, "options": {"digits": 3}}, {"use": "examples.demo.environments:Sort"}) as environments:
        assert environments.tasks(places) == wanted and environments.tasks([]) == []
        prompts = environments.prompts(places, encoder(environments))
        examples = environments.examples(places[:3], encoder(environments))
        facts = environments.facts
    assert [(p.domain, p.split, p.index, p.task) for p in prompts] == [
        (place.domain, place.split, place.index, task) for place, task in zip(places, wanted)
    ]
    assert [example.prompt for example in examples] == prompts[:3]
    assert [(f.train_size, f.held_out_size) for f in facts] == [
        (t.train_size, t.held_out_size) for t in (addition, sort)
    ]


def test_every_line_of_a_file_is_checked_at_the_start(tmp_path):
    train = lines(tmp_path, *[{"prompt": "P", "answer": "1"}] * 300, {"prompt": "Q" * 60, "answer": "1"})
    options = {"name": "file", "train": train, "chat_template": False}
    with started({"use": "chat", "name": "file", "options": options}) as environments:
        with pytest.raises(ValueError, match=r"'file'.*line 301: the prompt has 61 tokens, .*max_prompt_tokens = 50"):
            environments.check(encoder(environments))
        environments.check(encoder(environments, limit=61))


def test_of_a_large_file_an_even_sample_is_checked(tmp_path):
    """Position 90 of 0, 10, 20, ... is looked at, position 91 is not; it is refused when it is drawn."""
    for bad, refused in ((90, True), (91, False)):
        records = [{"prompt": "Q" * 60 if number == bad else "P", "answer": "1"} for number in range(100)]
        options = {"train": lines(tmp_path, *records), "chat_template": False}
        with started({"use": "chat", "options": options}) as environments:
            found = encoder(environments)
            with pytest.raises(ValueError, match=f"line {bad + 1}: the prompt has 61 tokens"):
                environments.check(found, 10) if refused else environments.prompts([Place(0, "train", bad)], found)
            if not refused:
                environments.check(found, 10)


def test_the_next_task_takes_the_place_of_one_with_a_long_prompt(tmp_path):
    texts = ["P", "Q" * 60, "R" * 60, "S", "T" * 60]
    train = lines(tmp_path, *({"prompt": text, "answer": "1"} for text in texts))
    options = {"train": train, "held_out": train.replace("train", "held_out"), "chat_template": False}
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "' + "U" * 60 + '", "answer": "1"}')
    with started({"use": "chat", "options": options}) as environments:
        found = encoder(environments)
        found.skip_long_prompts = True
        places = [Place(0, "train", index) for index in range(5)]
        prompts = environments.prompts(places, found)
        assert [(prompt.index, prompt.text) for prompt in prompts] == [(0, "P"), (3, "S"), (3, "S"), (3, "S"), (0, "P")]
        assert environments.take_metrics() == {"environment/e0/long_prompts": 3.0}
        assert environments.prompts(places[::-1], found) == prompts[::-1], "it depends on the place alone"
        with pytest.raises(ValueError, match=r"held_out\.jsonl, line 1: the prompt has 61 tokens"):
            environments.prompts([Place(0, "held_out", 0)], found)
        short = encoder(environments, limit=1)
        short.skip_long_prompts = True
        with pytest.raises(ValueError, match=r'5 training tasks in a row are too long, .*"skip" finds no other; raise'):
            environments.prompts(places, short)


@pytest.mark.parametrize(
    ("tokenizer", "limit", "message"),
    [
        (CharacterTokenizer(), 4, r"environment 'e0', task 0: the prompt has 7 tokens, .* = 4"),
        (templated(templates.PLAIN), 50, None),
    ],
)
def test_of_other_environments_the_first_task_is_checked(tokenizer, limit, message):
    with started(ADDITION) as environments:
        if message is None:
            environments.check(encoder(environments, tokenizer, limit))
        else:
            with pytest.raises(ValueError, match=message):
                environments.check(encoder(environments, tokenizer, limit))


def test_templates_of_conversations_are_checked_at_the_start(tmp_path):
    train = lines(tmp_path, {"prompt": "17 + 25 =", "answer": "42"})
    options = {"name": "file", "train": train, "max_turns": 2}
    with started({"use": "chat", "name": "file", "options": options}) as environments:
        with pytest.raises(ValueError, match=r"environment 'file' holds conversations, but the chat template writes"):
            environments.check(encoder(environments, templated(templates.PLAIN), 200))
        good = encoder(environments, templated(templates.CHATML), 200)
        environments.check(good)
        assert good.ends_of_turn == (good.tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_options_of_the_template_come_from_the_environment(tmp_path):
    train = lines(tmp_path, {"prompt": "17 + 25 =", "answer": "42"})
    options = {"name": "file", "train": train, "chat_template_kwargs": {"enable_thinking": False}}
    with started({"use": "chat", "options": options}) as environments:
        found = encoder(environments, templated(templates.THINKING, eos="<|im_end|>"), 200)
        (prompt,) = environments.prompts([Place(0, "train", 0)], found)
    assert prompt.text.endswith("<think>\n\n</think>\n\n") and prompt.task.id == "e0/train/0"


EMPTY = """
from fiberpo_megatron.environments import SingleTurn, Task


class Empty(SingleTurn):
    train_size, held_out_size = 0, 1

    def held_out(self, index):
        return Task("1+1=", "2")

    def score(self, task, turn):
        return 1.0
"""


def test_an_environment_without_training_tasks_is_refused(tmp_path, monkeypatch):
    (tmp_path / "empty.py").write_text(EMPTY)
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"'e0' has no training task \(train_size is below 1\)"),
        started({"use": "empty.py:Empty"}),
    ):
        pytest.fail("it started")


def test_counts_become_metrics_by_environment():
    class Pool:
        def take_counts(self) -> dict[str, int]:
            return {"failures": 2}

    class One:
        config = EnvironmentConfig(name="sums", use="x:X")
        pool = Pool()

    with started() as environments:
        environments.running.append(One())  # type: ignore[arg-type]
        assert environments.take_metrics() == {"environment/sums/failures": 2.0}
        environments.running.clear()
