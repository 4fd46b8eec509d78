"""What the doctor and a rank say of Transformer Engine's attention and of two versions of cuDNN."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch

from fiberpo_megatron.config import Config
from fiberpo_megatron.doctor import attention, examination
from fiberpo_megatron.doctor.attention import Answer, Shape
from fiberpo_megatron.doctor.report import Finding
from fiberpo_megatron.mcore import cudnn
from tests.gpu_ready.te_ranks import driver_of
from tests.gpu_ready.te_stub import VERSIONS
from tests.variations import varied

REASON = "Disabling FusedAttention: CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED"
ONE = Answer("9.19.0", "9.19.0", backend="fused")
TWO = Answer("9.19.0", "9.14.0", ["/image/lib", "/venv/nvidia/cudnn/lib"], "unfused", [REASON])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())


def found(answer: Answer, context: int = 1) -> dict[str, Finding]:
    config = Config.model_validate({"model": {"path": "nowhere"}, "parallel": {"context": context}})
    findings = attention.check(config, lambda shape: answer)
    assert all((finding.status == "pass") == (not finding.fix) for finding in findings)
    return {finding.check: finding for finding in findings}


def test_without_transformer_engine_nothing_is_tried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert attention.check(None, lambda shape: pytest.fail("it was tried")) == []


def test_one_cudnn_and_the_fused_attention_pass(installed):
    assert {finding.status for finding in found(ONE).values()} == {"pass"}
    assert found(ONE)["attention"].seen == "fused, for heads of 128"


def test_two_versions_of_cudnn_fail_with_their_folders(installed):
    finding = found(TWO)["cuDNN"]
    assert finding.status == "fail" and "CUDNN_HOME" in finding.fix
    for text in ("torch runs 9.19.0", "Transformer Engine 9.14.0", "/image/lib, /venv/nvidia/cudnn/lib"):
        assert text in finding.seen


def test_the_unfused_attention_is_a_warning_and_fails_under_context_parallelism(installed):
    alone, together = found(TWO)["attention"], found(TWO, context=2)["attention"]
    assert (alone.status, together.status) == ("warn", "fail")
    assert REASON in alone.seen and REASON in together.seen and "2 context-parallel ranks" in together.seen
    none = found(Answer(error="ValueError: no backend"))
    assert none.keys() == {"attention"}, "versions that are not known are not compared"
    assert none["attention"].status == "fail" and "ValueError: no backend" in none["attention"].seen


def test_the_shape_is_that_of_one_rank(tmp_path: Path):
    from examples.demo.make_model import write_model

    write_model(tmp_path)
    config = Config.model_validate({"model": {"path": str(tmp_path)}, "parallel": {"tensor": 2}})
    whole = Config.model_validate({"model": {"path": str(tmp_path)}})
    halves, one = attention.shape_of(config), attention.shape_of(whole)
    assert (2 * halves.heads, 2 * halves.groups, halves.size) == (one.heads, one.groups, one.size)
    assert attention.shape_of(None) == Shape()


def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    """Have the trial run another program."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_the_trial_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pretended(monkeypatch, tmp_path, "echo Fatal: no GPU >&2; exit 3")
    assert attention.tried(Shape()).error == "the trial ended with exit code 3: Fatal: no GPU"
    pretended(monkeypatch, tmp_path, "exec sleep 60")
    assert attention.tried(Shape(), 0.3).error == "the trial gave no answer within 0.3 s"
    (tmp_path / "python").unlink()
    assert attention.tried(Shape()).error.startswith("the trial could not be started")


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="the trial would succeed")
def test_the_trial_is_a_process_that_answers():
    """Without a GPU and Transformer Engine the answer is the error."""
    answer = attention.tried(Shape())
    assert answer.backend == "none" and answer.error.startswith("ModuleNotFoundError")


def chosen(context: int) -> tuple[str, list[str]]:
    """Return what is taken with and without the fused attention, with Transformer Engine's own choice."""
    from transformer_engine.pytorch import DotProductAttention
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as choice
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    from tests.gpu_ready import te_backends

    te_backends.choose([te_backends.Attention(8, 8)])  # makes the GPU and cuDNN up
    utils.AttentionLogging._log_level = 10
    os.environ["NVTE_FUSED_ATTN"] = "0"
    choice._attention_backends["attention_params"] = te_backends._params(utils, te_backends.Attention(8, 8))
    cuda, attention._run = attention._run, lambda shape: cuda(shape, "cpu")
    try:
        with mock.patch.object(DotProductAttention, "softmax_scale", 1.0, create=True):  # 2.10 has none
            answer = attention.attempt(Shape(context=context))
            os.environ["NVTE_FUSED_ATTN"] = "1"
            return attention.attempt(Shape(context=context)).backend, [answer.backend, answer.error, *answer.reasons]
    finally:
        attention._run = cuda


