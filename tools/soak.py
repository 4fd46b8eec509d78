#!/usr/bin/env python3
"""Run the training loop for thousands of steps with a toy policy and a toy engine, and check that nothing grows.

    OMP_NUM_THREADS=1 .venv/bin/python tools/soak.py --steps 10000 --out FOLDER

The run and its bounds are tests/soak; FOLDER gets soak.json and soak.png. Exits with 1 when something grows too much.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.soak.soak import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
