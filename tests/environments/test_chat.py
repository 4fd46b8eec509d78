"""These tests run the built-in environment of problems in files."""

import asyncio
import json
from pathlib import Path

import pytest

from fiberpo_megatron.environments import Outcome, Turn
from fiberpo_megatron.environments.builtin import math_answers
from fiberpo_megatron.environments.builtin.chat import Chat
from fiberpo_megatron.environments.builtin.math import Math
from tests.environments.pools import policy, pool_of


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def train(tmp_path):
    return str(write(tmp_path / "train.jsonl", *({"prompt": f"t{i}", "answer": i} for i in range(30))))


def test_it_reads_strings_chats_and_numbers(tmp_path):
    chat = [{"role": "user", "content": "1+1?"}]
    path = write(tmp_path / "a.jsonl", {"prompt": "é?", "answer": "x"}, {"prompt": chat, "answer": 2})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n", 1))
    environment = Chat(str(path), name="t")
    first, second = environment.train(0), environment.train(1)
    assert first.prompt == [{"role": "user", "content": "é?"}] and first.answer == "x"
    assert second.prompt == tuple(chat) and second.answer == "2"
    assert second.metadata == {"source": f"{path}, line 3"}
    assert Chat(str(path), chat_template=False, name="t").train(0).prompt == "é?"
    assert environment.single_turn and environment.check_all_tasks and environment.deterministic


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "answer": "b"', "not a JSON object"),
        (b"[1]", r"got \[1\]"),
        (b'{"prompt": "a"}', "`answer` must be a non-empty string or a number, got None"),
        (b'{"prompt": "a", "answer": " "}', "`answer` must be"),
        (b'{"prompt": "a", "answer": true}', "got True"),
        (b'{"answer": "a"}', "`prompt` must be"),
        (b'{"prompt": [], "answer": "a"}', "`prompt` must be"),
        (b'{"prompt": [{"role": "user"}], "answer": "a"}', "`prompt` must be"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"prompt": "a", "answer": NaN}', "`answer` must be .* got nan"),
        (b'{"prompt": "a", "answer": 1e999}', "`answer` must be .* got inf"),
        (b'{"prompt": "a", "answer": ' + b"1" * 5000 + b"}", "not a JSON object .Exceeds the limit"),
        (b"[" * 10**5, "not a JSON object .maximum recursion depth"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n' + line)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2: .*{message}"):
        Chat(str(path))


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"prompt": "a", "answer": "half \ud83d"}, "`answer` holds the lone surrogate '\\\\ud83d' at character 5"),
        ({"prompt": "\udc00", "answer": "b"}, "`prompt` holds the lone surrogate '\\\\udc00' at character 0"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "\ud800"}], "answer": "b"},
            r"`prompt\[1\].content` holds the lone surrogate",
        ),
        (
            {"prompt": [{"role": "\ud800", "content": "a"}], "answer": "b"},
            r"`prompt\[0\].role` holds the lone surrogate",
        ),
    ],
)
def test_half_a_character_is_refused_with_file_line_and_field(tmp_path, record, field):
    """It passes for text until the first file is written."""
    path = write(tmp_path / "bad.jsonl", {"prompt": "whole 🙂", "answer": "🙂"}, record)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2: {field}") as error:
        Chat(str(path))
    str(error.value).encode("utf-8")


def test_hidden_characters_of_a_bad_line_are_escaped(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\x1b[2J\xc2\x85 no JSON")
    with pytest.raises(ValueError, match=r"line 1: not a JSON object .*: \\x1b\[2J\\x85 no JSON"):
        Chat(str(path))


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the prompt file .*none\.jsonl: No such file.*correct the path"):
        Chat(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no prompts"):
        Chat(str(tmp_path / "empty.jsonl"))


def test_a_held_out_prompt_that_is_trained_on_is_refused(tmp_path):
    train = write(tmp_path / "train.jsonl", {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "1"})
    held_out = write(tmp_path / "test.jsonl", {"prompt": "c", "answer": "1"}, {"prompt": "b", "answer": "1"})
    with pytest.raises(ValueError, match=r"1 held-out .*test\.jsonl, line 2 = .*train\.jsonl, line 2: b; remove"):
        Chat(str(train), str(held_out), name="t")


def test_training_problems_keep_their_order_and_held_out_ones_are_shuffled(tmp_path, train):
    held_out = write(tmp_path / "test.jsonl", *({"prompt": f"h{i}", "answer": i} for i in range(10)))
    environment = Chat(train, str(held_out), name="t")
    assert [environment.train(i).answer for i in range(30)] == list(map(str, range(30)))
    order = [int(environment.held_out(i).answer) for i in range(10)]
    assert order == [int(Chat(train, str(held_out), name="t").held_out(i).answer) for i in range(10)]
    # what runs were evaluated on before; another order would make their curves incomparable
    assert order == [7, 4, 0, 3, 8, 9, 2, 1, 6, 5]
    assert order != [int(Chat(train, str(held_out), name="u").held_out(i).answer) for i in range(10)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "math_verify"}, 'write use = "math"'),
        ({"reward": "guess"}, "reward = 'guess' is unknown; use \"exact\", or the import path"),
        ({"max_turns": 0}, "max_turns = 0 must be a whole number of at least 1"),
        ({"retry_message": ""}, "retry_message = '' must be a text that is not empty"),
        ({"max_turns": 2, "chat_template": False}, "only a chat template says where a message ends; set chat_template"),
    ],
)
def test_bad_options_are_named(train, options, message):
    with pytest.raises(ValueError, match=message):
        Chat(train, name="t", **options)


