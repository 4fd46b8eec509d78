#!/usr/bin/env python3
"""Run the acceptance of a machine with GPUs, step by step: `tools/gpu_acceptance.sh [--dry-run] [--steps NAME ..]`.

Every step is a command line of this package or one of its tools, in a process group of its own with a deadline. A step
that fails or takes too long is ended, and the rest goes on. The results, with a figure for each step, are written after
every step to acceptance.json and acceptance.md in the folder `--out`, beside the output of each step. The exit code is
1 when a step failed. With `--dry-run` the GPUs are hidden, and every step runs on the CPU in a small form, except for
those that need a GPU, which are listed as left out.
"""

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIBERPO = [sys.executable, "-m", "fiberpo_megatron.cli.main"]
PARITY_BOUND = 1e-4
"""Largest relative difference of a float32 layout on GPUs from a float64 process: kernels sum in another order. An H200
was 1e-6 away; products in TF32 are beyond it by far."""
_TERM_S = 10.0


@dataclass(frozen=True)
class Place:
    """Says where the acceptance runs."""

    out: Path
    gpus: int
    """GPUs that are used; 0 for a dry run."""

    @property
    def demo(self) -> list[str]:
        """Return the arguments that make the demo's configs fit the machine."""
        return [] if self.gpus else ["--parallel.expert", "1"]

    def config(self, name: str) -> str:
        """Return the demo's config of a name, for a GPU or not."""
        return f"examples/demo/{name}{'_gpu' if self.gpus else ''}.toml"


@dataclass(frozen=True)
class Step:
    """Says what one step runs and what is read from it."""

    name: str
    about: str
    commands: Callable[[Place], Sequence[Sequence[str]]]
    """Command lines, one after the other; the step fails with the first that fails."""
    figure: Callable[[Place, str], str]
    """Makes the figure from the output of all commands; raises ValueError when it is not good enough."""
    timeout_s: float
    needs_gpu: bool = False


@dataclass(frozen=True)
class Result:
    """Is the outcome of one step: pass, fail or left out, with its figure or the reason."""

    name: str
    about: str
    status: str
    figure: str
    seconds: float
    commands: list[str]


def last_json(output: str) -> dict[str, Any]:
    """Return the JSON object in the last line of an output. Raises ValueError if it is none."""
    lines = [line for line in output.splitlines() if line.strip()]
    found = json.loads(lines[-1]) if lines and lines[-1].lstrip().startswith("{") else None
    if not isinstance(found, dict):
        raise ValueError(f"the last line is no JSON object: {lines[-1][:200] if lines else 'there is no output'}")
    return found


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the metrics of a run of one kind. Raises ValueError if there are none."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if record["kind"] == kind]
    if not found:
        raise ValueError(f"{folder}/metrics.jsonl has no record of kind {kind}")
    return found


def doctor_figure(place: Place, output: str) -> str:
    found = json.loads(output)["findings"]
    seen = [finding["seen"] for finding in found if finding["check"] in ("GPU 0", "GPU driver", "Transformer Engine")]
    warnings = sum(finding["status"] == "warn" for finding in found)
    return "; ".join([*seen, f"{len(found)} findings, {warnings} warnings"])


def parity_figure(place: Place, output: str) -> str:
    layouts = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if len(layouts) != len(parity(place)):
        raise ValueError(f"{len(layouts)} of {len(parity(place))} layouts gave a JSON object")
    texts = []
    for found in layouts:
        differences = {key: float(value) for key, value in found.items() if "max_relative_diff" in key}
        worst = max(differences, key=lambda key: (math.isnan(differences[key]), differences[key]))
        texts.append(f"{worst} {differences[worst]:.1e}, bound {PARITY_BOUND:.0e}")
        if not differences[worst] <= PARITY_BOUND:
            raise ValueError(texts[-1])
    return "; ".join(texts)


def ratios_figure(place: Place, output: str) -> str:
    found = last_json(output)
    ratios = found.get("ratio", {key: value for key, value in found.items() if key.endswith("_ratio")})
    return ", ".join(f"{name} {float(value):.2f}" for name, value in ratios.items())


def publish_figure(place: Place, output: str) -> str:
    found = last_json(output)
    wrong = [f"{way}: the engine holds other bytes" for way, equal in found["bitwise"].items() if not equal]
    # of the whole device, the second number, other processes use a part as well
    grown = {way: trainer for way, (trainer, _) in found["growth"].items() if trainer > 0}
    wrong += [f"{way}: {grown[way]} bytes more in the trainer's allocator" for way in grown]
    if wrong:
        raise ValueError("; ".join(wrong))
    return ratios_figure(place, output)


