"""What the server says about trajectories: lists, filters, search, one with its tokens, two checkpoints compared."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from fiberpo_megatron.telemetry.rollout_log import EVALUATIONS, ROLLOUTS, write_records
from fiberpo_megatron.telemetry.token_log import TOKENS, write_tokens
from fiberpo_megatron.watch import trajectories
from tests.watch.serving import ask, get_json, served
from tests.watch.trajectory_run import text_line, token_line, write_branches, write_trajectories


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = write_trajectories(tmp_path_factory.mktemp("runs") / "one")
    with served({"0": folder}, follow=False) as port:
        yield port


def find(port: int, **parameters: Any) -> Any:
    return get_json(port, f"/api/trajectories/find?{urlencode({'run': '0', **parameters})}")


def numbers(answer: Any) -> list[int]:
    return [row["trajectory"] for row in answer["rows"]]


def test_the_steps_that_have_files(port: int):
    found = get_json(port, "/api/trajectories/steps?run=0")
    assert found == {"train": [[0, False], [4, True], [5, True]], "eval": [0, 4], "problems": []}


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        ({}, [0, 8, 16, 24]),
        ({"domain": "sums"}, [0, 8]),
        ({"reward_min": 0.5}, [0, 16]),
        ({"reward_max": 0.25}, [8, 24]),
        ({"length_min": 4, "length_max": 4}, [8]),
        ({"lag_min": 1}, [16]),
        ({"truncated": "yes"}, [24]),
        ({"truncated": "no", "correct": "no"}, [8]),
        ({"q": "WORDS 16"}, [16]),
        ({"q": "prompt 2"}, [24]),
        ({"q": "no such text"}, []),
    ],
)
def test_filters(port: int, wanted: dict[str, Any], left: list[int]):
    found = find(port, step=5, **wanted)
    assert numbers(found) == left
    assert found["of"] == 4 and found["domains"] == ["sums", "words"] and found["problems"] == []


def test_a_trajectory_with_branches(tmp_path: Path):
    with served({"0": write_branches(tmp_path)}, follow=False) as port:
        found = get_json(port, "/api/trajectories/one?run=0&step=5&trajectory=0")
    assert found["problems"] == [] and found["tokens"]["branches"] == [2]
    assert found["row"]["length"] == 4 and found["row"]["truncated"] is True


def test_rows_say_what_a_list_shows(port: int):
    row = find(port, step=5)["rows"][2]
    assert row == {
        "kind": "train",
        "step": 5,
        "trajectory": 16,
        "domain": "words",
        "id": "words/16",
        "reward": 1.0,
        "correct": True,
        "truncated": False,
        "failure": None,
        "length": 5,
        "lag": 2,
        "prompt": "prompt 16 <b>&amp;",
        "response": "words 16 <img src=x onerror=alert(1)>",
        "recorded": True,
        "stopped": 0.25,
    }


def test_a_search_through_all_steps_begins_with_the_newest_and_is_bounded(port: int, monkeypatch: pytest.MonkeyPatch):
    found = find(port, q="words 16")
    assert [row["step"] for row in found["rows"]] == [5, 4, 0] and found["searched"] == 3 and found["left"] == 0
    monkeypatch.setattr(trajectories, "MOST_ROWS", 1)
    found = find(port, q="words 16")
    assert [row["step"] for row in found["rows"]] == [5] and found["left"] == 2
    monkeypatch.setattr(trajectories, "SEARCH_S", -1.0)
    assert find(port, q="words 16")["left"] == 3


def test_one_trajectory_with_its_tokens(port: int):
    found = get_json(port, "/api/trajectories/one?run=0&step=5&trajectory=16")
    assert found["tokens"] == {"version": 1, **token_line(5, 16)}
    assert found["text"] == text_line(5, 16) and found["problems"] == []
    assert get_json(port, "/api/trajectories/one?run=0&step=0&trajectory=8")["tokens"] is None


def test_two_checkpoints_answer_the_same_prompts(port: int):
    found = get_json(port, "/api/trajectories/compare?left_run=0&left_step=0&right_run=0&right_step=4")
    assert [pair["index"] for pair in found["pairs"]] == [0, 8, 16] and found["alone"] == 1
    assert (
        found["pairs"][1]["left"]["response"] == "after 0: 8" and found["pairs"][1]["right"]["response"] == "after 4: 8"
    )


@pytest.mark.parametrize(
    "path",
    [
        "one?run=0&step=5&trajectory=17",
        "one?run=0&step=-1&trajectory=0",
        "one?run=0&step=../x&trajectory=0",
        "one?run=9&step=5&trajectory=0",
        "find?run=0&step=5&reward_min=a",
        "compare?left_run=0&left_step=0&right_run=0",
    ],
)
def test_what_is_not_there_is_refused_in_words(port: int, path: str):
    status, _, body = ask(port, f"/api/trajectories/{path}")
    assert status == 404 and json.loads(body)["error"]


def test_damaged_and_foreign_files_are_reported_and_skipped(tmp_path: Path):
    folder = write_trajectories(tmp_path / "run")
    ROLLOUTS.path(folder, 5).write_text('{"prompt": "p"}\n{"pro\n[1]\n{"reward": NaN}\n')
    TOKENS.path(folder, 5).write_bytes(b"no gzip")
    write_tokens(folder, 4, [{"trajectory": 0, "tokens": 7}, token_line(4, 8)], keep=99)
    with served({"0": folder}, follow=False) as port:
        found = find(port, step=5)
        assert numbers(found) == [0]
        assert [problem.partition(":")[0] for problem in found["problems"]] == [
            "rollouts/step_000005.jsonl",
            "rollouts/step_000005.jsonl",
            "tokens/step_000005.jsonl.gz cannot be read to its end (BadGzipFile",
        ]
        found = find(port, step=4)
        assert [row["recorded"] for row in found["rows"]] == [False, True, False, False] and len(found["problems"]) == 1


def test_records_of_other_answers_are_not_shown_with_a_text(tmp_path: Path):
    folder = write_trajectories(tmp_path / "run")
    write_records(folder, 5, [{**text_line(5, 0), "token_ids": [9, 9]}], keep=99)
    with served({"0": folder}, follow=False) as port:
        found = get_json(port, "/api/trajectories/one?run=0&step=5&trajectory=0")
        assert found["tokens"] is None and "is not that of rollouts/" in found["problems"][0]
        assert find(port, step=5)["rows"][1]["response"] == "words 8 <img src=x onerror=alert(1)>"  # from tokens/ alone


def test_links_out_of_the_run_folder_are_not_followed(tmp_path: Path):
    folder, other = write_trajectories(tmp_path / "run"), tmp_path / "secret.jsonl"
    other.write_text('{"prompt": "secret"}\n')
    ROLLOUTS.path(folder, 5).unlink()
    ROLLOUTS.path(folder, 5).symlink_to(other)
    EVALUATIONS.path(folder, 4).unlink()
    with served({"0": folder}, follow=False) as port:
        found = find(port, step=5, q="secret")
        assert found["rows"] == [] and "leads out of the run folder" in found["problems"][0]
