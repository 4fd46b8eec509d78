"""The same log-probs, gradients and trained parameters on every layout as on one process.

All start from the same Hugging Face checkpoint. The reference takes everything in one micro-batch; layouts have a
token budget that gives several. The trajectories are 2 to 64 tokens long.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fiberpo_megatron.certify.processes import run_ranks
from tests.distributed.parity import (
    LENGTHS,
    MODELS,
    Case,
    Run,
    assemble,
    run_cases,
    run_in_small_buckets,
    run_with_late_receives,
    run_without_expert_marks,
    write_checkpoints,
)
from tests.variations import varied

Runner = Callable[[list[Case], Path, dict[str, int]], list[Run]]

TOLERANCE = 1e-5
"""float32 has 24 bits: a sum in another order moves a log-prob or a tensor's largest element by up to about 1e-6."""

LAYOUTS: dict[str, dict[str, int]] = {
    "DP2": {"data": 2},
    "DP4": {"data": 4},
    "TP2": {"tensor": 2},
    "TP2 DP2": {"tensor": 2, "data": 2},
    "PP2": {"pipeline": 2},
    "PP2 VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "PP3 uneven": {"pipeline": 3, "uneven_stages": True},
    "CP2": {"context": 2},
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "TP2 CP2": {"tensor": 2, "context": 2},
    "TP2 PP2 VPP2": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
}
EXPERT_LAYOUTS: dict[str, dict[str, int]] = {
    "DP2 EP2": {"data": 2, "expert": 2},
    "DP4 EP2": {"data": 4, "expert": 2},
    "TP2 EP2": {"tensor": 2, "expert": 2},
    "CP2 EP2": {"context": 2, "expert": 2},
    "TP2 ETP2": {"tensor": 2, "expert_tensor": 2},
    "DP2 ETP2": {"data": 2, "expert_tensor": 2},
    "TP2 DP2 EP2 ETP2": {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2},
    "PP2 DP2 EP2": {"pipeline": 2, "data": 2, "expert": 2},
    "CP2 DP2 EP4": {"context": 2, "data": 2, "expert": 4},
}
BIG_LAYOUTS: dict[str, dict[str, int]] = {
    "TP2 PP2 CP2 EP2": {"tensor": 2, "pipeline": 2, "context": 2, "expert": 2},
    "TP2 PP2 VPP2 DP2 EP2": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2},
}


@dataclass(frozen=True)
class Whole:
    """A layout's results as global tensors."""

    log_probs: NDArray[Any]
    entropy: NDArray[Any]
    gradients: dict[str, dict[str, NDArray[Any]]]
    parameters: dict[str, NDArray[Any]]
    norms: list[float]
    micro_batches: list[int]
    """Of every rank."""
    scored: list[int]
    """Response tokens of every rank."""


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
        micro_batches=[run.micro_batches for run in runs],
        scored=[len(run.log_probs) for run in runs],
    )


@dataclass(frozen=True)
class Reference:
    """What one process found, from the checkpoints that the layouts start from too."""

    folder: Path
    whole: dict[tuple[str, str], Whole]
    """By model and batch."""

    def of(self, case: Case) -> Whole:
        return self.whole[case.model, case.batch]

    def run(self, cases: list[Case], parallel: dict[str, int], how: Runner = run_cases) -> list[Whole]:
        sizes = [parallel.get(name, 1) for name in ("tensor", "pipeline", "context", "data")]
        ranks = run_ranks(int(np.prod(sizes)), how, cases, self.folder, parallel)
        return [join(list(runs)) for runs in zip(*ranks)]

    def compare(self, cases: list[Case], parallel: dict[str, int]) -> list[Whole]:
        """Run the cases and hold each against one process; their largest differences are printed (pytest -rP)."""
        found = self.run(cases, parallel)
        for case, whole in zip(cases, found):
            assert_same(case, whole, self.of(case))
        return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(1, write_checkpoints, folder)
    cases = [Case(model, batch=batch, budget=None) for model in MODELS for batch in LENGTHS]
    empty = Reference(folder, {})
    return replace(empty, whole={(c.model, c.batch): w for c, w in zip(cases, empty.run(cases, {}))})


