"""The ledger of published runs: the bound of its errors, the format for points of a user's own, and its refusals."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fiberpo_megatron.cli.main import main
from fiberpo_megatron.planning import (
    collectives,
    decoding,
    lengths,
    publication,
    published,
    rollouts,
    sources,
    timing,
    training,
)
from fiberpo_megatron.planning.hardware import Assumptions
from fiberpo_megatron.planning.ledger import Prediction, compare, compare_parts, summary
from fiberpo_megatron.planning.overheads import Overheads
from fiberpo_megatron.planning.published import DATA, built_in, read_points, scenarios

ROOT = Path(__file__).parents[2]
POINT: dict[str, Any] = {
    "id": "mine",
    "model": str(DATA / "models/qwen3_30b_a3b"),
    "gpu": "H100",
    "gpus": 32,
    "mode": "separate",
    "trainer_gpus": 16,
    "staleness": 1,
    "layout": [1, 1, 8, 1],
    "engine_tensor": 2,
    "prompts": 64,
    "samples": 32,
    "optimiser_steps": 4,
    "max_length": 4096,
    "mean_length": 3200,
    "prompt_length": 150,
    "recompute": True,
    "seconds": {"step": 150, "generate": 140, "old_log_probs": 20, "reference": 20, "update": 70, "publish": 2},
}


def write(folder: Path, *points: dict[str, Any]) -> Path:
    path = folder / "points.json"
    path.write_text(json.dumps(points))
    return path


def test_errors_stay_within_their_bound():
    """The issue's goal is 15 % and 40 %; a change of the model that loses more than it gains is to be seen here."""
    comparisons = compare(built_in(), Assumptions())
    found = summary(comparisons)
    assert found.points == 13 and found.median < 0.10 and found.largest < 0.35, comparisons
    generation = [c.errors["generate"] for c in comparisons if "generate" in c.published]
    assert len(generation) == 3 and max(map(abs, generation)) < 0.25
    parts = {c.id: next(iter(c.errors.values())) for c in compare_parts(Assumptions())}
    assert max(abs(error) for error in parts.values()) < 0.5
    assert all(abs(error) < 0.2 for name, error in parts.items() if name.startswith("mlm-"))


def test_the_page_shows_what_the_tool_writes():
    tool = [sys.executable, str(ROOT / "tools/ledger_tables.py"), "--check"]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.exhaustive  # fits the constants four times, which takes a minute
