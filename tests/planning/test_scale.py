"""The plan of growing runs: what is counted is what the code does, and docs/scaling.md shows what it computes."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from fiberpo_megatron.cli.main import main
from fiberpo_megatron.mcore.parallel import exchange
from fiberpo_megatron.planning import scale as module
from fiberpo_megatron.planning.hardware import Assumptions
from fiberpo_megatron.planning.scale import ScaleRow, scale_text, size_text, sized, token_bytes
from fiberpo_megatron.trainer.loop import train
from fiberpo_megatron.types import RolloutBatch
from tests.planning.test_estimate import TRAIN, config
from tests.trainer import toy
from tests.trainer.test_loop import training

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/scaling.md"


def tool() -> object:
    spec = importlib.util.spec_from_file_location("scale_tables", ROOT / "tools/scale_tables.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def rows() -> list[ScaleRow]:
    return tool().rows_of("qwen3_30b_a3b", (8, 1024))  # type: ignore[attr-defined, no-any-return]


def test_the_page_shows_what_the_planner_computes(rows: list[ScaleRow]):
    """Two sizes of one model; `make test-all` compares all of them."""
    page = PAGE.read_text()
    for line in scale_text(rows).splitlines():
        assert not line or line in page, f"docs/scaling.md is not current, run python tools/scale_tables.py: {line}"


@pytest.mark.exhaustive
def test_all_tables_and_the_plot_are_current():
    command = [sys.executable, str(ROOT / "tools/scale_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_does_not_shrink_is_named(rows: list[ScaleRow]):
    small, large = rows
    for row in rows:
        assert row.plan is not None and row.traffic is not None
        seconds = [value for _, value in row.stops]
        assert seconds == sorted(seconds, reverse=True) and 0 < seconds[0] < row.plan.time.total
    assert large.traffic is not None and small.traffic is not None
    assert large.traffic.rollouts > 100 * small.traffic.rollouts, "the batch grows with the GPUs"
    assert large.traffic.agreement < 10 * small.traffic.agreement, "agreement takes the logarithm of the ranks"


def test_a_tokens_bytes_are_those_of_the_exchange():
    """One token more makes the message of `gather_rollouts` longer by so many bytes."""

    def message(tokens: int) -> int:
        batch = RolloutBatch.filled(
            tokens=np.zeros(tokens), response_mask=np.ones(tokens), lengths=[tokens], groups=[0]
        )
        return len(exchange.encode(batch)) - _header(batch)

    assert message(11) - message(10) == token_bytes() > 8
    assert "routed_experts" in {fact.name for fact in fields(RolloutBatch)}


def _header(batch: RolloutBatch) -> int:
    return 8 + int.from_bytes(exchange.encode(batch)[:8].numpy().tobytes(), "little")


def test_the_batch_stays_below_the_limit_and_divides():
    for gpus in (8, 128, 10240):
        batch = sized(config(), gpus, Assumptions()).batch
        assert batch.prompts % batch.mini_batches == 0
    assert batch.prompts * batch.samples_per_prompt < 8 * 10240


def test_agreements_of_a_step_are_counted(monkeypatch: pytest.MonkeyPatch):
    """Between the records of two steps; the toy policy takes its optimiser steps alone, and stores no rollouts."""
    counts: Counter[str] = Counter()
    monkeypatch.setattr(toy.SingleLayout, "any_rank", lambda self, flag: counts.update(["any"]) or flag)
    monkeypatch.setattr(toy.SingleLayout, "agree", lambda self, *_, **__: counts.update(["agree"]))
    run, memory = training(trainer={"steps": 4}, evaluation={"prompts": 0})
    at: list[int] = []
    record = memory.record
    monkeypatch.setattr(memory, "record", lambda *arguments: (at.append(counts.total()), record(*arguments)))
    train(run)
    storing = 1
    assert at[2] - at[1] + storing == module.AGREEMENTS_STEP


def test_sizes_are_written_with_units():
    assert [size_text(value) for value in (12, 1500, 2.5e9, 3e12)] == ["12 B", "1.5 kB", "2.5 GB", "3 TB"]


def test_the_command_shows_growing_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(module, "scale", lambda config, hf_config, memory, gpu, assumptions: [])
    folder = ROOT / "fiberpo_megatron/planning/data/models/qwen3_30b_a3b"
    assert main(["plan", str(TRAIN), "--model.path", str(folder), "--scale", "--json"]) == 1, "nothing fits"
    assert json.loads(capsys.readouterr().out) == []