def run_figure(name: str, kind: str = "train") -> Callable[[Place, str], str]:
    """Return what reads the last metrics of a run in the folder of that name."""

    def figure(place: Place, output: str) -> str:
        found = records(place.out / name, kind)
        last, seconds = found[-1], sorted(record["seconds/total"] for record in found if "seconds/total" in record)
        parts = [f"{len(found)} records, the last of step {last['step']}"]
        parts += [f"{seconds[len(seconds) // 2]:.2f} s a step (median)"] if seconds else []
        names = ("accuracy", "eval/accuracy", "loss", "rollout_diff/mean", "verify/mean_difference")
        parts += [f"{key} {last[key]:.4g}" for key in names if key in last]
        return ", ".join(parts)

    return figure


def resume_figure(place: Place, output: str) -> str:
    steps = [record["step"] for record in records(place.out / "resume", "train")]
    if steps != list(range(len(steps))) or len(steps) != 3:
        raise ValueError(f"the steps of the run that was resumed are {steps}, not 0, 1, 2")
    return f"steps {steps}: two before, one after"


def memory_figure(place: Place, output: str) -> str:
    last = records(place.out / "colocated", "train")[-1]
    used = {key: value for key, value in last.items() if key.startswith("gpu/") and key.endswith("memory_used")}
    peak = [f"{key} {value:.1f} GiB" for key, value in used.items()]
    return ", ".join([f"{last['step'] + 1} steps in turns", f"{last['seconds/total']:.2f} s the last", *peak])


def tail(place: Place, output: str) -> str:
    return ([line for line in output.splitlines() if line.strip()] or ["no output"])[-1][:200]


def warmup(place: Place) -> list[str]:
    steps = [] if place.gpus else ["--sft.steps", "2"]
    return [*FIBERPO, "sft", place.config("warmup"), "--run.folder", str(place.out / "warmup"), *place.demo, *steps]


def train(place: Place, name: str, steps: int, *more: str) -> list[str]:
    words = [*FIBERPO, "train", place.config("train"), "--run.folder", str(place.out / name)]
    words += ["--model.path", str(place.out / "warmup/hf"), "--trainer.steps", str(steps), *place.demo]
    small = ["--batch.prompts", "8", "--batch.epochs", "1", "--evaluation.prompts", "8"]
    return [*words, *([] if place.gpus else small), *more]


def parity(place: Place) -> list[list[str]]:
    # NCCL takes one rank for each GPU: on a single one, it gets one rank, and two ranks send through the host
    layouts = [["--tensor", "2"]] if place.gpus != 1 else [["--data", "1"], ["--tensor", "2", "--shared-gpu"]]
    return [[sys.executable, "tools/layout_parity.py", *layout, "--steps", "1"] for layout in layouts]


def publish(place: Place) -> list[str]:
    words = [sys.executable, "tools/bench_publish.py", "--engines", "1"]
    return [*words, *(["--mib", "1024", "--real"] if place.gpus else ["--mib", "32", "--attempts", "1"])]


def throughput(place: Place) -> list[str]:
    words = [sys.executable, "tools/bench_step.py", "--ranks", str(min(max(place.gpus, 1), 2))]
    small = ["--layers", "2", "--hidden", "64", "--vocabulary", "512", "--rows", "2", "--row-tokens", "128"]
    return [*words, *(["--dtype", "bfloat16"] if place.gpus else small)]


def certify(place: Place) -> list[str]:
    words = [*FIBERPO, "certify", place.config("train"), "--gates-only", "--model.path", "examples/demo/model"]
    return [*words, "--out", str(place.out / "certify")]


def evaluate(place: Place) -> list[str]:
    words = [*FIBERPO, "eval", place.config("train"), "--run.folder", str(place.out / "eval"), *place.demo]
    small = [] if place.gpus else ["--evaluation.prompts", "8"]
    return [*words, "--model.path", str(place.out / "warmup/hf"), *small]


