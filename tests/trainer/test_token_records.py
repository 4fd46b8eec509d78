"""Records of single tokens hold what the objective saw and gave, whatever the objective."""

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fiberpo_megatron.fibration import OBJECTIVES, build_objective
from fiberpo_megatron.telemetry.token_log import TOKENS, read_tokens
from fiberpo_megatron.trainer import token_records
from fiberpo_megatron.trainer.loop import train
from fiberpo_megatron.trainer.step_dump import FOLDER, StepDumps
from fiberpo_megatron.trainer.step_file import StepFile
from fiberpo_megatron.trainer.terms import build_terms
from fiberpo_megatron.trainer.token_records import TokenRecords, recorded_trajectories
from fiberpo_megatron.types import RolloutBatch
from tests.fibration import oracle
from tests.trainer.test_loop import training

BUDGETS = {"trajectory": (0.05, 0.02), "prompt_group": (0.03, 0.02), "domain": (0.02, 0.01)}


def pieces(ids: Sequence[int]) -> list[str]:
    return [f"<{token}>" for token in ids]


def records_of(folder: Path, bound: int = 1000, samples: int = 8) -> TokenRecords:
    return TokenRecords(folder, bound, samples, 9, pieces, ["counting", "other"])


def recorded(folder: Path, objective: str = "fiberpo", steps: int = 2, **sections: Any) -> list[dict[str, Any]]:
    """The records of the last step of a toy run, beside which its dump is written."""
    options = sections.pop("options", {})
    run, _ = training(objective, trainer={"steps": steps}, **sections)
    built = dataclasses.replace(run.objective, **options)
    dumps = StepDumps(folder, [steps - 1], objective)
    terms = build_terms(run.algorithm)
    run = dataclasses.replace(run, objective=built, dumps=dumps, steps=steps, terms=terms)
    train(dataclasses.replace(run, records=records_of(folder)))
    records, problems = read_tokens(TOKENS.path(folder, steps - 1))
    assert not problems
    return records


def batch(lengths: Sequence[int], prompt: int = 2) -> RolloutBatch:
    return RolloutBatch.filled(
        tokens=np.arange(sum(lengths)),
        response_mask=np.concatenate([np.arange(size) >= prompt for size in lengths]),
        lengths=np.array(lengths),
        groups=np.arange(len(lengths)),
    )


def test_whole_trajectories_are_chosen_within_the_bound():
    rollouts = batch([5, 9, 4, 6, 5, 7])
    found = recorded_trajectories(rollouts, samples=3, bound=100)
    assert [(one.place, one.begin, one.first, one.end) for one in found] == [
        (0, 0, 2, 5),
        (2, 14, 16, 18),
        (4, 24, 26, 29),
    ]
    assert [one.place for one in recorded_trajectories(rollouts, samples=99, bound=14)] == [0, 1, 2]  # 3 + 7 + 2, not 4
    assert recorded_trajectories(rollouts, samples=0, bound=100) == []
    kept = np.array([True, False, True, True, False, True])
    found = recorded_trajectories(rollouts, samples=6, bound=100, kept=kept)
    assert [(one.place, one.trained, one.begin) for one in found] == [(0, 0, 0), (2, 1, 5), (3, 2, 9), (5, 3, 15)]
    assert [rollouts.select(kept).offsets[one.trained] for one in found] == [one.begin for one in found]


