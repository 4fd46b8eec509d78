import json

import pytest

from fiberpo_megatron.data.tokenizer import load_tokenizer, response_text, stop_token_ids
from tests.data.characters import CharacterTokenizer


def test_a_missing_folder_or_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model\.path = .*nowhere is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no tokenizer .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot load the tokenizer of model\.path"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("listed", "expected"), [([7, 5], (1, 5, 7)), (9, (1, 9)), (None, (1,))])
def test_stop_tokens_of_the_generation_config_count_too(tmp_path, listed, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert stop_token_ids(tmp_path, CharacterTokenizer()) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"eos_token_id":' * 50_000, "nested too deep"),
        ('{"eos_token_id": 1, "eos_token_id": 2}', "stands in one object twice"),
        ('{"eos_token_id": NaN}', "NaN is not a finite number"),
        ('{"eos_token_id": "</s>"}', "eos_token_id = '</s>'"),
        ('{"eos_token_id": [true]}', r"eos_token_id = \[True\]"),
        ('{"eos_token_id": 1e30}', "eos_token_id = 1e"),
        ('{"eos_token_id": 99999999999}', "whole numbers below"),
        ('{"eos_token_id": "\\u001b[2J"}', r"eos_token_id = '\\x1b"),
    ],
)
def test_a_damaged_generation_config_is_named(tmp_path, text, named):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"generation_config\.json.*{named}"):
        stop_token_ids(tmp_path, CharacterTokenizer())


def test_a_model_without_stop_token_is_refused(tmp_path):
    tokenizer = CharacterTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        stop_token_ids(tmp_path, tokenizer)


def test_response_text_keeps_a_stop_token_inside():
    """Only the last token is taken for the stop; other special tokens are skipped by the tokenizer."""
    tokenizer = CharacterTokenizer()
    comma = ord(",") + 10
    assert response_text(tokenizer, [*tokenizer.encode("a", add_special_tokens=False), comma], [comma]) == "a"
    assert response_text(tokenizer, [comma, *tokenizer.encode("a")], [comma]) == ",a"


def test_response_text_can_keep_the_special_tokens_that_tool_calls_begin_with():
    """Many models begin a call with a special token; without its text the engine's parser would not see the call."""
    tokenizer = CharacterTokenizer()
    special, comma = 2, ord(",") + 10
    ids = [special, *tokenizer.encode("a", add_special_tokens=False), comma]
    assert response_text(tokenizer, ids, [comma]) == "a"
    assert response_text(tokenizer, ids, [comma], special=True) == tokenizer.decode([special]) + "a" != "a"