def assert_same(case: Case, found: Whole, wanted: Whole) -> None:
    worst = differences(found, wanted)
    print(case, {name: f"{value:.1e}" for name, value in worst.items()})
    too_far = {name: value for name, value in worst.items() if not value < TOLERANCE}
    assert not too_far, f"{case}: {too_far}"


def differences(found: Whole, wanted: Whole) -> dict[str, float]:
    """Largest differences: of log-probs and entropies absolute (both are of order 1), of the gradient norms
    relative, of a tensor relative to its largest element."""
    worst = {
        "log_probs": float(np.abs(found.log_probs - wanted.log_probs).max()),
        "entropy": float(np.abs(found.entropy - wanted.entropy).max()),
        "norm": float(np.abs(np.array(found.norms) / np.array(wanted.norms) - 1).max()),
        "parameters": tensor_difference(found.parameters, wanted.parameters),
    }
    for gate, gradient in found.gradients.items():
        worst[f"{gate} gradient"] = tensor_difference(gradient, wanted.gradients[gate])
    return worst


def tensor_difference(found: dict[str, NDArray[Any]], wanted: dict[str, NDArray[Any]]) -> float:
    assert found.keys() == wanted.keys()
    worst = 0.0
    for key, value in wanted.items():
        rows = found[key][tuple(slice(0, n) for n in value.shape)]  # without rows that pad the vocabulary
        assert not found[key][len(value) :].any(), f"{key}: the rows that pad the vocabulary are not zero"
        size = np.abs(value).max()
        worst = max(worst, float(np.abs(rows - value).max() / size) if size else float(np.abs(rows).max()))
    return worst


def cases_for(parallel: dict[str, int]) -> list[Case]:
    """Every kind of model once, with and without the distributed optimizer, and ranks without a trajectory."""
    experts = [Case("moe"), Case("moe tied", distributed_optimizer=True), Case("deepseek", distributed_optimizer=True)]
    dense = [Case("dense", distributed_optimizer=True), Case("dense tied")]
    nothing = [Case("moe", distributed_optimizer=True, batch="single")] if parallel.get("data", 1) > 1 else []
    return experts + nothing + ([] if "expert" in parallel or "expert_tensor" in parallel else dense)


# Each kind of parallelism alone or in the pair that is most likely to break it; the others are in `make test-all`.
KEPT = (
    "DP2",
    "PP2 VPP2",
    "PP3 uneven",
    "TP2 CP2",
    "DP2 EP2",
    "TP2 EP2",
    "TP2 DP2 EP2 ETP2",
    "CP2 DP2 EP4",
)


@pytest.mark.parametrize("name", varied([*LAYOUTS, *EXPERT_LAYOUTS], KEPT))
def test_layout_does_not_matter(name: str, reference: Reference):
    parallel = (LAYOUTS | EXPERT_LAYOUTS)[name]
    cases = cases_for(parallel)
    found = reference.compare(cases, parallel)
    assert max(found[0].micro_batches) > 1 or parallel.get("data", 1) > 2
    for case, whole in zip(cases, found):
        assert len(set(whole.micro_batches)) == 1, "every rank takes part in every micro-batch"
        assert case.batch == "mixed" or 0 in whole.scored


@pytest.mark.slow  # eight ranks: the only layouts with four kinds of parallelism at once
@pytest.mark.parametrize("name", varied(BIG_LAYOUTS, ["TP2 PP2 CP2 EP2"]))
def test_big_layout_does_not_matter(name: str, reference: Reference):
    cases = [Case("moe tied", distributed_optimizer=True), Case("deepseek", distributed_optimizer=True)]
    reference.compare(cases, BIG_LAYOUTS[name])


def test_a_slow_network_does_not_matter(reference: Reference):
    case = Case("dense tied")
    (found,) = reference.run([case], LAYOUTS["PP2 VPP2"], run_with_late_receives)
    assert_same(case, found, reference.of(case))


def test_micro_batches_do_not_matter(reference: Reference):
    (found,) = reference.compare([Case("moe")], {})
    assert found.micro_batches == [3]