def test_nothing_is_recorded_without_a_bound(tmp_path: Path):
    run, memory = training(trainer={"steps": 1})
    train(dataclasses.replace(run, steps=1, records=records_of(tmp_path, bound=0)))
    assert not list(tmp_path.iterdir())
    assert "seconds/token_records" not in memory.records[-2][2]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_figures_are_those_of_the_step_dump(tmp_path: Path, objective: str):
    """To the last bit of float32: nine digits are written."""
    keys = BUDGETS if objective == "fiberpo-domain" else None
    options = {"budgets": keys} if keys else {}
    records = recorded(tmp_path, objective, algorithm={"expert_partitions": 2}, options=options)
    file = StepFile(tmp_path / FOLDER / "step-00000001.safetensors")
    built = build_objective(objective)
    assert [record["trajectory"] for record in records] == [0, 12, 24, 36, 48, 60, 72, 84]
    offsets = np.concatenate([[0], np.cumsum(file.tensor("rollouts/lengths").numpy())])
    for record in records:
        first = int(offsets[record["trajectory"]]) + record["prompt_tokens"]
        flat = torch.arange(first, first + len(record["tokens"]["id"]))
        for epoch, number in enumerate((record["mini_batch"], 2 + record["mini_batch"])):
            dump = file.step(number, built)
            at = torch.tensor([int((dump.token_index == token).nonzero()) for token in flat])
            assert record["tokens"]["id"] == dump.token_ids[at].tolist()
            seen = dump.tokens.take(at)
            assert torch.equal(torch.tensor(record["tokens"]["log_ratio"][epoch]), seen.log_ratio)
            assert torch.equal(torch.tensor(record["tokens"]["coefficient"][epoch]), dump.coefficients[at])
        assert torch.equal(torch.tensor(record["tokens"]["advantage"]), seen.advantages)
        assert torch.equal(torch.tensor(record["tokens"]["gated_ratio"]), dump.gated_ratio[at])
        torch.testing.assert_close(
            torch.tensor(record["tokens"]["weight"], dtype=torch.float64), seen.weights, rtol=1e-8, atol=0
        )
        assert [level["name"] for level in record["levels"]] == list(built.level_names)
        assert record["tokens"]["text"] == pieces(record["tokens"]["id"])
        assert record["tokens"]["sampled"] == [1, 1, 1] and record["tokens"]["weight_version"] == [1, 1, 1]
        assert min(record["tokens"]["entropy"]) > 0 and max(record["tokens"]["log_prob"]) < 0
    if "clip_value" in records[0]["tokens"]:
        for record in records:
            columns = (record["tokens"][f"clip_{name}"] for name in ("value", "low", "high"))
            for free, value, low, high in zip(record["tokens"]["free"], *columns, strict=True):
                inside = (low is None or value >= low) and (high is None or value <= high)
                assert inside == bool(free)


def test_coefficients_and_gates_are_those_of_the_definition(tmp_path: Path):
    """An implementation with loops over tokens and torch's autograd gives the coefficients once more."""
    records = recorded(tmp_path, "fiberpo-domain", options={"budgets": BUDGETS})
    file = StepFile(tmp_path / FOLDER / "step-00000001.safetensors")
    offsets = np.concatenate([[0], np.cumsum(file.tensor("rollouts/lengths").numpy())])
    states = set()
    for mini_batch in (0, 1):
        seen = file.step(2 + mini_batch, build_objective("fiberpo-domain"))
        tokens = seen.tokens
        share = torch.ones(len(tokens), 1, dtype=torch.float64)
        case = oracle.Case(tokens.log_ratio.double(), tokens.advantages.double(), tokens.weights, tokens.keys, share)
        levels = [[key] for key in BUDGETS]
        _, expected, _ = oracle.slow_fiber(case, oracle.Spec(levels=levels, budgets=BUDGETS, epsilon=(0.05, 0.05)))
        scale = float(expected.abs().max())
        for record in (one for one in records if one["mini_batch"] == mini_batch):
            for place, c in enumerate(record["tokens"]["coefficient"][-1]):
                token = int(offsets[record["trajectory"]]) + record["prompt_tokens"] + place
                at = int((seen.token_index == token).nonzero())
                assert c == pytest.approx(float(expected[at]), abs=2e-6 * scale)  # float32 against float64
                for level in record["levels"]:
                    node = level["nodes"][level["of"][place]]
                    mine = tokens.keys[level["keys"][0]] == tokens.keys[level["keys"][0]][at]
                    mu, x = tokens.weights[mine], tokens.log_ratio[mine].double()
                    for sign, s, d, budget, state in zip((1, -1), *(node[name] for name in ("S", "D", "C", "state"))):
                        assert s == pytest.approx(float((mu * (sign * x).clamp(min=0)).sum() / mu.sum()), rel=1e-6)
                        beyond = abs(d) / budget
                        assert state == (
                            "pass" if beyond <= 1 else "rollback" if beyond < 1 + 1 / node["k"] else "zeroed"
                        )
                        states.add(state)
    assert {"pass", "zeroed"} <= states
    assert {level["name"]: level["nodes"][0]["id"] for level in records[3]["levels"]} == {
        "trajectory": {"trajectory": 36},
        "prompt_group": {"prompt_group": 4},
        "domain": {"domain": "counting"},
    }


