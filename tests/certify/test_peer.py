"""The file of another framework: what its page says, what is filled in, and what is refused with name and fix."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fiberpo_megatron.certify.peer import compare_peer
from fiberpo_megatron.certify.replay import dumped_objective
from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.trainer.step_file import METADATA, StepFile, StepFileError

ROOT = Path(__file__).parents[2]
TRAJECTORIES = torch.tensor([70, 70, 70, 12, 12, 12, 12, 3, 3])
FIBERPO = build_objective("fiberpo")


def tensors() -> dict[str, Tensor]:
    """What a peer writes, with the right coefficients of fiberpo."""
    random = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(9, generator=random)
    advantages = torch.tensor([1.0, -1.0, 0.5])[torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])]
    lengths = torch.tensor([3.0, 4.0, 2.0])[torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])]
    ids = torch.tensor([2, 2, 2, 1, 1, 1, 1, 0, 0])
    old = -torch.rand(9, generator=random)
    now = old + x
    out = FIBERPO(now - old, advantages, 1 / (3 * lengths.double()), keys={"trajectory": ids})
    return {
        "token_ids": torch.arange(100, 109),
        "log_probs": now,
        "old_log_probs": old,
        "advantages": advantages,
        "coefficients": out.gradient,
        "keys/trajectory": TRAJECTORIES,
    }


def written(path: Path, change: dict[str, Tensor | None] | None = None, about: object = None) -> StepFile:
    found = {name: tensor for name, tensor in (tensors() | (change or {})).items() if tensor is not None}
    save_file(found, path, None if about is None else {METADATA: json.dumps(about)})
    return StepFile(path)


def test_a_file_without_weights_counts_or_numbers_is_filled_in(tmp_path: Path):
    step = written(tmp_path / "peer").step(0, FIBERPO)
    assert step.tokens.counts == {"trajectory": 3}
    assert step.tokens.keys["trajectory"].tolist() == [2, 2, 2, 1, 1, 1, 1, 0, 0]
    assert step.tokens.labels["trajectory"].tolist() == [3, 12, 70]
    assert step.tokens.weights.tolist() == pytest.approx([1 / 9] * 3 + [1 / 12] * 4 + [1 / 6] * 2)
    compared = compare_peer(step, FIBERPO, 1e-5)
    assert compared.check.passed, compared.check
    assert step.where(4) == "trajectory 1, response token 1, id 104"
    token_mean = written(tmp_path / "other", about={"weighting": "token-mean"}).step(0, FIBERPO)
    assert token_mean.tokens.weights.tolist() == pytest.approx([1 / 9] * 9)


def test_several_optimiser_steps_have_numbers(tmp_path: Path):
    both = {f"{number}/{name}": tensor for number in (0, 1) for name, tensor in tensors().items()}
    both = {name: tensor.clone() for name, tensor in both.items()}
    save_file(both, tmp_path / "both")
    assert StepFile(tmp_path / "both").steps == [0, 1]
    assert compare_peer(StepFile(tmp_path / "both").step(1, FIBERPO), FIBERPO, 1e-5).check.passed
    save_file(both | {"coefficients": torch.zeros(9)}, tmp_path / "mixed")
    with pytest.raises(StepFileError, match="with and without the number of an optimiser step"):
        StepFile(tmp_path / "mixed")


def test_the_worst_tokens_come_first(tmp_path: Path):
    coefficients = tensors()["coefficients"].clone()
    coefficients[5] += 0.25
    coefficients[1] -= 0.125
    compared = compare_peer(written(tmp_path / "peer", {"coefficients": coefficients}).step(0, FIBERPO), FIBERPO, 1e-5)
    assert not compared.check.passed
    assert [one.where for one in compared.worst] == [
        "trajectory 1, response token 2, id 105",
        "trajectory 2, response token 1, id 101",
    ]
    assert compared.worst[0].theirs - compared.worst[0].ours == pytest.approx(0.25)
    assert compared.hint is None
    assert compared.check.where == compared.worst[0].where


@pytest.mark.parametrize(("factor", "hint"), [(-1.0, "a loss that is minimised"), (3.0, "ours times 3:")])
def test_a_common_factor_is_named(tmp_path: Path, factor: float, hint: str):
    file = written(tmp_path / "peer", {"coefficients": factor * tensors()["coefficients"]})
    compared = compare_peer(file.step(0, FIBERPO), FIBERPO, 1e-5)
    assert not compared.check.passed
    assert compared.hint is not None and hint in compared.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": None}, r"tensor 'coefficients': is missing; add it, float32 \[T\]"),
        ({"advantages": None}, r"tensor 'advantages': is missing; add it"),
        ({"log_probs": None}, r"tensor 'log_ratio': is missing; add it, float32 \[T\], or both log_probs"),
        ({"old_log_probs": None}, "tensor 'old_log_probs': is missing"),
        ({"advantages": torch.zeros(8)}, r"tensor 'advantages' \[8\]: has 8 entries, but coefficients has 9"),
        ({"coefficients": torch.zeros(3, 3)}, r"tensor 'coefficients' \[3, 3\]: has more than one dimension"),
        ({"coefficients": torch.zeros(9).half()}, "has dtype torch.float16; write float32 or float64"),
        ({"advantages": torch.full((9,), float("nan"))}, "holds nan at token 0; every token needs a finite number"),
        ({"keys/trajectory": TRAJECTORIES.float()}, r"'keys/trajectory' \[9\]: has dtype torch.float32; write int64"),
        ({"keys/trajectory": None}, "tensor 'keys/trajectory': is missing, and objective 'fiberpo' reads it"),
        ({"weights": -torch.ones(9)}, "weights must not be negative"),
        ({"expert_share": torch.ones(4, 2)}, r"tensor 'expert_share' \[4, 2\]: must be float \[9, P\]"),
        ({"labels/trajectory": torch.zeros(2).long()}, r"'labels/trajectory' \[2\]: must be int64 \[3\]"),
    ],
)
def test_what_is_missing_or_malformed_is_named(tmp_path: Path, change: dict[str, Tensor | None], message: str):
    with pytest.raises(StepFileError, match=message):
        written(tmp_path / "peer", change).step(0, FIBERPO)


def test_what_an_objective_needs_is_named(tmp_path: Path):
    file = written(tmp_path / "peer")
    with pytest.raises(StepFileError, match="'keys/prompt_group': is missing, and objective 'fiberpo-domain' reads it"):
        file.step(0, build_objective("fiberpo-domain"))
    group = {"keys/domain": TRAJECTORIES * 0, "keys/prompt_group": TRAJECTORIES * 0}
    with pytest.raises(StepFileError, match="'expert_share': is missing, and objective 'fiberpo-expert' reads it"):
        written(tmp_path / "peer", group).step(0, build_objective("fiberpo-expert"))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"version": 99}, "has version 99 of the format, and this package reads 1"),
        ([1], "write a JSON object"),
        ({"objective": 3}, '"objective" is 3; write'),
        ({"optimizer_steps": [{"counts": {"trajectory": 2}}]}, "holds the id 70, but counts says 2 ids"),
        ({"weighting": "mean"}, "\"weighting\" is 'mean'; write 'seq-mean' or 'token-mean'"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path: Path, about: object, message: str):
    with pytest.raises(StepFileError, match=re.escape(message)):
        file = written(tmp_path / "peer", about=about)
        assert file.objective is None
        file.step(0, FIBERPO)


def test_files_that_are_none(tmp_path: Path):
    with pytest.raises(StepFileError, match="does not exist, or is no file; name a dumped step"):
        StepFile(tmp_path / "nothing")
    (tmp_path / "text").write_text("coefficients: 1, 2, 3")
    with pytest.raises(StepFileError, match="is no whole safetensors file"):
        StepFile(tmp_path / "text")
    save_file(tensors(), tmp_path / "peer", {METADATA: "{"})
    with pytest.raises(StepFileError, match="is no JSON"):
        StepFile(tmp_path / "peer")


def test_a_replay_needs_the_objective(tmp_path: Path):
    with pytest.raises(
        StepFileError, match="names no objective, so it is a file of another framework; compare it with"
    ):
        dumped_objective(written(tmp_path / "peer"))
    with pytest.raises(StepFileError, match="cannot be built: unknown objective 'mine'"):
        dumped_objective(written(tmp_path / "mine", about={"objective": "mine"}))


def test_the_example_of_the_page_writes_a_file_that_we_reproduce(tmp_path: Path):
    page = (ROOT / "docs/certify.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    file = StepFile(tmp_path / "peer.safetensors")
    assert file.objective is not None
    objective = build_objective(file.objective[0], **file.objective[1])
    compared = compare_peer(file.step(0, objective), objective, 1e-5)
    assert compared.check.passed, compared
