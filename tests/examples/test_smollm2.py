import importlib.util
import json
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "examples/smollm2"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_problems_are_those_of_the_script():
    make_data = module("make_data")
    for name, records in make_data.split().items():
        assert [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()] == records


def test_a_quarter_is_held_out_with_what_says_the_same():
    make_data = module("make_data")
    assert make_data.record(20, 13) == {"prompt": "14 - 8 = 6\n20 - 13 =", "answer": "7"}
    said = {}
    for name, records in make_data.split().items():
        for item in records:
            first, second = map(int, item["prompt"].splitlines()[1].removesuffix("=").split(" - "))
            assert int(item["answer"]) == first - second >= 0
            assert (first, second) != make_data.SHOWN and (first, first - second) != make_data.SHOWN
            said[first, second] = name
    assert len(said) == 231 - 2
    assert all(said[first, first - second] == name for (first, second), name in said.items())
    assert 0.2 < sum(name == "held_out" for name in said.values()) / len(said) < 0.3


def test_the_table_is_made_of_the_metrics(tmp_path: Path, monkeypatch, capsys):
    for name, best in (("train", 0.5), ("control", 0.25)):
        (tmp_path / name).mkdir()
        records = [{"kind": "eval", "step": 0, "accuracy": 0.25}, {"kind": "train", "step": 0, "accuracy": 0.2}]
        records.append({"kind": "eval", "step": 1, "accuracy": best, "truncated_share": 0.1})
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    monkeypatch.setattr("sys.argv", ["results.py", "--runs", str(tmp_path)])
    module("results").main()
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| steps | 0 | 1 |" and table[2].endswith("| 25.0% | 50.0% |") and table[3].endswith("| 25.0% |")
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 6
    assert "coin flips rewarded" in (tmp_path / "curve.svg").read_text()
