"""Make the recorded runs of tests/telemetry/data/alarms: `.venv/bin/python -m tests.telemetry.record_runs [NAMES]`.

Each is a run of the real training loop and objective with a toy policy (tests/trainer/toy.py) that really has the
fault; REAL holds those of the real stack. Where the machine has to be at fault, the fault is injected: an engine that
sleeps, a file system that says that it is full, servers that do not answer. Only the metrics that rules read are kept.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import torch

from fiberpo_megatron.config import Config
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.environments import Outcome, SingleTurn, Task, Turn
from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.planning.shapes import ModelShape
from fiberpo_megatron.rollout.filter import Filter
from fiberpo_megatron.sources.engine import EngineSource
from fiberpo_megatron.sources.engine_watch import EngineWatch
from fiberpo_megatron.telemetry.throughput import Devices
from fiberpo_megatron.trainer.figures import Figures
from fiberpo_megatron.trainer.loop import Training, train
from fiberpo_megatron.trainer.terms import build_terms
from fiberpo_megatron.types import MicroBatch
from tests.trainer.test_loop import Memory, toy_config, training
from tests.trainer.toy import VOCABULARY, FakeEngine, FirstToken, TablePolicy, generator

DATA = Path(__file__).parent / "data/alarms"
KEPT = re.compile(
    r"reward/(mean|std)|accuracy|entropy|response_length/mean|truncated_share|failed_share|ratio/(p99|max)|kl/mean"
    r"|rollout_diff/mean|objective/value|gradient_norm(_max)?|groups/.*|expert/drift/.*|seconds/(total|train|generate)"
    r"|idle_share|slowest/.*|disk/.*|engines/.*|filter/.*"
)
BATCH = {"prompts": 12, "samples_per_prompt": 8, "mini_batches": 2, "epochs": 2, "micro_batch_tokens": 64}
Change = Callable[[Training], Training]


def record(name: str, run: Training, memory: Memory) -> None:
    """Train and write the records, with five digits: a test needs no more."""
    train(run)
    write(name, [{"step": step, "kind": kind, **metrics} for kind, step, metrics in memory.records])


def write(name: str, records: list[dict[str, Any]]) -> None:
    """Write a file of records with what rules read in them."""
    with (DATA / f"{name}.jsonl").open("w") as file:
        for one in records:
            kept = {key: value for key, value in one.items() if key in ("step", "kind") or KEPT.fullmatch(key)}
            file.write(json.dumps({key: short(value) for key, value in kept.items()}) + "\n")
    print(name, len(records), "records")


def short(value: Any) -> Any:
    """Return a number with five digits, and None for one that is not finite, as in metrics.jsonl."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if abs(value) < float("inf") else None


def toy(
    rate: float,
    *,
    steps: int = 30,
    every: int = 5,
    environment: SingleTurn | None = None,
    engine: FakeEngine | None = None,
    known: float = 0.0,
    **sections: Any,
) -> tuple[Training, Memory]:
    """Return a toy run with the learning rate `rate`; `known` is the logit with which it knows the answers already."""
    engine = engine or FakeEngine(seed=0)
    sections = {"batch": BATCH, "trainer": {"steps": steps}, **sections}
    sections = {"evaluation": {"prompts": 48, "samples_per_prompt": 2, "every_steps": every}, **sections}
    run, memory = training(engine=engine, **sections)
    assert isinstance(run.policy, TablePolicy) and isinstance(run.source, EngineSource)
    run.policy.learning_rate = rate
    with torch.no_grad():
        run.policy.table += known * torch.eye(VOCABULARY).roll(1, 1)
        run.policy.reference_table = run.policy.table.detach().clone()
    if environment is not None:
        run.source.generator = generator(engine, environment, **environment_settings(environment))
    return run, memory


def environment_settings(environment: SingleTurn) -> dict[str, Any]:
    return {"on_failure": "zero"} if isinstance(environment, Failing) else {}


class Easy(FirstToken):
    """Pays for the token 0, whatever was asked; only an evaluation sees what is right."""

    def score(self, task: Task, turn: Turn) -> Outcome:
        first = turn.text.split()[0]
        return Outcome(float(first == "0"), correct=first == task.answer)


class Nothing(FirstToken):
    """Pays for nothing."""

    def score(self, task: Task, turn: Turn) -> Outcome:
        return Outcome(0.0, correct=False)


class Outliers(FirstToken):
    """Pays a hundredfold for the prompt <7>, a twelfth of all."""

    def score(self, task: Task, turn: Turn) -> Outcome:
        right = turn.text.split()[0] == task.answer
        return Outcome((100.0 if task.prompt == "<7>" else 1.0) * right, correct=right)


class Failing(FirstToken):
    """Fails for the prompt <3>."""

    def score(self, task: Task, turn: Turn) -> Outcome:
        if task.prompt == "<3>":
            raise ArithmeticError("this task cannot be scored")
        return super().score(task, turn)


class Drifting(FakeEngine):
    """Samples from a table that is a little further from the published one after every publication."""

    def publish(self, source: Any, version: str) -> None:
        self.corrupt = 0.02 * max(0, int(version) - 12)
        super().publish(source, version)


