"""Tasks to tokens: prompts, supervised examples, the words of a conversation, and the text of a response."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from examples.demo.environments import Addition
from fiberpo_megatron.data.chat import ChatTemplate
from fiberpo_megatron.data.encoding import Encoder
from fiberpo_megatron.data.prompts import Place
from fiberpo_megatron.data.tokenizer import Tokenizer
from fiberpo_megatron.environments import Task
from fiberpo_megatron.environments.builtin.chat import Chat
from fiberpo_megatron.types import Prompt
from tests.data import templates
from tests.data.characters import CharacterTokenizer
from tests.data.templates import templated

NOWHERE = Path("/nowhere")
"""A model folder without files: the tokenizer alone says where a text ends."""


def encoder(
    tokenizer: Tokenizer | None = None,
    limit: int = 200,
    stop: Sequence[str] = (),
    names: Sequence[str] = ("addition",),
    options: Mapping[str, Any] | None = None,
) -> Encoder:
    return Encoder(
        tokenizer or CharacterTokenizer(),
        names,
        [options or {}] * len(names),
        model=NOWHERE,
        vocabulary=300,
        max_prompt_tokens=limit,
        stop=stop,
    )


def encode(found: Encoder, task: Task, index: int = 0) -> Prompt:
    return found.prompt(Place(0, "train", index), task)


def from_file(folder: Path, *records: dict[str, Any], **options: Any) -> Chat:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Chat(name="file", train=str(path), **options)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_prompt_says_where_it_stands():
    task = Task("1+2=", "03", id="12")
    prompt = encoder(names=("other", "addition")).prompt(Place(1, "held_out", 5), task)
    assert (prompt.index, prompt.domain, prompt.split, prompt.task) == (5, 1, "held_out", task)
    assert (prompt.text, prompt.token_ids) == ("1+2=", (2, *(ord(c) + 10 for c in "1+2=")))
    assert prompt.number == 12


class Bytes(CharacterTokenizer):
    """One token per byte of UTF-8."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(token_ids).decode(errors="replace")


def test_a_token_has_a_piece_of_text_for_people():
    assert encoder().pieces([59, 1, 60]) == ["1", "<1>", "2"]
    ids = list("aé€😀b".encode()) + [0xFF, 0x62]
    pieces = encoder(Bytes()).pieces(ids)
    assert pieces == ["a", "é", "", "€", "", "", "😀", "", "", "", "b", "\ufffd", "b"]
    assert encoder(Bytes()).pieces(ids[:2]) == ["a", "\ufffd"]  # cut inside a character
    assert encoder().pieces([]) == []


def test_a_task_is_identified_as_in_earlier_versions():
    """By the number that is its id, or by its index where the environment gave it no id; a text stays a text."""
    found = encoder()
    for task_id, number in (("12", 12), (None, 5), ("addition/train/5", 5), ("addition/train/15", "addition/train/15")):
        assert encode(found, Task("1+2=", id=task_id), 5).number == number
    assert encode(found, Task("1+2=", id="addition/held_out/5"), 5).number == "addition/held_out/5"


def test_examples_end_with_the_stop_token():
    tokenizer, found = CharacterTokenizer(), encoder()
    example = found.example(encode(found, Addition(digits=1).train(1)))
    assert tokenizer.decode(example.target_ids) == f"{example.prompt.task.answer}<1>"
    assert tokenizer.decode(example.prompt.token_ids, skip_special_tokens=True) == example.prompt.text


def test_examples_need_an_end_of_sequence_token():
    tokenizer = CharacterTokenizer()
    tokenizer.eos_token_id = None
    found = encoder(tokenizer)
    with pytest.raises(ValueError, match="no end-of-sequence token; set eos_token"):
        found.example(encode(found, Addition(digits=1).train(0)))


def test_examples_need_a_text_as_answer():
    found = encoder()
    with pytest.raises(ValueError, match=r"'addition', task 3: the answer is 4; supervised training needs a string"):
        found.example(encode(found, Task("2+2=", 4, id="3")))


def test_strings_and_chats_go_through_the_chat_template(tmp_path):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    environment = from_file(tmp_path, {"prompt": "P", "answer": "1"}, {"prompt": chat, "answer": "2"})
    found = encoder(CharacterTokenizer(chat=True), names=("file",))
    prompts = [encode(found, environment.train(index), index) for index in range(2)]
    assert {p.task.answer: (p.text, p.token_ids[0]) for p in prompts} == {
        "1": ("<user>P<assistant>", ord("<") + 10),
        "2": ("<system>S<user>U<assistant>", ord("<") + 10),
    }


def test_plain_prompts_get_the_special_tokens_of_the_tokenizer(tmp_path):
    environment = from_file(tmp_path, {"prompt": "P", "answer": "1"}, chat_template=False)
    assert encode(encoder(names=("file",)), environment.train(0)).token_ids == (2, ord("P") + 10)
    assert environment.held_out_size == 0


def test_a_missing_chat_template_names_the_setting(tmp_path):
    environment = from_file(tmp_path, {"prompt": "P", "answer": "1"})
    with pytest.raises(ValueError, match=r"line 1: .*tokenizer has none.*chat_template = false"):
        encode(encoder(names=("file",)), environment.train(0))


