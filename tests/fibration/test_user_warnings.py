"""A warning is the user's: it stands at the line of the user's call, once."""

from __future__ import annotations

import runpy
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from fiberpo_megatron.fibration import FiberPO, build_objective
from fiberpo_megatron.user_warnings import nowhere, on_console, warn_user, warnings_to

SCRIPT = """\
from fiberpo_megatron.fibration import FiberPO, build_objective


def mine(width):
    return build_objective("fiberpo", epsilon=width)


for _ in range(3):
    mine(0.3)
FiberPO(budgets={"trajectory": (0.2, 0.3)})
"""


def test_a_script_shows_its_own_lines_once_and_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        runpy.run_path(str(path), run_name="__main__")
    clip, call, budget, constructor = "".join(
        warnings.formatwarning(it.message, it.category, it.filename, it.lineno) for it in found
    ).splitlines()
    assert clip.startswith(f"{path}:5: UserWarning: epsilon = 0.3: it is not well below delta")
    assert call.strip() == 'return build_objective("fiberpo", epsilon=width)'
    assert budget.startswith(f"{path}:10: UserWarning: budgets['trajectory'] = (0.2, 0.3): C_minus is not below C_plus")
    assert constructor.strip() == SCRIPT.splitlines()[9]


@dataclass(frozen=True)
class Mine(FiberPO):
    """Is a user's class: its constructor is generated."""

    epsilon: float = 0.05


@pytest.mark.parametrize(
    "build",
    [
        lambda: build_objective("fiberpo", epsilon=0.3),
        lambda: build_objective("fiberpo", preset="paper", epsilon=0.3),
        lambda: build_objective(Mine, epsilon=0.3),
        lambda: FiberPO(epsilon=0.3),
        lambda: Mine(epsilon=0.3),
    ],
)
def test_every_way_to_build_warns_once_at_the_call(build) -> None:
    with pytest.warns(UserWarning, match="^epsilon = 0.3") as found:
        build()
    (warning,) = found
    assert (warning.filename, warning.lineno) == (__file__, build.__code__.co_firstlineno)
    assert "\n" not in str(warning.message)


def test_a_built_objective_is_not_warned_of_again() -> None:
    with pytest.warns(UserWarning):
        built = FiberPO(epsilon=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_objective(built, kernels=False)


def test_commands_print_a_line_or_leave_it_to_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with warnings_to(on_console):
            warn_user("a\x1b[31m setting")
            with warnings_to(nowhere):
                warn_user("said by another")
    assert capsys.readouterr().err == "fiberpo: warning: a\\x1b[31m setting\n"
    with pytest.warns(UserWarning, match="outside"):
        warn_user("outside")