STEPS = (
    Step("doctor", "versions, driver, GPUs, links", lambda p: [[*FIBERPO, "doctor", "--json"]], doctor_figure, 180),
    Step("kernels", "fused kernels against torch", lambda p: [certify(p)], tail, 600),
    Step("parity", "layouts against one float64 process", parity, parity_figure, 600),
    Step("warmup", "supervised steps in bfloat16", lambda p: [warmup(p)], run_figure("warmup", "sft"), 900),
    Step("engine", "SGLang serves the weights", lambda p: [evaluate(p)], tail, 900),
    Step("demo", "reinforcement learning", lambda p: [train(p, "demo", 60 if p.gpus else 1)], run_figure("demo"), 1800),
    Step("publish", "each way of publishing, times the floor", lambda p: [publish(p)], publish_figure, 900),
    Step(
        "colocated",
        "engine and trainer take turns on the GPU",
        lambda p: [train(p, "colocated", 4, "--rollout.engine.colocated", "true")],
        memory_figure,
        600,
        needs_gpu=True,
    ),
    Step("fp8", "training in FP8", lambda p: [train(p, "fp8", 2, "--model.fp8", "e4m3")], run_figure("fp8"), 600, True),
    Step(
        "resume",
        "a checkpoint, and the run that goes on from it",
        lambda p: [train(p, "resume", 2), train(p, "resume", 3, "--resume")],
        resume_figure,
        900,
    ),
    Step("throughput", "a step beside Megatron-Core's, ratios", lambda p: [throughput(p)], ratios_figure, 900),
)


def take(step: Step, place: Place) -> Result:
    """Run one step within its deadline; whatever goes wrong is its result."""
    if step.needs_gpu and not place.gpus:
        return Result(step.name, step.about, "left out", "it needs a GPU", 0.0, [])
    began, commands = time.monotonic(), [list(command) for command in step.commands(place)]
    output, error = "", None
    with (place.out / f"{step.name}.log").open("w") as log:
        for command in commands:
            left = step.timeout_s - (time.monotonic() - began)
            found, error = _run(command, max(left, 1.0), place, log)
            output += found
            if error:
                break
    figure = ""
    if error is None:
        try:
            figure = step.figure(place, output)
        except (ValueError, KeyError, OSError) as problem:
            error = f"{type(problem).__name__}: {problem}"
    seconds = time.monotonic() - began
    shown = [shlex.join(command) for command in commands]
    return Result(step.name, step.about, "fail" if error else "pass", error or figure, round(seconds, 1), shown)


def _run(command: Sequence[str], timeout_s: float, place: Place, log: Any) -> tuple[str, str | None]:
    """Return stdout of a command and what went wrong, if anything; when time is over, its process group is ended."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({} if place.gpus else {"CUDA_VISIBLE_DEVICES": ""})
    log.write(f"$ {shlex.join(command)}\n")
    log.flush()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=log,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        output, late = process.communicate(timeout=timeout_s)[0], False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            output, late = process.communicate(timeout=_TERM_S)[0], True
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, late = process.communicate()[0], True
    log.write(output)
    if late:
        return output, f"it did not end within {timeout_s:.0f} s; see {log.name}"
    return output, f"exit code {process.returncode}; see {log.name}" if process.returncode else None


def write(results: Sequence[Result], place: Place) -> None:
    """Write acceptance.json and acceptance.md."""
    facts = {"gpus": place.gpus, "card": _card(place), "results": [asdict(result) for result in results]}
    (place.out / "acceptance.json").write_text(json.dumps(facts, indent=1) + "\n")
    lines = ["# Acceptance", "", facts["card"], "", "| step | | figure | seconds |", "|---|---|---|---|"]
    for result in results:
        figure = result.figure.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {result.name}: {result.about} | {result.status} | {figure} | {result.seconds:g} |")
    (place.out / "acceptance.md").write_text("\n".join(lines) + "\n")


def _card(place: Place) -> str:
    if not place.gpus:
        return "A dry run on the CPU: nothing here says anything about a GPU."
    import torch

    return f"{place.gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def main(arguments: Sequence[str]) -> int:
    """Run the steps that were asked for, and return 1 if one failed."""
    parser = argparse.ArgumentParser(description="the first hour on a GPU", allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU, as far as it can")
    parser.add_argument("--out", type=Path, default=None, help="folder for results; default runs/acceptance-TIME")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], help="default: all")
    options = parser.parse_args(arguments)
    import torch

    gpus = 0 if options.dry_run else torch.cuda.device_count()
    if not gpus and not options.dry_run:
        print("gpu_acceptance: this machine shows no GPU; run it on one, or add --dry-run", file=sys.stderr)
        return 2
    out = options.out or ROOT / time.strftime("runs/acceptance-%Y%m%d_%H%M%S")
    out.mkdir(parents=True, exist_ok=True)
    return accept(
        [step for step in STEPS if not options.steps or step.name in options.steps], Place(out.resolve(), gpus)
    )


def accept(steps: Sequence[Step], place: Place) -> int:
    """Run steps one after the other, whatever becomes of each; return 1 if one failed."""
    results: list[Result] = []
    for step in steps:
        results.append(take(step, place))
        write(results, place)
        result = results[-1]
        print(f"{result.status:>8}  {result.name:<10} {result.seconds:7.1f} s  {result.figure}", flush=True)
    print(place.out / "acceptance.md")
    return int(any(result.status == "fail" for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