def test_what_a_template_raises_names_the_task():
    found = encoder(templated(templates.MISTRAL, eos="</s>"))
    roles = [user("a"), user("b")]
    with pytest.raises(ValueError, match=r"'addition', task 7: the chat template refuses the prompt: .*roles must alt"):
        encode(found, Task(roles, id="7"))
    prompt = encode(found, Task(roles[:1], id="7"))
    with pytest.raises(ValueError, match=r"task 7: the chat template refuses the prompt: .*roles must alternate"):
        found.first(prompt, roles, None)
    (end,) = found.ends_of_turn
    with pytest.raises(ValueError, match=r"task 7: the chat template refuses the messages .*roles must alternate"):
        found.following(prompt, [9, end], roles, None)


def test_a_prompt_that_is_too_long_is_named(tmp_path):
    records = [{"prompt": "P", "answer": "1"}, {"prompt": "Q" * 60, "answer": "1"}]
    environment, found = from_file(tmp_path, *records, chat_template=False), encoder(limit=50, names=("file",))
    encode(found, environment.train(0))
    with pytest.raises(ValueError, match=r"'file'.*line 2: the prompt has 61 tokens, .*max_prompt_tokens = 50"):
        encode(found, environment.train(1))
    with pytest.raises(ValueError, match=r"environment 'addition', task 0: the prompt has 5 tokens, .* = 4"):
        encode(encoder(limit=4), Addition(digits=1).train(0))
    prompt = encode(found, environment.train(0))
    with pytest.raises(ValueError, match=r"'file'.*line 1: the prompt has 61 tokens"):
        found.first(prompt, "Q" * 60, None)


class Without(CharacterTokenizer):
    """It loses some characters, and folds the rest as `fold` says."""

    def __init__(self, lost: str, fold: Any = str) -> None:
        super().__init__()
        self.lost, self.fold = lost, fold

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        kept = "".join(character for character in text if character not in self.lost)
        return super().encode(self.fold(kept), add_special_tokens=add_special_tokens)


def test_a_tokenizer_without_the_characters_of_a_task_is_refused():
    with pytest.raises(ValueError, match=r"'addition', task 0: the tokenizer turns '0\+0=' into '00='.*'\+'"):
        encode(encoder(Without("+")), Addition(digits=1).train(0))
    with pytest.raises(ValueError, match=r"the tokenizer turns 'A\+a' into 'aa'.*characters '\+'"):
        encode(encoder(Without("+", str.lower)), Task("A+a"))
    prompt = encode(encoder(Without("+")), Task("a"))
    with pytest.raises(ValueError, match="the tokenizer turns 'a\\+' into 'a'"):
        encoder(Without("+")).first(prompt, "a+", None)


@pytest.mark.parametrize(
    "fold",
    [
        str.lower,
        str.upper,
        str.split,
        lambda text: unicodedata.normalize("NFKC", text),
        lambda text: "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c)),
    ],
    ids=["lower case", "upper case", "white space", "NFKC", "no accents"],
)
def test_a_tokenizer_that_normalises_is_not_refused(fold):
    encode(
        encoder(Without("", lambda text: "".join(fold(text)))), Task("Wie gro\u00df ist \uff14\u00b2?\n\u00c9t\u00e9")
    )


def test_special_tokens_that_a_raw_prompt_spells_out_are_not_lost():
    found = encoder(templated(templates.CHATML, eos="<|im_end|>"))
    prompt = encode(found, Task("<|im_start|>user\nHi<|im_end|>\n"))
    assert found.tokenizer.decode(prompt.token_ids) == "<|im_start|>user\nHi<|im_end|>\n"


def test_supervised_answers_end_as_the_template_ends_a_turn():
    """Only the last answer is trained on: earlier assistant messages belong to the prompt."""
    tokenizer = templated(templates.CHATML)
    history = [user("What is 17 + 25?"), {"role": "assistant", "content": " 41"}, user("  That is wrong. ")]
    found = encoder(tokenizer)
    example = found.example(encode(found, Task(history, "42")))
    whole = tokenizer.apply_chat_template([*history, {"role": "assistant", "content": "42"}])
    ids = [*example.prompt.token_ids, *example.target_ids]
    assert whole["input_ids"] == [*ids, *tokenizer.encode("\n")]
    assert tokenizer.decode(example.target_ids) == "42<|im_end|>"
    assert found.ends_of_turn == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)

    raw = encoder(tokenizer)
    assert tokenizer.decode(raw.example(encode(raw, Task("17 + 25 =", "42"))).target_ids) == "42</s>"
    assert raw.ends_of_turn == ()