class Slow(FakeEngine):
    """Takes so many seconds longer for the responses of a step, from publication `first` on."""

    def __init__(self, first: int, seconds: float) -> None:
        super().__init__(seed=0)
        self.first, self.seconds, self.asked = first, seconds, ""

    async def sample(self, *arguments: Any, **named: Any) -> Any:
        if int(self.version) >= self.first and self.asked != self.version:
            time.sleep(self.seconds)
        self.asked = self.version
        return await super().sample(*arguments, **named)


class OneExpert:
    """Stands for the routing of a model in which expert t mod 4 alone has the token t."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def expert_counts(self, micro_batches: list[MicroBatch]) -> Any:
        counts = self.inner.expert_counts(micro_batches)
        return (counts == counts.max(-1, keepdim=True).values).cumsum(-1).eq(1).float() * 2


SHAPE = ModelShape(1, 12, 12, 1, 12, 12, 1, 24, 1, 0, 0, 0, 0, 0, 12, 144, 0, True)


def measured(run: Training, config: Config | None = None, checkpoint: int = 0) -> Training:
    """Give a run the figures that a real one has."""
    figures = Figures(
        config or toy_config(batch=BATCH, run={"folder": "."}), SHAPE, run.policy.layout, Devices(1, 1, False, None),
        lambda: run.timers.own, lambda: checkpoint,
    )  # fmt: skip
    return replace(run, figures=figures)


def healthy() -> None:
    """A run near its reference, whose experts drift alike."""
    algorithm = {"kl": {"coefficient": 0.1}, "expert_partitions": 4}
    run, memory = toy(3.0, steps=22, known=0.5, algorithm=algorithm)
    run = replace(with_terms(run, algorithm), objective=build_objective("fiberpo-expert"))
    record("healthy", measured(run), memory)


def hacked() -> None:
    run, memory = toy(60.0, environment=Easy(), known=2.0)
    record("hacked", run, memory)


def random_policy() -> None:
    algorithm = {"entropy": {"coefficient": 0.5}}
    run, memory = toy(4.0, known=6.0, algorithm=algorithm)
    record("random", with_terms(run, algorithm), memory)


def far_from_reference() -> None:
    run, memory = toy(30.0, algorithm={"kl": {"coefficient": 1e-4}})
    record("far", with_terms(run, {"kl": {"coefficient": 1e-4}}), memory)


def with_terms(run: Training, algorithm: Mapping[str, Any]) -> Training:
    return replace(run, terms=build_terms(toy_config(algorithm=dict(algorithm)).algorithm))


def no_signal() -> None:
    run, memory = toy(3.0, environment=Nothing(), steps=12)
    record("no-signal", run, memory)


def few_groups() -> None:
    run, memory = toy(3.0, environment=Nothing(), steps=12)
    record("few-groups", with_filter(run), memory)


def filtered() -> None:
    """A run whose filter finds what it needs."""
    run, memory = toy(3.0, known=1.5, steps=22)
    record("filtered", with_filter(run), memory)


def with_filter(run: Training) -> Training:
    source: Any = run.source
    prompts = run.batch.prompts
    return replace(
        run,
        source=replace(source, filter=Filter("correct", prompts, 2 * prompts, prompts), prompts_per_step=2 * prompts),
    )


def spikes() -> None:
    batch = {**BATCH, "prompts": 3, "mini_batches": 1}
    run, memory = toy(0.5, environment=Outliers(), steps=40, batch=batch, algorithm={"normalise_std": False})
    record("spikes", run, memory)


def failing() -> None:
    run, memory = toy(3.0, environment=Failing(), steps=12)
    record("failing", run, memory)


def mismatch() -> None:
    run, memory = toy(3.0, engine=Drifting(seed=0), weight_sync={"verify_every": 0})
    record("mismatch", run, memory)


def one_expert_drifts() -> None:
    run, memory = toy(12.0, steps=14, environment=OneRow(), engine=FakeEngine(0, 1), algorithm={"expert_partitions": 4})
    assert isinstance(run.policy, TablePolicy)
    run.policy.routing = OneExpert(run.policy.routing)  # type: ignore[assignment]
    record("one-expert", replace(run, objective=build_objective("fiberpo-expert")), memory)


class OneRow(FirstToken):
    """Pays only behind the prompts <0>, <4> and <8>."""

    def score(self, task: Task, turn: Turn) -> Outcome:
        right = turn.text.split()[0] == task.answer
        return Outcome(float(right and int(task.prompt[1:-1]) % 4 == 0), correct=right)


def idle() -> None:
    small = {"prompts": 2, "samples_per_prompt": 2, "micro_batch_tokens": 64}
    run, memory = toy(3.0, engine=Slow(0, 4.0), steps=10, known=0.5, batch=small)
    record("idle", measured(run), memory)


def late() -> None:
    run, memory = toy(3.0, engine=Slow(14, 1.0), steps=26, known=0.5)
    record("late", measured(run), memory)


def disk() -> None:
    run, memory = toy(3.0, steps=26, known=0.5)
    free = iter(range(40, 0, -1))

    def filling(folder: object) -> Any:
        return SimpleNamespace(f_bavail=next(free) * 2**29, f_frsize=1)

    with mock.patch.object(os, "statvfs", filling):
        record("disk", measured(run, checkpoint=3 * 2**29), memory)


def silent(folder: Path) -> None:
    from tests.engines.fake_server import FakeServers

    run, memory = toy(3.0, steps=16, known=0.5)
    assert isinstance(run.source, EngineSource)
    count = iter(range(100))

    def load(host: str, body: Any) -> Any:
        row = {"num_running_reqs": 0, "num_waiting_reqs": 0, "token_usage": 0.0, "cache_hit_rate": 0.5}
        if host.startswith("b") and next(count) >= 8:
            return httpx.Response(500, json={"error": "it has crashed"})
        return {"loads": [{**row, "gen_throughput": 9.0}]}

    addresses = [EngineAddress(f"http://{host}:30000") for host in "ab"]
    with EnginePool(addresses, timeout_s=5, transport=FakeServers({"/v1/loads": load})) as pool:
        run.source.watch = EngineWatch(pool, folder)
        record("silent", run, memory)


STEP_S, LATE_S = 0.05, 0.03


def straggling(slow: int | None, steps: int = 12, late_s: float = LATE_S) -> list[dict[str, Any]]:
    """Run on each of some real ranks: phases that sleep, and rank `slow` from step 4 on `late_s` longer; the records
    come from the rank that logs."""
    from fiberpo_megatron.mcore.parallel.layout import start_layout, stop_layout
    from fiberpo_megatron.mcore.settings import ParallelConfig
    from fiberpo_megatron.telemetry.timers import PhaseTimers

    config = toy_config(batch=BATCH, run={"folder": "."})
    layout = start_layout(
        json.loads((Path("examples/demo/model/config.json")).read_text()), ParallelConfig(), config.run
    )
    timers = PhaseTimers(waited=lambda: layout.waited_s)
    figures = Figures(config, SHAPE, layout, Devices(4, 0, False, None), lambda: timers.own, lambda: 0)
    rollouts = next(iter(batches()))
    records = []
    for step in range(steps):
        with timers("train"):
            time.sleep(STEP_S + (late_s if layout.rank == slow and step >= 4 else 0.0))
            layout.barrier()  # the others wait here for the slow one, in the same phase
        seconds = timers.read()
        found = figures(step, rollouts, seconds, 0.0)
        records += [{"step": step, "kind": "train", **seconds, **found}] if found else []
    stop_layout()
    return records


def batches() -> Any:
    """Yield the trajectories of a toy step."""
    run, _ = toy(3.0)
    run.source.publish(0)
    yield run.source.take(0)


def straggler() -> None:
    from fiberpo_megatron.certify.processes import run_ranks

    for name, slow in (("straggler", 2), ("even-ranks", None)):
        everyone = run_ranks(4, straggling, slow)
        write(name, next(records for records in everyone if records))


def not_finite() -> None:
    records = [json.loads(line) for line in (DATA / "healthy.jsonl").read_text().splitlines()][:12]
    records[-2]["ratio/max"] = None  # injected: a run whose gradient is not finite ends by itself
    write("not-finite", records)


REAL = {
    "real-healthy": "eight/grpo-epsilon=0.01-seed11",
    "real-tail": "short16/grpo-epsilon=0.01-seed12",
    "real-truncated": "short16/gspo-epsilon=-1e-3-8e-4--seed12",
    "real-longer": "short16/fiberpo-seed12",
}
"""Runs of the demo's model on Megatron-Core and SGLang: `examples/stability/run.py --config
examples/stability/study/real_stack.toml` with the cells of examples/stability/README.md (Real stack)."""


def real(cells: Path) -> None:
    """Copy the runs of REAL from the folder of their cells."""
    for name, folder in REAL.items():
        write(name, [json.loads(line) for line in (cells / folder / "metrics.jsonl").read_text().splitlines()])


MAKERS: dict[str, Callable[[], None]] = {
    "healthy": healthy,
    "hacked": hacked,
    "random": random_policy,
    "far": far_from_reference,
    "no-signal": no_signal,
    "few-groups": few_groups,
    "filtered": filtered,
    "spikes": spikes,
    "failing": failing,
    "mismatch": mismatch,
    "one-expert": one_expert_drifts,
    "idle": idle,
    "late": late,
    "disk": disk,
    "straggler": straggler,
    "not-finite": not_finite,
}

if __name__ == "__main__":
    import tempfile

    DATA.mkdir(parents=True, exist_ok=True)
    if sys.argv[1:2] == ["real"]:
        real(Path(sys.argv[2]))
    else:
        for each in sys.argv[1:] or [*MAKERS, "silent"]:
            if each == "silent":
                with tempfile.TemporaryDirectory() as scratch:
                    silent(Path(scratch))
            else:
                MAKERS[each]()
