"""The same log-probs, gradients and trained parameters on every layout as on one process.

The reference takes everything in one micro-batch; layouts have a token budget that gives several. All in float32:
the order of summation differs, which at these sizes moves the largest element of a tensor by about 1e-6.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.distributed.parity import QWEN3_MOE, Run, assemble, run_policy
from tests.distributed.spawn import run_ranks

TOLERANCE = 1e-5
BUDGET = 72  # the longest trajectory takes 63 positions, all together 188
DENSE = {**QWEN3_MOE, "model_type": "qwen3", "tie_word_embeddings": True}
for key in ("num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size"):
    del DENSE[key]

LAYOUTS: dict[str, dict[str, int]] = {
    "micro-batches": {},
    "DP2": {"data": 2},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "EP2": {"data": 2, "expert": 2},
    "CP2": {"context": 2},
    "TP2 ETP2": {"tensor": 2, "expert_tensor": 2},
    "PP2 VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "PP2 EP2": {"pipeline": 2, "data": 2, "expert": 2},
    "DP2 EP2": {"data": 4, "expert": 2},
    "TP2 CP2": {"tensor": 2, "context": 2},
}


@dataclass(frozen=True)
class Whole:
    """A layout's results as global tensors."""

    log_probs: NDArray[Any]
    entropy: NDArray[Any]
    gradients: dict[str, dict[str, NDArray[Any]]]
    parameters: dict[str, NDArray[Any]]
    norms: list[float]
    micro_batches: int


def join(runs: list[Run]) -> Whole:
    scores: dict[int, tuple[float, float]] = {}
    for run in runs:
        for token, log_prob in run.log_probs.items():
            found = (log_prob, run.entropy[token])
            assert scores.setdefault(token, found) == found, "tensor-parallel ranks disagree"
    assert len({tuple(run.norms) for run in runs}) == 1, "ranks disagree about the gradient norm"
    ordered = np.array([scores[token] for token in sorted(scores)])
    return Whole(
        log_probs=ordered[:, 0],
        entropy=ordered[:, 1],
        gradients={name: assemble(run.gradients[name] for run in runs) for name in runs[0].gradients},
        parameters=assemble(run.parameters for run in runs),
        norms=runs[0].norms,
        micro_batches=runs[0].micro_batches,
    )


def run_layout(hf_config: dict[str, Any], parallel: dict[str, int], budget: int | None, **model: Any) -> Whole:
    sizes = {name: parallel.get(name, 1) for name in ("tensor", "pipeline", "context", "data")}
    sections = {"parallel": {"distributed_optimizer": False, **parallel}, "model": model}
    return join(run_ranks(int(np.prod(list(sizes.values()))), run_policy, hf_config, sections, budget))


@cache
def reference(dense: bool = False) -> Whole:
    return run_layout(DENSE if dense else QWEN3_MOE, {}, None)


def assert_same_tensors(found: dict[str, NDArray[Any]], wanted: dict[str, NDArray[Any]]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        rows = found[key][tuple(slice(0, n) for n in value.shape)]  # without rows that pad the vocabulary
        worst = np.abs(rows - value).max() / np.abs(value).max()
        assert worst < TOLERANCE, f"{key}: off by {worst:.1e} of its largest element"
        assert not found[key][len(value) :].any(), f"{key}: the rows that pad the vocabulary are not zero"


def assert_same(found: Whole, wanted: Whole) -> None:
    np.testing.assert_allclose(found.log_probs, wanted.log_probs, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found.entropy, wanted.entropy, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found.norms, wanted.norms, rtol=TOLERANCE)
    for name, gradient in found.gradients.items():
        assert_same_tensors(gradient, wanted.gradients[name])
    assert_same_tensors(found.parameters, wanted.parameters)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_layout_does_not_matter(name: str):
    found = run_layout(QWEN3_MOE, LAYOUTS[name], BUDGET)
    assert found.micro_batches > 1 or LAYOUTS[name].get("data", 1) > 2
    assert found.gradients.keys() == {"fixed", "coupled"}
    assert_same(found, reference())


@pytest.mark.parametrize("name", ["DP2", "TP2 PP2", "DP2 EP2"])
def test_distributed_optimizer(name: str):
    found = run_layout(QWEN3_MOE, LAYOUTS[name] | {"distributed_optimizer": True}, BUDGET)
    assert_same(found, reference())


def test_recompute():
    found = run_layout(QWEN3_MOE, LAYOUTS["PP2"], BUDGET, recompute="full")
    assert_same(found, reference())


@pytest.mark.parametrize("dense, name, modules", [(False, "PP2", "moe"), (True, "TP2", "mlp")])
def test_selective_recompute(dense: bool, name: str, modules: str):
    hf_config = DENSE if dense else QWEN3_MOE
    options = {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm", modules]}
    assert_same(run_layout(hf_config, LAYOUTS[name], BUDGET, **options), reference(dense))


def test_chunked_log_probs():
    found = run_layout(QWEN3_MOE, LAYOUTS["TP2"], BUDGET, log_prob_chunk_tokens=7)
    assert_same(found, reference())


@pytest.mark.parametrize("name", ["TP2", "PP2", "CP2"])
def test_dense_with_tied_embeddings(name: str):
    found = run_layout(DENSE, LAYOUTS[name], BUDGET)
    assert_same(found, reference(dense=True))


def test_the_gates_differ():
    """The coupled gate is not a fixed one in disguise: otherwise the reduction over ranks would go untested."""
    gradients = reference().gradients
    key = "output_layer.weight"
    assert np.abs(gradients["fixed"][key] - gradients["coupled"][key]).max() > 1e-3
