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
import re
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
BFLOAT16_PARITY_BOUNDS = {"log_probs": 0.2, "gradient": 1.0}
"""The same for a layout in bfloat16, which context parallelism on a GPU needs. On a CPU one rank in bfloat16 and two in
context parallelism are up to 0.07 and 0.55 away; tokens without the other rank's values are 0.39 and 1.7 away or more.
Coefficients are not compared: rounding moves a ratio across a clip."""
ENGINE_BOUND = 0.03
"""Largest mean difference of the engine's log-probs from the trainer's, both in bfloat16 (nats). An H200 was at 0.003
in the demo, and at 0.006 and 0.009 with other weights."""
FP8_ENGINE_BOUND = 0.1
"""The same for a trainer in FP8, which nothing has measured: an 8-bit factor is rounded 16 times as coarsely as in
bfloat16, and errors of many factors cancel in part."""
FP8_GRADIENT_BOUND = 0.25
"""Largest relative difference of FP8's gradient norm from bfloat16's in the first step; that of tests/gpu/test_step.py.
An H200 was at 0.024, and at 0.46 with the recipe that is now refused."""
OVERLAP_BOUND = 1e-3
"""Largest relative difference of losses and gradient norms with overlapping communication: the sums are the same, the
optimizer's shards are cut elsewhere, and bfloat16 rounds what differs in the last bit of float32."""
ACCURACY_BOUND = 0.25
"""Least accuracy of the engine after the whole warm-up, which brings 0.56 on a CPU; other weights give about 0."""
STEP_BOUNDS = {"single_pass_ratio": 1.05, "two_pass_ratio": 1.30}
"""The goals for a step beside a bare one of Megatron-Core. An H200 had 1.00 and 1.23 with the sizes of `STEP_SIZES`."""
STEP_SIZES = ["--layers", "4", "--hidden", "2048", "--heads", "16", "--vocabulary", "151936", "--rows", "4"]
PUBLISH_BOUNDS = {"disk": 1.5}
"""The goal for a way of publishing beside its floor. An H200 was at 1.54 with `disk`, which misses it."""
IPC_ROUND_MS = {"stand-ins": 20.0, "SGLang": 60.0}
"""Largest time of a round over `ipc` beyond the copies alone (ms). The copies of a round take 0.4 ms on a GPU, its
requests to engines much more, so that no ratio says anything. An H200 had 9.9 with stand-ins for two engines; with
SGLang a publication of 9 rounds took 0.27 s, which is 30."""
_TERM_S = 10.0
_DIFFERENCE = "_max_relative_diff"


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
    needs_gpus: int = 0


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


def whole_run(place: Place, name: str, kind: str, steps: int | None = None) -> list[dict[str, Any]]:
    """Return the metrics of all steps of the run of that name; `kind`: "train" or "sft".

    Raises ValueError when they are not those of steps 0 to `steps` - 1, or when a loss or gradient norm is missing, not
    finite, or 0 in all steps. A dry run has no right answers, so that its reinforcement learning has gradients of 0.
    """
    folder = place.out / name
    found = records(folder, kind)
    seen = [record["step"] for record in found]
    if seen != list(range(len(seen) if steps is None else steps)):
        raise ValueError(f"the steps of {folder.name} are {seen}, not 0 to {(steps or len(seen)) - 1}")
    for key in ("gradient_norm", *(("loss",) if kind == "sft" else ("objective/value", "entropy"))):
        values = [float(record.get(key, math.nan)) for record in found]
        wrong = [f"{value} in step {step}" for step, value in enumerate(values) if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"{key} of {folder.name} is {wrong[0]}")
        if key == "gradient_norm" and not any(values) and (place.gpus or kind == "sft"):
            raise ValueError(f"{key} of {folder.name} is 0 in all steps")
    return found


def relative(found: float, wanted: float) -> float:
    return abs(found - wanted) / abs(wanted) if wanted else math.inf


def bounded(what: str, value: float, bound: float) -> str:
    """Return the figure with its bound. Raises ValueError, with the same text, when it is above or no number."""
    text = f"{what} {value:.3g}, bound {bound:g}"
    if not value <= bound:
        raise ValueError(text)
    return text


