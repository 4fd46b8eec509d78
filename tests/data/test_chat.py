"""Conversations continued token by token, against the templates' own rendering of the whole."""

from typing import Any

import numpy as np
import pytest

from fiberpo_megatron.data.chat import ChatTemplate
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


def test_templates_whose_turns_depend_on_a_thought_are_refused_for_several_turns():
    marking = "+ '<|im_end|>' + ('(thought)' if 'think' in message['content'] else '') +"
    template = templates.CHATML.replace("+ '<|im_end|>' +", marking)
    with pytest.raises(
        ValueError, match=r"'<\|im_end\|>\(thought\).*after an answer with a thought.*set max_turns = 1"
    ):
        ChatTemplate(templated(template)).check_turns()


def test_nothing_is_continued_by_a_template_that_was_not_checked():
    counting = templates.CHATML.replace("+ '<|im_end|>' +", "+ '<|im_end|>' + loop.index | string +")
    chat = ChatTemplate(templated(counting))
    with pytest.raises(ValueError, match="between a first and a second answer"):
        chat.continuation([7, chat.end_of_turn], "Again")


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [
    {"type": "function", "id": f"call{i:05d}", "function": {"name": "add", "arguments": {"a": i}}} for i in range(2)
]
ANSWERS = [{"role": "tool", "content": text, "name": "add"} for text in ("41", "  42 ")]


@pytest.mark.parametrize("template", [templates.TOOLS, templates.FORGETTING_TOOLS], ids=["qwen25", "qwen3"])
def test_answers_of_tools_follow_as_the_template_renders_them(template):
    """What was sampled, calls and thoughts, stays; behind it stands what the template writes for the tools' answers."""
    tokenizer = templated(template, eos="<|im_end|>")
    chat = ChatTemplate(tokenizer)
    chat.check_turns(TOOLS)
    asked = {"role": "user", "content": "What is 17 + 25?"}
    turn = {"role": "assistant", "content": "I add.", "tool_calls": CALLS}
    assert '"name": "add"' in chat.prompt([asked], TOOLS)
    prompt = tokenizer.encode(chat.prompt([asked], TOOLS), add_special_tokens=False)
    whole = tokenizer.apply_chat_template([asked, turn], tools=TOOLS, tokenize=False)
    sampled = tokenizer.encode(whole[len(chat.prompt([asked], TOOLS)) :].rstrip("\n"), add_special_tokens=False)
    assert sampled[-1] == chat.end_of_turn and tokenizer.decode(sampled).count("<tool_call>") == 2
    for new in (ANSWERS[:1], ANSWERS, [*ANSWERS, {"role": "user", "content": "And 18 + 25?"}]):
        between = chat.continuation(sampled, new, TOOLS)
        expected = tokenizer.apply_chat_template([asked, turn, *new], tools=TOOLS, tokenize=False)
        expected += "<|im_start|>assistant\n"
        after = expected[expected.index("I add.") :]
        found = tokenizer.decode([*prompt, *sampled, *between])
        assert found[found.index("I add.") :] == after
        assert list(between) == tokenizer.encode(tokenizer.decode(between), add_special_tokens=False)


def test_a_user_may_follow_where_tools_were_described():
    tokenizer = templated(templates.TOOLS, eos="<|im_end|>")
    chat = ChatTemplate(tokenizer)
    between = chat.continuation([5, chat.end_of_turn], [{"role": "user", "content": "Again"}], TOOLS)
    assert tokenizer.decode(between) == "\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n"


def test_templates_that_rewrite_a_call_once_it_is_answered_are_refused_for_tools():
    rewriting = templates.TOOLS.replace("{% if message.tool_calls %}", "{% if message.tool_calls and loop.last %}")
    chat = ChatTemplate(templated(rewriting, eos="<|im_end|>"))
    chat.check_turns()
    with pytest.raises(ValueError, match=r"(?s)<tool_call>.*once a tool has answered: conversations with tools cannot"):
        chat.check_turns(TOOLS)
    with pytest.raises(ValueError, match="once a tool has answered"):
        chat.continuation([5, chat.end_of_turn], ANSWERS, TOOLS)