def test_a_response_ends_where_the_files_the_template_and_the_settings_say():
    tokenizer = templated(templates.CHATML)
    found = encoder(tokenizer, stop=["?", "="])
    before = found.stop_ids
    encode(found, Task([user("17 + 25")]))
    eos, end = (tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|im_end|>"))
    assert found.stop_ids == (eos, end, *before[1:]) and before[0] == eos
    assert set(before[1:]) == {
        i for i in range(300) if set("?=") & set(tokenizer.decode([i], skip_special_tokens=True))
    }
    answer = tokenizer.encode("12, 3? 4=", add_special_tokens=False)
    assert found.text([*answer, end]) == found.text([*answer, eos]) == found.text(answer) == "12, 3"
    assert found.text([*answer, end], stop=[","]) == "12"


def test_a_conversation_begins_with_the_tasks_prompt_or_with_another():
    tokenizer = templated(templates.CHATML)
    found = encoder(tokenizer)
    task = Task([user("17 + 25 =")], id="0")
    prompt = encode(found, task)
    assert found.first(prompt, [dict(message) for message in task.prompt], None) is prompt.token_ids
    system = {"role": "system", "content": "Be short."}
    other = found.first(prompt, [system, *task.prompt], None)
    assert list(other) == tokenizer.apply_chat_template([system, *task.prompt], add_generation_prompt=True)["input_ids"]
    raw = found.first(prompt, "17 + 25 =", None)
    assert raw == tuple(tokenizer.encode("17 + 25 =")) and raw != prompt.token_ids


def test_messages_follow_by_the_template_and_texts_as_they_are():
    tokenizer = templated(templates.CHATML)
    found = encoder(tokenizer)
    prompt = encode(found, Task([user("17 + 25 =")], id="0"))
    (end,) = found.ends_of_turn
    expected = ChatTemplate(tokenizer).continuation([7, end], "Again")
    assert found.following(prompt, [7, end], [user("Again")], None) == expected
    assert found.following(prompt, [7], " Again", None) == tuple(tokenizer.encode(" Again", add_special_tokens=False))
    with pytest.raises(ValueError, match=r"the policy did not end its turn .*turn\.finish_reason is not \"stop\""):
        found.following(prompt, [7], [user("Again")], None)


def test_options_of_an_environment_reach_its_template():
    found = encoder(templated(templates.THINKING, eos="<|im_end|>"), options={"enable_thinking": False})
    assert encode(found, Task([user("Hi")])).text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_conversations_are_checked_before_anything_starts(tmp_path):
    found = encoder(templated(templates.PLAIN))
    found.check_conversations(0)  # raw text so far, which needs no template
    prompt = encode(found, Task([user("17 + 25 =")]))
    with pytest.raises(
        ValueError, match=r"'addition' holds conversations, but the chat template writes.*max_turns = 1"
    ):
        found.check_conversations(0)
    with pytest.raises(
        ValueError, match=r"task None: the chat template refuses the messages.*the chat template writes"
    ):
        found.following(prompt, [7], [user("Again")], None)
    with pytest.raises(ValueError, match="max_turns = 2 and chat_template = false"):
        from_file(tmp_path, {"prompt": "17 + 25 =", "answer": "42"}, max_turns=2, chat_template=False)
    good = encoder(templated(templates.CHATML))
    encode(good, Task([user("17 + 25 =")]))
    good.check_conversations(0)


def test_a_template_is_checked_with_tools_where_conversations_may_pass_them():
    """This template rewrites a turn that called tools once a tool has answered: only the check with tools notices."""
    rewriting = templates.CHATML.replace(
        "message['content'] + '<|im_end|>'",
        "(message['content'] ~ (' called' if message.tool_calls and loop.last else '')) + '<|im_end|>'",
    )
    assert rewriting != templates.CHATML
    task = Task([{"role": "user", "content": "17 + 25?"}], "42", id="0")
    for tools in (False, True):
        encoder = Encoder(
            templated(rewriting),
            ["file"],
            [{}],
            model=Path("unread"),
            vocabulary=1000,
            max_prompt_tokens=200,
            tools=tools,
        )
        encoder.prompt(Place(0, "train", 0), task)
        if tools:
            with pytest.raises(ValueError, match=r"environment 'file' holds conversations, but .*tool"):
                encoder.check_conversations(0)
        else:
            encoder.check_conversations(0)


def test_half_a_character_never_reaches_the_tokenizer():
    """Tokenizers raise TypeError for it, far from the environment that is to blame."""
    found, chat = encoder(), encoder(templated(templates.CHATML))
    half = "half \ud83d"
    place = r"environment 'addition', task 7: "
    for one, task in ((found, Task(half, "1", id="7")), (chat, Task([user(half)], "1", id="7"))):
        with pytest.raises(ValueError, match=rf"{place}the prompt holds the lone surrogate '\\ud83d' at character"):
            encode(one, task)
    with pytest.raises(ValueError, match=rf"{place}the answer holds the lone surrogate"):
        found.example(encode(found, Task("1+2=", half, id="7")))
    prompt = encode(chat, Task([user("1+2")], "1", id="7"))
    for new in (half, [user(half)]):
        with pytest.raises(ValueError, match=rf"{place}what is said holds the lone surrogate"):
            chat.following(prompt, [1], new, None)


def test_half_a_character_beside_the_prompt_is_kept():
    task = Task("1+2=", "half \ud83d", {"note": "\udc00"}, "7")
    assert encode(encoder(), task).task == task
