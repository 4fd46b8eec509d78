"""One file from all ranks of a real layout, which a replay in one process gives again to the bit."""

from pathlib import Path

import pytest
import torch

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.certify.replay import replay, table
from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.trainer.batch import mini_batches
from fiberpo_megatron.trainer.optimise import optimise
from fiberpo_megatron.trainer.settings import BatchConfig
from fiberpo_megatron.trainer.step_dump import FOLDER, StepDumps
from fiberpo_megatron.trainer.step_file import StepFile
from fiberpo_megatron.trainer.step_routing import StepRouting
from tests.variations import varied
from tools import layout_parity

LAYOUTS = {
    "CP2": ("fiberpo-domain", ["--context=2"], [[0, 0], [0, 1]]),
    "TP2 PP2": ("fiberpo", ["--tensor=2", "--pipeline=2"], [[0, 0]]),
    "DP4 EP2": ("fiberpo-expert", ["--data=4", "--expert=2"], [[0, 0], [1, 0], [2, 0], [3, 0]]),
    "DP2": ("tests.fibration.topr:TOPR", ["--data=2"], [[0, 0], [1, 0]]),
}


def train_one_step(words: list[str], folder: Path, name: str) -> None:
    """On each rank: two mini-batches, twice."""
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy

    torch.set_num_threads(1)
    case, objective = layout_parity.case_of(words), build_objective(name)
    config = case.config(case.sizes)
    layout = start_layout(case.model, config.parallel, config.run)
    policy = build_policy(config, case.model, layout)
    problem = case.problem
    parts = mini_batches(
        problem.rollouts,
        problem.advantages,
        batch=BatchConfig(prompts=6, mini_batches=2, micro_batch_tokens=96),
        weighting=objective.weighting,
        domains=problem.domains,
        layout=layout,
        version=6,
    )
    dump = StepDumps(folder, [5], name).begin(5, layout, problem.rollouts, objective, {})
    routing = StepRouting(policy, config.algorithm, objective.uses_experts, problem.rollouts)
    optimise(policy, objective, parts, routing, epochs=2, temperature=0.8, timers=PhaseTimers(), dump=dump)


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