def doctor_figure(place: Place, output: str) -> str:
    found = json.loads(output)["findings"]
    seen = [finding["seen"] for finding in found if finding["check"] in ("GPU 0", "GPU driver", "Transformer Engine")]
    warnings = sum(finding["status"] == "warn" for finding in found)
    return "; ".join([*seen, f"{len(found)} findings, {warnings} warnings"])


def parity_figure(place: Place, output: str) -> str:
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    layouts = layouts_of(place)
    if len(found) != len(layouts):
        raise ValueError(f"{len(found)} of {len(layouts)} layouts gave a JSON object")
    texts, wrong = [], []
    for words, values in zip(layouts, found, strict=True):
        differences = {key.removesuffix(_DIFFERENCE): float(one) for key, one in values.items() if _DIFFERENCE in key}
        bounds = BFLOAT16_PARITY_BOUNDS if "bfloat16" in words else dict.fromkeys(differences, PARITY_BOUND)
        if not {"log_probs", "gradient"} <= differences.keys():
            raise ValueError(f"{' '.join(words)}: its JSON object lacks log-probs or the gradient")
        over = {key: differences[key] / bound for key, bound in bounds.items()}
        worst = max(over, key=lambda key: (math.isnan(over[key]), over[key]))
        name = " ".join(words).replace("--", "")
        texts.append(f"{name}: {worst} {differences[worst]:.1e}, bound {bounds[worst]:.0e}")
        wrong += [] if differences[worst] <= bounds[worst] else [texts[-1]]
    if wrong:
        raise ValueError("; ".join(wrong))
    return "; ".join(texts)


def throughput_figure(place: Place, output: str) -> str:
    found = last_json(output)
    speeds = [f"{name} {speed:,.0f} tokens/s" for name, speed in found["tokens_per_second"].items()]
    ratios, wrong = [], []
    for key, bound in STEP_BOUNDS.items():
        ratios.append(f"{key} {float(found[key]):.2f}, goal {bound:.2f}")
        wrong += [] if float(found[key]) <= bound else [ratios[-1]]
    return _judged(place, [*ratios, *speeds], wrong)


def publish_figure(place: Place, output: str) -> str:
    """Make the figures of the stand-ins, whose bits are compared, and on a GPU of SGLang's servers after them."""
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if len(lines) != len(publish(place)):
        raise ValueError(f"{len(lines)} of {len(publish(place))} benchmarks gave a JSON object")
    texts, slow, wrong = [], [], []
    for found in lines:
        who = "SGLang" if found["real"] else "stand-ins"
        if not found["real"] and found["bitwise"].keys() != found["seconds"].keys():
            wrong.append(f"bits were compared for {', '.join(found['bitwise'])} alone")
        wrong += [f"{way}: the engine holds other bytes" for way, equal in found["bitwise"].items() if not equal]
        # of the whole device, the second number, other processes use a part as well
        grown = {way: trainer for way, (trainer, _) in found["growth"].items() if trainer > 0}
        wrong += [f"{way}: {grown[way]} bytes more in the trainer's allocator" for way in grown]
        for way, ratio in found["ratio"].items():
            seconds, floor, rounds = found["seconds"][way], found["floor"][way], found["rounds"][way]
            text = f"{way} to {who} {seconds:.3f} s"
            if way == "ipc" and place.gpus:
                value, bound = (seconds - floor) / rounds * 1e3, IPC_ROUND_MS[who]
                text += f", {value:.1f} ms a round beyond the copies, bound {bound:g}"
            else:
                value, bound = float(ratio), PUBLISH_BOUNDS.get(way, math.inf) if not found["real"] else math.inf
                text += f", {value:.2f} times the floor"
                text += f", goal {bound:g}" if math.isfinite(bound) else ", which has no goal"
            texts.append(text)
            slow += [] if value <= bound else [text]
    if wrong:
        raise ValueError("; ".join(wrong))
    return _judged(place, texts, slow)


def _judged(place: Place, figures: Sequence[str], missed: Sequence[str]) -> str:
    """Return the figures, or raise ValueError with those that miss their goal. A dry run is too small to judge."""
    if not place.gpus:
        return "; ".join([*figures, "not judged: it is a dry run"])
    if missed:
        raise ValueError(f"missed: {'; '.join(missed)} (all: {'; '.join(figures)})")
    return "; ".join(figures)


