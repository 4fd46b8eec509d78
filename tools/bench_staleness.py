#!/usr/bin/env python3
"""This tool times a training step with sampling ahead (`rollout.staleness = 1`) beside one without, on two cores.

    python tools/bench_staleness.py                     # about six minutes on two cores
    python tools/bench_staleness.py --response-tokens 200 --epochs 3

One training rank runs on one core, one SGLang server on another. The model is small and drawn at random, the learning
rate is so low that it stays what it is, and every response has as many tokens as it may have, so that all steps do the
same. `--response-tokens` and `--epochs` choose how long sampling and training take, which should be alike: sampling
ahead can at best hide the shorter of the two behind the longer.

Two processes on two cores also slow each other down, because they share the last level of cache and the memory. The
tool measures that apart from the product: the passes over the model for stored rollouts (`storage.replay`, without any
request) run alone, and again while something else keeps the server busy. What the slower passes would leave if nothing
else cost any time is printed as the bound of this machine.

The last line is a JSON object: `ratio`, the median step with staleness 1 over that without; `bound`; `slowdown`, of the
passes beside a busy server; and the seconds of each.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fiberpo_megatron.engines.client import Sampling  # noqa: E402
from fiberpo_megatron.engines.pool import EnginePool  # noqa: E402
from fiberpo_megatron.engines.servers import engines  # noqa: E402
from fiberpo_megatron.engines.settings import EngineConfig  # noqa: E402

SKIPPED = 2
"""Steps at the beginning that are not counted: the first one warms up, and with staleness 1 the second one's
trajectories were sampled beside it."""
RUN_TIMEOUT_S = 900.0
PROMPT = [3, 4, 5, 6, 7, 8]
"""Tokens of the prompt with which the server is kept busy."""


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Give this process one core; what is started inside the block inherits it."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def write_model(folder: Path, hidden: int, layers: int) -> None:
    """Write a random Qwen3-MoE with the demo's tokenizer."""
    import torch
    from transformers import AutoConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    tokenizer = ROOT / "examples/demo/model"
    theirs = json.loads((tokenizer / "config.json").read_text())
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=theirs["vocab_size"],
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,  # nothing ends a response before its last token
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)


def config_text(options: argparse.Namespace, model: Path) -> str:
    """Return the run's config; what differs between runs is given on their command lines."""
    return f"""
[model]
path = {json.dumps(str(model))}
dtype = "float32"

[optimizer]
learning_rate = 1e-9
schedule = "constant"

[batch]
prompts = {options.prompts}
samples_per_prompt = 8
epochs = {options.epochs}
micro_batch_tokens = 4096

[rollout]
max_response_tokens = {options.response_tokens}
stop = []

[rollout.engine]
dtype = "float32"

[weight_sync]
method = "ipc"

[evaluation]
prompts = 0

[checkpoint]
every_steps = 0

[storage]
dump = true

[trainer]
steps = {options.steps}

[[environments]]
name = "addition"
use = "examples.demo.environments:Addition"
"""


