"""Hugging Face weights in every layout: transformers' answers, an export equal bit for bit to the files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.parallel.layout import start_layout
from fiberpo_megatron.mcore.policy import build_policy
from fiberpo_megatron.mcore.probe import Observation, observed, whole
from fiberpo_megatron.mcore.weights import export_hf
from fiberpo_megatron.mcore.weights.global_tensors import gradients_as_data
from fiberpo_megatron.types import concatenated_response_tokens
from tests.distributed.parity import (
    TEMPERATURE,
    fixed_gate,
    loss_weights,
    make_batch,
    make_config,
    micro_batches_for,
)
from tests.mcore.weights.weights_reference import (
    DENSE,
    MODELS,
    MOE,
    Expected,
    expected,
    read_config,
    read_tensors,
    write_gradients,
    write_model,
)

pytestmark = pytest.mark.timeout(900)  # transformers runs every model once, which takes minutes on a busy machine
LAYOUTS: dict[str, tuple[int, dict[str, int], list[str]]] = {
    "one process": (1, {}, list(MODELS)),
    "TP2": (2, {"tensor": 2}, [*DENSE, *MOE, "qwen3-yarn"]),
    "PP2": (2, {"pipeline": 2}, [*DENSE, *MOE]),
    "VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, ["qwen3-tied", "qwen2", "qwen3_moe-mixed", "deepseek_v3"]),
    "EP2": (2, {"expert": 2}, list(MOE)),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}, ["qwen3_moe", "qwen2", "qwen3-tied", "deepseek_v3"]),
    "PP2xEP2": (4, {"pipeline": 2, "expert": 2}, ["qwen3_moe", "mixtral", "deepseek_v3"]),
    "TP2xEP2, ETP2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}, ["qwen3_moe", "deepseek_v3"]),
}
"""Processes, parallel sizes, models."""


@dataclass(frozen=True)
class Models:
    """Folder of all models, each with the gradients of a loss beside it, and transformers' answers."""

    root: Path
    expected: dict[str, Expected]


@dataclass
class Answer:
    """What one rank says of one model."""

    scores: dict[int, tuple[float, float]]
    """(log-prob, entropy) by flat token index; empty away from the last pipeline stage."""
    seen: Observation
    """Of all ranks."""
    exported: list[tuple[str, Tensor]]
    gradients: dict[str, Tensor]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Every model written once (one in several files) and run by transformers."""
    root = tmp_path_factory.mktemp("models")
    batch = make_batch(vocab=51)
    wanted = {}
    for name in MODELS:
        model = write_model(root / name, name, max_shard_size="50KB" if name == "mixtral" else "5GB")
        wanted[name] = expected(model, batch, TEMPERATURE)
        write_gradients(model, batch, loss_weights(len(batch.tokens)), TEMPERATURE, root / name / "gradients")
    return Models(root, wanted)


def answer(root: Path, names: list[str], parallel: dict[str, int]) -> dict[str, Answer]:
    """This rank's answer for every model."""
    sizes: dict[str, Any] = {"distributed_optimizer": False, **parallel}
    config = make_config(parallel=sizes)
    layout = start_layout(read_config(root / names[0]), config.parallel, config.run)
    batch = make_batch(vocab=51)
    (micro_batch,) = micro_batches_for(batch, layout, None)
    index = concatenated_response_tokens([micro_batch]).tolist()
    gate = fixed_gate([micro_batch], len(batch.tokens))
    out = {}
    for name in names:
        sections = make_config(parallel=sizes, model={"path": root / name, "random_init": False})
        policy = build_policy(sections, read_config(root / name), layout)
        with observed(policy.models) as seen:
            scores = policy.log_probs([micro_batch], TEMPERATURE)
        # a bucket smaller than the model, so that several are sent
        exported = list(export_hf(policy.models, policy.hf_config, layout, bucket_bytes=20_000))
        policy.accumulate([micro_batch], gate, TEMPERATURE, single_pass=True)
        with gradients_as_data(policy.models):
            gradients = dict(export_hf(policy.models, policy.hf_config, layout))
        by_token = dict(zip(index, zip(scores.log_probs.tolist(), scores.entropy.tolist()))) if scores else {}
        out[name] = Answer(by_token, whole(seen, micro_batch, layout, len(batch.tokens)), exported, gradients)
    return out


