"""How often prompts were solved: the file, what a resumed run drops, the table of the report, and the filter."""

from pathlib import Path

from fiberpo_megatron.environments.builtin.solve_rates import SolveRates
from fiberpo_megatron.telemetry.report.tables import solve_section
from fiberpo_megatron.telemetry.solve_rates import (
    SOLVE_RATES_FILE,
    SolveRate,
    append_solve_rates,
    drop_solve_rates,
    read_solve_rates,
)


def group(name: str, solved: int, environment: str = "sums") -> dict[str, object]:
    return {"environment": environment, "id": f"{environment}/train/{name}", "solved": solved, "samples": 4}


def test_rates_are_summed_and_a_resumed_run_drops_what_it_makes_again(tmp_path: Path):
    append_solve_rates(tmp_path, 0, [group("1", 4), group("2", 0)])
    append_solve_rates(tmp_path, 1, [group("1", 2)])
    append_solve_rates(tmp_path, 2, [group("3", 4)])
    with (tmp_path / SOLVE_RATES_FILE).open("a") as file:
        file.write('{"step": 1, "environment"')  # the run was killed here
    drop_solve_rates(tmp_path, 2)
    assert read_solve_rates(tmp_path) == [
        SolveRate("sums", "sums/train/1", 6, 8),
        SolveRate("sums", "sums/train/2", 0, 4),
    ]
    rates = SolveRates(tmp_path / SOLVE_RATES_FILE)
    assert (rates.of(None, 1), rates.of(None, 2), rates.of(None, 3)) == (0.75, 0.0, None)


def test_the_report_counts_both_ends_of_each_environment():
    rates = [
        SolveRate("a", "a/1", 4, 4),
        SolveRate("a", "a/2", 0, 4),
        SolveRate("a", "a/3", 1, 4),
        SolveRate("<b>", "b/1", 0, 2),
    ]
    page = solve_section(rates)
    first = page.index("<td>a</td>")
    assert page[first:].count("<span class='number'>1</span>") == 4  # 1, 1, 1 of a, and one that is never solved of <b>
    assert "&lt;b&gt;" in page and "<b>" not in page and "a/3" not in page
    assert solve_section([]) == ""
