"""The acceptance on a GPU: steps end in time, the rest goes on when one fails, and the page says what happened."""

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fiberpo_megatron.cli.main import _parser, local_world_size
from fiberpo_megatron.config import Config, ConfigError, load_config
from fiberpo_megatron.trainer.gpu_checks import check_gpus
from tools import bench_step, layout_parity

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))
bench_publish: Any = importlib.import_module("bench_publish")
spec = importlib.util.spec_from_file_location("gpu_acceptance", ROOT / "tools/gpu_acceptance.py")
assert spec is not None and spec.loader is not None
acceptance = importlib.util.module_from_spec(spec)
sys.modules["gpu_acceptance"] = acceptance
spec.loader.exec_module(acceptance)


def step(name: str, code: str, timeout_s: float = 60.0, figure=acceptance.tail, needs_gpus: int = 0):
    command = [sys.executable, "-S", "-c", code]
    return acceptance.Step(name, "about", lambda place: [command], figure, timeout_s, needs_gpus)


def test_the_rest_goes_on_when_a_step_fails_or_hangs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    steps = [
        step("good", "print('0.5 s a step')"),
        step("bad", "raise SystemExit(3)"),
        step("hangs", "import time; time.sleep(600)", timeout_s=1.0),
        step("unread", "print('no figure')", figure=lambda place, output: str(acceptance.last_json(output))),
        step("gpu", "print('never')", needs_gpus=1),
        step("gpus", "print('never')", needs_gpus=2),
        step("last", """print('{"a": 1.25}')""", figure=lambda place, output: str(acceptance.last_json(output)["a"])),
    ]
    began = time.monotonic()
    assert acceptance.accept(steps, acceptance.Place(tmp_path, 0)) == 1
    assert time.monotonic() - began < 60
    found = {result["name"]: result for result in json.loads((tmp_path / "acceptance.json").read_text())["results"]}
    status = {name: result["status"] for name, result in found.items()}
    wanted = {
        "good": "pass",
        "bad": "fail",
        "hangs": "fail",
        "unread": "fail",
        "gpu": "left out",
        "gpus": "left out",
        "last": "pass",
    }
    assert status == wanted
    assert found["good"]["figure"] == "0.5 s a step" and found["last"]["figure"] == "1.25"
    assert "exit code 3" in found["bad"]["figure"] and "did not end within 1 s" in found["hangs"]["figure"]
    assert "no JSON object" in found["unread"]["figure"] and found["gpu"]["figure"] == "it needs a GPU"
    assert found["gpus"]["figure"] == "it needs 2 GPUs"
    page = (tmp_path / "acceptance.md").read_text()
    assert page.count("| fail |") == 3 and "A dry run on the CPU" in page
    assert acceptance.accept([steps[0], steps[4]], acceptance.Place(tmp_path, 0)) == 0


def place_of(gpus: int, folder: Path = Path(".")) -> Any:
    return acceptance.Place(folder, gpus)


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_a_layout_that_differs_is_a_failure(gpus: int):
    """Whichever of the layouts it is, by the bound of its type."""
    place = place_of(gpus)
    layouts = acceptance.layouts_of(place)
    good = {"log_probs": 1e-6, "gradient": 2e-5, "coefficients": 1e-6, "parameters": 1e-7}

    def line(**differences: float) -> str:
        return json.dumps({f"{key}_max_relative_diff": value for key, value in {**good, **differences}.items()})

    lines = ["rank 0 says", *(line(log_probs=0.05 if "bfloat16" in words else 1e-6) for words in layouts)]
    assert acceptance.parity_figure(place, "\n".join(lines)).count("bound") == len(layouts)
    for number, words in enumerate(layouts, 1):
        narrow = "bfloat16" in words
        for key, wrong in (("log_probs", 0.3 if narrow else 1e-3), ("gradient", 1.5 if narrow else 1e-3)):
            for value in (wrong, float("nan")):
                others = [*lines[:number], line(**{key: value}), *lines[number + 1 :]]
                with pytest.raises(ValueError, match=f"^{' '.join(words).replace('--', '')}: {key}"):
                    acceptance.parity_figure(place, "\n".join(others))
        if not narrow:
            with pytest.raises(ValueError, match="parameters 1.0e-03"):
                acceptance.parity_figure(
                    place, "\n".join([*lines[:number], line(parameters=1e-3), *lines[number + 1 :]])
                )
    with pytest.raises(ValueError, match=f"{len(layouts) - 1} of {len(layouts)} layouts"):
        acceptance.parity_figure(place, "\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="lacks log-probs or the gradient"):
        acceptance.parity_figure(place, "\n".join([*lines[:-1], '{"tokens": 99}']))


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 4, 8])
def test_every_kind_of_parallelism_is_compared(gpus: int):
    """Alone, and in pairs where there are four GPUs. NCCL refuses two ranks on one GPU, and on a GPU context
    parallelism has no attention in float32."""
    layouts = acceptance.layouts_of(place_of(gpus))
    for kind in ("tensor", "expert", "pipeline", "context"):
        assert any(words[words.index(f"--{kind}") + 1] == "2" for words in layouts if f"--{kind}" in words)
    for words in layouts:
        case = layout_parity.case_of([*words, "--steps", "1"])
        case.check()
        assert case.ranks <= max(gpus, 2) and ("--shared-gpu" in words) == (gpus == 1 and case.ranks > 1)
        assert (case.dtype == "bfloat16") == (gpus > 0 and "--context" in words)
    pairs = {frozenset(set(words[:6:2]) - {"--data", "--dtype"}) for words in layouts if len(words) >= 4}
    wanted = {frozenset(pair) for pair in (("--tensor", "--expert"), ("--tensor", "--pipeline"))}
    wanted |= {frozenset(pair) for pair in (("--pipeline", "--expert"), ("--context", "--expert"))}
    assert (wanted | {frozenset(("--context", "--tensor"))} <= pairs) == (gpus >= 4)


