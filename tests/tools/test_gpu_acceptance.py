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
    place = acceptance.Place(Path("."), 8)
    line = json.dumps({"gradient_max_relative_diff": 2e-5, "coefficients_max_relative_diff": 1e-6, "tokens": 99})
    assert acceptance.parity_figure(place, line).startswith("gradient_max_relative_diff 2.0e-05")
    for wrong in ("NaN", "0.1"):
        other = f'{{"coefficients_max_relative_diff": 1e-6, "gradient_max_relative_diff": {wrong}}}'
        with pytest.raises(ValueError, match="gradient_max_relative_diff"):
            acceptance.parity_figure(place, other)
        with pytest.raises(ValueError, match="gradient_max_relative_diff"):  # of two layouts, the first one
            acceptance.parity_figure(acceptance.Place(Path("."), 1), f"{other}\n{line}\n")


def test_one_gpu_runs_one_rank_over_nccl_and_two_through_the_host():
    """NCCL refuses two ranks on one GPU; both layouts have to say what they found."""
    one = acceptance.Place(Path("."), 1)
    layouts = [" ".join(command[2:]) for command in acceptance.parity(one)]
    assert layouts == ["--data 1 --steps 1", "--tensor 2 --shared-gpu --steps 1"]
    assert ["--shared-gpu" in command for command in acceptance.parity(acceptance.Place(Path("."), 2))] == [False]
    line = '{"gradient_max_relative_diff": 1e-6}\n'
    assert acceptance.parity_figure(one, line + "rank 0 says\n" + line).count("1.0e-06") == 2
    with pytest.raises(ValueError, match="1 of 2 layouts"):
        acceptance.parity_figure(one, line)


def test_the_figure_is_made_from_what_all_commands_print(tmp_path: Path):
    commands = [[sys.executable, "-S", "-c", f"print('said {number}')"] for number in (1, 2)]
    both = acceptance.Step("both", "about", lambda place: commands, lambda place, output: output, 60.0)
    assert acceptance.take(both, acceptance.Place(tmp_path, 0)).figure == "said 1\nsaid 2\n"


def test_a_publication_with_other_bytes_or_a_lost_buffer_is_a_failure():
    place = acceptance.Place(Path("."), 1)
    good = {
        "ratio": {"ipc": 1.5},
        "bitwise": {"ipc": True, "disk": True},
        "growth": {"ipc": [0, 4096], "disk": [-8, 0]},
    }
    (publish,) = [step for step in acceptance.STEPS if step.name == "publish"]
    assert publish.figure(place, json.dumps(good)) == "ipc 1.50"
    with pytest.raises(ValueError, match="^disk: the engine holds other bytes$"):
        publish.figure(place, json.dumps(good | {"bitwise": {"ipc": True, "disk": False}}))
    with pytest.raises(ValueError, match="^ipc: 512 bytes more"):
        publish.figure(place, json.dumps(good | {"growth": {"ipc": [512, 0]}}))


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
