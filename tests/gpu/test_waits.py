"""On a real GPU the host waits in a training step no more often than `tests/gpu_ready/test_devices.py` says."""

from collections import Counter

import pytest
import torch

from tests.gpu.alone import alone
from tests.gpu.waits import counted_waits
from tests.gpu_ready.strict_run import Steps, train
from tests.gpu_ready.test_devices import PER_MICRO_BATCH, PER_PASS, PER_STEP, shares

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

OF_THE_OBJECTIVE = ("fibration/", "kernels/")
"""Folders of the objective's source."""
PER_GATE = 2
"""Most waits of one call of the objective in its kernels."""


def waits_of_steps(*cases: Steps) -> list[Counter[str]]:
    """The waits of the last step of each case; earlier steps make what later ones keep, and compile."""
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy

    first = cases[0]
    layout = start_layout(first.hf_config, first.config.parallel, first.config.run)
    found = []
    for case in cases:
        policy = build_policy(case.config, case.hf_config, layout)
        for _ in range(case.steps - 1):
            train(case, case.config, layout, policy)
        with counted_waits() as waits:
            train(case, case.config, layout, policy)
        found.append(waits)
    return found


def test_every_wait_is_counted_with_its_place() -> None:
    x = torch.ones(3, device="cuda")
    for wait in (
        lambda: float(x[0]),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.nonzero(),
        lambda: torch.ones(3).to("cuda"),
        lambda: torch.cuda.synchronize(),
        lambda: torch.cuda.current_stream().synchronize(),
    ):
        with counted_waits() as found:
            wait()
        (place,) = found
        assert place.startswith("gpu/test_waits.py:")
    with counted_waits() as found:
        pinned = torch.ones(3).pin_memory()
        (x + pinned.to("cuda", non_blocking=True)).exp_()
    assert not found


@pytest.mark.parametrize("replay", ["old", "none"])
def test_waits_of_a_training_step(replay: str) -> None:
    cases = [Steps(replay=replay), Steps(replay=replay, layers=4), Steps(replay=replay, micro_batches=4)]
    found = alone(waits_of_steps, *cases)
    kept = [{place: n for place, n in one.items() if not place.startswith(OF_THE_OBJECTIVE)} for one in found]
    base, deeper, longer = (sum(one.values()) for one in kept)
    of_step, of_micro_batch, of_pass = shares(cases[0], base, deeper, longer)
    of_gate = sum(found[0].values()) - base
    table = "\n".join(f"{count:5d} {place}" for place, count in sorted(found[1].items()))
    print(
        f"waits: {of_step:g} a step, {of_micro_batch:g} a micro-batch, {of_pass:g} a pass through a layer, "
        f"{of_gate} of the gate\n{table}"
    )
    assert of_step <= PER_STEP, table
    assert of_micro_batch <= PER_MICRO_BATCH, table
    assert of_pass <= PER_PASS, table
    assert of_gate <= PER_GATE, table