def test_the_page_shows_the_sources_left_out():
    tool = [sys.executable, str(ROOT / "tools/ledger_tables.py"), "--check", "--refit"]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_points_of_ones_own_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path, POINT, {**POINT, "id": "other", "gpu": "H20", "seconds": {"step": 100}})
    assert main(["plan", "--published", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["mine", "other"]
    mine = found["mine"]
    assert mine["published"] == POINT["seconds"]
    for phase, seconds in POINT["seconds"].items():
        assert mine["error"][phase] == pytest.approx(mine["predicted"][phase] / seconds - 1)
    parts = sum(mine["predicted"][phase] for phase in POINT["seconds"].keys() - {"step"})
    assert mine["predicted"]["step"] < parts  # generation passes beside training
    assert main(["plan", "--published", str(path)]) == 0
    assert "| mine | old log probs |" in capsys.readouterr().out


def test_the_command_without_a_file(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--published"]) == 0
    assert "np-30b-sync" in capsys.readouterr().out
    assert main(["plan"]) == 2
    assert "or --published" in capsys.readouterr().err


def test_a_relative_model_folder_lies_beside_the_file(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text((DATA / "models/qwen3_30b_a3b/config.json").read_text())
    (published,) = read_points(write(tmp_path, {**POINT, "model": "model"}))
    assert published.shape == read_points(write(tmp_path, POINT))[0].shape


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "/none"}, ["mine", "model", "/none/config.json"]),
        ({"gpu": "H123"}, ["mine", "gpu", "'H123' is not known"]),
        ({"gpus": "many"}, ["mine", "gpus", "'many'"]),
        ({"gpus": 0}, ["mine", "gpus", "0"]),
        ({"mode": "mixed"}, ["mine", "mode", "'mixed'"]),
        ({"layout": [1, 1, 8]}, ["mine", "layout"]),
        ({"layout": [1, 1, 3, 1]}, ["mine", "layout", "does not divide 16"]),
        ({"engine_tensor": 32}, ["mine", "engine_tensor", "16 generate"]),
        ({"mean_length": 5000}, ["mine", "mean_length = 5000", "max_length"]),
        ({"trainer_gpus": 32}, ["mine", "trainer_gpus = 32", "gpus = 32"]),
        ({"mode": "colocated", "trainer_gpus": 32}, ["mine", "staleness", "separate"]),
        ({"seconds": {"train": 1}}, ["mine", "seconds", "'train' is no phase"]),
        ({"seconds": {"step": -1}}, ["mine", "seconds", "-1"]),
        ({"seconds": {}}, ["mine", "seconds", "nothing is stated"]),
        ({"id": 3}, ["id"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_points_are_refused_in_one_line(
    changes: dict[str, Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path, {**POINT, **changes})
    assert main(["plan", "--published", str(path)]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    assert all(word in message for word in [str(path), *words]), message


@pytest.mark.parametrize("name", sorted(POINT.keys() - {"staleness", "trainer_gpus", "layout", "engine_tensor"}))
def test_missing_fields(name: str, tmp_path: Path):
    point = {key: value for key, value in POINT.items() if key != name}
    if name in ("mean_length", "prompt_length", "recompute"):  # a source that does not state them gets a range
        assert read_points(write(tmp_path, point))
        return
    with pytest.raises(ValueError, match=rf"points.json: point {'number 1' if name == 'id' else 'mine'}: {name}"):
        read_points(write(tmp_path, point))


def test_files_that_are_no_list_of_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "points.json"
    for text, words in [("{", "cannot be read as JSON"), ("{}", "a list of points"), ("[1]", "point 1 is a int")]:
        path.write_text(text)
        assert main(["plan", "--published", str(path)]) == 2
        message = capsys.readouterr().err
        assert str(path) in message and words in message
    assert main(["plan", "--published", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="point mine: id stands in the file twice"):
        read_points(write(tmp_path, POINT, POINT))


def test_fields_that_nothing_reads_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path, {**POINT, "recomptue": True})
    assert main(["plan", "--published", str(path), "--json"]) == 0
    assert "point mine: not read: recomptue" in capsys.readouterr().err


def test_what_a_source_does_not_state_makes_a_range(tmp_path: Path):
    def widths(**changes: object) -> tuple[int, Prediction]:
        points = read_points(write(tmp_path, {**POINT, **changes}))
        return len(scenarios(points[0], Assumptions())), compare(points, Assumptions())[0].predicted["update"]

    count, exact = widths()
    assert count == 1 and exact.low == exact.high
    for changes, expected in [
        ({"recompute": None}, 2),
        ({"mean_length": None}, 2),
        ({"mean_length": [1000, 3200]}, 2),
        ({"layout": None}, 2),
        ({"engine_tensor": None}, 2),
        ({"staleness": None}, 2),
        ({"trainer_gpus": None}, 2),
        ({"seconds": {"step": 100}}, 2),  # with or without a reference model
        ({"seconds": {"step": 100}, "reference": False}, 1),
    ]:
        assert widths(**changes)[0] == expected, changes
    assert widths(mean_length=[1000, 3200])[1].low < exact.low


def test_errors_of_ranges():
    narrow, wide = Prediction(90.0, 110.0), Prediction(50.0, 150.0)
    assert narrow.error(100.0) == narrow.error(90.0) == 0
    assert narrow.error(120.0) == pytest.approx(110 / 120 - 1) and narrow.error(80.0) == pytest.approx(90 / 80 - 1)
    assert wide.error(125.0) == pytest.approx(100 / 125 - 1)
    assert Prediction(90.0, 90.0).error(100.0) == pytest.approx(-0.1)


def ledger_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ledger_tables", ROOT / "tools/ledger_tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(module: ModuleType) -> set[str]:
    """Return the names of a module's own constants that are numbers or tuples of numbers."""
    found = set()
    for name in vars(module):
        value = getattr(module, name)
        values = value if isinstance(value, tuple) else (value,)
        if re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name) and all(type(each) in (int, float) for each in values):
            found.add(name)
    return found


def test_every_constant_has_a_source():
    fields = {field.name for field in dataclasses.fields(Assumptions)} - set(Overheads.__dataclass_fields__)
    assert sources.SOURCES.keys() == fields
    # units, seeds and the sizes of samples and grids say nothing about a machine or a model
    technical = {"GIGA", "MICRO", "TERA", "_SEED", "_SAMPLED_RANKS", "_SAMPLED_TRAJECTORIES", "_POPULARITIES"}
    modules = (collectives, decoding, lengths, publication, published, rollouts, timing, training)
    constants = {f"{module.__name__.rpartition('.')[2]}.{name}" for module in modules for name in numbers(module)}
    assert {name for name in constants if name.partition(".")[2] not in technical} == sources.COUNTS.keys()
    for name, source in {**sources.SOURCES, **sources.COUNTS}.items():
        assert len(source.figure) > 20, name
        named = {
            "document": r"github\.com/|arXiv \d{4}\.\d{5}|\w+/[\w.-]+#\d+|\.(com|org|xyz|ai)/|vLLM, vllm/|\.json",
            "measurement": r"\d{4}-\d{2}-\d{2}",
            "fit": r"--refit",
            "derived": r"\w+",
        }[source.kind]
        assert re.search(named, source.where), f"{name}: {source.where!r} names no {source.kind}"
        if source.kind == "document":
            assert re.search(r"\d", source.figure), f"{name}: what does the document say?"
    fitted = {name for name, source in sources.SOURCES.items() if source.kind == "fit"}
    assert fitted == set(ledger_tables().FITTED), "the constants that the ledger's tool fits"
    ids = {each.point.id for each in built_in()}
    for name in fitted - {"pageable_copy_efficiency"}:
        text = sources.SOURCES[name].figure
        assert any(identifier in text for identifier in ids) or "30B points" in text, name
