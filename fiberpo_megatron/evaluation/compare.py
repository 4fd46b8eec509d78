"""This module writes the results of two checkpoints side by side, as Markdown that people read."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fiberpo_megatron import durable
from fiberpo_megatron.evaluation.results import BESIDE, IN_TRAINING, read_results
from fiberpo_megatron.printable import printable

SHOWN = 20
"""Prompts of each kind (won, lost) that are shown with their responses, for each set."""


def write_comparison(folder: Path, before: int, after: int) -> tuple[Path, str]:
    """Write <folder>/evaluations/compare_BEFORE_AFTER.md; return the file and a summary for the console.

    A prompt is won when a larger share of its samples is right after `after` steps than after `before`, and lost when a
    smaller one is. Raises ValueError when a step was not evaluated, or when the two have no set in common.
    """
    first, second = results_of(folder, before), results_of(folder, after)
    common = [name for name in first if name in second]
    if not common:
        raise ValueError(
            f"the evaluations of {folder} after {before} and {after} steps have no set in common: {', '.join(first)} "
            f"and {', '.join(second)}; evaluate one of them again with `fiberpo eval {folder} --step N`"
        )
    lines = [f"# {printable(folder.resolve().name)}: after {before} and after {after} steps", ""]
    summary = []
    for name in common:
        pairs = paired(first[name]["prompts"], second[name]["prompts"])
        won = [pair for pair in pairs if right_share(pair[1]) > right_share(pair[0])]
        lost = [pair for pair in pairs if right_share(pair[1]) < right_share(pair[0])]
        counts = f"{len(won)} of {len(pairs)} prompts won, {len(lost)} lost"
        summary.append(f"{name}: {counts}")
        lines += [f"## {name}", "", f"{counts}, {len(pairs) - len(won) - len(lost)} unchanged.", ""]
        lines += _metrics(first[name]["metrics"], second[name]["metrics"], before, after)
        for title, chosen in (("Won", won), ("Lost", lost)):
            more = f" (the first {SHOWN} of {len(chosen)})" if len(chosen) > SHOWN else ""
            lines += [f"### {title}{more}", ""] if chosen else []
            for pair in chosen[:SHOWN]:
                lines += _prompt(*pair, before, after)
    path = folder / "evaluations" / f"compare_{before}_{after}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replaced(path, text=True) as file:
        file.write("\n".join(lines) + "\n")
    return path, "\n".join(summary)


def results_of(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    """Return the sets that were evaluated after `step` steps: those of `fiberpo eval RUN`, and those of the run itself
    that it did not evaluate again. Raises ValueError when there are none."""
    found: dict[str, dict[str, Any]] = {}
    for files in (IN_TRAINING, BESIDE):
        path = files.path(folder, step)
        if path.is_file():
            found |= read_results(path)["sets"]
    if not found:
        known = sorted({number for files in (IN_TRAINING, BESIDE) for number, _ in files.stored(folder)[0]})
        raise ValueError(
            f"{folder} has no results of an evaluation after {step} steps, only after "
            f"{', '.join(map(str, known)) or 'none'}; make them with `fiberpo eval {folder} --step {step}`"
        )
    return found


def paired(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return the results of the prompts that both have, in the order of the first."""
    of_id = {(prompt["environment"], prompt["id"], prompt["prompt"]): prompt for prompt in after}
    keys = [(prompt["environment"], prompt["id"], prompt["prompt"]) for prompt in before]
    return [(prompt, of_id[key]) for prompt, key in zip(before, keys) if key in of_id]


def right_share(prompt: Mapping[str, Any]) -> float:
    """Return the share of a prompt's samples that are right; 0 where all were dropped."""
    samples = prompt["samples"]
    return sum(bool(sample["correct"]) for sample in samples) / max(1, len(samples))


def _metrics(before: Mapping[str, float], after: Mapping[str, float], first: int, second: int) -> Iterator[str]:
    yield f"| metric | after {first} steps | after {second} steps |"
    yield "|---|---|---|"
    for name in before:
        if name in after and not name.endswith(("/low", "/high")):
            yield f"| {printable(name)} | {_value(before, name)} | {_value(after, name)} |"
    yield ""


def _value(metrics: Mapping[str, float], name: str) -> str:
    low, high = metrics.get(f"{name}/low"), metrics.get(f"{name}/high")
    interval = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
    return f"{metrics[name]:.4g}{interval}"


def _prompt(before: Mapping[str, Any], after: Mapping[str, Any], first: int, second: int) -> Iterator[str]:
    yield f"#### {printable(str(before['environment']))}, task {printable(str(before['id']))}"
    yield ""
    yield from _fenced(str(before["prompt"]))
    if before.get("expected") is not None:
        yield f"The answer is {_inline(str(before['expected']))}."
        yield ""
    gained = right_share(after) > right_share(before)
    for prompt, step, wanted in ((before, first, not gained), (after, second, gained)):
        samples = prompt["samples"]
        right = sum(bool(sample["correct"]) for sample in samples)
        shown = next(
            (sample for sample in samples if bool(sample["correct"]) is wanted), samples[0] if samples else None
        )
        yield (
            f"After {step} steps {right} of {len(samples)} samples are right; one of them:"
            if shown
            else (f"After {step} steps all samples were dropped.")
        )
        yield ""
        if shown is not None:
            yield from _fenced(str(shown["text"]))


def _inline(text: str) -> str:
    return "`" + printable(text).replace("`", "'")[:200] + "`"


def _fenced(text: str) -> Iterator[str]:
    """Yield a text as a block that nothing in it can end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    yield fence
    yield printable(text, keep="\n\t")
    yield fence
    yield ""
