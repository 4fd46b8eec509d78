"""This module says how old the weights were that sampled a training step's tokens."""

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.types import RolloutBatch


def lag_metrics(rollouts: RolloutBatch, version: int) -> dict[str, float]:
    """Return mean, maximum and shares of the lags of response tokens: how many versions the weights that sampled one
    lie behind `version`, those that train on it. Tokens whose version is not known are left out; {} where none is."""
    versions = rollouts.weight_versions[rollouts.response_mask]
    lags = version - versions[(versions >= 0) & (versions <= version)]
    if not len(lags):
        return {}
    found, counts = np.unique(lags, return_counts=True)
    shares = {f"lag/token_share/{lag}": count / len(lags) for lag, count in zip(found.tolist(), counts.tolist())}
    return {"lag/mean": float(lags.mean()), "lag/max": float(lags.max()), **shares}


def route_lags(rollouts: RolloutBatch, version: int) -> tuple[NDArray[np.int64], list[int]]:
    """Return (bins [N], lags) of the engines' routes of all tokens: bin i + 1 has those of lag lags[i], bin 0 the rest.

    A token was routed by the weights that sampled the token after it, which were older by its lag than `version`. In
    the rest are tokens that no sampled one follows, and those whose version is not known.
    """
    sampled = np.where(rollouts.response_mask, rollouts.weight_versions, -1)
    versions = np.append(sampled[1:], -1)[: len(sampled)]
    known = (versions >= 0) & (versions <= version)
    lags, of = np.unique(version - versions[known], return_inverse=True)
    bins = np.zeros(len(versions), np.int64)
    bins[known] = of + 1
    return bins, lags.tolist()