def test_terms_are_in_coefficient_and_weight(tmp_path: Path):
    plain = recorded(tmp_path / "plain", "ppo")
    terms = {"kl": {"coefficient": 0.5}, "off_policy_mask": {"delta": 1e-9}}
    with_terms = recorded(tmp_path / "terms", "ppo", algorithm=terms)
    file = StepFile(tmp_path / "terms" / FOLDER / "step-00000001.safetensors")
    objective = torch.cat([file.tensor(f"{number}/coefficients") for number in (2, 3)])
    assert any(0.0 in record["tokens"]["weight"] for record in with_terms)
    assert not any(0.0 in record["tokens"]["weight"] for record in plain)
    index = torch.cat([file.tensor(f"{number}/token_index") for number in (2, 3)])
    offsets = np.concatenate([[0], np.cumsum(file.tensor("rollouts/lengths").numpy())])
    added = []
    for record in with_terms:
        first = int(offsets[record["trajectory"]]) + record["prompt_tokens"]
        alone = [float(objective[int((index == first + place).nonzero())]) for place in range(3)]
        added += (np.array(record["tokens"]["coefficient"][-1]) - alone).tolist()
    assert np.abs(added).max() > 1e-5  # the gradient of the KL divergence


def test_experts_of_training_and_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = recorded(tmp_path, "fiberpo-expert", algorithm={"expert_partitions": 2})
    record = records[0]
    assert record["experts"]["layers"] == [0] and record["experts"]["top_k"] == 2
    chosen = np.frombuffer(base64.b64decode(record["experts"]["chosen"]), "<i2").reshape(3, 1, 2)
    before = [0, *record["tokens"]["id"][:-1]]  # the token whose position predicts each one; prompt 12 is token 0
    assert chosen[1:, 0].tolist() == [[token % 4, (token + 1) % 4] for token in before[1:]]
    assert "engine_same" not in record["experts"]
    level = record["levels"][0]
    assert level["name"] == "trajectory+expert"
    assert [sum(share for _, share in of) for of in level["of"]] == pytest.approx([1, 1, 1])
    assert {node["id"]["expert"] for node in level["nodes"]} <= {0, 1}
    assert "experts" not in recorded(tmp_path / "off", "fiberpo")[0]


def test_truncated_trajectories_that_are_left_out_have_no_records(tmp_path: Path):
    run, _ = training(trainer={"steps": 1}, algorithm={"truncated": "leave_out"})
    take = run.source.take

    def cut(step: int) -> RolloutBatch:
        found = take(step)
        return dataclasses.replace(found, truncated=np.arange(len(found.lengths)) % 24 == 12)

    run.source.take = cut  # type: ignore[method-assign, assignment]
    train(dataclasses.replace(run, steps=1, records=records_of(tmp_path)))
    records, _ = read_tokens(TOKENS.path(tmp_path, 0))
    assert [record["trajectory"] for record in records] == [0, 24, 48, 72]
    assert [record["group"] for record in records] == [0, 3, 6, 9]


@pytest.mark.parametrize("where", ["packed", "write_tokens", "_levels"])
def test_a_record_that_fails_is_a_warning_and_no_end_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
):
    def fails(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_records, where, fails)
    run, memory = training("fiberpo-expert", trainer={"steps": 1}, algorithm={"expert_partitions": 2})
    train(dataclasses.replace(run, steps=1, records=records_of(tmp_path)))
    assert memory.saved == [1]
    assert "the token records of step 0 are not written: " in caplog.text
    assert "No space left on device" in caplog.text
    assert not TOKENS.path(tmp_path, 0).exists()