def warmup_figure(place: Place, output: str) -> str:
    found = whole_run(place, "warmup", "sft")
    first, last = found[0]["loss"], found[-1]["loss"]
    if not last < first:
        raise ValueError(f"the loss went from {first:.3f} to {last:.3f} in {len(found)} steps")
    return f"{len(found)} steps, loss {first:.3f} to {last:.3f}, {_median_seconds(found):.2f} s a step (median)"


def run_figure(name: str, steps: Callable[[Place], int], bound: float = ENGINE_BOUND) -> Callable[[Place, str], str]:
    """Return what reads a run of reinforcement learning in the folder of that name: every step is there, its numbers
    are finite, and the engine's log-probs are within `bound` of the trainer's."""

    def figure(place: Place, output: str) -> str:
        found = whole_run(place, name, "train", steps(place))
        last, parts = found[-1], [f"{len(found)} steps, {_median_seconds(found):.2f} s a step (median)"]
        worst = max((float(one.get("rollout_diff/mean", math.nan)) for one in found), key=lambda x: (x != x, x))
        parts.append(bounded("engine's log-probs off by", worst, bound))
        names = ("accuracy", "eval/accuracy", "verify/mean_difference", "gradient_norm")
        parts += [f"{key} {last[key]:.4g}" for key in names if key in last]
        used = {key: value for key, value in last.items() if key.startswith("gpu/") and key.endswith("memory_used")}
        return ", ".join([*parts, *(f"{key} {value:.1f} GiB" for key, value in used.items())])

    return figure


