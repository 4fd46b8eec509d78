"""Conversations continued token by token, against the templates' own rendering of the whole."""

import json
from typing import Any

import numpy as np
import pytest

from fiberpo_megatron.data.chat import ChatTemplate
from fiberpo_megatron.data.prompts import build_prompt_sets
from fiberpo_megatron.data.settings import JsonlTask
from tests.data import templates
from tests.data.templates import templated

TEMPLATES = {
    "smollm2": (templates.CHATML, "<|im_end|>", {}),
    "qwen3": (templates.THINKING, "<|im_end|>", {}),
    "llama3": (templates.LLAMA_3, "<|eot_id|>", {}),
    "mistral": (templates.MISTRAL, "</s>", {}),
}
CONVERSATION = ["What is 17 + 25?", " 41", "  That is wrong,\ntry again. ", "The sum is 42.", "Why?", "né 42"]


def tokenizer_of(name: str) -> tuple[Any, str, dict[str, object]]:
    template, end, options = TEMPLATES[name]
    bos = "<|begin_of_text|>" if name == "llama3" else "<s>"
    return templated(template, bos=bos, eos=end), end, options


def messages(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_whole_conversation_is_what_the_template_renders(name: str):
    """Also what each turn was sampled after: the rendering of the messages before it, with the generation prompt."""
    tokenizer, end, options = tokenizer_of(name)
    # Llama 3 trims what people and models write; a model that begins with a space is not rendered as it wrote
    texts = [text.strip() if i % 2 and name == "llama3" else text for i, text in enumerate(CONVERSATION)]
    chat = ChatTemplate(tokenizer, options)
    chat.check_turns()
    assert tokenizer.convert_ids_to_tokens(chat.end_of_turn) == end
    before = " " if name == "mistral" else ""  # Mistral writes a space before an answer; the model samples it
    ids = tokenizer.encode(chat.prompt(messages(texts[:1])), add_special_tokens=False)
    mask = [False] * len(ids)
    for turn in range(1, len(texts), 2):
        expected = tokenizer.apply_chat_template(messages(texts[:turn]), add_generation_prompt=True)
        assert ids == expected["input_ids"]
        sampled = [*tokenizer.encode(before + texts[turn], add_special_tokens=False), chat.end_of_turn]
        ids, mask = ids + sampled, mask + [True] * len(sampled)
        if turn + 1 < len(texts):
            between = list(chat.continuation(sampled, texts[turn + 1]))
            ids, mask = ids + between, mask + [False] * len(between)
    whole = tokenizer.apply_chat_template(messages(texts))["input_ids"]
    assert whole[: len(ids)] == ids
    assert tokenizer.decode(whole[len(ids) :]).strip() == ""  # at most the newline after the last turn
    runs = np.split(np.array(ids), np.flatnonzero(np.diff(mask)) + 1)
    assert [tokenizer.decode(run) for run in runs[1::2]] == [before + text + end for text in texts[1::2]]


def test_options_reach_the_template_and_the_sampled_thought_stays():
    """Qwen3's template leaves the empty thought of the generation prompt out of past turns. What was sampled after it
    must stay behind it: only the tokens between the turns come from the template."""
    tokenizer, _, _ = tokenizer_of("qwen3")
    chat = ChatTemplate(tokenizer, {"enable_thinking": False})
    chat.check_turns()
    assert chat.prompt(messages(["Hi"])).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert ChatTemplate(tokenizer).prompt(messages(["Hi"])).endswith("<|im_start|>assistant\n")
    between = tokenizer.decode(chat.continuation([5, chat.end_of_turn], "Again"))
    assert between == "\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_thoughts_that_the_template_drops_from_past_turns_stay_sampled():
    """The policy was conditioned on its thought, so the next turn is too; a prompt's own history is the template's."""
    tokenizer = templated(templates.FORGETTING, eos="<|im_end|>")
    chat = ChatTemplate(tokenizer)
    chat.check_turns()
    assert tokenizer.convert_ids_to_tokens(chat.end_of_turn) == "<|im_end|>"
    thought = "<think>\n17 + 25\n</think>\n\n41"
    history = messages(["What is 17 + 25?", thought, "Try again."])
    assert "think" not in chat.prompt(history) and "<|im_start|>assistant\n41<|im_end|>" in chat.prompt(history)
    sampled = [*tokenizer.encode(thought, add_special_tokens=False), chat.end_of_turn]
    text = chat.prompt(history[:1]) + tokenizer.decode([*sampled, *chat.continuation(sampled, "Try again.")])
    assert text == chat.prompt(history).replace("assistant\n41", f"assistant\n{thought}")


def test_a_response_that_did_not_end_its_turn_is_not_continued():
    tokenizer, _, _ = tokenizer_of("smollm2")
    chat = ChatTemplate(tokenizer)
    cut = tokenizer.encode("41", add_special_tokens=False)
    assert chat.continuation(cut, "Again") is None
    assert chat.continuation([*cut, tokenizer.convert_tokens_to_ids("</s>")], "Again") is None
    assert chat.continuation([*cut, chat.end_of_turn], "Again") is not None


def test_templates_without_end_of_turn_are_refused_for_several_turns():
    chat = ChatTemplate(templated(templates.PLAIN))
    assert chat.end_of_turn is None
    with pytest.raises(ValueError, match=r"does not begin with the special token.*set max_turns = 1"):
        chat.check_turns()


def test_templates_that_count_turns_are_refused_for_several_turns():
    counting = templates.CHATML.replace("+ '<|im_end|>' +", "+ '<|im_end|>' + loop.index | string +")
    with pytest.raises(ValueError, match="between a first and a second answer.*set max_turns = 1"):
        ChatTemplate(templated(counting)).check_turns()


def sets(tmp_path, template: str | None, *records: dict, **settings: object):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = JsonlTask(kind="jsonl", name="file", train=path, **settings)
    return build_prompt_sets([task], templated(template), max_prompt_tokens=200)


def test_supervised_answers_end_as_the_template_ends_a_turn(tmp_path):
    """Only the last answer is trained on: earlier assistant messages belong to the prompt."""
    record = {"prompt": messages(CONVERSATION[:3]), "answer": "42"}
    found = sets(tmp_path, templates.CHATML, record)
    tokenizer = templated(templates.CHATML)
    (example,) = found.examples_at(0, 0, 1)
    whole = tokenizer.apply_chat_template([*messages(CONVERSATION[:3]), {"role": "assistant", "content": "42"}])
    ids = [*example.prompt.token_ids, *example.target_ids]
    assert whole["input_ids"] == [*ids, *tokenizer.encode("\n")]
    assert tokenizer.decode(example.target_ids) == "42<|im_end|>"
    assert found.ends_of_turn == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)

    raw = sets(tmp_path, templates.CHATML, {"prompt": "17 + 25 =", "answer": "42"}, chat_template=False)
    assert tokenizer.decode(raw.examples_at(0, 0, 1)[0].target_ids) == "42</s>"
    assert raw.ends_of_turn == ()


def test_several_turns_are_checked_before_anything_starts(tmp_path):
    record = {"prompt": "17 + 25 =", "answer": "42"}
    with pytest.raises(ValueError, match=r"task 'file': max_turns = 2: the chat template writes"):
        sets(tmp_path, templates.PLAIN, record, max_turns=2)
    with pytest.raises(ValueError, match="max_turns = 2 and chat_template = false"):
        sets(tmp_path, templates.PLAIN, record, max_turns=2, chat_template=False)
    found = sets(tmp_path, templates.CHATML, record, max_turns=2)
    (prompt,) = found.prompts_at(0, 0, 1)
    (end,) = found.ends_of_turn
    chat = ChatTemplate(templated(templates.CHATML))
    assert found.continuation(prompt, [7, end], "Again") == chat.continuation([7, end], "Again")
