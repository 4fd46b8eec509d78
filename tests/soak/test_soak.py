"""A run of many steps stays bounded, and a leak of each kind is found."""

import json
from pathlib import Path

import pytest

from tests.soak import soak
from tests.soak.soak import BOUNDS, growth_of


@pytest.mark.parametrize(
    "steps",
    [60, pytest.param(2000, marks=[pytest.mark.exhaustive, pytest.mark.timeout(1800)])],
)
def test_a_run_stays_bounded(tmp_path: Path, capsys, steps: int):
    """tools/soak.py --steps 10000 runs the same for longer: leaks that are slower than the noise of this one show."""
    out = tmp_path / "out"
    code = soak.main(["--steps", str(steps), "--out", str(out)])
    said = capsys.readouterr()
    assert code == 0, said.err + said.out
    result = json.loads((out / "soak.json").read_text())
    assert result["measured_after"][-1] == steps and not result["exceeded"]
    samples = result["samples"]
    assert min(samples["trainer sockets"]) >= 1, "the engine is reached through a real socket"
    assert min(samples["processes"]) >= 3, "two workers and the engine run"
    assert samples["bytes of metrics.jsonl"][-1] == (out / "run/metrics.jsonl").stat().st_size - last_evaluation(out)
    assert (out / "soak.png").stat().st_size > 10_000


def last_evaluation(out: Path) -> int:
    """Return the bytes of the record that is written after the last measurement."""
    lines = (out / "run/metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert json.loads(lines[-1])["kind"] == "eval"
    return len(lines[-1])


@pytest.mark.parametrize(
    ("name", "per_step"),
    [
        ("trainer memory", 4096),
        ("workers memory", 2048),
        ("trainer objects", 1),
        ("trainer threads", 0.01),
        ("trainer descriptors", 0.01),
        ("trainer sockets", 0.01),
        ("processes", 0.01),
        ("bytes of metrics.jsonl", 8192),
        ("bytes of checkpoints/step-N/checkpoint.json", 16),
        ("bytes of rollouts/step_N.jsonl", 100),
        ("bytes of environments/next_rankN.failures.jsonl", 8192),
        ("files", 0.01),
    ],
)
def test_a_leak_is_found(name: str, per_step: float):
    """Each grows over 10,000 steps, with the noise that a real run has; half of the bound is no leak."""
    steps = list(range(50, 10_001, 50))
    bound = next(bound for bound in BOUNDS if soak.re.fullmatch(bound.pattern, name))
    allowed = bound.per_step + bound.fixed / 5000
    assert per_step > allowed, "the case is no leak"
    for slope, exceeded in ((per_step, True), (allowed / 2, False)):
        samples = [{name: 1000 + slope * step + (step // 50 % 3) * bound.fixed / 50} for step in steps]
        (growth,) = growth_of(steps, samples)
        assert growth.exceeded == exceeded, growth


def test_what_is_made_once_is_no_leak():
    """Memory that grows in the first half of a run, and files that appear late, do not count."""
    steps = list(range(10, 201, 10))
    samples = [{"trainer memory": min(step, 100) * 1e6} | ({"files": 3.0} if step > 20 else {}) for step in steps]
    assert [growth.exceeded for growth in growth_of(steps, samples)] == [False, False]


def test_the_command_line(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        soak.main(["--steps", "10", "--out", str(tmp_path / "x")])
    assert "needs at least 40 steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        soak.main(["--out", str(tmp_path)])
    assert "exists; name a new folder" in capsys.readouterr().err


def test_growth_ends_the_command_with_1(tmp_path: Path, capsys, monkeypatch):
    growth = soak.Growth("files", growth=100.0, allowed=8.0, per_step=1.0)
    monkeypatch.setattr(soak, "soak", lambda steps, out: [growth])
    assert soak.main(["--steps", "100", "--out", str(tmp_path / "x")]) == 1
    said = capsys.readouterr()
    assert "TOO MUCH" in said.out and "These grow without a bound, or faster than they may: files" in said.err
