"""This module compares the log-probs of trainer and engine on the same tokens: do both have the same weights?"""

import numpy as np
from numpy.typing import ArrayLike


class WeightMismatch(RuntimeError):
    """This is raised when engine and trainer disagree about log-probs after a publication."""


def compare_log_probs(
    trainer: ArrayLike,
    engine_log_probs: ArrayLike,
    *,
    tolerance: float,
    engine: str,
    version: str,
    reported_version: str | None = None,
) -> float:
    """Return the mean absolute difference of two [n] log-prob arrays of the same tokens, at the same temperature.

    Raises WeightMismatch, with both figures, when it exceeds `tolerance`, when a value is not finite, or when
    the engine's `reported_version` is not `version`; ValueError when the shapes differ or are empty.
    """
    ours, theirs = np.asarray(trainer, dtype=np.float64), np.asarray(engine_log_probs, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or ours.size == 0:
        raise ValueError(f"cannot compare log-probs of shapes {ours.shape} and {theirs.shape}; both must be [n > 0]")
    difference = np.abs(ours - theirs)
    worst = int(np.argmax(np.where(np.isfinite(difference), difference, np.inf)))
    mean, largest = float(difference.mean()), float(difference[worst])
    figures = (
        f"mean |difference| {mean:.3g}, max {largest:.3g} over {ours.size} tokens; at position {worst} the "
        f"trainer has {ours[worst]:.6f}, the engine {theirs[worst]:.6f}"
    )
    if reported_version is not None and reported_version != version:
        raise WeightMismatch(
            f"{engine} reports weights {reported_version!r} after weights {version!r} were published "
            f"({figures}). Check that no other run publishes to it"
        )
    if not mean <= tolerance:  # also true for nan
        raise WeightMismatch(
            f"after publishing weights {version!r}, {engine} and the trainer disagree: {figures}; the "
            f"tolerance of the mean is {tolerance:g}. The publication lost or mixed weights, or the two "
            "sides compute in different types (rollout.engine.dtype, weight_sync.verify_tolerance)"
        )
    return mean
