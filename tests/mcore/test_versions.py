"""Both shapes of everything in which the versions of Megatron-Core differ."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fiberpo_megatron.mcore import versions
from fiberpo_megatron.mcore.versions import group_identity, load_checkpoint, save_common, set_grouped_layers, set_router


class Experts:
    """A stand-in for Megatron's module of experts."""

    def __init__(self, submodules: Any) -> None:
        self.submodules = submodules


@pytest.mark.parametrize("wrap", [lambda parts: functools.partial(Experts, submodules=parts), Experts])
def test_the_router_of_either_description(wrap: Any):
    parts = SimpleNamespace(router=object)
    spec = SimpleNamespace(submodules=SimpleNamespace(mlp=wrap(parts)))
    set_router(spec, int)
    built = spec.submodules.mlp() if isinstance(spec.submodules.mlp, functools.partial) else spec.submodules.mlp
    assert built.submodules.router is int


class Grouped:
    """A stand-in for Megatron's layer of grouped products, as 0.16.1 has it."""

    num_gemms = 2

    def _split_extra_state(self, state: torch.Tensor) -> list[torch.Tensor]:
        assert state.numel(), "0.16.1 takes content for granted"
        return list(state.chunk(self.num_gemms))


@pytest.mark.parametrize("later", [False, True])
def test_the_grouped_layers_of_either_description(later: bool):
    """0.16.1 gets layers that take an empty state; 0.19.2, which takes one itself, keeps its own."""
    layers = SimpleNamespace(linear_fc1=Grouped, linear_fc2=Grouped)
    wrap = functools.partial(functools.partial, Experts) if later else Experts
    experts = wrap(submodules=layers)
    set_grouped_layers(
        SimpleNamespace(submodules=SimpleNamespace(mlp=wrap(submodules=SimpleNamespace(experts=experts))))
    )
    for layer in (layers.linear_fc1, layers.linear_fc2):
        assert (layer is Grouped) == later
        if not later:
            assert [part.numel() for part in layer()._split_extra_state(torch.empty(0))] == [0, 0]
            assert [part.numel() for part in layer()._split_extra_state(torch.ones(4))] == [2, 2]


class Strategy:
    """The strategy object of 0.16.1."""

    def __init__(self, *name: Any) -> None:
        pass

    def save_common(self, state: dict[str, Any], folder: str) -> None:
        Path(folder, "common").write_text(str(state))


@pytest.mark.parametrize("earlier", [True, False])
def test_the_common_state_is_written_once(earlier: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    functions = SimpleNamespace(save_common=lambda state, folder: Path(folder, "common").write_text(str(state)))
    strategies = SimpleNamespace(TorchCommonSaveStrategy=Strategy) if earlier else functions
    monkeypatch.setattr(versions, "common_strategies", strategies)
    save_common({"step": 3}, str(tmp_path))
    assert (tmp_path / "common").read_text() == "{'step': 3}"


def earlier_load(
    wanted: Any,
    folder: str,
    sharded_strategy: Any = None,
    common_strategy: Any = None,
    validate_access_integrity: bool = True,
    strict: Any = None,
) -> dict[str, Any]:
    """What 0.16.1 does with its arguments."""
    assert not validate_access_integrity
    return common_strategy.load_common(folder) | {"read with": sharded_strategy, "strict": strict}


def test_a_checkpoint_is_read_by_either_version(monkeypatch: pytest.MonkeyPatch):
    def later_load(
        wanted: Any,
        folder: str,
        sharded_strategy: Any = None,
        validate_access_integrity: bool = True,
        strict: Any = None,
    ) -> dict[str, Any]:
        assert not validate_access_integrity
        return later.load_common_state_dict(folder) | {"read with": sharded_strategy, "strict": strict}

    def must_not_read(folder: str) -> dict[str, Any]:
        raise AssertionError(f"{folder}: the file of the common state is read freely")

    later = SimpleNamespace(load=later_load, load_common_state_dict=must_not_read)
    monkeypatch.setattr(versions, "common_strategies", SimpleNamespace(TorchCommonLoadStrategy=object))
    for serialization in (SimpleNamespace(load=earlier_load), later):
        monkeypatch.setattr(versions, "serialization", serialization)
        loaded = load_checkpoint({}, "folder", common={"step": 3}, tensors="reader", strict="strict")
        assert loaded == {"step": 3, "read with": "reader", "strict": "strict"}
    assert later.load_common_state_dict is must_not_read


def test_parameter_groups_are_told_apart_where_keys_are_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "param_group_identifier_keys", ("wd_mult", "end_wd"))
    assert group_identity({"wd_mult": 1.0}) == group_identity({"wd_mult": 1.0, "end_wd": None})
    assert group_identity({"wd_mult": 1.0}) != group_identity({"wd_mult": 0.0})
