"""Everything that touches Megatron-Core.

Importing this package sets what Megatron-Core reads while it is imported; `platform.activate` then makes the process
ready for use (without a GPU it installs the CPU platform, see `cpu/patches.py`). `architecture` and `checks` import
no Megatron: a launcher or a planner can use them without either.
"""

from fiberpo_megatron.mcore import platform as _platform

_platform.prepare()
