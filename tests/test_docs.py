"""The pages name tests and settings that exist."""

import ast
import importlib.util
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from fiberpo_megatron.config import Config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def functions(source: Path) -> set[str]:
    return {node.name for node in ast.parse(source.read_text()).body if hasattr(node, "name")}


@pytest.fixture(scope="module")
def tests() -> set[str]:
    """Names of all test files, without .py, and of what is in them."""
    sources = list((ROOT / "tests").rglob("test_*.py"))
    return {source.stem for source in sources}.union(*map(functions, sources))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page: Path, tests: set[str]):
    text = page.read_text()
    missing = set(re.findall(r"\btest_\w+", text)) - tests
    assert not missing
    for path, name in re.findall(r"(tests/\S+\.py)::(\w+)", text):
        assert name in functions(ROOT / path), f"{path} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_settings_exist(page: Path):
    sections = "|".join(Config.model_fields)
    for name in re.findall(rf"`(?:--)?((?:{sections})(?:\.[a-z_0-9]+)+)\b[^`/(]*`", page.read_text()):
        module = (ROOT / "fiberpo_megatron").joinpath(*name.split(".")[:2]).with_suffix(".py")
        if module.is_file() or name.endswith((".py", ".json", ".safetensors")):
            continue
        at: type[BaseModel] | None = Config
        for part in name.split("."):
            assert at is not None and part in at.model_fields, f"{page.name}: no setting {name}"
            kind = at.model_fields[part].annotation
            kinds = [one for one in get_args(kind) if type(None) in get_args(kind)] or [kind]  # of X | None
            at = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def test_the_page_of_settings_is_current():
    spec = importlib.util.spec_from_file_location("make_settings_page", ROOT / "tools/make_settings_page.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (ROOT / "docs/settings.md").read_text() == tool.page(), (
        f"docs/settings.md is not current: run {tool.COMMAND}"
    )
    assert "| `learning_rate` | number, above 0 | `1e-6` | Peak learning rate. |" in tool.page()
    assert set(re.findall(r"^## `\[+(\w+)\]+`", tool.page(), re.MULTILINE)) == set(Config.model_fields)
