"""The tool that measures a step's memory: what it sees is what the options are for."""

import argparse
import importlib.util
from pathlib import Path

from fiberpo_megatron.certify.processes import run_ranks

TOOL = Path(__file__).parents[2] / "tools/step_memory.py"
SMALL = argparse.Namespace(layers=2, hidden=64, vocabulary=2048, row_tokens=512, rows=1, experts=8, heads=4)


def measured(cases: list[str]) -> dict[str, dict[str, float]]:
    spec = importlib.util.spec_from_file_location("step_memory", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return {case: tool.measure(case, SMALL) for case in cases}


def test_every_option_lowers_the_peak():
    cases = ["nothing saved", "full recompute", "optimizer offload"]
    found = {case: run_ranks(1, measured, [case])[0][case] for case in cases}
    parameters = 2 * 2048 * 64 + 2 * (8 * 3 * 128 * 64)  # embeddings and experts; the rest is small
    plain = found["nothing saved"]
    for case in cases:
        # parameters in bfloat16, and little else: the gradient and 12 bytes of state for each parameter are gone
        assert 2 * parameters < found[case]["generating"] * 2**20 < 3 * parameters
    assert plain["step"] * 2**20 > (2 + 4 + 12) * parameters
    assert found["full recompute"]["step"] < plain["step"]
    state = 12 * parameters / 2**20
    assert plain["step"] - state * 1.1 < found["optimizer offload"]["step"] < plain["step"] - 0.4 * state
