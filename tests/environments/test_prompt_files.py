"""These tests read data sets as `chat` and `math` do: JSON lines, and tables by the real pyarrow and datasets."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fiberpo_megatron.environments.builtin import index_cache, tables
from fiberpo_megatron.environments.builtin.chat import Chat

ROWS: list[dict[str, Any]] = [
    {
        "name": f"p{number}",
        "question": [{"role": "user", "content": f"{number} + {number} é"}] if number % 2 else f"{number} + {number}",
        "extra": {"solution": {"text": f"It is #### {2 * number}"}, "level": number % 3},
        "source_set": "made" if number else None,
    }
    for number in range(7)
]
FIELDS = {
    "prompt": "question",
    "answer": "extra.solution.text",
    "id": "name",
    "metadata": ["extra.level", "source_set"],
    "answer_after": "####",
}
CHATS = [{**row, "question": [{"role": "user", "content": f"{number}?"}]} for number, row in enumerate(ROWS)]
"""Rows as tables hold them: of one type in each column."""


def lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def parquet(path: Path, records: list[dict[str, Any]], **options: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, **options)
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give each test a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/fiberpo-megatron/prompts"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Write a DatasetDict with two splits, the first in two files, by the real library; return its folder."""
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("saved") / "sums"
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(CHATS), test=datasets.Dataset.from_list(CHATS[:2]))
    splits["test"] = splits["test"].map(lambda row: {"question": [{"role": "user", "content": "other"}]})
    splits.save_to_disk(folder, num_shards={"train": 2, "test": 1})
    splits["train"].select(range(2, 5)).save_to_disk(folder.parent / "part")
    return folder


def tasks(chat: Chat) -> list[tuple[Any, ...]]:
    return [
        (task.prompt, task.answer, {k: v for k, v in task.metadata.items() if k != "source"}, task.id)
        for task in map(chat.train, range(chat.train_size))
    ]


def test_json_lines_have_fields_of_any_name(tmp_path):
    chat = Chat(lines(tmp_path / "a.jsonl", ROWS), **FIELDS, system="Be brief.")
    task = chat.train(3)
    assert task.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 3 é"}]
    assert (task.answer, task.id) == ("6", "p3")
    assert task.metadata == {"source": f"{tmp_path}/a.jsonl, line 4", "extra.level": 0, "source_set": "made"}
    own = [{"role": "system", "content": "Think."}, {"role": "user", "content": "?"}]
    kept = Chat(lines(tmp_path / "b.jsonl", [{"prompt": own, "answer": 1}]), system="Be brief.").train(0)
    assert list(kept.prompt) == own, "a prompt with a system message keeps it"


@pytest.mark.parametrize("row_group_size", [2, 100])
def test_parquet_holds_the_same_tasks_as_json_lines(tmp_path, row_group_size):
    path = parquet(tmp_path / "a.parquet", CHATS, row_group_size=row_group_size)
    chat = Chat(path, **FIELDS)
    assert tasks(chat) == tasks(Chat(lines(tmp_path / "a.jsonl", CHATS), **FIELDS)) and chat.train_size == 7
    assert chat.train(5).metadata["source"] == f"{path}, row 5"


