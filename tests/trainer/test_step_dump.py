"""A dumped training step holds what the objective saw and gave, and a replay gives the same bits."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fiberpo_megatron.certify.replay import replay, same_machine, table
from fiberpo_megatron.cli.main import main
from fiberpo_megatron.config import Config
from fiberpo_megatron.trainer.loop import train
from fiberpo_megatron.trainer.step_dump import FOLDER, StepDumps
from fiberpo_megatron.trainer.step_file import METADATA, StepFile, write_joined
from tests.trainer.test_loop import toy_config, training


def dumped(folder: Path, objective: str = "fiberpo", steps: tuple[int, ...] = (1,), **sections: object) -> Path:
    """The file of the last of `steps` of a toy run."""
    run, _ = training(objective, **sections)
    train(dataclasses.replace(run, dumps=StepDumps(folder, steps, objective)))
    return folder / FOLDER / f"step-{steps[-1]:08}.safetensors"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dumped(tmp_path_factory.mktemp("run"))


def changed(file: Path, to: Path, name: str, tensor: torch.Tensor) -> Path:
    """A copy of the file with another tensor."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file) | {name: tensor.contiguous()}, to, metadata)
    return to


def test_the_file_holds_the_steps_of_the_run(file: Path):
    found = StepFile(file)
    assert found.steps == [0, 1, 2, 3]  # two mini-batches, two epochs
    assert found.about["step"] == 1
    assert found.about["objective"]["use"] == "fiberpo"
    assert found.about["machine"]["torch"] == torch.__version__
    lengths = found.tensor("rollouts/lengths")
    tokens, mask = found.tensor("rollouts/tokens"), found.tensor("rollouts/response_mask")
    assert len(lengths) == 96
    assert int(lengths.sum()) == len(tokens)
    index = torch.cat([found.tensor(f"{number}/token_index") for number in (0, 1)])
    assert sorted(index.tolist()) == mask.nonzero()[:, 0].tolist()  # both mini-batches: each response token once
    assert torch.equal(found.tensor("1/token_ids"), tokens[found.tensor("1/token_index")])
    assert not (file.parent / f".{file.name}.parts").exists()


def test_the_first_optimiser_step_is_on_policy_and_the_others_are_single_passes(file: Path):
    found, objective = StepFile(file), replay(file).objective
    first, last = found.step(0, objective), found.step(3, objective)
    assert not first.single_pass
    assert not first.tokens.log_ratio.any()
    torch.testing.assert_close(first.coefficients, (first.tokens.weights * first.tokens.advantages).float())
    assert last.single_pass
    assert len(last.calls[0]) > 1
    assert last.tokens.log_ratio.any()
    assert last.metrics is not None
    assert last.metrics["token/weight"] == pytest.approx(1)
    assert "gate/trajectory/plus/pass" in last.metrics


@pytest.mark.parametrize(
    "objective", ["fiberpo", "fiberpo-domain", "fiberpo-expert", "apc", "tests.fibration.topr:TOPR"]
)
def test_a_replay_has_equal_bits(tmp_path: Path, objective: str):
    result = replay(dumped(tmp_path, objective))
    assert result.bits, result.why
    assert result.passed, list(table(result))
    assert all(one.equal for row in result.rows for one in row.found.values())
    assert set(result.rows[-1].found) == {"coefficients", "gated_ratio", "value", "metrics"}


def test_only_the_steps_that_were_asked_for_are_written(tmp_path: Path):
    dumped(tmp_path, steps=(0, 2))
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [
        "step-00000000.safetensors",
        "step-00000002.safetensors",
    ]


def test_options_and_kernels_are_the_runs(tmp_path: Path):
    run, _ = training("fiberpo")
    objective = dataclasses.replace(
        run.objective, epsilon=(0.03, 0.02), budgets={"trajectory": {"by": "trajectory", 2: (0.5, 0.25)}}, kernels=False
    )
    run = dataclasses.replace(run, objective=objective, dumps=StepDumps(tmp_path, [0], "fiberpo"), steps=1)
    train(run)
    again = replay(tmp_path / FOLDER / "step-00000000.safetensors")
    assert again.passed
    assert again.objective.kernels is False
    assert again.objective.epsilon == [0.03, 0.02]
    assert again.objective.budgets == {"trajectory": {"by": "trajectory", "2": [0.5, 0.25]}}