def test_memory_options_do_not_matter(reference: Reference):
    selective = {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm"]}
    moe = selective | {"recompute_modules": ["core_attn", "layernorm", "moe"]}
    mlp = selective | {"recompute_modules": ["core_attn", "layernorm", "mlp"]}
    pipelined = [Case("moe", options={"recompute": "full"}), Case("moe", options=moe)]
    split = [Case("dense tied", options=mlp), Case("moe", options={"log_prob_chunk_tokens": 7})]
    reference.compare(pipelined, LAYOUTS["PP2"])
    reference.compare(split, LAYOUTS["TP2"])


OVERLAPPED: dict[str, dict[str, int]] = {
    "DP2": {"data": 2},
    "DP2 EP2": {"data": 2, "expert": 2},
    "TP2 DP2": {"tensor": 2, "data": 2},
    "PP2 DP2": {"pipeline": 2, "data": 2},
    "PP2 VPP2 DP2": {"pipeline": 2, "virtual_pipeline": 2, "data": 2},
    "CP2 DP2 EP4": {"context": 2, "data": 2, "expert": 4},
}


@pytest.mark.parametrize("name", varied(OVERLAPPED, ["DP2 EP2"]))
def test_overlapping_communication_does_not_matter(name: str, reference: Reference):
    parallel = OVERLAPPED[name] | {"overlap_grad_reduce": True}
    experts = [Case("moe tied"), Case("deepseek", distributed_optimizer=True)]
    cases = experts + ([] if "expert" in parallel else [Case("dense", distributed_optimizer=True), Case("dense tied")])
    with_gather = [replace(case, distributed_optimizer=True) for case in cases]
    # every micro-batch passes such a model once, so that gradients travel while no forward pass comes between
    kept = [replace(case, kept_forwards=1 if "pipeline" in parallel else 9) for case in with_gather]
    for found, of in (
        (reference.run(cases, parallel, run_in_small_buckets), cases),
        (reference.run(kept, parallel | {"overlap_param_gather": True}, run_in_small_buckets), with_gather),
    ):
        for case, whole in zip(of, found, strict=True):
            assert_same(case, whole, reference.of(case))


def test_balanced_routers(reference: Reference):
    """The auxiliary loss belongs to a micro-batch, so it is compared where the rows are the same: on other stages, and
    beside a rank that has only padding. The moving correction bias is a sum over the mini-batch: anywhere."""
    loss, bias = {"router_aux_loss": 0.1}, {"router_bias_update_rate": 0.01}
    several, single = Case("moe", options=loss), Case("moe", options=loss, batch="single", budget=None)
    moving = Case("deepseek", distributed_optimizer=True, options=bias)
    wanted = reference.run([several, single, replace(moving, budget=None)], {})
    pipelined = reference.run([several, replace(moving, options=bias | {"recompute": "full"})], LAYOUTS["PP2"])
    spread = reference.run([single, moving], EXPERT_LAYOUTS["DP2 EP2"])
    (cut,) = reference.run([moving], LAYOUTS["TP2 CP2"])
    for case, found, whole in [
        (several, pipelined[0], wanted[0]),
        (single, spread[0], wanted[1]),
        (moving, pipelined[1], wanted[2]),
        (moving, spread[1], wanted[2]),
        (moving, cut, wanted[2]),
    ]:
        assert_same(case, found, whole)
    for case, whole in ((several, wanted[0]), (single, wanted[1])):
        assert tensor_difference(whole.gradients["fixed"], reference.of(case).gradients["fixed"]) > 0.01
    key = next(name for name in wanted[2].parameters if name.endswith("expert_bias"))
    moved = np.abs(wanted[2].parameters[key] - reference.of(moving).parameters[key])
    np.testing.assert_allclose(moved.max(), 0.05, rtol=0.01)  # three steps and two gradients before them


def test_the_expert_marks_matter(reference: Reference):
    """With expert = 1 and expert_tensor other than tensor Megatron 0.16 is wrong without them."""
    (found,) = reference.run([Case("moe")], EXPERT_LAYOUTS["DP2 ETP2"], run_without_expert_marks)
    assert tensor_difference(found.gradients["fixed"], reference.of(Case("moe")).gradients["fixed"]) > 0.01


def test_the_gates_differ(reference: Reference):
    """The coupled gate is not a fixed one in disguise: otherwise the reduction over ranks would go untested."""
    gradients = reference.of(Case("moe")).gradients
    key = "output_layer.weight"
    assert np.abs(gradients["fixed"][key] - gradients["coupled"][key]).max() > 1e-3
