"""This module checks after a publication that every engine computes with the weights that the trainer has."""

from dataclasses import dataclass

import numpy as np
import torch

from fiberpo_megatron.data.packing import pack
from fiberpo_megatron.interfaces import Passes, Sampler
from fiberpo_megatron.together import together
from fiberpo_megatron.types import RolloutBatch, concatenated_response_tokens
from fiberpo_megatron.user_warnings import on_console
from fiberpo_megatron.weight_sync.compare import compare_log_probs
from fiberpo_megatron.weight_sync.settings import WeightSyncConfig

FIRST, LATER = 10.0, 2.0
"""Factors of the tolerance, and of the smallest difference that was measured, above which a run in bfloat16 stops."""


def verify_publication(
    policy: Passes,
    sampler: Sampler,
    rollouts: RolloutBatch,
    settings: WeightSyncConfig,
    version: int,
    bound: float | None = None,
) -> float | None:
    """Score the step's longest trajectory in every engine and in the trainer, at temperature 1.

    Every rank calls it. Raises (on all ranks) when the mean absolute difference over the response tokens exceeds
    `bound` (by default `weight_sync.verify_tolerance`), with both figures. Returns the largest mean of all engines on
    the rank that logs, and None on the others.
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
            largest = 0.0
            mask = rollouts.response_mask[begin:end]
            for engine, log_probs in enumerate(sampler.score(rollouts.tokens[begin:end].tolist())):
                theirs = np.asarray(log_probs)
                scored = mask[1:] & ~np.isnan(theirs)  # nan: a token that the engine cannot score
                mean = compare_log_probs(
                    trainer[1:][scored],
                    theirs[scored],
                    tolerance=settings.verify_tolerance if bound is None else bound,
                    engine=f"engine {engine}",
                    version=str(version),
                )
                largest = max(largest, mean)
            return largest
    return None


@dataclass
class Tolerance:
    """This is how large a difference of log-probs may be.

    In float32 it is `weight_sync.verify_tolerance`. In bfloat16 a healthy model with experts can be above that, because
    rounding sends tokens to other experts. So a first difference above it is a warning, unless it is ten times as
    large, and from then on a publication may differ twice as much as the smallest difference that was measured.
    """

    settings: WeightSyncConfig
    exact: bool
    """Whether both sides compute in float32."""
    floor: float | None = None
    """The smallest difference of a publication that was measured so far, on the rank that logs."""

    def bound(self) -> float:
        """Return the mean difference above which the run stops."""
        usual = self.settings.verify_tolerance
        if self.exact:
            return usual
        return FIRST * usual if self.floor is None else max(usual, LATER * self.floor)

    def measured(self, mean: float | None, version: int) -> None:
        """Take the result of a check, and warn once if it is above the tolerance."""
        if mean is None:
            return
        if self.floor is None and mean > self.settings.verify_tolerance:
            on_console(
                f"after publishing weights {version} the log-probs of engine and trainer differ by {mean:.3g} in the "
                f"mean, more than weight_sync.verify_tolerance = {self.settings.verify_tolerance:g}: rounding alone "
                f"can do this in bfloat16; the run stops when a later publication differs {LATER:g} times as much"
            )
        self.floor = mean if self.floor is None else min(self.floor, mean)
