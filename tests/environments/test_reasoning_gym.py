"""These tests run the environment of the reasoning-gym package with the package itself."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed; run `make reasoning-gym`")

import reasoning_gym as package

from fiberpo_megatron.environments import Outcome, Turn
from fiberpo_megatron.environments.builtin.expression_guard import is_harmless_expression
from fiberpo_megatron.environments.builtin.reasoning_gym import EXPRESSIONS, LITERALS, ReasoningGym
from tests.environments.pools import pool_of

SUMS = {"max_terms": 2, "max_digits": 1}


def right(environment: ReasoningGym, index: int = 0) -> Turn:
    """Return the right answer to a training task, in the form that supervised training would teach."""
    answer = environment.train(index).answer
    assert isinstance(answer, str)
    return Turn(f"I think {answer}")


def test_a_task_is_asked_and_scored_by_the_package():
    environment = ReasoningGym("chain_sum", SUMS, train_size=100, held_out_size=10)
    task = environment.train(3)
    assert [message["role"] for message in task.prompt] == ["system", "user"]
    assert task.prompt[0]["content"] == package.utils.SYSTEM_PROMPTS["default"]
    assert re.search(r"\d [+-] \d =$", task.prompt[1]["content"])
    assert task == environment.train(3) != environment.train(4)
    outcome = environment.score(task, right(environment, 3))
    assert outcome.reward == 1 and outcome.correct and outcome.metrics["answered"] == 1
    wrong = environment.score(task, Turn(task.answer.removeprefix("<answer>").removesuffix("</answer>")))
    assert wrong.reward == 0 and not wrong.correct and wrong.metrics["answered"] == 0


def test_raw_text_with_the_whole_response_as_the_answer():
    environment = ReasoningGym("chain_sum", SUMS, extract="text", chat_template=False, template="{question} ")
    task = environment.train(0)
    assert task.prompt.endswith(" = ") and "answer>" not in task.answer
    assert environment.score(task, Turn(f" {task.answer}\n")).reward == 1


def test_a_partial_score_is_kept_or_not():
    spelled = {"min_word_len": 6}
    for partial, reward in ((True, pytest.approx(0.75, abs=0.25)), (False, 0.0)):
        environment = ReasoningGym("spell_backward", spelled, partial=partial)
        task = environment.train(0)
        word = task.answer.removeprefix("<answer>").removesuffix("</answer>")
        outcome = environment.score(task, Turn(f"<answer>{word[:-1]}#</answer>"))
        assert outcome.reward == reward and outcome.correct is False


def test_no_training_question_is_a_held_out_one():
    """Sums of two digits have 200 questions, so that different seeds alone would not keep the splits apart."""
    environment = ReasoningGym("chain_sum", SUMS, train_size=300, held_out_size=60)
    held_out = {environment.held_out(index).prompt[1]["content"] for index in range(60)}
    train = {environment.train(index).prompt[1]["content"] for index in range(300)}
    assert len(held_out) > 40 and len(train) > 80 and not held_out & train
    other = ReasoningGym("chain_sum", SUMS, train_size=300, held_out_size=60, seed=10_000)
    assert other.train(0) != environment.train(0)
    narrow = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    full = ReasoningGym("chain_sum", narrow, train_size=10, held_out_size=5000)
    with pytest.raises(ValueError, match="too few different problems; lower held_out_size"):
        full.train(0)


def test_later_training_tasks_are_of_higher_levels():
    environment = ReasoningGym("chain_sum", levels=[0, {"num_terms": 4}, 9], train_size=31, held_out_size=6)

    def numbers(prompt: object) -> list[str]:
        return re.findall(r"\d+", prompt[1]["content"])  # type: ignore[index]

    levels = [environment.train(index).metadata["level"] for index in range(31)]
    assert levels == sorted(levels) and [levels.count(n) for n in range(3)] == [11, 10, 10]
    assert all(len(numbers(environment.train(index).prompt)) == 2 for index in range(11))
    middle = [numbers(environment.train(index).prompt) for index in range(11, 21)]
    assert max(map(len, middle)) > 3 and all(len(number) == 1 for one in middle for number in one)
    assert max(len(number) for index in range(21, 31) for number in numbers(environment.train(index).prompt)) > 5
    assert [environment.held_out(index).metadata["level"] for index in range(6)] == [0, 1, 2, 0, 1, 2]
    for index in range(31):
        assert environment.score(environment.train(index), right(environment, index)).reward == 1


def test_a_composite_of_several_tasks():
    parts = [{"name": "chain_sum", "weight": 1, "config": SUMS}, {"name": "spell_backward", "weight": 2}]
    environment = ReasoningGym("composite", {"datasets": parts}, train_size=40, held_out_size=5)
    tasks = [environment.train(index) for index in range(40)]
    assert {task.metadata["task"] for task in tasks} == {"chain_sum", "spell_backward"}
    assert all(environment.score(task, Turn(task.answer)).reward == 1 for task in tasks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "chain_sums"}, "task = 'chain_sums' is unknown to reasoning-gym; its .* tasks are .*chain_sum"),
        ({"config": {"terms": 3}}, "config = .*'terms': 3.* unexpected keyword .* its parameters are min_terms"),
        ({"config": {"min_terms": 0}}, "min_terms must be positive"),
        ({"config": {"seed": 3}}, "config sets 'seed'.*use its options seed"),
        ({"extract": "boxed"}, 'extract = \'boxed\' is unknown; use "tags" or "text"'),
        ({"template": "what?"}, "lacks {question}"),
        ({"train_size": 0}, "train_size = 0"),
        ({"levels": [{"terms": 1}]}, "no attribute 'terms', only num_terms, num_digits"),
        ({"levels": [{"num_terms": 99}]}, "Invalid level: 99"),
        ({"levels": [-1]}, "at least 0"),
        ({"task": "composite", "config": {"datasets": [{"weight": 1}]}}, "config.datasets holds {'weight': 1}"),
        ({"task": "composite"}, "at least one dataset"),
        ({"task": "arc_agi", "levels": [0], "config": {"x": 1}}, "unexpected keyword"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReasoningGym(**({"task": "chain_sum"} | options))


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install fiberpo-megatron\[reasoning-gym\]"):
        ReasoningGym("chain_sum")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch X')",
        "().__class__",
        "preview(x)",
        "sympify('1')",
        "9**9**9",
        "((9**99)**99)**99",
        "+".join(["x**99"] * 9),
        "lambda: 1",
        "[1][0]",
        "f(x)",
        "1" * 1001,
        "5!",
        "(" * 500,
        "exec(x)",
    ],
)
def test_what_must_not_be_evaluated(text):
    assert not is_harmless_expression(text)


@pytest.mark.parametrize("text", [" 6*(98 - 54) - 34", "-5*X**9 - 2*X**6/3 + C", "exp(x)*sin(2*x)", "x^2 + 1", "2**-1"])
def test_what_may_be_evaluated(text):
    assert is_harmless_expression(text)


def test_the_tasks_that_evaluate_answers_are_known():
    """What calls an evaluator in `score_answer` is found in the source of the package, so that a new version shows."""
    found = set()
    for path in Path(package.__file__).parent.rglob("*.py"):
        source = path.read_text()
        for body in re.findall(r"def score_answer\(.*?(?=\n    def |\nclass |\Z)", source, re.DOTALL):
            if re.search(r"\beval\(answer|parse_expr\(answer|exec\(", body):
                found.add(re.search(r'DATASET_NAME = "(\w+)"', source)[1])
    assert found == {*LITERALS, *EXPRESSIONS}


@pytest.mark.parametrize("name", [*LITERALS, *EXPRESSIONS])
def test_what_a_model_wrote_is_not_run(name, tmp_path):
    environment = ReasoningGym(name, train_size=3, held_out_size=0)
    task = environment.train(0)
    trace = tmp_path / "trace"
    for text in (
        f"open('{trace}', 'w')",
        f" [open('{trace}', 'w')]",
        f"__import__('pathlib').Path('{trace}').touch()!",
    ):
        assert environment.score(task, Turn(f"<answer>{text}</answer>")).reward < 0.2
    assert not trace.exists()
    assert environment.score(task, right(environment)).reward == 1


def test_an_answer_for_which_the_package_raises_is_counted(capsys):
    environment = ReasoningGym("prime_factorization", train_size=3, held_out_size=0)
    outcome = environment.score(environment.train(0), Turn("<answer>hello</answer>"))
    assert outcome.reward == 0 and outcome.metrics["scoring_errors"] == 1
    assert "prime_factorization: scoring 'hello' failed with ValueError" in capsys.readouterr().err


def test_it_works_in_a_worker():
    async def scores() -> list[object]:
        options = {"task": "chain_sum", "config": SUMS, "train_size": 50}
        async with pool_of("reasoning_gym", options=options, workers=1, memory_gib=4.0, deadline_s=30.0) as pool:
            (task,) = await pool.tasks("train", [7])
            return [await pool.score(task, Turn(text), seed=0) for text in (task.answer, "<answer>x</answer>")]

    good, bad = asyncio.run(scores())
    assert isinstance(good, Outcome) and good.reward == 1 and isinstance(bad, Outcome) and bad.reward == 0


def test_the_module_needs_the_standard_library_alone():
    code = "import fiberpo_megatron.environments.builtin.reasoning_gym, sys; print('reasoning_gym' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
