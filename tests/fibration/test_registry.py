"""Objectives of one's own: how they are found, their options, the keys that they need, and their kernels."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fiberpo_megatron.fibration import (
    DEFAULT_BUDGETS,
    GRPO,
    OBJECTIVES,
    PPO,
    Chunk,
    GatedChunk,
    Objective,
    TokenObjective,
    build_objective,
    evaluate,
    objective_class,
    objective_options,
    register,
    registry,
)
from tests.fibration import topr
from tests.fibration.oracle import random_case
from tests.fibration.registered import NAMES, TOPR, TurnGSPO

ROOT = Path(__file__).resolve().parents[2]
SUPPLIED = ("trajectory", "prompt_group", "domain")


@dataclass(frozen=True)
class Weighted(TokenObjective):
    """Is the shortest objective: an option without a default, and no registration."""

    scale: float
    """Factor of every ratio."""

    def gate(self, chunk: Chunk) -> GatedChunk:
        return GatedChunk(chunk.ratio, chunk.weights * chunk.advantages * chunk.ratio * self.scale)


# ---- finding a class ----


def test_the_page_shows_the_example_as_it_is_tested() -> None:
    page = (ROOT / "docs" / "fibration.md").read_text()
    assert Path(topr.__file__).read_text() in page


def test_short_name_import_path_class_and_instance_are_the_same() -> None:
    case = random_case(0)
    expected = case.call(TOPR(bound_positive=2.0)).gradient
    assert not torch.equal(case.call(TOPR()).gradient, expected)
    for objective in ("topr", "tests.fibration.topr:TOPR", TOPR):
        built = build_objective(objective, bound_positive=2.0)
        assert built == TOPR(bound_positive=2.0) and built.name == "topr"
        assert torch.equal(case.call(built).gradient, expected)
    built = TOPR(bound_positive=2.0)
    assert build_objective(built) is built
    assert build_objective(built, kernels=False) == replace(built, kernels=False)
    assert build_objective("tests.fibration.test_registry:Weighted", scale=2.0).name == "Weighted"


def test_what_is_registered_by_others_is_no_built_in() -> None:
    assert "topr" in NAMES and "gspo-turn" in NAMES and not {"topr", "gspo-turn"} & set(OBJECTIVES)


def test_a_module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(topr.__file__).read_text().replace('@register("topr")', '@register("mine")')
    (tmp_path / "objective_of_mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))  # other tests do not know this name
    case = random_case(0)
    found = case.call(build_objective("objective_of_mine:TOPR"))
    assert torch.equal(found.gradient, case.call(TOPR()).gradient)


class Nothing(TokenObjective):
    pass


class Forgotten(TokenObjective):
    temperature: float = 1.0

    def gate(self, chunk: Chunk) -> GatedChunk:
        return GatedChunk(chunk.ratio, chunk.ratio * self.temperature)


@pytest.mark.parametrize(
    ("objective", "options", "words"),
    [
        ("tests.fibration.topr:TOP", {}, "tests.fibration.topr has no TOP; it defines TOPR"),
        ("tests.fibration.toprs:TOPR", {}, "there is no module 'tests.fibration.toprs'"),
        ("tests.fibration.oracle:Case", {}, "is no subclass of fiberpo_megatron.fibration.Objective"),
        (Path, {}, "is no subclass of fiberpo_megatron.fibration.Objective"),
        (Nothing, {}, r"test_registry:Nothing lacks the method gate\(\)"),
        (TokenObjective, {}, r"lacks the method gate\(\)"),
        (Forgotten, {}, r"declares the option 'temperature' but is not a dataclass; write @dataclass\(frozen=True\)"),
        (Weighted, {}, "objective 'Weighted' needs the option 'scale'"),
        (TOPR, {"tau": 1.0}, "'topr' does not read 'tau'; remove it .topr reads bound_negative, bound_positive"),
        (TOPR, {"bound_positive": "hot"}, "option 'bound_positive' is 'hot'; its type is float"),
        (TOPR, {"bound_positive": True}, "option 'bound_positive' is True; its type is float"),
        (TOPR, {"bound_positive": -1.0}, "TOPR's bounds are -1.0 and 1.0; make both at least 1"),
        (TOPR(), {"bound_positive": 1.0}, "'topr' is already built and takes no options; give bound_positive to its"),
        ("fiberpo", {"unclip_positive": 1}, "option 'unclip_positive' is 1; its type is bool"),
        ("fiberpo", {"epsilon": "0.1"}, "option 'epsilon' is '0.1'; its type is"),
        ("fiberpo", {"budgets": 0.1}, "option 'budgets' is 0.1; its type is"),
        ("fiberpo", {"budgets": {"trajectory": ("a", "b")}}, "pass a pair of numbers"),
    ],
)
def test_refused(objective: object, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_objective(objective, **options)


def test_a_name_belongs_to_one_class() -> None:
    register("topr")(TOPR)  # a module that is imported twice registers twice
    with pytest.raises(ValueError, match="the objective name 'topr' belongs to tests.fibration.topr:TOPR"):
        register("topr")(Weighted)
    with pytest.raises(ValueError, match="leave out the colon"):
        register("a:b")(Weighted)
    assert objective_class("topr") is TOPR and Weighted.name == "Weighted"


# ---- options ----


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_type_a_default_and_a_sentence(name: str) -> None:
    for option in objective_options(name):
        assert option.default is not MISSING and option.type
        assert re.match(r"[A-Z].*\.$", option.doc), f"{name}.{option.name}: write a docstring below the field"


def test_options_are_listed_as_they_are_declared() -> None:
    by_name = {option.name: option for option in objective_options("dapo")}
    assert list(by_name) == ["epsilon", "epsilon_high", "dual_clip"]
    assert (
        by_name["epsilon"].default == (0.28, 0.2)
        and by_name["epsilon"].type == "float | Sequence[float] | Mapping[str, float]"
    )
    assert by_name["epsilon"].doc.startswith("Width of the clip of the ratio")
    (scale,) = objective_options(Weighted)
    assert scale == ("scale", "float", MISSING, "Factor of every ratio.")
    assert objective_options("tests.fibration.topr:TOPR") == objective_options("topr")


NOT_FINITE = (math.nan, math.inf, -math.inf)
OPTIONS = [
    (name, option.name) for name in NAMES for option in objective_options(name) if option.type not in ("bool", "str")
]


@pytest.mark.parametrize("number", NOT_FINITE)
@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_numbers_that_are_not_finite_are_refused(name: str, option: str, number: float) -> None:
    first = next(iter(build_objective(name).level_names), "trajectory")
    for value in (number, (0.1, number), [number, 0.1], {first: (0.1, number)}, {first: [number, 0.1]}, [[number]]):
        with pytest.raises(ValueError, match=f"option '{option}' is .*; its numbers must be finite"):
            build_objective(name, **{option: value})


def test_constructors_check_as_well() -> None:
    with pytest.raises(ValueError, match="its numbers must be finite"):
        GRPO(epsilon=math.nan)
    with pytest.raises(ValueError, match="1 - epsilon must stay"):
        GRPO(epsilon=2.0)


def test_a_subclass_changes_a_default() -> None:
    @dataclass(frozen=True)
    class Wide(GRPO):
        epsilon: float | Sequence[float] = (0.5, 0.4)

    case = random_case(2)
    for options in ({}, {"epsilon_high": 0.3}):
        pair = (options.get("epsilon_high", 0.5), 0.4)
        expected = case.call(build_objective("ppo", epsilon=pair))
        assert torch.equal(case.call(Wide(**options)).gradient, expected.gradient)


# ---- keys and levels ----


@pytest.mark.parametrize(
    ("levels", "spans"),
    [
        ([["turn"]], False),
        ([["turn"], ["trajectory"]], False),
        ([["turn", "expert"], ["turn"], ["trajectory"]], False),
        ([["turn"], ["trajectory"], ["prompt_group"]], True),
        ([["trajectory", "weight_version"], ["trajectory"]], False),
        ([["weight_version"]], True),
        ([["trajectory"], ["engine"]], True),
    ],
)
def test_new_keys_are_levels(levels: list[list[str]], spans: bool) -> None:
    """A turn lies inside a trajectory; a version of the weights and an engine do not."""
    budgets = {"+".join(level): (0.1, 0.08) for level in levels}
    objective = build_objective("fiberpo", epsilon=0.05, levels=levels, budgets=budgets)
    assert objective.spans_micro_batches is spans
    case = random_case(3)
    whole = case.call(objective).gradient
    assert torch.isfinite(whole).all()
    if not spans:
        parts = [(case.ids["trajectory"] == at).nonzero().squeeze(1) for at in case.ids["trajectory"].unique()]
        apart = torch.cat([case.call(objective, part, metrics=False).gradient for part in parts])
        torch.testing.assert_close(apart, whole, rtol=1e-10, atol=1e-15)
    missing = next(name for name in budgets if name not in DEFAULT_BUDGETS)
    with pytest.raises(ValueError, match=re.escape(f"level '{missing}' has no budget")):
        build_objective("fiberpo", levels=levels, budgets={})


def test_levels_of_new_keys_must_nest() -> None:
    levels = [["trajectory"], ["weight_version"]]
    objective = build_objective("fiberpo", levels=levels, budgets={"trajectory": (1, 0.9), "weight_version": (1, 0.9)})
    with pytest.raises(ValueError, match="level 'trajectory' is not nested in level 'weight_version'"):
        random_case(3).call(objective)


def test_keys_that_a_run_does_not_supply_are_named() -> None:
    levels = [["turn"], ["trajectory"]]
    turns = build_objective("fiberpo", levels=levels, budgets={"turn": (0.2, 0.1), "trajectory": (0.2, 0.1)})
    assert turns.missing_keys(SUPPLIED) == ["turn"] and turns.missing_keys({*SUPPLIED, "turn"}) == []
    turns.check_keys([*SUPPLIED, "turn"])
    words = "level 'turn' of objective 'fiberpo' needs the key 'turn', which is not supplied; the keys supplied are "
    with pytest.raises(ValueError, match=words + "domain, prompt_group, trajectory; change the levels"):
        turns.check_keys(SUPPLIED)
    experts = build_objective("fiberpo-expert")
    assert experts.keys == SUPPLIED and experts.missing_keys(SUPPLIED) == ["expert"]
    with pytest.raises(ValueError, match=r"level 'trajectory\+expert' of .* needs the key 'expert'"):
        experts.check_keys(SUPPLIED)
    with pytest.raises(ValueError, match="objective 'gspo-turn' needs the key 'turn'.*supplied are none"):
        TurnGSPO().check_keys(())
    assert TOPR().keys == ()
    TOPR().check_keys(())


def test_an_objective_with_node_sums_declares_its_keys() -> None:
    @dataclass(frozen=True)
    class GroupGSPO(TurnGSPO):
        base_keys = ("prompt_group",)

    assert not TurnGSPO().spans_micro_batches and GroupGSPO().spans_micro_batches
    assert GroupGSPO().keys == ("prompt_group",)


# ---- kernels ----


def test_a_subclass_inherits_no_kernel() -> None:
    @dataclass(frozen=True)
    class Mine(PPO):
        def gate(self, chunk: Chunk) -> GatedChunk:
            return replace(super().gate(chunk), ratio=chunk.ratio)

    assert PPO.kernel == GRPO.kernel is not None and Mine.kernel is None
    words = "kernels=True: objective 'Mine' has no Triton kernel; leave kernels unset"
    with pytest.raises(ValueError, match=words):
        Mine(kernels=True)
    with pytest.raises(ValueError, match=words):
        build_objective(Mine, kernels=True)
    with pytest.raises(ValueError, match=words):
        build_objective(Mine(), kernels=True)


def test_without_a_kernel_a_call_on_a_gpu_runs_in_torch() -> None:
    on_gpu = SimpleNamespace(log_ratio=SimpleNamespace(is_cuda=True, device="cuda"))
    assert evaluate._use_kernels(TOPR(), on_gpu, None) is False
    assert evaluate._use_kernels(PPO(), on_gpu, False) is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_an_objective_without_a_kernel_on_a_gpu() -> None:
    case = random_case(0)
    expected = case.call(TOPR()).gradient
    for name in ("x", "advantages", "weights", "share"):
        setattr(case, name, getattr(case, name).cuda())
    case.ids = {key: ids.cuda() for key, ids in case.ids.items()}
    torch.testing.assert_close(case.call(TOPR()).gradient.cpu(), expected, rtol=1e-12, atol=1e-15)


def test_the_base_classes_show_a_complete_objective() -> None:
    """The example in the docstring of `TokenObjective` runs."""
    doc = TokenObjective.__doc__ or ""
    source = textwrap.dedent(doc[doc.index("        @dataclass") :])
    names = {"dataclass": dataclass, "TokenObjective": TokenObjective, "Chunk": Chunk, "GatedChunk": GatedChunk}
    exec("from __future__ import annotations\n" + source, names)
    plain: type[Objective] = names["PowerWeight"]
    case = random_case(1)
    torch.testing.assert_close(
        case.call(plain(power=1.0)).gradient, case.call(build_objective("reinforce")).gradient, rtol=1e-14, atol=0
    )
