"""Make the table and the plot of an example's README from the metrics of its runs.

    python examples/results.py runs/smollm2 train="right answers rewarded" control="coin flips rewarded"

Every run of the folder that is to be shown is given with its label. results.jsonl and curve.svg go to the same folder,
or to that of --out.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "fiberpo", "svg.fonttype": "none"})  # the same numbers, the same small file
import matplotlib.pyplot as plt  # noqa: E402

KEPT = ("accuracy", "entropy", "gradient_norm", "response_length/mean", "rollout_diff/max", "seconds/total")
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:red")
CONTROL = "tab:grey"
Records = dict[str, list[dict[str, float]]]


def read(folder: Path, kept: tuple[str, ...], every: int = 1) -> Records:
    """Return the kept metrics of the training steps (numbered from 0) and of the evaluations (by steps done).

    Of the training steps, every `every`-th is kept.
    """
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        kind: [
            {name: round(record[name], 6) for name in ("step", *kept) if name in record}
            for record in records
            if record["kind"] == kind and record["step"] % (every if kind == "train" else 1) == 0
        ]
        for kind in ("train", "eval")
    }


def table(runs: dict[str, Records], labels: dict[str, str], metric: str) -> str:
    """Return a held-out metric by steps done, as Markdown; a cell is empty if a run was not (yet) evaluated."""
    steps = sorted({e["step"] for run in runs.values() for e in run["eval"]})
    rows = [["steps", *map(str, steps)], ["---"] * (len(steps) + 1)]
    for name, run in runs.items():
        found = {e["step"]: f"{e[metric]:.1%}" for e in run["eval"] if metric in e}
        rows.append([labels[name], *(found.get(step, "") for step in steps)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(runs: dict[str, Records], labels: dict[str, str], metrics: list[str], path: Path) -> None:
    """Draw a panel for each metric: held-out values with marks, and those of the training steps as thin lines."""
    width = 6 if len(metrics) == 1 else 3.2 * len(metrics)
    figure, panels = plt.subplots(1, len(metrics), figsize=(width, 3.2), layout="constrained", squeeze=False)
    colours = dict(zip([name for name in runs if not name.startswith("control")], COLOURS))
    for axes, metric in zip(panels[0], metrics):
        for name, run in runs.items():
            colour = colours.get(name, CONTROL)
            steps = [(r["step"] + 1, r[metric]) for r in run["train"] if metric in r]
            axes.plot(*zip(*steps), color=colour, alpha=0.35, linewidth=1)
            held_out = [(e["step"], e[metric]) for e in run["eval"] if metric in e]
            axes.plot(*zip(*held_out), color=colour, marker="o", markersize=4, label=labels[name])
        axes.set(xlabel="training steps", ylabel=metric, ylim=(0, 1))
    panels[0][-1].legend(title="held out (thin: the step's own samples)", fontsize="small", title_fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder of the runs")
    parser.add_argument("runs", nargs="+", metavar="RUN=LABEL", help="a run's folder in it, and what to call it")
    parser.add_argument("--metrics", nargs="+", default=["accuracy"], help="a table and a panel for each")
    parser.add_argument("--keep", nargs="*", default=[], help="further metrics for results.jsonl")
    parser.add_argument("--every", type=int, default=1, help="keep every so many training steps in results.jsonl")
    parser.add_argument("--out", type=Path, help="unset: the folder of the runs")
    arguments = parser.parse_args()
    labels = dict(word.split("=", 1) for word in arguments.runs)
    kept = tuple(dict.fromkeys([*KEPT, *arguments.metrics, *arguments.keep]))
    runs = {name: read(arguments.folder / name, kept, arguments.every) for name in labels}
    out = arguments.out or arguments.folder
    out.mkdir(parents=True, exist_ok=True)
    flat = [{"run": name, "kind": kind, **r} for name, run in runs.items() for kind in run for r in run[kind]]
    (out / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in flat))
    plot(runs, labels, arguments.metrics, out / "curve.svg")
    for metric in arguments.metrics:
        print(f"{metric}\n\n{table(runs, labels, metric)}\n")


if __name__ == "__main__":
    main()
