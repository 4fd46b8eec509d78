"""Tests of the examples' own programs, which import their neighbours as a script does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "stability"))
