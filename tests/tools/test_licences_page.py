"""The page of licences is current and has every direct dependency."""

import importlib.util
import re
import sys
from email.message import Message
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.utils import canonicalize_name

from tests.tools.setup_requirements import setup_requirements

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/licences.md"
spec = importlib.util.spec_from_file_location("make_licences_page", ROOT / "tools/make_licences_page.py")
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
sys.modules["make_licences_page"] = tool
spec.loader.exec_module(tool)


def rows() -> dict[str, list[str]]:
    """Return the cells of the table of all packages by package."""
    table = PAGE.read_text().partition("## All packages")[2]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line[:2] == "| "]
    return {line[0]: line for line in cells[2:]}


def test_the_page_is_what_the_tool_writes():
    assert PAGE.read_text() == tool.page(requires("fiberpo-megatron") or []), "run `make licences`"


def test_every_direct_dependency_has_a_licence():
    found = rows()
    for extra, requirements in setup_requirements().items():
        for requirement in requirements:
            name, _, asked, licence, needed, _ = found[canonicalize_name(requirement.name)]
            assert tool.families_in(licence), f"{name}: {licence!r}"
            assert "direct" in needed and (extra or "always") in re.split(r"[:,] *", f"{needed}, always")
            assert asked, name


def declared(**fields: str | list[str]) -> SimpleNamespace:
    """Return a distribution that declares these fields of its metadata."""
    metadata = Message()
    for name, values in ({"Name": "x"} | fields).items():
        for value in values if isinstance(values, list) else [values]:
            metadata[name.replace("_", "-")] = value
    return SimpleNamespace(metadata=metadata)


APPROVED = "License :: OSI Approved :: "


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ({"License_Expression": "MIT", "License": "GPL"}, "MIT"),
        ({"License": "Apache 2.0", "Classifier": [APPROVED + "Apache Software License"]}, "Apache 2.0"),
        ({"License": "Copyright (c) MIT 2001", "Classifier": [APPROVED + "BSD License"]}, "BSD License"),
        (
            {"License": "Apache 2.0", "Classifier": [APPROVED + "BSD License"]},
            "Apache 2.0 (its classifier says BSD License)",
        ),
        ({"License": "UNKNOWN"}, "not declared"),
        ({}, "not declared"),
    ],
)
def test_what_a_package_declares(fields, licence):
    assert tool.licence_of(declared(**fields)) == licence


@pytest.mark.parametrize(
    ("licence", "flag"),
    [
        ("MIT", ""),
        ("GPL-3.0", "copyleft (GPL)"),
        ("LGPL-2.1-or-later", "copyleft (LGPL)"),
        ("GNU Lesser General Public License v3", "copyleft (LGPL)"),
        ("GNU Affero General Public License", "copyleft (AGPL)"),
        ("Mozilla Public License 2.0 (MPL 2.0)", "copyleft (MPL)"),
        ("Apache-2.0 OR MPL-2.0", "copyleft (MPL)"),
        ("not declared", "unknown"),
        ("Proprietary", "unknown"),
    ],
)
def test_what_is_flagged(licence, flag):
    assert tool.Entry("x", "1", licence, "").flag == flag
