"""The committed demo model: its files are what the script writes, and both sides can load them."""

import runpy
from pathlib import Path

import pytest
from transformers import AutoConfig

from examples.demo.environments import Addition, Sort
from fiberpo_megatron.data.encoding import Encoder
from fiberpo_megatron.data.prompts import Domain, PromptSets
from fiberpo_megatron.data.tokenizer import load_tokenizer, response_text, stop_token_ids

DEMO = Path(__file__).parents[2] / "examples" / "demo"


def test_committed_files_are_what_the_script_writes(tmp_path):
    runpy.run_path(str(DEMO / "make_model.py"))["write_model"](tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in names:
        assert (DEMO / "model" / name).read_text(encoding="utf-8") == (tmp_path / name).read_text(encoding="utf-8")


def test_every_character_is_one_token_and_comes_back():
    tokenizer = load_tokenizer(DEMO / "model")
    config = AutoConfig.from_pretrained(DEMO / "model")
    characters = "0123456789+-*/=<>:;,.?!()[]|_#&^% \nabcdefghijklmnopqrstuvwxyz"
    ids = tokenizer.encode(characters)
    assert len(ids) == len(set(ids)) == len(characters) == config.vocab_size - 3
    assert tokenizer.decode(ids) == characters
    assert tokenizer.decode(tokenizer.encode("a 1 , b\n\n"), skip_special_tokens=True) == "a 1 , b\n\n"
    assert tokenizer.encode("A~") == [2, 2]
    assert (tokenizer.eos_token_id, config.eos_token_id, config.pad_token_id) == (1, 1, 0)


def test_the_config_is_a_small_mixture_of_experts():
    config = AutoConfig.from_pretrained(DEMO / "model")
    attention = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    experts = config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size
    embeddings = 2 * config.vocab_size * config.hidden_size
    assert config.model_type == "qwen3_moe" and not config.tie_word_embeddings
    assert config.num_hidden_layers * (attention + experts) + embeddings == pytest.approx(1.79e6, rel=0.01)


def test_prompts_of_both_tasks_fit_the_tokenizer():
    tokenizer = load_tokenizer(DEMO / "model")
    tasks = [Addition(), Sort()]
    names = ["addition", "sort"]
    sets = PromptSets([Domain(n, 1.0, t.train_size, t.held_out_size) for n, t in zip(names, tasks)])
    encoder = Encoder(tokenizer, names, [{}, {}], model=DEMO / "model", vocabulary=64, max_prompt_tokens=16)
    places = sets.prompts_at(0, 0, 8)
    assert {place.domain for place in places} == {0, 1}
    for place in places:
        prompt = encoder.prompt(place, tasks[place.domain].train(place.index))
        assert tokenizer.decode(prompt.token_ids) == prompt.text and len(prompt.token_ids) == len(prompt.text)


def test_response_text_leaves_the_stop_token_out():
    tokenizer = load_tokenizer(DEMO / "model")
    stop = stop_token_ids(DEMO / "model", tokenizer)
    assert stop == (1,)
    ids = tokenizer.encode("092")
    assert response_text(tokenizer, [*ids, 1], stop) == "092"
    assert response_text(tokenizer, ids, stop) == "092"
    assert response_text(tokenizer, [1], stop) == response_text(tokenizer, [], stop) == ""
