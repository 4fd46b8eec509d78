"""Training steps on a real GPU in FP8, beside the same steps in bfloat16."""

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.gpu.alone import alone
from tests.gpu_ready.strict_run import Steps, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8"
    ),
]

CLOSE = 0.25
"""Relative difference of FP8's gradient norm: e4m3 has 3 bits of mantissa, an error of 6 % in each factor. Errors of
many factors cancel; a scale that is wrong is off by a factor of 2 or more."""

BLOCKS = {"hidden_size": 256, "head_dim": 32, "intermediate_size": 256, "moe_intermediate_size": 128}
"""Sizes that whole blocks of 128 values fill, as the blockwise recipe wants them; rows have 128 tokens."""


def metrics_of_steps(case: Steps) -> list[dict[str, float]]:
    """The metrics of each step of a case."""
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy
    from fiberpo_megatron.trainer import optimise

    layout = start_layout(case.hf_config, case.config.parallel, case.config.run)
    policy = build_policy(case.config, case.hf_config, layout)
    found = []
    whole = optimise.optimise

    def noted(*arguments: Any, **named: Any) -> dict[str, float]:
        found.append(whole(*arguments, **named))
        return found[-1]

    with mock.patch.object(optimise, "optimise", noted):
        for _ in range(case.steps):
            train(case, case.config, layout, policy)
    return found


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_steps_in_fp8(model: str, recipe: str) -> None:
    objective = "fiberpo-expert" if model == "moe" else "fiberpo"
    replay = "old" if model == "moe" else "none"
    plain = Steps(model=model, objective=objective, replay=replay, length=64, sizes=BLOCKS)
    options = {"fp8": "e4m3", "fp8_recipe": recipe}
    wanted = alone(metrics_of_steps, plain)
    found = alone(metrics_of_steps, replace(plain, options=options))
    for one, other in zip(found, wanted, strict=True):
        print({name: (one[name], other[name]) for name in ("gradient_norm", "entropy", "objective") if name in one})
        assert all(math.isfinite(value) for value in one.values())
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=CLOSE)
        assert one["entropy"] == pytest.approx(other["entropy"], rel=0.02)
        assert one["gradient_norm"] != other["gradient_norm"], "the products were not in FP8"