def test_several_parquet_files_are_one_data_set(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(2):
        parquet(tmp_path / f"data/train-{number}.parquet", CHATS[4 * number : 4 * number + 4])
    whole = tasks(Chat(lines(tmp_path / "a.jsonl", CHATS), **FIELDS))
    chat = Chat(str(tmp_path / "data/train-*.parquet"), **FIELDS)
    assert tasks(chat) == whole == tasks(Chat(str(tmp_path / "data"), **FIELDS))
    assert chat.train(5).metadata["source"] == f"{tmp_path}/data/train-1.parquet, row 1"


def test_a_folder_that_datasets_saved(tmp_path, saved):
    chat = Chat(str(saved / "train"), held_out=str(saved / "test"), **FIELDS)
    assert tasks(chat) == tasks(Chat(lines(tmp_path / "a.jsonl", CHATS), **FIELDS))
    assert chat.held_out_size == 2 and list(chat.held_out(0).prompt) == [{"role": "user", "content": "other"}]
    assert [task[3] for task in tasks(Chat(str(saved.parent / "part"), **FIELDS))] == ["p2", "p3", "p4"]
    arrow = tmp_path / "one.arrow"
    with pyarrow.OSFile(str(arrow), "wb") as file, pyarrow.ipc.new_file(file, pyarrow.schema([("prompt", "string")])):
        pass
    with pytest.raises(ValueError, match=r"one\.arrow has no column `answer`; it has prompt"):
        Chat(str(arrow))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda at: parquet(at / "a.parquet", [{"prompt": "a", "gold": "b"}]),
            r"has no column `answer`; it has prompt, gold",
        ),
        (
            lambda at: parquet(at / "a.parquet", [{"prompt": "a", "answer": ""}]),
            r"a\.parquet, row 0: `answer` must be a",
        ),
        (
            lambda at: parquet(at / "a.parquet", [{"prompt": "a", "answer": "1"}, {"prompt": None, "answer": "1"}]),
            r"a\.parquet, row 1: `prompt` must be .* got None",
        ),
        (lambda at: str(at / "none.parquet"), r"cannot read the prompt file .*none\.parquet: No such file"),
        (lambda at: str(at / "train-*.parquet"), r"pattern .* must match parquet files, it matches nothing"),
        (
            lambda at: (at / "a.parquet").write_bytes(b"PAR1 nonsense PAR1") and str(at / "a.parquet"),
            "cannot read the data set",
        ),
        (lambda at: (at / "empty").mkdir() or str(at / "empty"), "a folder with neither parquet files nor"),
        (lambda at: parquet(at / "a.parquet", CHATS[:0]), "has no column `prompt`"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        Chat(make(tmp_path))


def test_the_folder_of_several_splits_says_which_there_are(saved):
    with pytest.raises(ValueError, match=r"holds the splits train, test; name the folder of one: .*sums/train"):
        Chat(str(saved))


def test_a_fact_that_json_lacks_is_named_with_its_row(tmp_path):
    records = [{"prompt": "a", "answer": "1", "when": 1}, {"prompt": "b", "answer": "1", "when": float("nan")}]
    path = parquet(tmp_path / "a.parquet", records)
    with pytest.raises(ValueError, match=r"row 1: `when` is nan \(float\), which JSON cannot represent"):
        Chat(path, metadata=["when"])


def test_pyarrow_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", CHATS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"reading .*a\.parquet needs the pyarrow package .* run `pip install pyarrow`"
    ):
        Chat(path)


# ---- filters and order ----


def numbered(path: Path, count: int = 10, **more: Any) -> str:
    return lines(path, [{"prompt": "x" * (number + 1), "answer": number, **more} for number in range(count)])


def answers(chat: Chat) -> list[int]:
    return [int(chat.train(index).answer) for index in range(chat.train_size)]


def test_long_prompts_and_repeated_ones_are_left_out(tmp_path, capsys):
    held_out = lines(tmp_path / "h.jsonl", [{"prompt": "xx", "answer": 1}, {"prompt": "y" * 9, "answer": 1}])
    records = [{"prompt": "x" * n, "answer": number} for number, n in enumerate([1, 2, 3, 1, 4, 9, 3])]
    chat = Chat(lines(tmp_path / "a.jsonl", records), held_out, deduplicate=True, max_characters=5)
    assert answers(chat) == [0, 2, 4] and chat.held_out_size == 1, "`xx` is held out"
    assert [chat.train(index).id for index in range(3)] == ["0", "2", "4"], "ids are rows, as without filters"
    said = capsys.readouterr().err
    assert "a.jsonl: 3 prompts are used; deduplicate = true left out 3, max_characters = 5 left out 1" in said
    plain = Chat(lines(tmp_path / "b.jsonl", records))
    assert answers(plain) == list(range(7)) and plain.train(0).id is None


