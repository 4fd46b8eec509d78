"""What setup.py asks for, read by running it without installing anything."""

import os
import runpy
from pathlib import Path
from typing import Any

import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def setup_requirements() -> dict[str, list[Requirement]]:
    """Return the direct dependencies by extra; "" has those that are always installed."""
    arguments: dict[str, Any] = {}
    real, folder = setuptools.setup, os.getcwd()
    setuptools.setup = lambda **given: arguments.update(given)
    os.chdir(ROOT)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = real
        os.chdir(folder)
    extras = {"": arguments["install_requires"], **arguments["extras_require"]}
    return {extra: [Requirement(text) for text in texts] for extra, texts in extras.items()}
