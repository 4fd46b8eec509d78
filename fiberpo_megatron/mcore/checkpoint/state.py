"""This module collects what one rank contributes to a checkpoint: sharded model and optimizer, random generators."""

import gc
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from fiberpo_megatron.mcore.checkpoint.reading import load_plain
from fiberpo_megatron.mcore.optimizers.build import optimizer_parts
from fiberpo_megatron.mcore.parallel import exchange

SHARDING = {
    # whole tensors under the parameters' names: loads in any layout
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


def sharded_state(policy: Any, is_loading: bool) -> dict[str, Any]:
    """Return Megatron's sharded state dict of model and optimizer. `is_loading` allocates the tensors to read into."""
    _create_state(policy)
    models = {
        _model_key(index): model.sharded_state_dict(metadata=dict(SHARDING))
        for index, model in enumerate(policy.models)
    }
    with _cheap_collections():
        optimizer = policy.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=dict(SHARDING))
    return {**models, "optimizer": optimizer, "scheduler": {"num_steps": policy.scheduler.num_steps}}


@contextmanager
def _cheap_collections() -> Iterator[None]:
    """Keep garbage collections cheap in the block.

    Megatron calls gc.collect() for each of its optimizers. That takes half a second of a small model's save if it walks
    over everything that was imported.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def restore_state(policy: Any, loaded: dict[str, Any]) -> None:
    """Put a loaded state dict into the policy.

    Learning rates, weight decay and the optimizer's options stay those of this run's config; the schedule continues at
    the saved step.
    """
    for index, model in enumerate(policy.models):
        model.load_state_dict(loaded[_model_key(index)])
    configured = [dict(group) for group in policy.optimizer.param_groups]
    policy.optimizer.load_state_dict(loaded["optimizer"])
    for group, before in zip(policy.optimizer.param_groups, configured, strict=True):
        group.update({key: value for key, value in before.items() if key not in ("params", "step")})
    _create_state(policy)
    policy.scheduler.num_steps = 0
    policy.scheduler.step(loaded["scheduler"]["num_steps"])


def _model_key(index: int) -> str:
    return f"model{index}"


def _create_state(policy: Any) -> None:
    """Give the optimizer the state that it makes at its first step, where it is missing.

    Megatron reads the state when it saves and before it loads; a fresh optimizer has none.
    """
    for part in optimizer_parts(policy.optimizer):
        if part.optimizer is not None:
            policy.optimizer_kind.create_state(part.optimizer)


def random_state(rank: int, world_size: int, data: Any = None) -> ShardedObject:
    """Return one rank's generators for a checkpoint; without data, the name of what is to be loaded."""
    return ShardedObject("random_state", data, (world_size,), (rank,))


def random_states(group: Any) -> dict[str, ShardedObject]:
    """Return the generators of all ranks on rank 0, by names of their own, and nothing on the others.

    All ranks call it. The generators are some 20 kB a rank; if every rank wrote its own, a checkpoint would have a file
    for each.
    """
    file = io.BytesIO()
    torch.save(_generators(), file)
    message = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    parts = exchange.gather_bytes(message, group)
    found = [load_plain(io.BytesIO(data := part.numpy().tobytes()), len(data), "random state") for part in parts]
    return {f"random_state_{rank}": random_state(rank, len(parts), data) for rank, data in enumerate(found)}


def _generators() -> dict[str, Any]:
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(states: dict[str, Any]) -> None:
    """Set this process's random number generators to saved states."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
