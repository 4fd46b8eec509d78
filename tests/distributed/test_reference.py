"""Reference weights in host memory: they are those that the run began with, in every layout and after a resume, and a
pass with them leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.config import Config
from fiberpo_megatron.mcore.parallel.layout import start_layout
from fiberpo_megatron.mcore.policy import MegatronPolicy, build_policy
from fiberpo_megatron.mcore.weights import save_hf
from tests.distributed.parity import (
    DEEPSEEK_V3,
    QWEN3_MOE,
    TEMPERATURE,
    coupled_gate,
    make_batch,
    make_config,
    micro_batches_for,
)
from tests.variations import varied

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2 EP2": {"data": 2, "expert": 2, "distributed_optimizer": True},
    "TP2": {"tensor": 2},
    "CP2": {"context": 2},
    "PP2 VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "TP2 PP2": {"tensor": 2, "pipeline": 2, "distributed_optimizer": True},
    "PP2 EP2": {"pipeline": 2, "expert": 2, "data": 2, "distributed_optimizer": True},
}


class Ways:
    """One rank's policies, and what they say about the same rows."""

    def __init__(self, config: Config, model: dict[str, Any]) -> None:
        self.config, self.model = config, model
        self.layout = start_layout(model, config.parallel, config.run)
        self.batches = micro_batches_for(make_batch(), self.layout, 144)
        self.gate = coupled_gate(self.batches, len(make_batch().tokens), self.layout)

    def policy(self, **model: Any) -> MegatronPolicy:
        section = self.config.model.model_copy(update=model)
        return build_policy(self.config.model_copy(update={"model": section}), self.model, self.layout)

    def log_probs(self, policy: MegatronPolicy, routing: Any = "off") -> Tensor:
        scores = policy.log_probs(self.batches, TEMPERATURE, routing=routing)
        return torch.zeros(0) if scores is None else scores.log_probs

    def reference(self, policy: MegatronPolicy) -> Tensor:
        with policy.reference():
            return self.log_probs(policy)

    def step(self, policy: MegatronPolicy) -> float:
        return policy.step(self.batches, self.gate, TEMPERATURE).gradient_norm


def reference_of_a_run(config: Config, model: dict[str, Any], folder: Path) -> dict[str, bool]:
    """On each rank: statements about the reference, and whether they hold, in all bits."""
    torch.set_num_threads(1)
    ways = Ways(config, model)
    plain = ways.policy()
    alone = [ways.step(plain), ways.step(plain)]

    policy = ways.policy()
    policy.keep_reference(None)
    start = ways.log_probs(policy, routing="record")
    routes = policy.routing.expert_counts(ways.batches)
    found = {"a step that follows a pass with the reference is the same": True}
    norms = [ways.step(policy)]
    now = ways.log_probs(policy)
    found["the reference has the weights of the start"] = torch.equal(ways.reference(policy), start)
    found["the policy has its own again"] = torch.equal(ways.log_probs(policy), now)
    found["the policy has moved"] = not ways.layout.is_last_stage or not torch.equal(now, start)
    found["the record of routes is the same"] = torch.equal(policy.routing.expert_counts(ways.batches), routes)
    norms.append(ways.step(policy))
    found["a step that follows a pass with the reference is the same"] = norms == alone
    now = ways.log_probs(policy)

    policy.save(str(folder / "step-00000002"), {})
    resumed = ways.policy()
    resumed.keep_reference(None)
    resumed.load(str(folder / "step-00000002"))
    found["a resumed run has the reference of the start"] = torch.equal(ways.reference(resumed), start)
    found["a resumed run has the trained policy"] = torch.equal(ways.log_probs(resumed), now)

    save_hf(policy.weights.full(), folder / "hf", folder, writer=ways.layout.rank == 0)
    ways.layout.barrier()
    resumed.keep_reference(folder / "hf")
    ways.step(resumed)
    found["a folder is a reference"] = torch.equal(ways.reference(resumed), now)
    loaded = ways.policy(random_init=False, path=folder / "hf")
    loaded.keep_reference(None)
    loaded.load(str(folder / "step-00000002"))
    ways.step(loaded)
    found["a resumed run that began with a folder has it as reference"] = torch.equal(ways.reference(loaded), now)
    found["its bytes are those of the parameters"] = policy.reference_bytes >= sum(
        p.nbytes for chunk in policy.models for p in chunk.parameters()
    )
    return found


def check(name: str, architecture: dict[str, Any], folder: Path, **sections: Any) -> None:
    (folder / "config.json").write_text(json.dumps(architecture))
    config = make_config(parallel=LAYOUTS[name], **sections)
    ranks = {"TP2 PP2": 4, "PP2 EP2": 4}.get(name, 2)
    for rank, found in enumerate(run_ranks(ranks, reference_of_a_run, config, architecture, folder)):
        assert all(found.values()), (rank, found)


@pytest.mark.parametrize("name", varied(LAYOUTS, ["DP2 EP2"]))
def test_the_reference_of_a_layout(name: str, tmp_path: Path):
    check(name, QWEN3_MOE, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_correction_biases_belong_to_the_reference(dtype: str, tmp_path: Path):
    """They move with every step, and so must not stay when the reference computes."""
    check("DP2 EP2", DEEPSEEK_V3, tmp_path, model={"router_bias_update_rate": 0.5, "dtype": dtype})


@pytest.mark.exhaustive
def test_offloaded_optimizers_and_released_memory(tmp_path: Path):
    check("DP2 EP2", QWEN3_MOE, tmp_path, optimizer={"cpu_offload": True})


def unkept(config: Config) -> list[str]:
    ways, errors = Ways(config, QWEN3_MOE), []
    policy = ways.policy()
    for kept in (False, True):
        if kept:
            policy.keep_reference(None)
        try:
            with policy.reference(), policy.reference():
                pass
        except RuntimeError as error:
            errors.append(str(error))
    return errors


@pytest.mark.exhaustive
def test_what_is_refused():
    (errors,) = run_ranks(1, unkept, make_config())
    assert [text.partition(";")[0] for text in errors] == [
        "no reference weights are kept",
        "the reference's weights are on the device already",
    ]