def inputs() -> NDArray[np.int64]:
    """Tokens that the model sees: all but the last of a trajectory, which is only a label."""
    batch = make_batch(vocab=51)
    return np.setdiff1d(np.arange(len(batch.tokens)), batch.offsets[1:] - 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_transformers(layout: str, models: Models) -> None:
    """Log-probs, logits, hidden states, routing, gradients; and the export is what was loaded."""
    ranks, parallel, names = LAYOUTS[layout]
    outcomes = run_ranks(ranks, answer, models.root, names, parallel)
    for name in names:
        answers, wanted = [outcome[name] for outcome in outcomes], models.expected[name]
        assert_scores(name, answers, wanted)
        assert_inside(name, answers[0], wanted)
        assert_gradients(name, answers[0].gradients, read_tensors(models.root / name / "gradients"))
        stored, exported = read_tensors(models.root / name), dict(answers[0].exported)
        assert exported.keys() == stored.keys()
        assert all(torch.equal(exported[tensor], stored[tensor]) for tensor in stored)
        for other in answers[1:]:
            assert [tensor for tensor, _ in other.exported] == list(exported)
            assert all(len(value) == 0 for _, value in other.exported)


def assert_scores(name: str, answers: list[Answer], wanted: Expected) -> None:
    scored = {token: value for answer in answers for token, value in answer.scores.items()}
    tokens = sorted(scored)
    assert len(tokens) == make_batch(vocab=51).response_mask.sum()
    got = torch.tensor([scored[token] for token in tokens])
    rows = (wanted.logits[[token - 1 for token in tokens]] / TEMPERATURE).log_softmax(-1)
    answered = torch.stack([wanted.log_probs[tokens], -(rows.exp() * rows).sum(-1)], dim=1)
    # float32 sums in another order than transformers': about 1e-6 each
    torch.testing.assert_close(got, answered, atol=1e-5, rtol=0, msg=lambda m: f"{name}: {m}")


def assert_inside(name: str, answer: Answer, wanted: Expected) -> None:
    """Hidden states and logits to float32 rounding; each token goes to the same experts."""
    rows, exported = inputs(), dict(answer.exported)
    output = exported.get("lm_head.weight", exported["model.embed_tokens.weight"])
    logits = answer.seen.final[0] @ output.T
    torch.testing.assert_close(logits[rows], wanted.logits[rows], atol=1e-4, rtol=0, msg=lambda m: f"{name}: {m}")
    assert sorted(answer.seen.layers) == list(range(4)) and answer.seen.routers.keys() == wanted.routers.keys()
    for layer, hidden in answer.seen.layers.items():
        torch.testing.assert_close(hidden[rows], wanted.layers[layer][rows], atol=1e-4, rtol=1e-5)
    for layer, probabilities in answer.seen.routers.items():
        torch.testing.assert_close(probabilities[rows].float(), wanted.routers[layer][rows], atol=1e-5, rtol=0)
        assert torch.equal(probabilities[rows] > 0, wanted.routers[layer][rows] > 0), (name, layer)


def assert_gradients(name: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for tensor, value in wanted.items():
        if tensor.endswith("e_score_correction_bias"):  # a buffer
            continue
        worst = (found[tensor] - value).abs().max() / value.abs().max().clamp(min=1e-6)
        assert worst < 1e-4, f"{name}: {tensor} is off by {worst:.1e} of its largest element"


def test_families_are_covered() -> None:
    from fiberpo_megatron.mcore.families import FAMILIES

    assert {family for family, _ in MODELS.values()} == set(FAMILIES)
    assert not DENSE.keys() & MOE.keys()
