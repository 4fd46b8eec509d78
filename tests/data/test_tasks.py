import json
from pathlib import Path

import pytest

from fiberpo_megatron.data.settings import AdditionTask, JsonlTask, SortTask
from fiberpo_megatron.data.tasks import AdditionProblems, SortProblems, build_problem_set, read_jsonl


@pytest.mark.parametrize("digits", [1, 2])
def test_addition_covers_its_space_once(digits):
    problems = AdditionProblems(AdditionTask(kind="addition", digits=digits))
    train = [problems.train(i) for i in range(problems.train_size)]
    held_out = [problems.held_out(i) for i in range(problems.held_out_size)]
    assert sorted(p.index for p in train + held_out) == list(range(100**digits))
    assert len(held_out) / 100**digits == pytest.approx(0.1, abs=0.021)
    for problem in train + held_out:
        first, second = problem.prompt.removesuffix("=").split("+")
        assert len(first) == len(second) == digits and len(problem.answer) == digits + 1
        assert int(first) + int(second) == int(problem.answer)


def test_a_held_out_sum_is_not_trained_in_the_other_order():
    problems = AdditionProblems(AdditionTask(kind="addition", digits=2))
    train = {problems.train(i).prompt for i in range(problems.train_size)}
    for position in range(problems.held_out_size):
        first, second = problems.held_out(position).prompt.removesuffix("=").split("+")
        assert f"{second}+{first}=" not in train


def test_the_first_held_out_sums_differ_in_more_than_order():
    problems = AdditionProblems(AdditionTask(kind="addition", digits=2))
    pairs = [frozenset(problems.held_out(i).prompt.removesuffix("=").split("+")) for i in range(100)]
    assert len(set(pairs)) == 100
    larger_first = sum(p.split("+")[0] > p.split("+")[1] for p in (problems.held_out(i).prompt for i in range(400)))
    assert 140 < larger_first < 260  # a fair coin: 200, standard deviation 10


def test_large_spaces_are_computed_not_stored():
    addition = build_problem_set(AdditionTask(kind="addition", digits=6))
    assert addition.train_size + addition.held_out_size == 10**12
    last = addition.train(addition.train_size - 1)
    first, second = last.prompt.removesuffix("=").split("+")
    assert int(first) + int(second) == int(last.answer)
    sort = build_problem_set(SortTask(kind="sort", length=16))
    assert sort.train_size + sort.held_out_size == 10**16
    sort.train(sort.train_size - 1)


def test_sort_covers_its_space_once():
    problems = SortProblems(SortTask(kind="sort", length=3, held_out_every=4))
    train = {problems.train(i).prompt: problems.train(i).answer for i in range(problems.train_size)}
    held_out = {problems.held_out(i).prompt for i in range(problems.held_out_size)}
    assert len(held_out) == 250 and not held_out & set(train) and len(train) == 750
    assert train.get("s:210=", "012") == "012"
    assert all(answer == "".join(sorted(prompt[2:5])) for prompt, answer in train.items())


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_jsonl_reads_strings_chats_and_numbers(tmp_path):
    chat = [{"role": "user", "content": "1+1?"}]
    path = write(tmp_path / "a.jsonl", {"prompt": "é?", "answer": "x"}, {"prompt": chat, "answer": 2})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n", 1))
    first, second = read_jsonl(path)
    assert (first.prompt, first.answer, first.index) == ("é?", "x", 0)
    assert (second.prompt, second.answer, second.index) == (tuple(chat), "2", 1)
    assert second.source.endswith("line 3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "answer": "b"', "not a JSON object"),
        (b"[1]", r"got \[1\]"),
        (b'{"prompt": "a"}', "`answer` must be a non-empty string or a number, got None"),
        (b'{"prompt": "a", "answer": " "}', "`answer` must be"),
        (b'{"prompt": "a", "answer": true}', "got True"),
        (b'{"answer": "a"}', "`prompt` must be"),
        (b'{"prompt": [], "answer": "a"}', "`prompt` must be"),
        (b'{"prompt": [{"role": "user"}], "answer": "a"}', "`prompt` must be"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n' + line)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2: .*{message}"):
        read_jsonl(path)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the prompt file .*none\.jsonl: No such file.*data\.tasks"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no prompts"):
        read_jsonl(tmp_path / "empty.jsonl")


def test_a_held_out_prompt_that_is_trained_on_is_refused(tmp_path):
    train = write(tmp_path / "train.jsonl", {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "1"})
    held_out = write(tmp_path / "test.jsonl", {"prompt": "c", "answer": "1"}, {"prompt": "b", "answer": "1"})
    task = JsonlTask(kind="jsonl", name="t", train=train, held_out=held_out)
    with pytest.raises(ValueError, match=r"1 held-out .*test\.jsonl, line 2 = .*train\.jsonl, line 2: b; remove"):
        build_problem_set(task)


def test_jsonl_problems_in_file_order_and_held_out_shuffled(tmp_path):
    train = write(tmp_path / "train.jsonl", *({"prompt": f"t{i}", "answer": i} for i in range(30)))
    held_out = write(tmp_path / "test.jsonl", *({"prompt": f"h{i}", "answer": i} for i in range(30)))
    problems = build_problem_set(JsonlTask(kind="jsonl", name="t", train=train, held_out=held_out))
    assert [problems.train(i).index for i in range(30)] == list(range(30))
    order = [problems.held_out(i).index for i in range(30)]
    assert sorted(order) == list(range(30)) and order != list(range(30))
