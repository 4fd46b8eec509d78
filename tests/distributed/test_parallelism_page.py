"""What docs/parallelism.md says is proven: the layouts and tests in its tables are those that run."""

from pathlib import Path

from tests.distributed.test_parity import BIG_LAYOUTS, EXPERT_LAYOUTS, LAYOUTS, TOLERANCE, cases_for

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/parallelism.md").read_text()
COLUMNS = ("moe", "moe tied", "deepseek", "idle", "dense")


def rows() -> dict[str, list[str]]:
    """Cells of the table of layouts, by layout."""
    table = PAGE.split("| layout |")[1].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert tuple(cells[0][:-1]) == COLUMNS
    return {name: found for name, *found in cells[2:]}


def columns_of(parallel: dict[str, int]) -> set[str]:
    names = {"single": "idle"}
    return {names.get(case.batch, case.model).replace("dense tied", "dense") for case in cases_for(parallel)}


def test_every_layout_is_in_the_table():
    found = rows()
    assert set(found) == {*LAYOUTS, *EXPERT_LAYOUTS, *BIG_LAYOUTS}
    for name, cells in found.items():
        told = {column for column, cell in zip(COLUMNS, cells) if cell}
        wanted = {"moe tied", "deepseek"} if name in BIG_LAYOUTS else columns_of((LAYOUTS | EXPERT_LAYOUTS)[name])
        assert told == wanted, name
        assert all(float(cell) < TOLERANCE for cell in cells[:-1] if cell), name
        test = "test_big_layout_does_not_matter" if name in BIG_LAYOUTS else "test_layout_does_not_matter"
        assert cells[-1] == f"`{test}[{name}]`"
