"""The demo's tasks: they cover their spaces once, held-out ones are never trained on, and answers are exact."""

import pytest

from examples.demo.environments import Addition, Sort
from fiberpo_megatron.environments import Outcome, Task, Turn


def sums(prompt: str) -> list[str]:
    return prompt.removesuffix("=").split("+")


@pytest.mark.parametrize("digits", [1, 2])
def test_addition_covers_its_space_once(digits):
    problems = Addition(digits)
    train = [problems.train(i) for i in range(problems.train_size)]
    held_out = [problems.held_out(i) for i in range(problems.held_out_size)]
    assert sorted(int(task.id) for task in train + held_out) == list(range(100**digits))
    assert len(held_out) / 100**digits == pytest.approx(0.1, abs=0.021)
    for task in train + held_out:
        first, second = sums(task.prompt)
        assert len(first) == len(second) == digits and len(task.answer) == digits + 1
        assert int(first) + int(second) == int(task.answer)
        assert int(task.id) == int(first + second)


def test_a_held_out_sum_is_not_trained_in_the_other_order():
    problems = Addition(digits=2)
    train = {problems.train(i).prompt for i in range(problems.train_size)}
    for position in range(problems.held_out_size):
        first, second = sums(problems.held_out(position).prompt)
        assert f"{second}+{first}=" not in train


def test_the_first_held_out_sums_differ_in_more_than_order():
    problems = Addition(digits=2)
    pairs = [frozenset(sums(problems.held_out(i).prompt)) for i in range(100)]
    assert len(set(pairs)) == 100
    larger_first = sum(first > second for first, second in (sums(problems.held_out(i).prompt) for i in range(400)))
    assert 140 < larger_first < 260  # a fair coin: 200, standard deviation 10


def test_large_spaces_are_computed_not_stored():
    addition = Addition(digits=6)
    assert addition.train_size + addition.held_out_size == 10**12
    last = addition.train(addition.train_size - 1)
    first, second = sums(last.prompt)
    assert int(first) + int(second) == int(last.answer)
    sort = Sort(length=16)
    assert sort.train_size + sort.held_out_size == 10**16
    sort.train(sort.train_size - 1)


def test_sort_covers_its_space_once():
    problems = Sort(length=3, held_out_every=4)
    train = {problems.train(i).prompt: problems.train(i).answer for i in range(problems.train_size)}
    held_out = {problems.held_out(i).prompt for i in range(problems.held_out_size)}
    assert len(held_out) == 250 and not held_out & set(train) and len(train) == 750
    assert train.get("s:210=", "012") == "012"
    assert all(answer == "".join(sorted(prompt[2:5])) for prompt, answer in train.items())


def test_the_tasks_are_the_same_on_every_machine_and_in_every_version():
    """Runs of earlier versions resume on them: a change would move tasks between the sets."""
    addition, sort = Addition(), Sort()
    assert [addition.train(i).prompt for i in (0, 50, 100, 5000)] == ["00+00=", "50+50=", "20+82=", "04+30="]
    assert [addition.held_out(i).prompt for i in range(3)] == ["99+56=", "18+70=", "78+73="]
    assert [sort.train(i).prompt for i in range(3)] == ["s:03042=", "s:23570=", "s:58130="]
    assert [sort.held_out(i).prompt for i in range(3)] == ["s:61336=", "s:68234=", "s:34308="]


@pytest.mark.parametrize("response", ["092", " 092\n"])
def test_the_right_answer_earns_one(response):
    assert Addition().score(Task("34+58=", "092"), Turn(response)) == Outcome(1.0, correct=True)


@pytest.mark.parametrize("response", ["", " ", "92", "0920", "093", "0 92", "092 092", "\x00", "٠٩٢", "9" * 10**6])
def test_everything_else_earns_nothing(response):
    assert Addition().score(Task("34+58=", "092"), Turn(response)) == Outcome(0.0, correct=False)


def test_sorted_digits_are_compared_in_the_same_way():
    assert Sort().score(Task("s:201=", "012"), Turn("012 ")).correct
    assert not Sort().score(Task("s:201=", "012"), Turn("021")).correct


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Addition(digits=0), "digits = 0; use 1 to 6"),
        (lambda: Addition(digits=7), "digits = 7; use 1 to 6"),
        (lambda: Addition(held_out_every=1), "held_out_every = 1; use at least 2"),
        (lambda: Sort(length=1), "length = 1; use 2 to 16"),
        (lambda: Sort(length=17), "length = 17; use 2 to 16"),
        (lambda: Sort(held_out_every=0), "held_out_every = 0; use at least 2"),
    ],
)
def test_sizes_outside_the_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
