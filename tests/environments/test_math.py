"""These tests compare final answers as the environment `math` does."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from fiberpo_megatron.environments import Turn
from fiberpo_megatron.environments.builtin import math_answers
from fiberpo_megatron.environments.builtin.final_answers import last_boxed, last_number
from fiberpo_megatron.environments.builtin.math import Math

real = pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed")


def problems(path: Path, *answers: object) -> str:
    path.write_text("".join(json.dumps({"prompt": f"{answer}?", "answer": answer}) + "\n" for answer in answers))
    return str(path)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 1,000.", "1000"),
        ("12,3456", "3456"),
        ("between 5-3", "3"),
        ("x = -0.50", "-0.5"),
        ("(\N{MINUS SIGN}4)", "-4"),
        ("$72.00", "72"),
        ("2e3 m", "2000"),
        ("1/2", "2"),
        ("71 or USD72", "72"),
        ("none, \u0663 neither", None),
        ("", None),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_the_last_number_of_a_text(text, number):
    found = last_number(text)
    assert found == (None if number is None else last_number(number)) and (found is None) == (number is None)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1", None),
        ("1", None),
        ("\\boxed{" * 10**5, None),
    ],
)
def test_the_last_box_of_a_text(text, box):
    assert last_boxed(text) == box


def test_last_number_needs_no_library(tmp_path, monkeypatch):
    monkeypatch.setattr(math_answers, "find_spec", lambda name: None)
    math = Math(problems(tmp_path / "a.jsonl", 72, "4 + 4 = 8 #### 8.0"), mode="last-number")
    first, second = math.train(0), math.train(1)
    texts = [(first, "71 or 72"), (first, "72 or 71"), (first, "none"), (second, r"\boxed{8} apples"), (first, "1,072")]
    assert [math.score(task, Turn(text)).reward for task, text in texts] == [1.0, 0.0, 0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: `answer` must hold a number, got many"):
        Math(problems(tmp_path / "b.jsonl", 1, "many"), mode="last-number")
    with pytest.raises(
        ValueError, match='needs the math-verify package; run `pip install math-verify`, or use mode = "last'
    ):
        Math(problems(tmp_path / "a.jsonl", 72))


@real
def test_boxed_takes_the_last_box_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answer": r"Half: #### \frac12"}))
    math = Math(str(path), mode="boxed", answer_after="####", timeout_s=30.0)
    task = math.train(0)
    texts = [
        r"\boxed{\frac12}",
        r"\boxed{3} \boxed{0.5}",
        r"\boxed{0.5} or \boxed{3}",
        r"\frac12",
        "0.5",
        r"\boxed{0.5",
    ]
    try:
        assert task.answer == r"\frac12"
        assert [math.score(task, Turn(text)).correct for text in texts] == [True, True, False, False, False, False]
    finally:
        math._verifier.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "guess"}, "mode = 'guess' is unknown; use one of math-verify, boxed, last-number"),
        ({"timeout_s": 0}, "timeout_s = 0 must be a number of seconds above 0"),
        ({"mode": "last-number", "max_turns": 0}, "max_turns = 0 must be"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Math(problems(tmp_path / "a.jsonl", 1), **options)
