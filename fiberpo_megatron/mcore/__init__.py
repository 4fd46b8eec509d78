"""This package holds everything that touches Megatron-Core.

Importing it installs a hook: just before Megatron-Core is imported, the hook sets what Megatron reads at that time.
`platform.activate` then makes the process ready for use (without a GPU it installs the CPU platform, see
`cpu/patches.py`). `settings`, `families` and `parallel.checks` import no Megatron, so that a config, a launcher or a
planner can use them without it.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType


class _BeforeMegatron(MetaPathFinder):
    """Prepares the process when Megatron-Core is about to be imported for the first time."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "megatron.core":
            sys.meta_path.remove(self)
            from fiberpo_megatron.mcore.platform import prepare

            prepare()


if "megatron.core" not in sys.modules:
    sys.meta_path.insert(0, _BeforeMegatron())
