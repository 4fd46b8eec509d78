"""Ranks of the shipped cluster layouts, one at a time in fake process groups: their groups, bytes and collectives."""

import json
import tomllib
from pathlib import Path

import pytest
import torch

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.optimizers import make_optimizer
from fiberpo_megatron.mcore.settings import ParallelConfig
from fiberpo_megatron.planning.states import state_bytes
from tests.gpu_ready.fake_groups import (
    Job,
    Place,
    expected_groups,
    job_config,
    model_file,
    order_of_ranks,
    sizes_of_ranks,
)
from tests.variations import varied

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU platform is not installed")

EXAMPLES = Path(__file__).parents[2] / "examples"
SHIPPED = {
    "qwen3_30b_a3b/train.toml": "qwen3_30b_a3b",
    "slurm/four_nodes.toml": "qwen3_30b_a3b",
    "slurm/thirty_two_nodes.toml": "qwen3_235b_a22b",
}
"""Cluster configs with the model of each that the planner knows."""
PLANNED = {
    "30B on 32": ("qwen3_30b_a3b", {"expert": 8}, 32),
    "30B on 1,024": ("qwen3_30b_a3b", {"pipeline": 16, "context": 8}, 1024),
    "235B on 256": ("qwen3_235b_a22b", {"tensor": 4, "pipeline": 16, "context": 4, "expert": 4}, 256),
    "DeepSeek-V3 on 1,024": ("deepseek_v3", {"tensor": 4, "pipeline": 16, "context": 4, "expert": 8}, 1024),
}
"""Layouts of docs/scaling.md, the last three, and one of 32 ranks."""


def job(name: str, narrow: bool = False) -> Job:
    """The job of a shipped config, or of a planned layout."""
    objective, options = "fiberpo-expert", {"recompute": "full"}
    if name in PLANNED:
        model, sizes, ranks = PLANNED[name]
        per_replica = sizes.get("tensor", 1) * sizes.get("pipeline", 1) * sizes.get("context", 1)
        parallel = {**sizes, "data": ranks // per_replica, "uneven_stages": True}
    else:
        model, shipped = SHIPPED[name], tomllib.loads((EXAMPLES / name).read_text())
        parallel, objective = shipped["parallel"], shipped["algorithm"]["objective"]
        assert shipped["algorithm"].get("routing_replay", "none") == "none"
        options = {key: value for key, value in shipped["model"].items() if key.startswith("recompute")}
        ranks = parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("context", 1) * parallel["data"]
    config = ParallelConfig(**{**parallel, "distributed_optimizer": True})
    hf_config = json.loads(model_file(model).read_text()) | {"num_nextn_predict_layers": 0}
    return Job(hf_config, config, ranks, narrow, objective, options)


def test_all_cluster_examples_are_here():
    with_nodes = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("slurm/*.toml")}
    assert with_nodes - set(SHIPPED) == {"slurm/one_node.toml"}  # its model is dense and runs on one node


@pytest.mark.parametrize("name", varied([*SHIPPED, *PLANNED], ["slurm/four_nodes.toml"]))
def test_groups_and_bytes(name: str):
    """A rank's groups hold the ranks that they should, and its buffers are as large as the planner says."""
    one = job(name)
    config, architecture = job_config(one), read_architecture(one.model)
    ranks = one.ranks if one.world_size > 64 else [0, one.world_size - 1]
    (found,) = run_ranks(1, sizes_of_ranks, one, ranks, timeout_s=280)
    assert sorted(found) == ranks
    for rank, (position, measured, groups) in found.items():
        assert groups == expected_groups(rank, one.parallel, one.world_size)
        optimizer = make_optimizer(config.optimizer)
        planned = state_bytes(architecture, config.model, one.parallel, one.world_size, position, optimizer)
        assert measured == planned, f"rank {rank}"
        assert measured.gradients > 10**8


@pytest.mark.parametrize("name", varied([*SHIPPED, *PLANNED], ["30B on 32"]))
def test_order_of_collectives(name: str):
    """All ranks of a group make the same calls in a training step of a narrow model with the config's objective."""
    one = job(name, narrow=True)
    (found,) = run_ranks(1, order_of_ranks, one, one.ranks, timeout_s=290)
    assert found.problems == []
    assert min(found.calls.values()) > 20
    larger = {kind for kind, ranks in expected_groups(0, one.parallel, one.world_size).items() if len(ranks) > 1}
    assert found.compared == found.used
    # With context parallelism gradients are summed over "token", which holds "data". "replica" carries rollouts, which
    # a training step has already; without context parallelism other groups have the same members.
    idle = {"data", "replica"} if one.parallel.context > 1 else set()
    assert larger - found.used <= idle, found.used


def test_places_follow_megatrons_order():
    sizes = ParallelConfig(tensor=2, context=2, expert=4, pipeline=2, data=4)
    places = [Place.of(rank, sizes, 32) for rank in range(32)]
    assert places[1] == Place(tensor=1, context=0, data=0, pipeline=0, expert=1, expert_data=0)
    assert places[2] == Place(tensor=0, context=1, data=0, pipeline=0, expert=2, expert_data=0)
    assert places[31] == Place(tensor=1, context=1, data=3, pipeline=1, expert=3, expert_data=3)
    assert len(set(places)) == 32
