"""Dependencies point down: read from the import statements, so nothing has to be importable here."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fiberpo_megatron"
PARTS = {
    # part: other parts of this package that it may import
    "closeable": set(),
    "settings": set(),
    "plugins": set(),
    "subprocesses": set(),
    "process_identity": set(),
    "run_lock": {"closeable", "process_identity"},
    "config": {"settings", "plugins"},
    "types": {"environments"},
    "rendezvous": set(),
    "fibration": {"plugins"},
    "terms": set(),
    "environments": {"settings", "plugins", "subprocesses"},
    "telemetry": {"config", "types", "plugins"},
    "evaluation": {"types", "telemetry"},
    "data": {"config", "types", "environments"},
    "mcore": {"config", "types", "interfaces", "plugins", "rendezvous", "subprocesses"},
    "planning": {"config", "types", "fibration", "mcore", "plugins"},
    "interfaces": {"types", "evaluation"},
    "together": {"interfaces"},
    "engines": {"closeable", "config", "types", "rendezvous", "environments", "subprocesses", "process_identity"},
    "rollout": {
        "closeable",
        "config",
        "types",
        "interfaces",
        "together",
        "telemetry",
        "data",
        "engines",
        "environments",
    },
    "weight_sync": {"config", "types", "interfaces", "plugins", "rendezvous", "engines"},
    "sources": {
        "config",
        "types",
        "interfaces",
        "together",
        "rendezvous",
        "evaluation",
        "telemetry",
        "data",
        "mcore",
        "engines",
        "environments",
        "rollout",
        "weight_sync",
    },
    "trainer": {
        "config",
        "types",
        "rendezvous",
        "fibration",
        "terms",
        "evaluation",
        "telemetry",
        "data",
        "mcore",
        "engines",
        "environments",
        "rollout",
        "weight_sync",
        "sources",
        "interfaces",
        "together",
        "planning",
        "plugins",
        "closeable",
        "run_lock",
    },
    "simulation": {
        "config",
        "types",
        "fibration",
        "data",
        "engines",
        "environments",
        "interfaces",
        "rollout",
        "weight_sync",
        "sources",
        "telemetry",
        "trainer",
    },
    "certify": {"config", "types", "fibration", "mcore", "rendezvous", "trainer", "subprocesses"},
    "launch": {"config", "types", "rendezvous", "engines", "subprocesses"},
    "doctor": {
        "config",
        "rendezvous",
        "telemetry",
        "data",
        "environments",
        "mcore",
        "planning",
        "engines",
        "launch",
        "subprocesses",
    },
    "calibration": {
        "config",
        "types",
        "data",
        "environments",
        "fibration",
        "mcore",
        "planning",
        "engines",
        "rollout",
        "launch",
    },
    "watch": {"run_lock", "telemetry"},
    "cli": {
        "evaluation",
        "calibration",
        "config",
        "types",
        "rendezvous",
        "telemetry",
        "launch",
        "trainer",
        "mcore",
        "planning",
        "engines",
        "doctor",
        "certify",
        "run_lock",
        "subprocesses",
        "watch",
    },
}
TOP = {
    "closeable",
    "durable",
    "interfaces",
    "json_files",
    "plugins",
    "printable",
    "process_identity",
    "rendezvous",
    "run_lock",
    "settings",
    "spans",
    "subprocesses",
    "together",
    "tracks",
    "types",
    "user_warnings",
}
"""Modules beside the folders."""
ANYWHERE = {"durable", "json_files", "printable", "spans", "tracks", "user_warnings"}
"""Modules of the standard library alone that every part may import."""
FOR_SETTINGS = {"fiberpo_megatron.engines.arguments", "fiberpo_megatron.engines.urls"}
"""Modules of the standard library alone with which settings check their values."""
SOURCES = [
    p
    for p in sorted(PACKAGE.rglob("*.py"))
    if not {"sglang_cpu", "sglang_plugin"} & set(p.parts) and p.parent != PACKAGE
]


def imports(source: Path) -> set[str]:
    """Dotted names of everything that a file imports, relative imports refused."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: write absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(source: Path) -> str:
    return source.relative_to(PACKAGE).parts[0]


def test_every_part_is_listed():
    assert {part_of(source) for source in SOURCES} == set(PARTS) - TOP


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(source: Path):
    part = part_of(source)
    for name in imports(source):
        if name.startswith("fiberpo_megatron.") and not name.startswith("fiberpo_megatron.__"):
            other = name.split(".")[1]
            # the sections of the config, which stand beside their parts
            settings = any(word.endswith("settings") for word in name.split(".")[1:])
            assert other == part or settings or other in PARTS[part] | ANYWHERE, f"{source} imports {name}"
            if source.name.endswith("settings.py"):
                alone = name.rpartition(".")[0] in FOR_SETTINGS or other in {"settings", "plugins"}
                assert settings or alone, f"{source} imports {name}: settings load alone"
            if ".".join(source.relative_to(PACKAGE.parent).with_suffix("").parts) in FOR_SETTINGS:
                assert other in ANYWHERE, f"{source} imports {name}, but settings import it and load alone"
        top = name.split(".")[0]
        if top == "megatron":
            assert part == "mcore", f"{source}: only mcore imports Megatron"
        if top == "sglang":
            pytest.fail(f"{source}: SGLang is started as a process, never imported")
        if name.startswith("torch.distributed") and not name.startswith("torch.distributed.elastic"):
            allowed = {"mcore", "weight_sync", "doctor", "calibration"}
            assert part in allowed, f"{source}: only {allowed} import torch.distributed"
        if part == "config" or source.name == "settings.py":
            assert top != "torch", f"{source}: config must load without torch"
    if part == "fibration":
        import sys

        outside = {n.split(".")[0] for n in imports(source)} - {"torch", "fiberpo_megatron"}
        if "kernels" in source.parts:
            outside -= {"triton"}  # optional: chosen on CUDA only, and nothing else in fibration needs it
        assert outside <= set(sys.stdlib_module_names) | {"__future__"}, (
            f"{source}: torch and the standard library alone"
        )