def test_one_wrong_bit_is_found_with_its_token(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    coefficients = load_file(file)["2/coefficients"].clone()
    coefficients.view(torch.int32)[7] ^= 1
    wrong = changed(file, tmp_path / "wrong.safetensors", "2/coefficients", coefficients)
    assert main(["replay-step", str(file)]) == 0
    assert main(["replay-step", str(wrong)]) == 1
    told = capsys.readouterr().out
    (line,) = [line for line in told.splitlines() if "DIFFERS" in line]
    assert line.split()[0] == "2"
    assert "1 differ" in line
    result = replay(wrong)
    step = StepFile(wrong).step(2, result.objective)
    assert step.where(7) in line
    assert line.count("equal bits") == 3


@pytest.mark.parametrize("name", ["gated_ratio", "values", "metrics"])
def test_every_result_is_compared(file: Path, tmp_path: Path, name: str):
    tensor = load_file(file)[f"1/{name}"].clone()
    tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)[-1] ^= 1
    result = replay(changed(file, tmp_path / "wrong.safetensors", f"1/{name}", tensor))
    assert [row.passed for row in result.rows] == [True, False, True, True]


def test_another_machine_gets_a_tolerance(file: Path, tmp_path: Path):
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        about = json.loads(opened.metadata()[METADATA])
    about["machine"]["torch"] = "1.0"
    near = tensors["1/coefficients"].clone()
    near.view(torch.int32)[3] ^= 1
    save_file(tensors | {"1/coefficients": near}, tmp_path / "near", {METADATA: json.dumps(about)})
    result = replay(tmp_path / "near")
    assert not result.bits
    assert "torch was 1.0" in result.why
    assert result.passed
    far = near.clone()
    far[3] += 1e-3 * far.abs().max()
    save_file(tensors | {"1/coefficients": far}, tmp_path / "far", {METADATA: json.dumps(about)})
    assert [row.passed for row in replay(tmp_path / "far").rows] == [True, False, True, True]
    assert same_machine({}, {"torch": "2"}) == (False, "the file does not say on what it was computed")


def test_a_step_that_is_not_finite_is_dumped_before_it_fails(tmp_path: Path):
    run, _ = training("fiberpo")

    def fails(*args: object, **keywords: object) -> None:
        step(*args, **keywords)
        raise FloatingPointError("the gradient of table is not finite")

    step, run.policy.step = run.policy.step, fails  # type: ignore[method-assign]
    run = dataclasses.replace(run, dumps=StepDumps(tmp_path, [0], "fiberpo"))
    with pytest.raises(FloatingPointError, match="the gradient of table"):
        train(run)
    result = replay(tmp_path / FOLDER / "step-00000000.safetensors")
    assert [row.step for row in result.rows] == [0]
    assert result.passed
    assert "metrics" not in result.rows[0].found


def test_a_rank_that_cannot_write_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fiberpo_megatron.trainer.step_dump.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        dumped(tmp_path)
    assert not list((tmp_path / FOLDER).glob("step-*"))


def test_parts_are_joined_in_order_and_in_one_type(tmp_path: Path):
    parts = [tmp_path / "a", tmp_path / "b"]
    save_file({"x": torch.arange(3.0), "y": torch.tensor([True])}, parts[0])
    save_file({"x": torch.arange(3.0, 5.0), "z": torch.ones(2, 3)}, parts[1])
    write_joined(tmp_path / "whole", parts, {"w": torch.tensor([7])}, {"k": 1})
    whole = load_file(tmp_path / "whole")
    assert whole["x"].tolist() == [0, 1, 2, 3, 4]
    assert whole["y"].tolist() == [True]
    assert whole["z"].shape == (2, 3)
    assert whole["w"].tolist() == [7]
    save_file({"x": np.float64(1) * torch.ones(2, dtype=torch.float64)}, parts[1])
    with pytest.raises(ValueError, match="ranks hold x in different types"):
        write_joined(tmp_path / "mixed", parts, {}, {})
    assert not (tmp_path / "mixed").exists()


def test_steps_that_the_run_does_not_have_are_refused():
    assert toy_config(debug={"dump_step": 2}).debug.steps == [2]
    assert toy_config(debug={"dump_step": [0, 2]}).debug.steps == [0, 2]
    assert toy_config().debug.steps == []
    with pytest.raises(ValueError, match="debug.dump_step = 3: the run has steps 0 to 2"):
        Config.model_validate(toy_config().model_dump() | {"debug": {"dump_step": [1, 3]}})
