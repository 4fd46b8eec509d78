"""This module checks after a publication that every engine computes with the weights that the trainer has."""

import numpy as np
import torch

from fiberpo_megatron.data.packing import pack
from fiberpo_megatron.interfaces import Passes, Sampler
from fiberpo_megatron.together import together
from fiberpo_megatron.types import RolloutBatch, concatenated_response_tokens
from fiberpo_megatron.weight_sync.compare import compare_log_probs
from fiberpo_megatron.weight_sync.settings import WeightSyncConfig


def verify_publication(
    policy: Passes, sampler: Sampler, rollouts: RolloutBatch, settings: WeightSyncConfig, version: int
) -> None:
    """Score the step's longest trajectory in every engine and in the trainer, at temperature 1.

    Every rank calls it. Raises (on all ranks) when the mean absolute difference over the response tokens exceeds
    `weight_sync.verify_tolerance`, with both figures.
    """
    layout = policy.layout
    probe = int(rollouts.lengths.argmax())
    begin, end = rollouts.offsets[probe : probe + 2].tolist()
    rows = [[probe]] if layout.data_rank == 0 else [[]]
    micro_batches = pack(
        rollouts,
        rows,
        sequence_multiple=layout.sequence_multiple,
        context_rank=layout.context_rank,
        context_size=layout.context_size,
    )
    scores = policy.log_probs(micro_batches, temperature=1.0)
    trainer = np.zeros(0)
    if scores is not None:
        whole = torch.zeros(end - begin, dtype=torch.float64, device=scores.log_probs.device)
        tokens = concatenated_response_tokens(micro_batches).to(whole.device)
        whole[tokens - begin] = scores.log_probs.double()
        trainer = layout.sum_over_tokens(whole).cpu().numpy()
    with together(layout, f"verifying published weights {version}"):
        if layout.is_logger:
            mask = rollouts.response_mask[begin:end]
            for engine, log_probs in enumerate(sampler.score(rollouts.tokens[begin:end].tolist())):
                theirs = np.asarray(log_probs)
                scored = mask[1:] & ~np.isnan(theirs)  # nan: a token that the engine cannot score
                compare_log_probs(
                    trainer[1:][scored],
                    theirs[scored],
                    tolerance=settings.verify_tolerance,
                    engine=f"engine {engine}",
                    version=str(version),
                )
