"""This module says how old the weights were that sampled a training step's tokens."""

import numpy as np

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
