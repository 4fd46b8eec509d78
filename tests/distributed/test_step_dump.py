"""One file from all ranks of a real layout, which a replay in one process gives again to the bit; and the records of
single tokens, which are the same in every layout."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.certify.replay import replay, table
from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.telemetry.token_log import TOKENS, read_tokens
from fiberpo_megatron.trainer.batch import mini_batches
from fiberpo_megatron.trainer.importance import Weighing
from fiberpo_megatron.trainer.importance_settings import ImportanceConfig, MismatchConfig
from fiberpo_megatron.trainer.optimise import optimise
from fiberpo_megatron.trainer.settings import BatchConfig
from fiberpo_megatron.trainer.step_dump import FOLDER, StepDumps
from fiberpo_megatron.trainer.step_file import StepFile
from fiberpo_megatron.trainer.step_routing import StepRouting
from fiberpo_megatron.trainer.token_records import TokenRecords
from tests.variations import varied
from tools import layout_parity

LAYOUTS = {
    "CP2": ("fiberpo-domain", ["--context=2"], [[0, 0], [0, 1]]),
    "TP2 PP2": ("fiberpo", ["--tensor=2", "--pipeline=2"], [[0, 0]]),
    "DP4 EP2": ("fiberpo-expert", ["--data=4", "--expert=2"], [[0, 0], [1, 0], [2, 0], [3, 0]]),
    "DP2": ("tests.fibration.topr:TOPR", ["--data=2"], [[0, 0], [1, 0]]),
}


def train_one_step(words: list[str], folder: Path, name: str) -> None:
    """On each rank: two mini-batches, twice, with importance weights from means over trajectories and versions."""
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy

    torch.set_num_threads(1)
    case, objective = layout_parity.case_of(words), build_objective(name)
    config = case.config(case.sizes)
    layout = start_layout(case.model, config.parallel, config.run)
    policy = build_policy(config, case.model, layout)
    problem = case.problem
    chance = np.random.default_rng(1).normal(-np.log(case.model["vocab_size"]), 0.4, len(problem.rollouts.tokens))
    rollouts = dataclasses.replace(problem.rollouts, rollout_log_probs=chance.astype(np.float32))
    parts = mini_batches(
        rollouts,
        problem.advantages,
        batch=BatchConfig(prompts=6, mini_batches=2, micro_batch_tokens=96),
        weighting=objective.weighting,
        domains=problem.domains,
        layout=layout,
        version=6,
    )
    dump = StepDumps(folder, [5], name).begin(5, layout, rollouts, objective, {})
    # Experts are recorded where routing is replayed; their partitions are by default those of expert parallelism.
    algorithm = config.algorithm.model_copy(update={"routing_replay": "old", "expert_partitions": 2})
    routing = StepRouting(policy, algorithm, objective.uses_experts, rollouts)
    records = TokenRecords(folder, 150, 6, 9, pieces, ["a", "b", "c"])
    tokens = records.begin(5, layout, rollouts, None, objective.name)
    importance, unlimited = ImportanceConfig(method="levels"), MismatchConfig(warn=0, mask=0)
    weighing = Weighing(5, "levels", importance, unlimited, objective.weighting, None, rollouts)
    options = {"epochs": 2, "temperature": 0.8, "timers": PhaseTimers(), "dump": dump, "records": tokens}
    forwards: list[int] = []
    policy.models[-1].register_forward_hook(lambda *_: forwards.append(1))
    metrics = optimise(policy, objective, parts, routing, weighing=weighing, **options)
    assert not layout.is_logger or 0.0 < metrics["importance/weight"] < 2.0
    if layout.pipeline_size == 1:  # the first step goes on from the old log-probs, another one from its own first pass
        first, second = (len(part.micro_batches) for part in parts)
        twice = objective.spans_micro_batches or layout.context_size > 1
        steps = [2 * count - 1 if twice else count for count in (second, first, second)]
        assert len(forwards) == (first + second) + (first - 1) + sum(steps)


def pieces(ids: Sequence[int]) -> list[str]:
    return [str(token) for token in ids]


def records_of(folder: Path) -> list[dict[str, Any]]:
    records, problems = read_tokens(TOKENS.path(folder, 5))
    assert not problems
    return records


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    """Compare JSON values: numbers to 1e-5, everything else exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for at, value in enumerate(expected):
            assert_close(found[at], value, f"{where}/{at}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5), where
    else:
        assert found == expected, where


def assert_as_dumped(records: list[dict[str, Any]], file: StepFile) -> None:
    """Compare with what the objective saw and gave, to the last bit."""
    offsets = np.concatenate([[0], np.cumsum(file.tensor("rollouts/lengths").numpy())])
    for record in records:
        sampled = np.flatnonzero(record["tokens"]["sampled"]).tolist()
        first = int(offsets[record["trajectory"]]) + record["prompt_tokens"]
        for epoch in (0, 1):
            step = f"{2 * epoch + record['mini_batch']}"
            index = file.tensor(f"{step}/token_index")
            at = torch.tensor([int((index == first + place).nonzero()) for place in sampled])
            ratio = file.tensor(f"{step}/log_probs") - file.tensor(f"{step}/old_log_probs")
            for name, tensor in (("log_ratio", ratio), ("coefficient", file.tensor(f"{step}/coefficients"))):
                noted = [record["tokens"][name][epoch][place] for place in sampled]
                assert torch.equal(torch.tensor(noted), tensor[at]), name


@pytest.mark.parametrize("name", varied(LAYOUTS, ["CP2"]))
def test_all_ranks_write_one_file(name: str, tmp_path: Path):
    objective, words, places = LAYOUTS[name]
    case = layout_parity.case_of(words)
    run_ranks(case.ranks, train_one_step, words, tmp_path, objective)
    result = replay(tmp_path / FOLDER / "step-00000005.safetensors")
    assert result.bits and result.passed, list(table(result))
    file = StepFile(result.path)
    assert file.about["ranks"] == places
    assert [row.step for row in result.rows] == [0, 1, 2, 3]
    single = not result.objective.spans_micro_batches and "--context=2" not in words
    assert [file.step(number, result.objective).single_pass for number in range(4)] == [False, single, single, single]
    index = torch.cat([file.tensor(f"{number}/token_index") for number in (2, 3)])
    assert sorted(index.tolist()) == case.problem.rollouts.response_mask.nonzero()[0].tolist()
    assert file.step(3, result.objective).tokens.log_ratio.abs().max() > 1e-3
    assert not (tmp_path / FOLDER / ".step-00000005.safetensors.parts").exists()
    records = records_of(tmp_path)
    assert_as_dumped(records, file)
    weights = [w for record in records for w in record["tokens"]["importance_weight"] if w is not None]
    assert len(set(weights)) > len(weights) // 2, "tokens have weights of their own"
    assert len(records) > 2 and all("chosen" in record["experts"] for record in records)
    sizes = [word for word in words if word.startswith("--expert")]
    run_ranks(1, train_one_step, ["--expert=1"] if sizes else [], tmp_path / "alone", objective)
    assert_close(records, records_of(tmp_path / "alone"))