def test_solve_rates_choose_and_order_the_problems(tmp_path):
    train = numbered(tmp_path / "a.jsonl")
    rates = [(0, 0.0), (1, 0.25), (2, 0.5), (3, 1.0), (4, 0.75)]
    by_rate = lines(tmp_path / "rates.jsonl", [{"id": str(row), "solve_rate": rate} for row, rate in rates])
    attempts = [
        {"id": f"sums/train/{row}", "domain": "sums", "correct": k < 4 * rate} for row, rate in rates for k in range(4)
    ]
    by_attempt = lines(tmp_path / "rollouts.jsonl", attempts)
    groups = [
        {
            "step": k,
            "environment": "e",
            "id": f"e/train/{row}",
            "solved": 0,
            "samples": n,
            "solve_rate": min(1, rate * r),
        }
        for row, rate in rates
        for k, n, r in ((0, 1, float(rate == 1)), (1, 4, 1.25))  # five samples together
    ]
    by_group = lines(tmp_path / "solve_rates.jsonl", groups)
    for file in (by_rate, by_attempt, by_group):
        options = {"solve_rates": file, "solve_rate_range": (0.2, 0.8)}
        assert answers(Chat(train, **options)) == [1, 2, 4, 5, 6, 7, 8, 9], "the others are unknown and stay"
        assert answers(Chat(train, **options, difficulty="solve_rate")) == [4, 2, 1, 5, 6, 7, 8, 9]


def test_ids_of_the_data_set_name_solve_rates(tmp_path):
    records = [{"prompt": str(number), "answer": number, "name": f"aime/{number}a"} for number in range(3)]
    rates = lines(
        tmp_path / "rates.jsonl", [{"id": f"aime/{number}a", "solve_rate": number / 2} for number in range(3)]
    )
    chat = Chat(lines(tmp_path / "a.jsonl", records), id="name", solve_rates=rates, solve_rate_range=(0.5, 1.0))
    assert answers(chat) == [1, 2] and chat.train(0).id == "aime/1a"