def test_the_figure_is_made_from_what_all_commands_print(tmp_path: Path):
    commands = [[sys.executable, "-S", "-c", f"print('said {number}')"] for number in (1, 2)]
    both = acceptance.Step("both", "about", lambda place: commands, lambda place, output: output, 60.0)
    assert acceptance.take(both, acceptance.Place(tmp_path, 0)).figure == "said 1\nsaid 2\n"


def benchmark(real: bool, **changed: Any) -> dict[str, Any]:
    """What tools/bench_publish.py says in its last line, of 4 rounds."""
    ways = ("ipc", "disk")
    return {
        "real": real,
        "seconds": {"ipc": 0.05, "disk": 0.6},
        "floor": {"ipc": 0.002, "disk": 0.5},
        "ratio": {"ipc": 25.0, "disk": 1.2},
        "rounds": dict.fromkeys(ways, 4),
        "bitwise": {} if real else dict.fromkeys(ways, True),
        "growth": {"ipc": [0, 4096], "disk": [-8, 0]},
        **changed,
    }


def published(gpus: int, *found: dict[str, Any]) -> str:
    return acceptance.publish_figure(place_of(gpus), "\n".join(json.dumps(one) for one in found))


def test_a_publication_with_other_bytes_or_a_lost_buffer_is_a_failure():
    good, real = benchmark(False), benchmark(True)
    figure = published(1, good, real)
    assert "ipc to stand-ins 0.050 s, 12.0 ms a round beyond the copies, bound 20" in figure
    assert "disk to stand-ins 0.600 s, 1.20 times the floor, goal 1.5" in figure
    assert "disk to SGLang 0.600 s, 1.20 times the floor, which has no goal" in figure
    with pytest.raises(ValueError, match="^disk: the engine holds other bytes$"):
        published(1, benchmark(False, bitwise={"ipc": True, "disk": False}), real)
    with pytest.raises(ValueError, match="^bits were compared for ipc alone$"):
        published(1, benchmark(False, bitwise={"ipc": True}), real)
    for number in (0, 1):
        both = [benchmark(one == 1, growth={"ipc": [512 * (one == number), 0]}) for one in (0, 1)]
        with pytest.raises(ValueError, match="^ipc: 512 bytes more"):
            published(1, *both)
    with pytest.raises(ValueError, match="1 of 2 benchmarks"):
        published(1, good)


def test_a_slow_publication_is_a_failure_with_the_figure():
    slow = {"seconds": {"ipc": 0.5, "disk": 0.9}, "ratio": {"ipc": 250.0, "disk": 1.8}}
    with pytest.raises(ValueError, match=r"^missed: ipc to stand-ins .*124.5 ms.*; disk to stand-ins .*1.80 times"):
        published(1, benchmark(False, **slow), benchmark(True))
    with pytest.raises(ValueError, match=r"^missed: ipc to SGLang 0.500 s, 124.5 ms a round .*bound 60 \(all"):
        published(1, benchmark(False), benchmark(True, **slow))
    figure = published(0, benchmark(False, **slow))  # a dry run of 32 MiB says nothing about speed
    assert "ipc to stand-ins 0.500 s, 250.00 times the floor" in figure and "not judged" in figure


def test_a_slow_step_is_a_failure_with_the_figure():
    found = {"single_pass_ratio": 1.04, "two_pass_ratio": 1.29, "tokens_per_second": {"single pass": 99700}}

    def figure(gpus: int, **changed: float) -> str:
        return str(acceptance.throughput_figure(place_of(gpus), json.dumps(found | changed)))

    assert figure(1) == "single_pass_ratio 1.04, goal 1.05; two_pass_ratio 1.29, goal 1.30; single pass 99,700 tokens/s"
    for key in acceptance.STEP_BOUNDS:
        for wrong in (1.4, float("nan")):
            with pytest.raises(ValueError, match=f"^missed: {key} {wrong:.2f}, goal"):
                figure(8, **{key: wrong})
            assert f"{key} {wrong:.2f}" in figure(0, **{key: wrong})


