import csv
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import search
import torch
from study import campaign, plan, report, training
from study.campaign import Row, read_rows
from study.model import Model, Shape, initial_parameters
from study.paired import Interval, paired_interval
from study.plan import CELLS, COMPARISON_SEEDS, GRIDS, REFINEMENTS, text_of
from study.tasks import TASKS, Problems
from study.training import Batch, Cell, coefficients, train

from fiberpo_megatron.fibration import build_objective

RESULTS = Path(search.__file__).parent / "results" / "search"
CELL = Cell("domains", 2, 4, 1e-2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few prompts and problems, for runs of tenths of a second."""
    monkeypatch.setattr(training, "PROMPTS", 8)
    monkeypatch.setattr(training, "HELD_OUT", dict.fromkeys(TASKS, 48))


def start(task: str = CELL.task, seed: int = 0) -> torch.Tensor:
    return initial_parameters(Shape.of(TASKS[task]), seed)


def drawn(name: str, count: int = 6) -> Problems:
    return TASKS[name].draw(torch.Generator().manual_seed(3), count)


def test_answers_are_right():
    short = drawn("short")
    for prompt, answer in zip(short.prompts.tolist(), short.answers.tolist(), strict=True):
        total = 10 * prompt[0] + prompt[1] + 10 * prompt[3] + prompt[4]
        assert answer == [total % 10, total // 10 % 10, total // 100]
    long = drawn("long")
    for prompt, answer in zip(long.prompts.tolist(), long.answers.tolist(), strict=True):
        assert answer == [sum((prompt[:8] * 4)[: at + 1]) % 10 for at in range(32)]
    domains = drawn("domains")
    assert domains.domains.tolist() == [0, 1, 2, 0, 1, 2]
    assert domains.lengths.tolist() == [4, 8, 16, 4, 8, 16]
    for prompt, answer, domain in zip(domains.prompts.tolist(), domains.answers.tolist(), domains.domains.tolist()):
        digits = prompt[1:9]
        if domain == 0:
            assert answer[:4] == digits[3::-1]
        if domain == 1:
            assert answer[:8] == [sum(digits[: at + 1]) % 10 for at in range(8)]
        if domain == 2:
            alternating = [0]
            for digit in digits * 2:
                alternating.append((digit - alternating[-1]) % 10)
            assert answer == alternating[1:]


def test_scores():
    problems = drawn("domains", 3)
    sampled = problems.answers.clone()
    assert TASKS["domains"].score(problems, sampled).tolist() == [1.0, 1.0, 1.0]
    sampled[1, 0] = 15
    sampled[0, 9] = 15  # beyond the length of that answer
    assert TASKS["domains"].score(problems, sampled).tolist() == [1.0, 7 / 8, 1.0]
    short = drawn("short", 2)
    assert TASKS["short"].score(short, (short.answers + torch.tensor([[0, 0, 0], [0, 0, 1]]))).tolist() == [1.0, 0.0]


def test_samples_have_the_log_probs_of_a_forward_pass():
    task = TASKS["domains"]
    model = Model(Shape.of(task), torch.stack([start(seed=1), start(seed=2)]))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    prompts = training.draw(task, generators, 3).prompts
    answers, log_probs = model.sample(prompts, 2, task.answer_length, generators)
    again = training.answer_log_probs(model, prompts.repeat_interleave(2, 1), answers)
    assert torch.allclose(log_probs, again, rtol=0, atol=1e-5)  # float32, some hundred operations


def test_a_run_is_repeatable():
    objectives = [build_objective("fiberpo", pessimistic=True, k_max=4.0)]
    first, second = (train(CELL, objectives, (4, 5), [start()] * 2, steps=2) for _ in range(2))
    assert [(a.start, a.final, a.ratio_max) for a in first.values()] == [
        (b.start, b.final, b.ratio_max) for b in second.values()
    ]
    assert first[0, 4].ratio_max != first[0, 5].ratio_max


def test_runs_at_once_are_the_runs_one_by_one():
    objectives = [build_objective("fiberpo-domain"), build_objective("gspo", epsilon=1e-3)]
    together = train(CELL, objectives, (4, 5), [start(), start(seed=1)], steps=1)
    for place, objective in enumerate(objectives):
        for seed, parameters in ((4, start()), (5, start(seed=1))):
            (alone,) = train(CELL, [objective], (seed,), [parameters], steps=1).values()
            assert together[place, seed].start == alone.start
            # Rounding of float32 through 8 optimiser steps at a high learning rate.
            assert together[place, seed].ratio_max == pytest.approx(alone.ratio_max, rel=1e-3)
            assert together[place, seed].final == pytest.approx(alone.final, abs=0.02)


def test_one_call_serves_several_runs():
    task, seeds = TASKS["domains"], (1, 2, 3)
    model = Model(Shape.of(task), torch.stack([start(seed=seed) for seed in seeds]))
    batch = training.roll_out(model, task, seeds, 0)
    log_ratio = torch.randn(batch.log_probs.shape, generator=torch.Generator().manual_seed(1)) * 0.2 * batch.mask
    objective = build_objective("fiberpo-domain", pessimistic=True)
    together = coefficients(objective, log_ratio, batch)
    for run in range(3):
        alone = Batch(*(getattr(batch, name)[run : run + 1] for name in batch.__dataclass_fields__))
        assert torch.allclose(together[run], coefficients(objective, log_ratio[run : run + 1], alone)[0], atol=1e-9)
    assert together.abs().sum() > 0


def test_the_first_optimiser_step_follows_the_policy_gradient():
    """On-policy every objective has c = mu A, apart from the rounding between the sampler and the forward pass."""
    task = TASKS["short"]
    model = Model(Shape.of(task), start("short").unsqueeze(0))
    batch = training.roll_out(model, task, (1,), 0)
    found = coefficients(build_objective("fiberpo"), torch.zeros_like(batch.log_probs), batch)
    assert torch.allclose(found, batch.advantages.unsqueeze(2) / (batch.log_probs[0].numel()), atol=1e-9)


def test_paired_interval():
    interval = paired_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    reach = 2.920 / 3**0.5  # differences 1, 2 and 3: deviation 1, two degrees of freedom
    assert (interval.mean, interval.count) == (2.0, 3)
    assert (interval.low, interval.high) == (pytest.approx(2 - reach), pytest.approx(2 + reach))
    with pytest.raises(ValueError, match="3 and 2 values"):
        paired_interval([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.02, "better"),
        (-0.02, 0.1, "level"),
        (-0.02, -0.01, "level"),
        (-0.1, -0.01, "worse"),
        (-0.1, 0.1, "open"),
    ],
)
def test_verdicts(low: float, high: float, verdict: str):
    assert Interval((low + high) / 2, low, high, 8).verdict == verdict


def test_every_objective_is_tuned_with_equal_effort():
    assert {len({text_of(options) for options in grid}) for grid in GRIDS.values()} == {8}
    assert all({} in grid for grid in GRIDS.values())
    assert {name: len(REFINEMENTS[name]) for name in GRIDS} == dict.fromkeys(GRIDS, 2)
    assert len(COMPARISON_SEEDS) >= 8
    tuning = {*plan.SCREENING_SEEDS, *plan.FINAL_SEEDS}
    assert not tuning & set(COMPARISON_SEEDS)
    assert not {plan.warm_up_of(seed) for seed in tuning} & {plan.warm_up_of(seed) for seed in COMPARISON_SEEDS}


@pytest.fixture
def warm_ups(tmp_path: Path) -> Path:
    """Untrained models in the place of warmed-up ones."""
    folder = tmp_path / "warm-ups"
    folder.mkdir()
    for task in TASKS:
        for number in (1, 2, 3):
            torch.save(start(task, number), folder / f"{task}-{number}.pt")
    return folder


def test_a_campaign_goes_on_where_it_ended(tmp_path: Path, warm_ups: Path):
    file, tried = tmp_path / "runs.csv", {"grpo": [{}, {"epsilon": 0.1}], "gspo": [{}]}
    jobs = campaign.plan("screening", [CELLS[0]], tried, (5, 6), [])
    assert [(job.objective, len(job.configurations), job.seeds) for job in jobs] == [
        ("grpo", 2, (5, 6)),
        ("gspo", 1, (5, 6)),
    ]
    campaign.run(jobs[:1], file, warm_ups, 1, steps=1)
    done = read_rows(file)
    assert [(row.objective, row.options, row.seed) for row in done] == [
        ("grpo", "{}", 5),
        ("grpo", "{}", 6),
        ("grpo", '{"epsilon":0.1}', 5),
        ("grpo", '{"epsilon":0.1}', 6),
    ]
    left = campaign.plan("screening", [CELLS[0]], tried, (5, 6), done)
    assert [job.objective for job in left] == ["gspo"]
    campaign.run(left, file, warm_ups, 1, steps=1)
    assert campaign.plan("screening", [CELLS[0]], tried, (5, 6), read_rows(file)) == []
    assert len(read_rows(file)) == 6
    (more,) = campaign.plan("screening", [CELLS[0]], {"gspo": [{}]}, (5, 6, 7), read_rows(file))
    campaign.run([more], file, warm_ups, 1, steps=1)
    assert [row.seed for row in read_rows(file) if row.objective == "gspo"] == [5, 6, 7]


def test_jobs_are_not_larger_than_what_is_computed_at_once():
    jobs = campaign.plan("screening", [CELLS[0]], {"fiberpo": GRIDS["fiberpo"]}, range(8), [])
    assert [len(job.configurations) for job in jobs] == [2] * 4


def rows_of(scores: Mapping[tuple[str, str], list[float]], stage: str, cell: Cell = CELLS[0]) -> list[Row]:
    return [
        Row(stage, cell.task, cell.optimiser_steps, cell.learning_rate, objective, options, seed, 0.5, score, 2.0, 1.0)
        for (objective, options), values in scores.items()
        for seed, score in enumerate(values)
    ]


def test_choices_and_table():
    screening = {(name, text_of(o)): [0.1 * place] for name, grid in GRIDS.items() for place, o in enumerate(grid)}
    rows = rows_of(screening, "screening")
    best = report.finalists(rows)
    for name, grid in GRIDS.items():
        assert best[name] == [text_of(grid[-1]), *map(text_of, REFINEMENTS[name])]
    finals = {(name, options): [0.5 + at] for name, three in best.items() for at, options in enumerate(three)}
    rows += rows_of(finals, "final")
    assert report.chosen(rows) == {name: text_of(REFINEMENTS[name][-1]) for name in GRIDS}
    scores = {("fiberpo", "f"): [0.6, 0.7, 0.8], ("grpo", "{}"): [0.5, 0.5, 0.5], ("gspo", "{}"): [0.6, 0.7, 0.81]}
    line = report.comparison_table(rows_of(scores, "comparison")).splitlines()[2]
    assert line == (
        "| short, 4, 0.0003 | 0.500 | 0.700 | 0.500 | 0.703 | +0.200 (+0.031 to +0.369), better "
        "| -0.003 (-0.013 to +0.006), level |"
    )


def test_the_committed_runs_give_the_committed_tables():
    rows = read_rows(RESULTS / "runs.csv")
    found = report.texts(rows)
    assert {"tuning.md", "by_cell.md", "comparison.md"} <= found.keys()
    for name, text in found.items():
        assert (RESULTS / name).read_text() == text, name
    assert found["comparison.md"] in (RESULTS.parents[1] / "README.md").read_text()


def test_the_recommended_preset_is_what_tuning_chose():
    chosen = json.loads(report.chosen(read_rows(RESULTS / "runs.csv"))["fiberpo"])
    found = build_objective("fiberpo", preset="recommended")
    assert found == build_objective("fiberpo", **{**chosen, "budgets": found.budgets})
    assert list(found.budgets["trajectory"]) == chosen["budgets"]["trajectory"]


def test_the_committed_runs_are_those_of_the_protocol():
    rows = read_rows(RESULTS / "runs.csv")
    assert len({row.key for row in rows}) == len(rows)
    expected = {}
    for name, grid in GRIDS.items():
        best = report.finalists(rows)[name]
        expected[name] = {
            *(
                ("screening", c.name, text_of(o), s)
                for c in plan.SCREENING_CELLS
                for o in grid
                for s in plan.SCREENING_SEEDS
            ),
            *(("final", c.name, o, s) for c in CELLS for o in best for s in plan.FINAL_SEEDS),
            *(("comparison", c.name, report.chosen(rows)[name], s) for c in CELLS for s in COMPARISON_SEEDS),
        }
        made = {(row.stage, row.cell, row.options, row.seed) for row in rows if row.objective == name}
        assert expected[name] <= made


def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    cell, grids = Cell("domains", 1, 4, 3e-4), {"fiberpo": ({}, {"pessimistic": True}), "grpo": ({},), "gspo": ({},)}
    for module in (search, report):
        monkeypatch.setattr(module, "CELLS", (cell,))
        monkeypatch.setattr(module, "GRIDS", grids)
    monkeypatch.setattr(report, "REFINEMENTS", dict.fromkeys(grids, ()))
    monkeypatch.setattr(search, "SCREENING_CELLS", (cell,))
    monkeypatch.setattr(search, "COMPARISON_SEEDS", (8, 9, 12))
    monkeypatch.setattr(training, "STEPS", {"domains": 1})
    monkeypatch.setattr(training, "TARGETS", {"domains": 0.0})  # the first look ends the warm-up
    words = [
        "tune",
        "compare",
        "levels",
        "defaults",
        "report",
        "--results",
        str(tmp_path / "results"),
        "--warm-ups",
        str(tmp_path / "warm-ups"),
    ]
    assert search.main(words) == 0
    with (tmp_path / "results" / "runs.csv").open() as lines:
        stages = [line["stage"] for line in csv.DictReader(lines)]
    assert {stage: stages.count(stage) for stage in stages} == {
        "screening": 4,
        "final": 3,
        "comparison": 9,
        "levels": 3,
        "defaults": 9,
    }
    assert (tmp_path / "results" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "defaults: 9 of 9 runs" in out
    assert (tmp_path / "results" / "comparison.md").read_text() in out
    assert search.main(words) == 0
    assert "of 9 runs" not in capsys.readouterr().out  # nothing was left