@pytest.mark.parametrize("version", varied(VERSIONS, VERSIONS[:1]))
def test_the_choice_is_transformer_engines_own(version: str):
    backend, (without, error, *reasons) = driver_of(version).call(chosen, 2)
    assert (backend, without, error) == ("fused", "none", "")
    assert "Disabling FusedAttention due to NVTE_FUSED_ATTN=0" in reasons


def test_a_full_examination_of_a_machine_with_gpus_has_the_attention(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(examination.machine, "gpu_count", lambda: 1)
    monkeypatch.setattr(examination, "_ranks", list)
    monkeypatch.setattr(examination, "_software", lambda config: [])
    monkeypatch.setattr(examination.gpu_software, "every", lambda config: [])
    monkeypatch.setattr(attention, "check", lambda config: asked.append(config) or [Finding("attention", "pass", "")])
    assert [finding.check for finding in examination.full(None)] == ["attention"] and asked == [None]


def two_versions(monkeypatch: pytest.MonkeyPatch, theirs: tuple[int, int, int]) -> None:
    """Pretend torch's cuDNN 9.19.0 and Transformer Engine's."""
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["transformer_engine.pytorch.utils"].get_cudnn_version = lambda: theirs
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)


def test_a_rank_refuses_two_versions_of_cudnn_before_it_builds_anything(monkeypatch: pytest.MonkeyPatch):
    from fiberpo_megatron.mcore.gpu_platform import GpuPlatform

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    two_versions(monkeypatch, (9, 19, 0))
    assert GpuPlatform().name == "gpu"
    two_versions(monkeypatch, (9, 14, 0))
    with pytest.raises(ValueError, match=r"torch runs cuDNN 9.19.0, Transformer Engine 9.14.0; .*CUDNN_HOME"):
        GpuPlatform()


def test_versions_and_folders_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert [cudnn._text(number) for number in (91900, 91401, 8907)] == ["9.19.0", "9.14.1", "8.9.7"]
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 08:01 1  /venv/nvidia/cudnn/lib/libcudnn.so.9\n"
        "7f01-7f02 r--p 00000000 08:01 1  /venv/nvidia/cudnn/lib/libcudnn.so.9\n"
        "7f02-7f03 r-xp 00000000 08:01 2  /usr/lib/libcudnn_graph.so.9.14.0\n"
        "7f03-7f04 r-xp 00000000 08:01 3  /usr/lib/libc.so.6\n7f04-7f05 rw-p 00000000 00:00 0\n"
    )
    assert cudnn.cudnn_folders(maps) == ["/venv/nvidia/cudnn/lib", "/usr/lib"]
    assert cudnn.cudnn_folders(tmp_path / "none") == []


def test_transformer_engine_is_given_the_cudnn_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch/__init__.py"))
    variables: dict[str, str] = {}
    cudnn.prefer_torch_cudnn(variables)
    assert not variables and "CUDNN_HOME" in cudnn.one_cudnn(), "torch has no package of its own"
    library = tmp_path / "nvidia/cudnn/lib/libcudnn.so.9"
    library.parent.mkdir(parents=True)
    library.touch()
    cudnn.prefer_torch_cudnn(variables)
    assert variables == {"CUDNN_HOME": str(library.parent)}
    assert f"CUDNN_HOME={library.parent}" in cudnn.one_cudnn()
    maps = tmp_path / "maps"
    for loaded, wanted in (["/usr/lib"], Path("/usr/lib")), (["/usr/lib", "/opt/lib"], library.parent):
        maps.write_text("".join(f"7f00-7f01 r-xp 00000000 08:01 1  {folder}/libcudnn.so.9\n" for folder in loaded))
        assert cudnn.torch_cudnn(maps) == wanted, "the one that torch has loaded is torch's"
    for name in ("CUDNN_HOME", "CUDNN_PATH"):
        variables = {name: "/theirs"}
        cudnn.prefer_torch_cudnn(variables)
        assert variables == {name: "/theirs"}