@pytest.mark.parametrize("response", ["3", " 3\n"])
def test_the_right_answer_earns_one(train, response):
    environment = Chat(train)
    assert environment.score(environment.train(3), Turn(response)) == Outcome(1.0, correct=True)


@pytest.mark.parametrize("response", ["", " ", "03", "33", "3 3", "\x00", "٣", "9" * 10**6])
def test_everything_else_earns_nothing(train, response):
    environment = Chat(train)
    assert environment.score(environment.train(3), Turn(response)) == Outcome(0.0, correct=False)


def test_a_missing_library_is_named(train, monkeypatch):
    monkeypatch.setattr(math_answers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install math-verify"):
        Math(train)


def test_a_comparison_that_never_ends_is_wrong_and_no_failure(tmp_path, monkeypatch):
    stand_in = "def parse(text, parsing_timeout):\n    while text == 'hang': pass\n    return text.strip('$')\n"
    stand_in += "def verify(gold, target, timeout_seconds):\n    return float(gold) == float(target)\n"
    (tmp_path / "math_verify.py").write_text(stand_in)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    write(tmp_path / "a.jsonl", {"prompt": "a", "answer": "0.5"})
    options = {"name": "t", "train": str(tmp_path / "a.jsonl")}

    async def scenario():
        async with pool_of("math", workers=1, options=options, deadline_s=30.0) as pool:
            (task,) = await pool.tasks("train", [0])
            return [await pool.score(task, Turn(text), seed=0) for text in ("hang", "0.50", "0.6")], pool.take_counts()

    outcomes, counts = asyncio.run(scenario())
    assert [outcome.correct for outcome in outcomes] == [False, True, False] and not counts


@pytest.mark.parametrize(
    ("answers", "turns", "correct"),
    [
        (["3"], 1, True),
        (["4", "3"], 2, True),
        (["4", "5", "6", "3"], 3, False),
        (["4", "cut", "3"], 2, False),
        (["4", "impossible", "3"], 2, False),
    ],
)
def test_wrong_answers_are_asked_again(train, answers, turns, correct):
    said = []

    class Policy:
        seed = 0

        async def say(self, new, tools=None, max_tokens=None, stop=None):
            if said and answers[len(said) - 1] == "impossible":
                raise ValueError("the turn ended with another token")
            said.append(new)
            answer = answers[len(said) - 1]
            return Turn(answer, "length" if answer == "cut" else "stop")

    environment = Chat(train, max_turns=3, retry_message="no")
    task = environment.train(3)
    outcome = asyncio.run(environment.run(task, Policy()))
    assert not environment.single_turn and outcome == Outcome(float(correct), correct=correct)
    assert said == [task.prompt, *[{"role": "user", "content": "no"}] * (turns - 1)]


REWARDS = """
from fiberpo_megatron.environments import Outcome

def length(task, turn):
    return len(turn.text) / task.answer["longest"]

async def parts(task, turn):
    return Outcome(0.5, rewards={"half": 0.5}, correct=False)

def one(task):
    return 1.0
"""


def test_a_reward_of_ones_own_runs_in_the_worker(tmp_path, monkeypatch):
    """Its answers are anything that JSON has, and it may wait for something."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "answer": {"longest": 4}}, {"prompt": "b"})

    async def scored(reward, **more):
        async with pool_of("chat", workers=1, options={"train": str(path), "reward": reward, **more}) as pool:
            tasks = await pool.tasks("train", [0, 1])
            if more:
                return await pool.run(tasks[0], policy(lambda call, new: "ab" * call), seed=0)
            return tasks[1].answer, await pool.score(tasks[0], Turn("ab"), seed=0)

    assert asyncio.run(scored("my_rewards.py:length")) == (None, Outcome(0.5))
    assert asyncio.run(scored("my_rewards.py:parts", max_turns=2)) == Outcome(0.5, {"half": 0.5}, correct=False)
    for reward, message in (
        ("my_rewards.py:one", r"must be a function that takes \(task, turn\)"),
        ("my_rewards.py:two", "my_rewards.py has no two"),
    ):
        with pytest.raises(ValueError, match=message):
            Chat(str(path), reward=reward)


def test_conversations_run_in_a_worker(train):
    options = {"name": "t", "train": train, "max_turns": 2}

    async def scenario():
        async with pool_of("chat", workers=1, options=options) as pool:
            assert not pool._described().single_turn and pool._described().deterministic
            (task,) = await pool.tasks("train", [3])
            return await pool.run(task, policy(lambda call, new: "3" if call == 2 else "9"), seed=0)

    assert asyncio.run(scenario()) == Outcome(1.0, correct=True)
