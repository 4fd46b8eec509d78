"""This tool writes the plans of docs/planning.md; with `--check` it says whether they are current.

`--search` shows for every row what `fiberpo plan --search` proposes; the layouts below were chosen from it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fiberpo_megatron.config import Config, load_config
from fiberpo_megatron.planning import show
from fiberpo_megatron.planning.estimate import make_plan
from fiberpo_megatron.planning.hardware import GPUS, Assumptions
from fiberpo_megatron.planning.search import propose
from fiberpo_megatron.planning.timing import GIGA

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/planning.md"
BEGIN, END = "<!-- plans: tools/plan_tables.py -->", "<!-- end of plans -->"
NAMES = {
    "qwen3_30b_a3b": "Qwen3-30B-A3B",
    "joyai_llm_flash": "JoyAI-LLM Flash 48B-A3B",
    "qwen3_235b_a22b": "Qwen3-235B-A22B",
}
COMMON = ["--rollout.engine.urls", "[]", "--rollout.engine.max_running_requests", "256"]


def _layout(engines: int, size: int, recompute: str, **parallel: int) -> list[str]:
    """Return the overrides: engines of `size` GPUs, recomputation, [parallel] sizes (1 if not given)."""
    words = ["--rollout.engine.count", str(engines), "--rollout.engine.tensor", str(size)]
    words += ["--model.recompute", recompute]
    for name in ("tensor", "pipeline", "context", "data", "expert"):
        words += [f"--parallel.{name}", str(parallel.get(name, 1))]
    return words


LAYOUTS = [
    # model, GPUs, which GPU, overrides
    ("qwen3_30b_a3b", 32, "H100", _layout(4, 4, "none", tensor=2, pipeline=2, context=4, expert=4)),
    ("qwen3_30b_a3b", 64, "H100", _layout(8, 4, "none", tensor=2, pipeline=2, context=4, data=2, expert=8)),
    ("qwen3_30b_a3b", 256, "H100", _layout(48, 4, "none", tensor=2, pipeline=2, context=4, data=4, expert=8)),
    ("joyai_llm_flash", 32, "H100", _layout(4, 4, "full", tensor=2, pipeline=2, data=4, expert=8)),
    ("joyai_llm_flash", 64, "H100", _layout(8, 4, "full", tensor=2, pipeline=2, data=8, expert=8)),
    ("joyai_llm_flash", 256, "H100", _layout(48, 4, "full", tensor=2, pipeline=2, data=16, expert=8)),
    ("qwen3_235b_a22b", 32, "B200", _layout(4, 4, "full", tensor=4, pipeline=2, data=2, expert=8)),
    ("qwen3_235b_a22b", 64, "B200", _layout(8, 4, "full", tensor=4, pipeline=2, data=4, expert=16)),
    (
        "qwen3_235b_a22b",
        256,
        "H100",
        _layout(16, 8, "none", tensor=4, pipeline=2, context=8, data=2, expert=64),
    ),
]
HEADINGS = ("model", "GPUs", "fits", *show.LAYOUT_HEADINGS, "publish GB", "gates bytes")


def config_of(model: str, overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """Return the example's config with another model, and that model's config.json."""
    folder = ROOT / "examples/planning" / model
    words = ["--model.path", str(folder), *COMMON, *overrides]
    return load_config(ROOT / "examples/qwen3_30b_a3b/train.toml", words), json.loads(
        (folder / "config.json").read_text()
    )


def tables() -> str:
    """Return the table between the page's marks."""
    rows = []
    for model, count, name, overrides in LAYOUTS:
        gpu = GPUS[name]
        config, hf_config = config_of(model, overrides)
        plan = make_plan(config, hf_config, count, gpu.memory_gb * GIGA, gpu, Assumptions())
        fits = "no" if plan.problems else "yes"
        gates = " + ".join(f"{size:,}" for size in plan.gates)
        rows.append(
            [NAMES[model], f"{count} x {name}", fits, *show.layout_row(plan), show.gigabytes(plan.publish), gates]
        )
    return show.table(HEADINGS, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--search", metavar="MODEL:GPUS:NAME", help="e.g. qwen3_30b_a3b:64:H100")
    options = parser.parse_args()
    if options.search:
        model, count, name = options.search.split(":")
        gpu = GPUS[name]
        config, hf_config = config_of(model, [])
        plans = propose(config, hf_config, int(count), gpu.memory_gb * GIGA, gpu, Assumptions()).plans
        print(show.table(show.LAYOUT_HEADINGS, [show.layout_row(plan) for plan in plans]))
        return 0
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    wanted = f"{head}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"
    if options.check:
        print("current" if text == wanted else f"{PAGE} is not current: run python tools/plan_tables.py")
        return int(text != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