def train(config: Path, folder: Path, core: int, *words: str) -> list[dict[str, Any]]:
    """Run `fiberpo train` on a core and return the metrics of the counted steps.

    Raises RuntimeError with the last lines of its log.
    """
    command = [sys.executable, "-m", "fiberpo_megatron.cli.main", "train", str(config), "--run.folder", str(folder)]
    with on_core(core), (folder.parent / f"{folder.name}.log").open("w+") as log:
        process = subprocess.Popen(
            [*command, *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
            code = -signal.SIGTERM
        if code:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with exit code {code}:\n{log.read()[-3000:]}")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return steps[SKIPPED:]


@contextmanager
def busy(url: str, options: argparse.Namespace, core: int) -> Iterator[None]:
    """Keep the server busy with as many requests as a step has, from a process on its own core."""
    command = [sys.executable, __file__, "--load", url, "--response-tokens", str(options.response_tokens)]
    with on_core(core):
        process = subprocess.Popen([*command, "--prompts", str(options.prompts)], cwd=ROOT)
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError(f"what keeps the server busy ended with exit code {process.returncode}")
    finally:
        process.kill()
        process.wait()


def load(options: argparse.Namespace) -> None:
    """Ask the server for responses until this process is killed."""
    from fiberpo_megatron.engines.connection import EngineAddress

    with EnginePool([EngineAddress(options.load)], timeout_s=RUN_TIMEOUT_S) as pool:
        client = pool.clients[0]
        while True:
            prompts = [PROMPT] * (8 * options.prompts)
            pool.run(client.generate(prompts, Sampling(options.response_tokens)))


def median(steps: Sequence[dict[str, Any]], key: str) -> float:
    """Return the median of a metric over the counted steps."""
    return statistics.median(step[key] for step in steps)


def passes(steps: Sequence[dict[str, Any]]) -> float:
    """Return the median seconds of a step's passes over the model."""
    return statistics.median(step["seconds/train"] + step["seconds/old_log_probs"] for step in steps)


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run what is compared, print it, and return the figures."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    model, config = work / "model", work / "train.toml"
    write_model(model, options.hidden, options.layers)
    config.write_text(config_text(options, model))
    engine = EngineConfig(dtype="float32", max_running_requests=8 * options.prompts, max_total_tokens=65536)
    print(f"the rank runs on core {first}, the server on core {second}; the server starts", flush=True)
    found: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    with ExitStack() as stack:
        with on_core(second):
            addresses = stack.enter_context(engines(engine, model, work / "engines", dtype="float32"))
        url = addresses[0].url
        given = ["--rollout.engine.urls", json.dumps([url])]
        for turn in range(options.turns):
            for staleness in (0, 1):
                folder = work / f"staleness_{staleness}_{turn}"
                found[staleness] += train(config, folder, first, "--rollout.staleness", str(staleness), *given)
                print(f"staleness {staleness}: {median(found[staleness], 'seconds/total'):.2f} s a step", flush=True)
        stored = ["--storage.replay", str(work / "staleness_0_0"), "--storage.dump", "false"]
        alone = train(config, work / "alone", first, *stored)
        with busy(url, options, second):
            beside = train(config, work / "beside", first, *stored)
    return figures(found[0], found[1], alone, beside)


Steps = Sequence[dict[str, Any]]


def figures(plain: Steps, ahead: Steps, alone: Steps, beside: Steps) -> dict[str, float]:
    """Return what the last line has, from the steps without and with staleness and those on stored rollouts."""
    step, sampling = median(plain, "seconds/total"), median(plain, "seconds/generate")
    slowdown = passes(beside) / passes(alone)
    # what is neither sampling nor a pass (publication, exchange) stays as it is in either case
    rest = step - sampling - passes(plain)
    found = {
        "ratio": median(ahead, "seconds/total") / step,
        "bound": (max(passes(plain) * slowdown, sampling) + rest) / step,
        "slowdown": slowdown,
        "step_0": step,
        "step_1": median(ahead, "seconds/total"),
        "sampling_0": sampling,
        "passes_0": passes(plain),
        "passes_1": passes(ahead),
        "passes_alone": passes(alone),
        "passes_beside": passes(beside),
        "waiting_0": median(plain, "idle/trainer_seconds"),
        "waiting_1": median(ahead, "idle/trainer_seconds"),
    }
    return {key: round(value, 4) for key, value in found.items()}


def report(found: dict[str, Any]) -> str:
    """Return the figures as sentences."""
    return (
        f"without: {found['step_0']:.2f} s a step, of which {found['sampling_0']:.2f} s sampling and "
        f"{found['passes_0']:.2f} s passes over the model\n"
        f"with staleness 1: {found['step_1']:.2f} s, {found['ratio']:.2f} times as long; passes "
        f"{found['passes_1']:.2f} s, waiting {found['waiting_1']:.2f} s\n"
        f"passes on stored rollouts: {found['passes_alone']:.2f} s alone, {found['passes_beside']:.2f} s beside a "
        f"server that is busy with something else, {found['slowdown']:.2f} times as long\n"
        f"bound of this machine: {found['bound']:.2f}"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print the figures. The result is 2 on a machine with a single core."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {
        "prompts": (8, "prompts of a step, 8 responses each"),
        "response-tokens": (100, "tokens of a response"),
        "epochs": (2, "optimiser steps on a batch"),
        "hidden": (256, "hidden size of the model"),
        "layers": (4, "its layers"),
        "steps": (8, f"steps of a run, of which the first {SKIPPED} are not counted"),
        "turns": (1, "runs of each kind"),
    }
    for name, (usual, meaning) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=usual, help=f"{meaning} (default {usual})")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.load:
        load(options)
    if len(os.sched_getaffinity(0)) < 2:
        print("bench_staleness: this process may use a single core; it needs two", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    print(report(found))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