def _median_seconds(found: Sequence[dict[str, Any]]) -> float:
    seconds = sorted(record["seconds/total"] for record in found)
    return float(seconds[len(seconds) // 2])


def engine_figure(place: Place, output: str) -> str:
    last = tail(place, output)
    said = re.search(r"held-out accuracy +([0-9.]+) %", last)
    if said is None:
        raise ValueError(f"the last line has no accuracy: {last}")
    # a dry run has two steps of warm-up behind it, after which nothing is right
    if place.gpus and not float(said[1]) / 100 >= ACCURACY_BOUND:
        raise ValueError(f"{last}; with the weights of the warm-up it is at least {ACCURACY_BOUND:.0%}")
    return last


def demo_figure(place: Place, output: str) -> str:
    figure = run_figure("demo", demo_steps)(place, output)
    accuracy = [record["accuracy"] for record in records(place.out / "demo", "train")]
    if place.gpus:
        first, last = (math.fsum(part) / len(part) for part in (accuracy[:10], accuracy[-10:]))
        figure += f", accuracy of the first ten steps {first:.3f}, of the last ten {last:.3f}"
        if not last > first:
            raise ValueError(figure)
    return figure


def fp8_figure(place: Place, output: str) -> str:
    plain, narrow = (whole_run(place, name, "sft", 2) for name in ("fp8_plain", "fp8_sft"))
    norms = [float(run[0]["gradient_norm"]) for run in (plain, narrow)]
    if norms[0] == norms[1]:
        raise ValueError(f"the gradient norm {norms[0]:.6g} is bfloat16's: nothing was computed in FP8")
    text = bounded("gradient norm, relative to bfloat16's, off by", relative(norms[1], norms[0]), FP8_GRADIENT_BOUND)
    return f"{text}; {run_figure('fp8', lambda place: 2, FP8_ENGINE_BOUND)(place, output)}"


def overlap_figure(place: Place, output: str) -> str:
    plain, beside = (whole_run(place, name, "sft", 3) for name in ("overlap_plain", "overlap"))
    pairs = [(one, other, key) for one, other in zip(beside, plain, strict=True) for key in ("loss", "gradient_norm")]
    worst = max(relative(float(one[key]), float(other[key])) for one, other, key in pairs)
    text = bounded("losses and gradient norms, relative to those without, off by", worst, OVERLAP_BOUND)
    return f"{text}; {_median_seconds(beside):.2f} s a step, {_median_seconds(plain):.2f} without"


def resume_figure(place: Place, output: str) -> str:
    whole_run(place, "resume_sft", "sft", 4)
    size = same_weights(place.out / "resume_sft/hf", place.out / "resume_whole/hf")
    figure = run_figure("resume", lambda place: 3)(place, output)
    return f"{size / 2**20:.1f} MiB of weights are bitwise those of the run that was not stopped; {figure}"


def same_weights(folder: Path, other: Path) -> int:
    """Return the bytes of the weights in two Hugging Face folders. Raises ValueError if a single bit differs."""
    found, wanted = _weights(folder), _weights(other)
    if found.keys() != wanted.keys() or not wanted:
        raise ValueError(f"{folder} and {other} hold other tensors: {sorted(found.keys() ^ wanted.keys())[:3]}")
    import torch

    differ = []
    for name, tensor in wanted.items():
        one = found[name]
        alike = one.dtype == tensor.dtype and one.shape == tensor.shape
        if not alike or not torch.equal(one.view(torch.uint8), tensor.view(torch.uint8)):
            differ.append(name)
    if differ:
        raise ValueError(
            f"{len(differ)} of {len(wanted)} tensors differ from the run that was not stopped: {differ[0]}"
        )
    return sum(tensor.nbytes for tensor in wanted.values())


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def tail(place: Place, output: str) -> str:
    return ([line for line in output.splitlines() if line.strip()] or ["no output"])[-1][:200]


def sft(place: Place, name: str, steps: int | None, *more: str) -> list[str]:
    """Return the warm-up in a folder of that name; `steps` of None are those of the config."""
    words = [*FIBERPO, "sft", place.config("warmup"), "--run.folder", str(place.out / name), *place.demo]
    return [*words, *([] if steps is None else ["--sft.steps", str(steps)]), *more]


def train(place: Place, name: str, steps: int, *more: str) -> list[str]:
    words = [*FIBERPO, "train", place.config("train"), "--run.folder", str(place.out / name)]
    words += ["--model.path", str(place.out / "warmup/hf"), "--trainer.steps", str(steps), *place.demo]
    small = ["--batch.prompts", "8", "--batch.epochs", "1", "--evaluation.prompts", "8"]
    return [*words, *([] if place.gpus else small), *more]


def demo_steps(place: Place) -> int:
    return 60 if place.gpus else 1


def layouts_of(place: Place) -> list[list[str]]:
    """Return the layouts that are compared with one process, as arguments of tools/layout_parity.py.

    NCCL takes one rank for each GPU. On a single one it gets one rank, and layouts of two send through the host. On a
    GPU context parallelism has no attention in float32.
    """
    two = [["--tensor", "2"], ["--data", "2", "--expert", "2"], ["--pipeline", "2"]]
    four = [
        ["--tensor", "2", "--data", "2", "--expert", "2"],
        ["--tensor", "2", "--pipeline", "2"],
        ["--pipeline", "2", "--data", "2", "--expert", "2"],
    ]
    narrow = ["--dtype", "bfloat16"] if place.gpus else []
    in_context = [["--context", "2", *narrow]]
    if place.gpus >= 4:
        in_context += [["--context", "2", "--data", "2", "--expert", "2", *narrow]]
        in_context += [["--context", "2", "--tensor", "2", *narrow]]
    if place.gpus == 1:
        return [["--data", "1"], *([*words, "--shared-gpu"] for words in [*two, *in_context])]
    return [*two, *(four if place.gpus >= 4 else []), *in_context]


def parity(place: Place) -> list[list[str]]:
    return [[sys.executable, "tools/layout_parity.py", *layout, "--steps", "1"] for layout in layouts_of(place)]


def publish(place: Place) -> list[list[str]]:
    words = [sys.executable, "tools/bench_publish.py", "--engines", "1"]
    if not place.gpus:
        return [[*words, "--mib", "32", "--attempts", "1"]]
    return [[*words, "--mib", "1024"], [*words, "--mib", "1024", "--real", "--ways", "ipc", "disk"]]


def throughput(place: Place) -> list[str]:
    words = [sys.executable, "tools/bench_step.py", "--ranks", str(min(max(place.gpus, 1), 2))]
    small = ["--layers", "2", "--hidden", "64", "--vocabulary", "512", "--rows", "2", "--row-tokens", "128"]
    return [*words, *([*STEP_SIZES, "--row-tokens", "8192", "--dtype", "bfloat16"] if place.gpus else small)]


def certify(place: Place) -> list[str]:
    words = [*FIBERPO, "certify", place.config("train"), "--gates-only", "--model.path", "examples/demo/model"]
    return [*words, "--out", str(place.out / "certify")]


def evaluate(place: Place) -> list[str]:
    words = [*FIBERPO, "eval", place.config("train"), "--run.folder", str(place.out / "eval"), *place.demo]
    small = [] if place.gpus else ["--evaluation.prompts", "8"]
    return [*words, "--model.path", str(place.out / "warmup/hf"), *small]


def overlap(place: Place) -> list[list[str]]:
    # with a single GPU there is no rank to send to, and the step shows that the settings do no harm
    layout = ["--parallel.data", "1" if place.gpus == 1 else "2"]
    beside = ["--parallel.overlap_grad_reduce", "true", "--parallel.overlap_param_gather", "true"]
    return [sft(place, "overlap_plain", 3, *layout), sft(place, "overlap", 3, *layout, *beside)]


def resume(place: Place) -> list[list[str]]:
    # rollouts on a GPU differ from run to run, so that bits are compared in the warm-up; of reinforcement learning the
    # resume is seen to go on, with an engine that gets the weights as files
    by_files = ["--weight_sync.method", "disk"]
    constant = ["--optimizer.warmup_steps", "0"]  # a rate that rises over the steps depends on how many there are
    return [
        sft(place, "resume_whole", 4, *constant),
        sft(place, "resume_sft", 2, *constant),
        sft(place, "resume_sft", 4, *constant, "--resume"),
        train(place, "resume", 2, *by_files),
        train(place, "resume", 3, *by_files, "--resume"),
    ]


def fp8(place: Place) -> list[list[str]]:
    narrow = ["--model.fp8", "e4m3"]
    return [sft(place, "fp8_plain", 2), sft(place, "fp8_sft", 2, *narrow), train(place, "fp8", 2, *narrow)]


STEPS = (
    Step("doctor", "versions, driver, GPUs, links", lambda p: [[*FIBERPO, "doctor", "--json"]], doctor_figure, 180),
    Step("kernels", "fused kernels against torch", lambda p: [certify(p)], tail, 600),
    Step("parity", "layouts against one float64 process", parity, parity_figure, 900),
    Step(
        "warmup",
        "supervised steps in bfloat16",
        lambda p: [sft(p, "warmup", None if p.gpus else 2)],
        warmup_figure,
        900,
    ),
    Step("engine", "SGLang serves the weights", lambda p: [evaluate(p)], engine_figure, 900),
    Step("demo", "reinforcement learning", lambda p: [train(p, "demo", demo_steps(p))], demo_figure, 1800),
    Step("publish", "each way of publishing", publish, publish_figure, 900),
    Step(
        "colocated",
        "engine and trainer take turns on the GPU",
        lambda p: [train(p, "colocated", 4, "--rollout.engine.colocated", "true")],
        run_figure("colocated", lambda p: 4),
        600,
        needs_gpus=1,
    ),
    Step(
        "distributed",
        "weights go over NCCL to an engine on another GPU",
        lambda p: [
            train(p, "distributed", 2, "--rollout.engine.colocated", "false", "--weight_sync.method", "distributed")
        ],
        run_figure("distributed", lambda p: 2),
        600,
        needs_gpus=2,
    ),
    Step("fp8", "training in FP8", fp8, fp8_figure, 900, needs_gpus=1),
    Step("overlap", "gradients and parameters travel beside computation", overlap, overlap_figure, 600),
    Step("resume", "a checkpoint, and the run that goes on from it", resume, resume_figure, 1200),
    Step("throughput", "a step beside Megatron-Core's", lambda p: [throughput(p)], throughput_figure, 900),
)


def take(step: Step, place: Place) -> Result:
    """Run one step within its deadline; whatever goes wrong is its result."""
    if place.gpus < step.needs_gpus:
        needed = "a GPU" if step.needs_gpus == 1 else f"{step.needs_gpus} GPUs"
        return Result(step.name, step.about, "left out", f"it needs {needed}", 0.0, [])
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
