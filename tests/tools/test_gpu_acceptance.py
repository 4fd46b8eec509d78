"""The acceptance on a GPU: steps end in time, the rest goes on when one fails, and the page says what happened."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("gpu_acceptance", ROOT / "tools/gpu_acceptance.py")
assert spec is not None and spec.loader is not None
acceptance = importlib.util.module_from_spec(spec)
sys.modules["gpu_acceptance"] = acceptance
spec.loader.exec_module(acceptance)


def step(name: str, code: str, timeout_s: float = 60.0, figure=acceptance.tail, needs_gpu: bool = False):
    command = [sys.executable, "-S", "-c", code]
    return acceptance.Step(name, "about", lambda place: [command], figure, timeout_s, needs_gpu)


def test_the_rest_goes_on_when_a_step_fails_or_hangs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    steps = [
        step("good", "print('0.5 s a step')"),
        step("bad", "raise SystemExit(3)"),
        step("hangs", "import time; time.sleep(600)", timeout_s=1.0),
        step("unread", "print('no figure')", figure=lambda place, output: str(acceptance.last_json(output))),
        step("gpu", "print('never')", needs_gpu=True),
        step("last", """print('{"a_ratio": 1.25}')""", figure=acceptance.ratios_figure),
    ]
    began = time.monotonic()
    assert acceptance.accept(steps, acceptance.Place(tmp_path, 0)) == 1
    assert time.monotonic() - began < 60
    found = {result["name"]: result for result in json.loads((tmp_path / "acceptance.json").read_text())["results"]}
    status = {name: result["status"] for name, result in found.items()}
    wanted = {"good": "pass", "bad": "fail", "hangs": "fail", "unread": "fail", "gpu": "left out", "last": "pass"}
    assert status == wanted
    assert found["good"]["figure"] == "0.5 s a step" and found["last"]["figure"] == "a_ratio 1.25"
    assert "exit code 3" in found["bad"]["figure"] and "did not end within 1 s" in found["hangs"]["figure"]
    assert "no JSON object" in found["unread"]["figure"] and found["gpu"]["figure"] == "it needs a GPU"
    page = (tmp_path / "acceptance.md").read_text()
    assert page.count("| fail |") == 3 and "A dry run on the CPU" in page
    assert acceptance.accept([steps[0], steps[4]], acceptance.Place(tmp_path, 0)) == 0


def test_a_layout_that_differs_is_a_failure():
    place = acceptance.Place(Path("."), 1)
    line = json.dumps({"gradient_max_relative_diff": 2e-4, "coefficients_max_relative_diff": 1e-6, "tokens": 99})
    assert acceptance.parity_figure(place, line).startswith("gradient_max_relative_diff 2.0e-04")
    for wrong in ("NaN", "0.1"):
        with pytest.raises(ValueError, match="gradient_max_relative_diff"):
            acceptance.parity_figure(place, f'{{"gradient_max_relative_diff": {wrong}}}')


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_every_command_is_one_of_ours(gpus: int, tmp_path: Path):
    """Configs and tools exist, on a CPU, one GPU and several."""
    place = acceptance.Place(tmp_path, gpus)
    names = [one.name for one in acceptance.STEPS]
    assert len(set(names)) == len(names) and all(60 <= one.timeout_s <= 1800 for one in acceptance.STEPS)
    for one in acceptance.STEPS:
        for command in one.commands(place):
            for word in command[1:]:
                if word.startswith(("tools/", "examples/")):
                    assert (ROOT / word).exists(), word


def test_without_a_gpu_it_asks_for_a_dry_run(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert acceptance.main(["--out", str(tmp_path)]) == 2 and "--dry-run" in capsys.readouterr().err


def test_the_script_passes_its_arguments_on():
    done = subprocess.run([ROOT / "tools/gpu_acceptance.sh", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--dry-run" in done.stdout


@pytest.mark.exhaustive
def test_the_dry_run_of_the_cheapest_steps(tmp_path: Path):
    words = ["--dry-run", "--out", tmp_path, "--steps", "doctor", "kernels"]
    done = subprocess.run([ROOT / "tools/gpu_acceptance.sh", *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[:2]] == [["pass", "doctor"], ["pass", "kernels"]]