def write_run(folder: Path, kind: str, steps: int, **changed: Any) -> None:
    """Metrics of a run in which nothing is wrong, apart from what is changed; a list is one value a step."""
    folder.mkdir(parents=True, exist_ok=True)
    plain: dict[str, Any] = {"gradient_norm": 2.0, "seconds/total": 1.5, "loss": [4.0 - n for n in range(steps)]}
    if kind == "train":
        plain = plain | {"objective/value": 0.1, "entropy": 1.0, "rollout_diff/mean": 0.003, "accuracy": 0.5}
    values = plain | changed
    lines = [
        {"step": n, "kind": kind} | {key: one[n] if isinstance(one, list) else one for key, one in values.items()}
        for n in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_is_whole_finite_and_agrees_with_its_engine(tmp_path: Path):
    figure, place, folder = acceptance.run_figure("run", lambda place: 3), place_of(1, tmp_path), tmp_path / "run"
    write_run(folder, "train", 3, **{"gpu/0/memory_used": 31.5})
    said = "3 steps, 1.50 s a step (median), engine's log-probs off by 0.003, bound 0.03, accuracy 0.5"
    assert figure(place, "").startswith(said) and "memory_used 31.5 GiB" in figure(place, "")
    nan = float("nan")
    for key, wrong, says in (
        ("gradient_norm", [1.0, nan, 1.0], "gradient_norm of run is nan in step 1"),
        ("gradient_norm", 0.0, "gradient_norm of run is 0 in all steps"),
        ("objective/value", [1.0, 1.0, float("inf")], "objective/value of run is inf in step 2"),
        ("entropy", nan, "entropy of run is nan in step 0"),
        ("rollout_diff/mean", [0.003, 0.5, 0.003], "engine's log-probs off by 0.5, bound 0.03"),
        ("rollout_diff/mean", [0.003, nan, 0.5], "engine's log-probs off by nan, bound 0.03"),
    ):
        write_run(folder, "train", 3, **{key: wrong})
        with pytest.raises(ValueError, match=says):
            figure(place, "")
    write_run(folder, "train", 3, gradient_norm=0.0)
    assert figure(place_of(0, tmp_path), "").startswith("3 steps"), "two steps of warm-up bring no right answer"
    write_run(folder, "train", 2)
    with pytest.raises(ValueError, match=r"steps of run are \[0, 1\], not 0 to 2"):
        figure(place, "")


def test_a_warm_up_that_learns_nothing_is_a_failure(tmp_path: Path):
    place = place_of(1, tmp_path)
    write_run(tmp_path / "warmup", "sft", 3)
    assert acceptance.warmup_figure(place, "").startswith("3 steps, loss 4.000 to 2.000")
    write_run(tmp_path / "warmup", "sft", 3, loss=4.0)
    with pytest.raises(ValueError, match=r"the loss went from 4.000 to 4.000 in 3 steps"):
        acceptance.warmup_figure(place, "")
    write_run(tmp_path / "warmup", "sft", 3, loss=[4.0, float("nan"), 2.0])
    with pytest.raises(ValueError, match="loss of warmup is nan in step 1"):
        acceptance.warmup_figure(place, "")


def test_a_demo_that_learns_nothing_is_a_failure(tmp_path: Path):
    place = place_of(1, tmp_path)
    write_run(tmp_path / "demo", "train", 60, accuracy=[0.5 + 0.005 * n for n in range(60)])
    assert "of the first ten steps 0.523, of the last ten 0.772" in acceptance.demo_figure(place, "")
    write_run(tmp_path / "demo", "train", 60)
    with pytest.raises(ValueError, match=r"of the first ten steps 0.500, of the last ten 0.500"):
        acceptance.demo_figure(place, "")
    write_run(tmp_path / "demo", "train", 1)
    assert acceptance.demo_figure(place_of(0, tmp_path), "").startswith("1 steps")


def test_an_engine_with_other_weights_than_those_of_the_warm_up_is_a_failure():
    line = "eval   0/180  held-out accuracy {} %  reward 0  length 5.12\n"
    assert acceptance.engine_figure(place_of(1), line.format("55.9")).startswith("eval   0/180")
    with pytest.raises(ValueError, match="it is at least 25%"):
        acceptance.engine_figure(place_of(1), line.format("0.4"))
    assert "0.4 %" in acceptance.engine_figure(place_of(0), line.format("0.4"))
    with pytest.raises(ValueError, match="has no accuracy: Ready"):
        acceptance.engine_figure(place_of(0), "Ready\n")


def test_fp8_is_compared_with_bfloat16(tmp_path: Path):
    place = place_of(1, tmp_path)
    write_run(tmp_path / "fp8_plain", "sft", 2)
    write_run(tmp_path / "fp8_sft", "sft", 2, gradient_norm=2.1)
    write_run(tmp_path / "fp8", "train", 2, **{"rollout_diff/mean": 0.06})
    said = acceptance.fp8_figure(place, "")
    assert said.startswith("gradient norm, relative to bfloat16's, off by 0.05, bound 0.25; 2 steps")
    assert "off by 0.06, bound 0.1" in said
    for wrong, says in ((1.08, "off by 0.46"), (2.0, "nothing was computed in FP8"), (float("nan"), "is nan")):
        write_run(tmp_path / "fp8_sft", "sft", 2, gradient_norm=wrong)
        with pytest.raises(ValueError, match=says):
            acceptance.fp8_figure(place, "")


def test_overlapping_communication_is_compared_with_none(tmp_path: Path):
    place = place_of(2, tmp_path)
    for name in ("overlap_plain", "overlap"):
        write_run(tmp_path / name, "sft", 3)
    assert "off by 0, bound 0.001" in acceptance.overlap_figure(place, "")
    for wrong in ({"gradient_norm": [2.0, 2.0, 2.01]}, {"loss": [4.0, 3.01, 2.0]}):
        write_run(tmp_path / "overlap", "sft", 3, **wrong)
        with pytest.raises(ValueError, match=r"off by 0.00\d+, bound 0.001"):
            acceptance.overlap_figure(place, "")


def test_a_resume_has_the_weights_of_a_run_that_was_not_stopped(tmp_path: Path):
    place = place_of(1, tmp_path)
    write_run(tmp_path / "resume_sft", "sft", 4)
    write_run(tmp_path / "resume", "train", 3)
    weights = {"a": torch.arange(8.0), "b": torch.zeros(4, dtype=torch.bfloat16)}
    for name in ("resume_sft", "resume_whole"):
        (tmp_path / name / "hf").mkdir(parents=True)
        save_file(weights, tmp_path / name / "hf/model.safetensors")
    assert "bitwise those of the run that was not stopped; 3 steps" in acceptance.resume_figure(place, "")
    for other, says in (
        ({**weights, "b": -weights["b"]}, "1 of 2 tensors differ from the run that was not stopped: b"),
        ({**weights, "a": weights["a"].nextafter(torch.tensor(99.0))}, "1 of 2 tensors differ .*: a"),
        ({"a": weights["a"]}, r"hold other tensors: \['b'\]"),
    ):
        save_file(other, tmp_path / "resume_sft/hf/model.safetensors")
        with pytest.raises(ValueError, match=says):
            acceptance.resume_figure(place, "")
    write_run(tmp_path / "resume_sft", "sft", 2)
    with pytest.raises(ValueError, match=r"steps of resume_sft are \[0, 1\], not 0 to 3"):
        acceptance.resume_figure(place, "")


def parse(command: Sequence[str], gpus: int) -> tuple[str, Config] | None:
    """Parse a command line as the program that it names does; return what fiberpo runs with which config."""
    tools = {"layout_parity": layout_parity.arguments, "bench_step": bench_step.arguments}
    tools["bench_publish"] = lambda words: bench_publish.parsed(words, gpus > 0)
    if command[1] == "-m":
        assert list(command[:3]) == acceptance.FIBERPO
        options, overrides = _parser().parse_known_args(command[3:])
        if options.command == "doctor":
            assert not overrides
            return None
        return options.command, load_config(options.config, overrides)
    assert (ROOT / command[1]).exists()
    tools[Path(command[1]).stem](command[2:])
    return None


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_every_command_is_one_of_ours(gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Programs, options, configs and settings exist, and fit the machine, on a CPU, one GPU and several."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    place = place_of(gpus, tmp_path)
    names = [one.name for one in acceptance.STEPS]
    assert len(set(names)) == len(names) and all(60 <= one.timeout_s <= 1800 for one in acceptance.STEPS)
    seen = set()
    for one in acceptance.STEPS:
        if gpus < one.needs_gpus:
            continue
        for command in one.commands(place):
            parsed = parse(command, gpus)
            if parsed and parsed[0] != "certify":
                check_gpus(parsed[1], parsed[0], local_world_size(parsed[1]), here=True)
                seen.add(parsed[0])
    assert seen == {"sft", "train", "eval"}
    with pytest.raises(ConfigError, match="model.fp9: unknown key"):
        parse([*acceptance.sft(place, "x", 1), "--model.fp9", "e4m3"], gpus)
    with pytest.raises(SystemExit):
        parse([sys.executable, "tools/bench_step.py", "--row-tokenz", "8"], gpus)


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
