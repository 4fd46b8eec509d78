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
