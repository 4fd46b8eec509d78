"""What a checkpoint costs a rank: it writes and reads its own shard of the optimizer's state, and gathers nothing."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.checkpoint.state import sharded_state
from fiberpo_megatron.mcore.optimizers.build import optimizer_parts
from fiberpo_megatron.mcore.parallel.layout import start_layout
from fiberpo_megatron.mcore.policy import MegatronPolicy
from tests.distributed.parity import MODELS
from tests.distributed.test_checkpoint_resume import configured, draws, start


def described(policy: MegatronPolicy) -> dict[str, Any]:
    """Return the elements that a rank describes to a checkpoint, and whether all of them lie where they always do."""
    own = {
        tensor.untyped_storage().data_ptr()
        for part in optimizer_parts(policy.optimizer)
        for parameter, state in part.optimizer.state.items()
        for tensor in (parameter, *state.values())
        if isinstance(tensor, torch.Tensor)
    }
    found = [
        value
        for value in nested_values(sharded_state(policy, is_loading=False)["optimizer"])
        if isinstance(value, ShardedTensor)
    ]
    return {
        "elements": sum(value.data.numel() for value in found),
        "copied": [value.key for value in found if value.data.untyped_storage().data_ptr() not in own],
        "parameters": sum(p.numel() for model in policy.models for p in model.parameters()),
    }


def save_and_resume(folder: str, ranks: int) -> dict[str, Any]:
    """Save after a step, and resume; return what each rank saw."""
    config = configured("DP2" if ranks == 2 else "1", {})
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
    return {
        "bytes": [path.stat().st_size for path in sorted(Path(folder).glob("*.distcp"))],
        "same": all(torch.equal(mine, theirs) for mine, theirs in pairs),
        "draws": (drawn, redrawn),
        **described(resumed),
    }


def test_replicas_write_their_own_shards_and_resume_bit_for_bit(tmp_path: Path):
    [alone] = run_ranks(1, save_and_resume, str(tmp_path / "step-00000001"), 1)
    found = run_ranks(2, save_and_resume, str(tmp_path / "step-00000002"), 2)
    for answer in (alone, *found):
        assert answer["same"]
        assert answer["draws"][0] == answer["draws"][1], "each rank's own generators go on"
        assert answer["copied"] == [], "nothing is gathered or copied to be saved"
    assert found[0]["draws"] != found[1]["draws"], "and they are not the other rank's"
    states = 3  # master weights and two moments
    assert alone["elements"] == states * alone["parameters"] == sum(answer["elements"] for answer in found)
    for answer in found:
        assert answer["elements"] < 0.55 * alone["elements"], "the state is shared among the replicas"
    [whole], halves = alone["bytes"], found[0]["bytes"]
    assert len(halves) == 2 and max(halves) < 0.75 * whole, "the first also writes the model's own tensors"
