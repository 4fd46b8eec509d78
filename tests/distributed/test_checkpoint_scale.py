"""What a checkpoint costs does not grow with the replicas: files, and the state that a rank gathers or reads."""

from pathlib import Path
from typing import Any

import torch

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.optimizers import sharded
from fiberpo_megatron.mcore.optimizers.build import optimizer_parts
from fiberpo_megatron.mcore.parallel.layout import start_layout
from tests.distributed.parity import MODELS
from tests.distributed.test_checkpoint_resume import configured, draws, start


def save_and_resume(folder: str) -> dict[str, Any]:
    """Save after a step of two replicas, in small pieces, and resume; return what each rank saw."""
    sharded.GATHER_BYTES = 2**17  # several pieces
    config = configured("DP2", {})
    layout = start_layout(MODELS["moe"], config.parallel, config.run)
    policy, step = start(config, layout, "moe")
    step()
    torch.manual_seed(100 + layout.rank)
    policy.save(folder, {"step": 1})
    drawn = draws()
    step()
    resumed, again = start(config, layout, "moe")
    resumed.load(folder)
    redrawn = draws()
    again()
    pairs = zip(policy.models[0].parameters(), resumed.models[0].parameters(), strict=True)
    model = {f"model{i}": m.sharded_state_dict() for i, m in enumerate(resumed.models)}
    [part] = optimizer_parts(resumed.optimizer)[:1]
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    read = part.sharded_param_state_fully_reshardable(model, is_loading=True, metadata=metadata)
    return {
        "files": sorted(path.name for path in Path(folder).glob("*.distcp")),
        "same": all(torch.equal(mine, theirs) for mine, theirs in pairs),
        "draws": (drawn, redrawn),
        "read": len(read),
        "all": sum(len(buffer.param_index_map) for buffer in part.buffers),
    }


def test_replicas_write_one_file_and_resume_bit_for_bit(tmp_path: Path):
    found = run_ranks(2, save_and_resume, str(tmp_path / "step-00000001"))
    for answer in found:
        assert answer["files"] == ["__0_0.distcp"], "the second rank has nothing that the first does not write"
        assert answer["same"]
        assert answer["draws"][0] == answer["draws"][1], "each rank's own generators go on"
        assert answer["read"] < answer["all"], "a rank reads the state of its shard"
    assert found[0]["draws"] != found[1]["draws"], "and they are not the other rank's"
