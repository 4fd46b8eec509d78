"""Plans as a whole: what is counted against what runs, sums, refusals, and the command."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fiberpo_megatron.cli.main import main
from fiberpo_megatron.config import Config, load_config
from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.planning.estimate import Plan, make_plan
from fiberpo_megatron.planning.hardware import GPUS, Assumptions, assume
from fiberpo_megatron.planning.parameters import active_parameters, model_parameters
from fiberpo_megatron.planning.reductions import gate_bytes, spans_micro_batches
from fiberpo_megatron.trainer.settings import AlgorithmConfig

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "examples/planning"
TRAIN = ROOT / "examples/qwen3_30b_a3b/train.toml"


def hf_config(model: str) -> dict[str, object]:
    return json.loads((MODELS / model / "config.json").read_text())


def config(*overrides: str) -> Config:
    return load_config(TRAIN, ["--model.path", str(MODELS / "qwen3_30b_a3b"), *overrides])


def plan(*overrides: str, gpus: int = 32, memory: float = 80e9) -> Plan:
    return make_plan(config(*overrides), hf_config("qwen3_30b_a3b"), gpus, memory, GPUS["H100"], Assumptions())


@pytest.mark.parametrize(
    ("model", "billions", "active"),
    [
        ("qwen3_30b_a3b", 30.5, 3.3),  # Qwen3's model cards; their active parameters count the embedding
        ("qwen3_235b_a22b", 235, 22),
        ("joyai_llm_flash", 48, 2.7),  # its model card, and the report's figure; both without embedding and output
    ],
)
def test_parameters_of_public_models(model: str, billions: float, active: float):
    architecture = read_architecture(hf_config(model))
    table = architecture.vocab_size * architecture.hidden_size
    total, used = model_parameters(architecture), active_parameters(architecture) + table
    if model == "joyai_llm_flash":
        total, used = total - 2 * table, used - 2 * table
    assert total / 1e9 == pytest.approx(billions, rel=0.01)
    assert used / 1e9 == pytest.approx(active, rel=0.03)


def test_all_ranks_together_hold_the_model():
    one = plan("--parallel.distributed_optimizer", "false", gpus=32)
    # tensor 2 x data 8, expert 8 x 2 replicas of them: attention 8 times, experts twice
    architecture = read_architecture(hf_config("qwen3_30b_a3b"))
    experts = 48 * 128 * 3 * 2048 * 768
    assert one.stages[0].states.parameters == pytest.approx(
        2 * (experts / 8 + (model_parameters(architecture) - experts) / 2),
        rel=2e-3,  # routers and norms are whole on every rank
    )


def test_gates_carry_what_the_objective_reduces():
    sent = gate_bytes(config("--batch.prompts", "8", "--batch.mini_batches", "2"))
    objective = build_objective("fiberpo-domain")
    tokens = torch.arange(4 * 8).repeat_interleave(5)
    seen: list[int] = []
    keys = {"trajectory": tokens, "prompt_group": tokens // 8, "domain": torch.zeros_like(tokens)}
    values = torch.zeros(len(tokens))
    counts = {"trajectory": 32, "prompt_group": 4, "domain": 2}
    objective(values, values, values + 1, keys=keys, counts=counts, reduce=lambda table: seen.append(table.nbytes))
    assert sent == tuple(seen) and len(sent) == 2


@pytest.mark.parametrize(
    ("name", "spans"),
    [("tests.fibration.topr:TOPR", False), ("tests.fibration.registered:TurnGSPO", False), ("fiberpo-domain", True)],
)
def test_custom_objectives_are_planned(name: str, spans: bool):
    run = config().model_copy(update={"algorithm": AlgorithmConfig.model_validate({"objective": name})})
    assert len(gate_bytes(run)) == 2 and spans_micro_batches(run) is spans


def test_levels_of_turns_and_weight_versions_are_planned():
    levels = [["turn"], ["trajectory"], ["version"]]
    budgets = {level[0]: (0.2, 0.1) for level in levels}
    given = {"levels": levels, "budgets": budgets}
    plain, turns = (
        gate_bytes(config().model_copy(update={"algorithm": AlgorithmConfig.model_validate(options)}))
        for options in ({}, given)
    )
    assert turns[0] > plain[0] and turns[1] == plain[1]  # the ids of coarser nodes cross ranks in the first reduction


def test_what_does_not_fit_is_told():
    small = plan(memory=30e9)
    assert "training: stage 0 needs" in small.problems[0] and "raise rollout.engine.tensor" in small.problems[1]
    assert plan().problems == []
    offloaded = plan("--optimizer.cpu_offload", "true")
    assert offloaded.largest.total < plan().largest.total - 5e9
    with pytest.raises(ValueError, match="training takes 16 GPUs and the engines 16; there are 24"):
        plan(gpus=24)


def test_full_recompute_costs_time_and_saves_memory():
    kept, again = plan("--model.recompute", "none"), plan("--model.recompute", "full")
    assert kept.largest.activations > 5 * again.largest.activations
    assert kept.time.train < again.time.train and kept.time.generate == again.time.generate


def test_assumptions():
    assert assume(["matmul_efficiency=0.4"]).matmul_efficiency == 0.4
    for wrong in ("speed=1", "matmul_efficiency=fast", "matmul_efficiency=1.5", "reserved_gb=0"):
        with pytest.raises(ValueError, match=f"--assume {wrong}"):
            assume([wrong])


def test_the_command(capsys: pytest.CaptureFixture[str]):
    words = ["plan", str(TRAIN), "--model.path", str(MODELS / "qwen3_30b_a3b"), "--gpus", "32", "--gpu-memory", "80"]
    assert main(words) == 0
    assert "It fits." in capsys.readouterr().out
    assert main([*words[:-1], "40", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert main(["plan", str(TRAIN), "--gpus", "32"]) == 2  # its model.path is not on this machine
    assert "a plan needs config.json alone" in capsys.readouterr().err


def test_the_command_says_how_many_forward_passes_can_be_kept(capsys: pytest.CaptureFixture[str]):
    words = ["plan", str(TRAIN), "--model.path", str(MODELS / "qwen3_30b_a3b"), "--gpus", "32"]

    def said(*more: str) -> dict[str, Any]:
        main([*words, "--json", *more])
        return json.loads(capsys.readouterr().out)

    assert main(words) == 0
    line = re.search(r"batch\.kept_forwards = (\d+) fits .* saves (\d+\.\d) s of a step", capsys.readouterr().out)
    assert line, "there is room for more than one"
    most = int(line[1])
    plain, full = said(), said("--batch.kept_forwards", str(most))
    assert (plain["kept_forwards"], plain["most_kept_forwards"], full["kept_forwards"]) == (1, most, most)
    assert full["fits"] and full["most_kept_forwards"] == most
    assert plain["seconds"]["total"] - full["seconds"]["total"] == pytest.approx(float(line[2]), abs=0.06)
    assert full["stages"][0]["total"] - plain["stages"][0]["total"] == (most - 1) * plain["stages"][0]["further"]
    main([*words, "--batch.kept_forwards", str(most)])
    assert "kept_forwards" not in capsys.readouterr().out, "there is nothing to say"
    assert said("--parallel.pipeline", "2", "--parallel.data", "4")["most_kept_forwards"] == 0


def test_committed_plans_are_what_the_tool_writes():
    tool = [sys.executable, str(ROOT / "tools/plan_tables.py"), "--check"]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
