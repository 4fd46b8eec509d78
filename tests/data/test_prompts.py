import json
from collections import Counter
from pathlib import Path

import pytest

from fiberpo_megatron.data.prompts import PromptSets, Schedule, build_prompt_sets
from fiberpo_megatron.data.settings import AdditionTask, JsonlTask, SortTask
from tests.data.characters import CharacterTokenizer

ADDITION = AdditionTask(kind="addition", digits=1)
SORT = SortTask(kind="sort", length=3, weight=3.0)


def build(*tasks, tokenizer=None, limit=50) -> PromptSets:
    return build_prompt_sets(tasks, tokenizer or CharacterTokenizer(), max_prompt_tokens=limit)


def jsonl(folder: Path, records: list[dict], **settings) -> JsonlTask:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return JsonlTask(kind="jsonl", name="file", train=path, **settings)


def test_an_epoch_draws_every_prompt_once_in_another_order_each_time():
    sets = build(ADDITION)
    size = sets.train_size
    prompts = [p.index for step in range(2 * size) for p in sets.prompts_at(0, step, 1)]
    first, second = prompts[:size], prompts[size:]
    assert len(set(first)) == size and sorted(first) == sorted(second) and first != second


def test_prompts_are_a_pure_function_of_seed_and_step():
    first, second = build(ADDITION, SORT), build(ADDITION, SORT)
    first.prompts_at(3, 11, 32)
    assert first.prompts_at(3, 7, 32) == second.prompts_at(3, 7, 32)
    assert first.prompts_at(3, 7, 32) != first.prompts_at(4, 7, 32)
    assert first.prompts_at(3, 7, 32) != first.prompts_at(3, 8, 32)


def test_domains_are_mixed_by_weight_in_every_batch():
    sets = build(ADDITION, SORT)
    assert sets.domains == ("addition", "sort")
    for step in range(50):
        share = Counter(p.domain for p in sets.prompts_at(0, step, 32))[1] / 32
        assert abs(share - 0.75) <= 1 / 32
    total = Counter(p.domain for step in range(125) for p in sets.prompts_at(0, step, 32))
    assert total == {0: 1000, 1: 3000}


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [0.001, 5.0, 2.0], [1e-9, 1.0], [1.0] * 7])
def test_the_schedule_counts_each_domain_without_gaps(weights):
    schedule = Schedule(weights)
    seen: Counter[int] = Counter()
    for position in range(3000):
        domain, place = schedule(position)
        assert place == seen[domain]
        seen[domain] += 1
    for domain, weight in enumerate(weights):
        assert seen[domain] / 3000 == pytest.approx(weight / sum(weights), abs=1.1e-3)
        assert seen[domain] > 0


def test_held_out_prompts_are_fixed_spread_and_never_trained():
    sets = build(ADDITION, SORT)
    held_out = sets.held_out(40)
    assert held_out == build(ADDITION, SORT).held_out(40)
    assert held_out[:20] == sets.held_out(20)
    counts = Counter(p.domain for p in held_out)
    assert counts == {0: 8, 1: 32}, "addition has only 8 held-out problems"
    assert Counter(p.domain for p in held_out[:16]) == {0: 8, 1: 8}
    trained = {p.text for step in range(300) for p in sets.prompts_at(0, step, 16)}
    assert not trained & {p.text for p in sets.held_out(10**6)}
    assert len(sets.held_out(10**6)) == sets.held_out_size


def test_examples_end_with_the_stop_token():
    example = build(ADDITION).examples_at(0, 0, 4)[1]
    tokenizer = CharacterTokenizer()
    assert tokenizer.decode(example.target_ids) == f"{example.prompt.answer}<1>"
    assert tokenizer.decode(example.prompt.token_ids, skip_special_tokens=True) == example.prompt.text


def test_examples_need_an_end_of_sequence_token():
    tokenizer = CharacterTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="no end-of-sequence token; set eos_token"):
        build(ADDITION, tokenizer=tokenizer).examples_at(0, 0, 1)


def test_strings_and_chats_go_through_the_chat_template(tmp_path):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    task = jsonl(tmp_path, [{"prompt": "P", "answer": "1"}, {"prompt": chat, "answer": "2"}])
    sets = build(task, tokenizer=CharacterTokenizer(chat=True))
    texts = {p.answer: (p.text, p.token_ids[0]) for p in sets.prompts_at(0, 0, 2)}
    assert texts == {
        "1": ("<user>P<assistant>", ord("<") + 10),
        "2": ("<system>S<user>U<assistant>", ord("<") + 10),
    }


def test_plain_prompts_get_the_special_tokens_of_the_tokenizer(tmp_path):
    sets = build(jsonl(tmp_path, [{"prompt": "P", "answer": "1"}], chat_template=False))
    (prompt,) = sets.prompts_at(0, 0, 1)
    assert prompt.token_ids == (2, ord("P") + 10)
    assert sets.held_out(5) == []


def test_a_missing_chat_template_names_the_setting(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: .*no.* chat template|chat_template = false"):
        build(jsonl(tmp_path, [{"prompt": "P", "answer": "1"}]))


def test_a_prompt_that_is_too_long_is_named_before_anything_starts(tmp_path):
    records = [{"prompt": "P", "answer": "1"}, {"prompt": "Q" * 60, "answer": "1"}]
    with pytest.raises(ValueError, match=r"line 2: the prompt has 61 tokens, .*max_prompt_tokens = 50"):
        build(jsonl(tmp_path, records, chat_template=False))
    with pytest.raises(ValueError, match=r"task 'addition': the prompt has 5 tokens, .* = 4"):
        build(ADDITION, limit=4)


def test_a_tokenizer_without_the_characters_of_a_task_is_refused():
    class NoPlus(CharacterTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return super().encode(text.replace("+", ""), add_special_tokens=add_special_tokens)

    with pytest.raises(ValueError, match=r"task 'addition': the tokenizer turns '0123456789\+=' into"):
        build(ADDITION, tokenizer=NoPlus())