def test_a_field_orders_the_problems(tmp_path):
    records = [
        {"prompt": str(number), "answer": number, "level": level} for number, level in enumerate([2, "1.5", 3, 1])
    ]
    path = lines(tmp_path / "a.jsonl", records)
    chat = Chat(path, difficulty="level")
    assert answers(chat) == [3, 1, 0, 2] and [chat.train(k).id for k in range(4)] == ["3", "1", "0", "2"]
    with pytest.raises(ValueError, match=r"line 2: `level` must be a finite number, got hard"):
        Chat(lines(tmp_path / "b.jsonl", [records[0], {**records[1], "level": "hard"}]), difficulty="level")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", r"line 1: `id` must be a string or a whole number, got None"),
        ('{"id": 1}', r"line 1: `solve_rate` must be a number from 0 to 1 \(or `correct` a truth\), got None"),
        ('{"id": 1, "solve_rate": 1.5}', "got 1.5"),
        ("3", "line 1: expected a JSON object with `id` and `solve_rate`, got 3"),
        ("", "holds no line"),
        ('{"id": 1, "solve_rate": 1, "samples": 0}', "`samples` must be a whole number of at least 1, got 0"),
        (
            '{"id": 99, "solve_rate": 1}',
            "has 1 ids, and none is that of a problem in .*a.jsonl; give the file of a run",
        ),
        (
            '{"id": 1, "correct": true, "domain": "a"}\n{"id": 1, "correct": true, "domain": "b"}',
            "holds lines of the environments a, b, whose ids may be equal; keep the lines of one: grep",
        ),
    ],
)
def test_a_bad_file_of_solve_rates_is_named(tmp_path, line, message):
    (tmp_path / "rates.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        Chat(numbered(tmp_path / "a.jsonl"), solve_rates=str(tmp_path / "rates.jsonl"))


def test_a_data_set_that_is_empty_after_filtering_says_what_each_filter_took(tmp_path):
    rates = lines(tmp_path / "rates.jsonl", [{"id": row, "solve_rate": 1} for row in range(4)])
    with pytest.raises(
        ValueError,
        match=r"no prompt of the 10 in .*a\.jsonl is left: solve_rate_range = \[0, 0.5\] took 4, "
        r"max_characters = 4 took 6; loosen",
    ):
        Chat(numbered(tmp_path / "a.jsonl"), solve_rates=rates, solve_rate_range=(0, 0.5), max_characters=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"difficulty": "solve_rate"}, "needs the file `solve_rates`"),
        ({"solve_rate_range": (0.1, 0.9)}, "needs the file `solve_rates`"),
        ({"solve_rate_range": (0.9, 0.1)}, "must be two numbers, 0 <= least <= largest <= 1"),
        ({"solve_rates": "none.jsonl"}, "cannot read solve_rates = 'none.jsonl': No such file"),
        ({"metadata": ["source"]}, 'metadata names the field "source"'),
        ({"max_characters": 0}, "max_characters = 0 must be a whole number of at least 1"),
        ({"system": "a", "chat_template": False}, "set chat_template = true or leave system out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Chat(numbered(tmp_path / "a.jsonl"), **options)


# ---- large data sets ----


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_index_of_a_large_data_set_is_kept(tmp_path, monkeypatch, cache, kind):
    monkeypatch.setattr(index_cache, "CACHED_ROWS", 7)
    path = (lines if kind == "jsonl" else parquet)(tmp_path / f"a.{kind}", CHATS)
    options = {**FIELDS, "deduplicate": True, "difficulty": "extra.level"}
    made = Chat(path, **options)
    assert sorted(file.suffix for file in cache.iterdir()) == [".index", ".lines"][: 1 + (kind == "parquet")]
    monkeypatch.setattr(tables, "table_rows", None)  # not called again
    kept = Chat(path, **options)
    assert tasks(kept) == tasks(made) and kept._train._index.starts.obj is not None, "its memory is that of the file"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    monkeypatch.setattr(index_cache, "CACHED_ROWS", 3)
    records = [*CHATS[:3], {**CHATS[4], "question": "changed"}] if kind == "jsonl" else CHATS[:4]
    (lines if kind == "jsonl" else parquet)(tmp_path / f"a.{kind}", records)
    os.utime(path, ns=(1, 1))
    assert Chat(path, **options).train_size == 4, "another time of change, another index"


def test_small_data_sets_leave_nothing_behind_and_a_missing_cache_folder_is_no_failure(tmp_path, monkeypatch, cache):
    path = parquet(tmp_path / "a.parquet", CHATS)
    whole = tasks(Chat(path, **FIELDS))
    assert not list(cache.iterdir())
    monkeypatch.setattr(index_cache, "CACHED_ROWS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert tasks(Chat(path, **FIELDS)) == whole


def test_unused_files_of_the_cache_are_deleted(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(index_cache, "CACHED_ROWS", 1)
    Chat(numbered(tmp_path / "a.jsonl"))
    (old,) = cache.iterdir()
    (cache / "torn.partial").touch()
    for file in cache.iterdir():
        then = time.time() - index_cache.USED_DAYS * 86400 - 60
        os.utime(file, (then, then))
    Chat(numbered(tmp_path / "b.jsonl"))
    (new,) = cache.iterdir()
    assert new != old


def test_a_damaged_index_is_made_again(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(index_cache, "CACHED_ROWS", 1)
    path = numbered(tmp_path / "a.jsonl")
    whole = tasks(Chat(path))
    (index,) = cache.iterdir()
    for damaged in (b"", b"{", index.read_bytes()[:-4], b'{"key": "another", "count": 0, "begin": 1}\n'):
        index.write_bytes(damaged)
        assert tasks(Chat(path)) == whole


def test_a_file_that_changes_under_the_run_is_noticed(tmp_path):
    path = numbered(tmp_path / "a.jsonl")
    chat = Chat(path)
    with open(path, "a") as file:
        file.write("{}\n")
    with pytest.raises(
        ValueError, match=r"a\.jsonl was changed after this run had begun to read it; start the run again"
    ):
        chat.train(0)


def test_a_worker_keeps_no_text_in_memory(tmp_path):
    """40 MB of prompts: a copy of the texts would show in the process's private memory."""
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(20_000):
            file.write(json.dumps({"prompt": f"{number} " + "x" * 2000, "answer": number}) + "\n")
    probe = (
        "import sys; from pathlib import Path; from fiberpo_megatron.environments.builtin.chat import Chat\n"
        "def private(): return int(Path('/proc/self/status').read_text().split('RssAnon:')[1].split()[0]) * 1024\n"
        "before = private(); chat = Chat(sys.argv[1]); print(private() - before, len(chat.train(19_999).prompt))"
    )
    done = subprocess.run([sys.executable, "-c", probe, str(path)], check=True, capture_output=True, text=True)
    grown, messages = map(int, done.stdout.split())
    assert grown < 8e6 and messages == 1
