"""This module checks after a publication that every engine computes with the weights that the trainer has."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fiberpo_megatron.data.packing import pack
from fiberpo_megatron.interfaces import Passes, Sampler
from fiberpo_megatron.together import together
from fiberpo_megatron.types import RolloutBatch, concatenated_response_tokens
from fiberpo_megatron.user_warnings import on_console
from fiberpo_megatron.weight_sync.compare import WeightMismatch, compare_log_probs
from fiberpo_megatron.weight_sync.settings import WeightSyncConfig


@dataclass(frozen=True)
class Verified:
    """It is what a check of published weights found."""

    mean: float | None
    """The largest mean |difference| of log-probs of all engines, on the rank that logs; None on the others."""
    failed: Mapping[int, str]
    """Engines that join and do not compute what the trainer does, by number with the reason; equal on every rank."""


FIRST, LATER = 10.0, 2.0
"""Factors of the tolerance, and of the smallest difference that was measured, above which a run in bfloat16 stops."""


def verify_publication(
    policy: Passes,
    sampler: Sampler,
    rollouts: RolloutBatch,
    settings: WeightSyncConfig,
    version: int,
    bound: float | None = None,
    joining: Collection[int] = (),
) -> Verified:
    """Score the step's longest trajectory in every engine and in the trainer, at temperature 1.

    Every rank calls it. Raises (on all ranks) when the mean absolute difference over the response tokens exceeds
    `bound` (by default `weight_sync.verify_tolerance`), with both figures. Engines that join the run, by number, end it
    in no case: what is wrong with them is in the result.
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
    largest: float | None = None
    failed: dict[int, str] = {}
    with together(layout, f"verifying published weights {version}"):
        if layout.is_logger:
            mask = rollouts.response_mask[begin:end]
            found = sampler.score(rollouts.tokens[begin:end].tolist())
            failed = {n: f"it did not score a text after weights {version}" for n in joining if n not in found}
            for engine, log_probs in found.items():
                theirs = np.asarray(log_probs)
                scored = mask[1:] & ~np.isnan(theirs)  # nan: a token that the engine cannot score
                try:
                    mean = compare_log_probs(
                        trainer[1:][scored],
                        theirs[scored],
                        tolerance=settings.verify_tolerance if bound is None else bound,
                        engine=f"engine {engine}",
                        version=str(version),
                    )
                except WeightMismatch as error:
                    if engine not in joining or len(joining) == len(found):
                        raise
                    failed[engine] = str(error)
                else:
                    largest = max(largest or 0.0, mean)
    if joining:
        (failed,) = (one for one in layout.gather_json(failed if layout.is_logger else None) if one is not None)
    return Verified(largest, {int(number): why for number, why in failed.items()})


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
