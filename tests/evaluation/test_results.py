"""Results of prompts, metrics of sets, files, and two checkpoints side by side."""

from pathlib import Path
from typing import Any

import pytest

from fiberpo_megatron.config import Config
from fiberpo_megatron.evaluation.compare import write_comparison
from fiberpo_megatron.evaluation.results import (
    BESIDE,
    IN_TRAINING,
    LONGEST_TEXT,
    measure,
    read_results,
    shortened,
    write_results,
)
from fiberpo_megatron.evaluation.settings import EvaluationSet


def prompt(name: str, right: str, answers: str = "", **more: Any) -> dict[str, Any]:
    """A prompt whose samples are right ("1") or wrong ("0")."""
    samples = [
        {"correct": r == "1", "reward": float(r), "tokens": 3, "truncated": False, "answer": a, "text": f"{name}: {a}"}
        for r, a in zip(right, answers or right)
    ]
    return {"environment": "sums", "id": name, "prompt": f"{name}=", "expected": "1", "samples": samples, **more}


SET = EvaluationSet(name="aime", environment="sums", samples=4, pass_at=[1, 2, 4])


def test_the_metrics_of_a_set():
    found = measure(SET, [prompt("a", "1100", "xxyy"), prompt("b", "0000"), prompt("c", "1110"), prompt("d", "")])
    assert found["aime/avg@4"] == pytest.approx((0.5 + 0 + 0.75) / 3)
    assert found["aime/pass@1"] == pytest.approx(found["aime/avg@4"])
    assert found["aime/pass@2"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert found["aime/pass@4"] == pytest.approx(2 / 3)
    assert found["aime/maj@4"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["aime/reward/mean"] == pytest.approx(5 / 12) and found["aime/response_length/mean"] == 3
    assert 0 <= found["aime/avg@4/low"] < found["aime/avg@4"] < found["aime/avg@4/high"] <= 1
    assert set(found) <= set(SET.metrics)
    fewer = measure(SET, [prompt("a", "1100"), prompt("b", "1")])
    assert fewer["aime/pass@2"] == pytest.approx(5 / 6), "a prompt with fewer than k samples takes no part"
    assert measure(SET, [prompt("a", "")]) == {}


def test_long_texts_keep_beginning_and_end():
    text = shortened("b" + "x" * LONGEST_TEXT + "e")
    assert text.startswith("bx") and text.endswith("xe") and "2 characters left out" in text
    assert shortened("short") == "short"


def test_two_checkpoints_side_by_side(tmp_path: Path):
    before = [prompt("a", "01"), prompt("b", "11"), prompt("c", "00"), prompt("gone", "1")]
    after = [prompt("a", "11"), prompt("b", "00", "``"), prompt("c", "00")]
    for files, step, prompts in ((IN_TRAINING, 100, before), (BESIDE, 200, after)):
        result = {"settings": {}, "metrics": measure(SET, prompts), "prompts": prompts}
        write_results(files.path(tmp_path, step), step, {"aime": result})
    assert read_results(IN_TRAINING.path(tmp_path, 100))["step"] == 100
    path, summary = write_comparison(tmp_path, 100, 200)
    assert path.name == "compare_100_200.md" and summary == "aime: 1 of 3 prompts won, 1 lost"
    text = path.read_text()
    won, lost = text.index("### Won"), text.index("### Lost")
    assert won < text.index("task a") < lost < text.index("task b") and "task c" not in text
    assert "| aime/avg@4 |" in text and "After 200 steps 2 of 2 samples are right" in text
    with pytest.raises(ValueError, match=r"no results of an evaluation after 300 steps, only after 100, 200"):
        write_comparison(tmp_path, 100, 300)
    IN_TRAINING.path(tmp_path, 100).write_text('{"step": 100, "sets": {"aime": 3}}')
    with pytest.raises(ValueError, match=r"training_000100.json holds no results"):
        write_comparison(tmp_path, 100, 200)


def config(**sections: Any) -> Config:
    environments = [{"name": "sums", "use": "unused:Unused"}]
    return Config.model_validate({"model": {"path": "unused"}, "environments": environments, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evaluation": {"sets": [{"name": "a", "environment": "none"}]}}, "'none' is none of"),
        ({"evaluation": {"sets": [{"name": "reward", "environment": "sums"}]}}, "choose another"),
        ({"evaluation": {"sets": [{"name": "a", "environment": "sums"}] * 2}}, "used twice"),
        (
            {"evaluation": {"sets": [{"name": "a", "environment": "sums", "samples": 2, "pass_at": [4]}]}},
            "raise samples to 4",
        ),
        ({"evaluation": {"sets": [{"name": "sums", "environment": {"use": "m:C"}}]}}, "rename the set"),
        (
            {
                "evaluation": {"sets": [{"name": "a", "environment": "sums", "samples": 8}]},
                "checkpoint": {"keep_best_metric": "eval/a/avg@4"},
            },
            "use one of eval/a/avg@8",
        ),
        (
            {"evaluation": {"prompts": 0}, "checkpoint": {"keep_best_metric": "eval/accuracy"}},
            "leaves the default set out",
        ),
        ({"algorithm": {"overlong": {"cache_tokens": 9}}, "rollout": {"max_response_tokens": 8}}, "is above"),
        ({"environments": [{"name": "a", "use": "m:C", "format": {"pattern": "("}}]}, "not a regular expression"),
    ],
)
def test_settings_that_cannot_work_are_refused(sections: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(**sections)


def test_an_environment_of_a_sets_own_has_its_name():
    one = config(evaluation={"sets": [{"name": "own", "environment": {"use": "m:C", "workers": 1}}]})
    assert [(own.name, own.workers) for own in one.evaluation.own_environments] == [("own", 1)]
    assert config(**one.model_dump(exclude={"model", "environments"})).evaluation == one.evaluation
