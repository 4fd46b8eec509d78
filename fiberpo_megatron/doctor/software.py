"""These checks compare Python and packages with what this package declares in its installed metadata (from
setup.py)."""

import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fiberpo_megatron.doctor.report import Finding
from fiberpo_megatron.engines.command import interpreter, sglang_version
from fiberpo_megatron.engines.settings import EngineConfig

DISTRIBUTION = "fiberpo-megatron"
ENGINE = "sglang"


def python_version() -> list[Finding]:
    """Check the interpreter against `python_requires`."""
    wanted, version = metadata.metadata(DISTRIBUTION)["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(version):
        return [Finding("Python", "pass", version)]
    return [Finding("Python", "fail", f"{version} is not supported; {wanted} is", "Use a supported Python")]


def packages(gpu: bool, engine: EngineConfig) -> list[Finding]:
    """Check installed versions against the requirements of the package itself, of its engine (which may have a separate
    Python) and, with a GPU, of `[cuda]`."""
    wrong = []
    for requirement, extra in _requirements():
        if extra is None or requirement.name == ENGINE or (gpu and extra == "cuda"):
            finding = _installed(requirement, extra, engine)
            wrong += [finding] if finding else []
    if wrong:
        return wrong
    return [Finding("packages", "pass", "all have the required versions")]


def _requirements() -> Iterator[tuple[Requirement, str | None]]:
    """Yield every requirement with the extra that asks for it."""
    extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    for text in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            yield requirement, None
            continue
        yield from ((requirement, extra) for extra in extras if marker.evaluate({"extra": extra}))


def _installed(requirement: Requirement, extra: str | None, engine: EngineConfig) -> Finding | None:
    """Return what is wrong with one requirement, or None."""
    name, wanted = requirement.name, str(requirement.specifier) or "any version"
    python = interpreter(engine) if name == ENGINE else sys.executable
    pip, where = ("pip", "") if python == sys.executable else (f"{python} -m pip", f" in {python}")
    version = sglang_version(python) if name == ENGINE else _version(name)
    if version is None:
        what = f"{name}{requirement.specifier}" if where else f"{DISTRIBUTION}[{extra}]" if extra else DISTRIBUTION
        fix = f"{pip} install '{what}' (without a GPU: make env)"
        return Finding(name, "fail", f"is not installed{where}, {wanted} is needed", fix)
    if requirement.specifier.contains(version, prereleases=True):
        return None
    fix = f"{pip} install '{name}{requirement.specifier}'"
    return Finding(name, "fail", f"{version} is installed{where}, {wanted} is needed", fix)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirement_of(name: str) -> Requirement:
    """Return the declared requirement of one package."""
    return next(requirement for requirement, _ in _requirements() if requirement.name == name)
