"""Everything that touches Megatron-Core.

Importing this package prepares the process: without a GPU the CPU platform is installed before Megatron-Core
is imported for the first time (see `platform.py` and `cpu/patches.py`).
"""

from fiberpo_megatron.mcore import platform as _platform

_platform.activate()
