"""This tool writes the tables of docs/scaling.md and their plot; with `--check` it says whether they are current."""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fiberpo_megatron.config import load_config
from fiberpo_megatron.planning.hardware import GPUS, Assumptions
from fiberpo_megatron.planning.picture import curves_svg
from fiberpo_megatron.planning.scale import ScaleRow, scale, scale_text
from fiberpo_megatron.planning.timing import GIGA

ROOT = Path(__file__).parents[1]
PAGE, PLOT = ROOT / "docs/scaling.md", ROOT / "docs/scaling.svg"
BEGIN, END = "<!-- scale: tools/scale_tables.py -->", "<!-- end of scale -->"
MODELS = {"qwen3_30b_a3b": "Qwen3-30B-A3B", "qwen3_235b_a22b": "Qwen3-235B-A22B", "deepseek_v3": "DeepSeek-V3"}
COMMON = ["--rollout.engine.urls", "[]", "--rollout.engine.max_running_requests", "256"]


def rows_of(model: str, sizes: tuple[int, ...] | None = None) -> list[ScaleRow]:
    """Return the rows of one model on H100s."""
    folder = ROOT / "fiberpo_megatron/planning/data/models" / model
    config = load_config(ROOT / "examples/qwen3_30b_a3b/train.toml", ["--model.path", str(folder), *COMMON])
    hf_config = json.loads((folder / "config.json").read_text())
    gpu = GPUS["H100"]
    more = {} if sizes is None else {"sizes": sizes}
    return scale(config, hf_config, gpu.memory_gb * GIGA, gpu, Assumptions(), **more)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with ProcessPoolExecutor(len(MODELS)) as pool:
        rows = dict(zip(MODELS, pool.map(rows_of, MODELS)))
    texts = [f"### {MODELS[model]}\n\n{scale_text(found)}" for model, found in rows.items()]
    curves = {
        MODELS[model]: [(row.gpus, row.tokens / row.plan.time.total) for row in found if row.plan is not None]
        for model, found in rows.items()
    }
    plot = curves_svg("Tokens a second on H100s (estimated)", "tokens/s", curves)
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    body = "\n\n".join(texts)
    wanted = f"{head}{BEGIN}\n\n{body}\n\n{END}{rest.split(END)[1]}"
    if options.check:
        current = text == wanted and PLOT.read_text() == plot
        print("current" if current else f"{PAGE} or {PLOT} is not current: run python tools/scale_tables.py")
        return int(not current)
    PAGE.write_text(wanted)
    PLOT.write_text(plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
