"""This script makes the README's table and plot from the metrics of the two runs.

    python examples/smollm2/results.py [--runs runs/smollm2] [--out FOLDER]

It writes results.jsonl and curve.svg to runs/smollm2, or to the folder that is given.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "fiberpo", "svg.fonttype": "none"})  # the same numbers, the same small file
import matplotlib.pyplot as plt  # noqa: E402

RUNS = {"train": "right answers rewarded", "control": "coin flips rewarded"}
KEPT = ("accuracy", "entropy", "gradient_norm", "response_length/mean", "rollout_diff/max", "seconds/total")


def read(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return the kept metrics of the training steps (numbered from 0) and of the evaluations (by steps done)."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        kind: [
            {name: round(record[name], 6) for name in ("step", *KEPT) if name in record}
            for record in records
            if record["kind"] == kind
        ]
        for kind in ("train", "eval")
    }


def table(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Return the held-out accuracy by steps done, as Markdown; a cell is empty if a run was not (yet) evaluated."""
    steps = sorted({e["step"] for run in results.values() for e in run["eval"]})
    rows = [["steps", *map(str, steps)], ["---"] * (len(steps) + 1)]
    for name, run in results.items():
        found = {e["step"]: f"{e['accuracy']:.1%}" for e in run["eval"]}
        rows.append([RUNS[name], *(found.get(step, "") for step in steps)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(results: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, colour in zip(results, ("tab:blue", "tab:grey")):
        run = results[name]
        steps = [r["step"] + 1 for r in run["train"]]
        axes.plot(steps, [r["accuracy"] for r in run["train"]], color=colour, alpha=0.35, linewidth=1)
        held_out = [(e["step"], e["accuracy"]) for e in run["eval"]]
        axes.plot(*zip(*held_out), color=colour, marker="o", label=RUNS[name])
    axes.set(xlabel="training steps", ylabel="accuracy", ylim=(0, 1))
    axes.legend(title="held out (thin: the step's own samples)", fontsize="small", title_fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--out", type=Path, help="unset: the folder of the runs")
    arguments = parser.parse_args()
    out = arguments.out or arguments.runs
    results = {name: read(arguments.runs / name) for name in RUNS}
    out.mkdir(parents=True, exist_ok=True)
    flat = [{"run": name, "kind": kind, **r} for name, run in results.items() for kind in run for r in run[kind]]
    (out / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in flat))
    plot(results, out / "curve.svg")
    print(table(results))


if __name__ == "__main__":
    main()
