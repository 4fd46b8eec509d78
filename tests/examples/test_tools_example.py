"""The tool example's vocabulary, template and problems fit each other."""

import json
from pathlib import Path

import pytest

from examples.tools.make_model import write_model
from examples.tools.problems import HELD_OUT, Habits, problem, write_files
from fiberpo_megatron.data.chat import ChatTemplate
from fiberpo_megatron.data.tokenizer import Tokenizer, load_tokenizer

TOOLS = [{"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_model(tmp_path)
    return load_tokenizer(tmp_path)


def test_the_warmup_writes_conversations_as_the_template_does(tokenizer):
    template, habits = ChatTemplate(tokenizer), Habits()
    template.check_turns(TOOLS)
    for kind, tools in enumerate((TOOLS, TOOLS, None, None)):
        question, _ = problem(HELD_OUT + kind)
        if kind != 2:
            asked = template.prompt([{"role": "user", "content": question}], tools)
            assert habits.train(kind).prompt == asked
    question, answer = problem(HELD_OUT + 2)
    first = template.prompt([{"role": "user", "content": question}], TOOLS)
    called = habits.train(0).answer.replace(problem(HELD_OUT)[0][:-1], question[:-1])
    sampled = [*tokenizer.encode(called), tokenizer.eos_token_id]
    result = [{"role": "tool", "content": answer, "name": "calculator", "tool_call_id": "call_0"}]
    conversation = tokenizer.encode(first) + sampled + list(template.continuation(sampled, result, TOOLS))
    assert tokenizer.encode(habits.train(2).prompt) == conversation


def test_a_call_is_fourteen_tokens(tokenizer):
    call = Habits().train(0).answer
    ids = tokenizer.encode(call)
    assert tokenizer.decode(ids) == call and len(ids) == 14  # and the end of the turn
    assert tokenizer.unk_token_id not in ids


def test_held_out_questions_are_not_trained_on(tmp_path):
    write_files(tmp_path)
    train, held_out = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    )
    for record in (train[0], held_out[0]):
        first, second = record["prompt"][0]["content"].removesuffix("=").split("*")
        assert int(record["answer"]) == int(first) * int(second)
    questions = [{record["prompt"][0]["content"] for record in records} for records in (train, held_out)]
    assert [len(part) for part in questions] == [8000, 512] and not questions[0] & questions[1]
    habits = Habits()
    assert all(habits.train(i).prompt.rpartition("u:")[2][:7] not in questions[1] for i in range(400))
