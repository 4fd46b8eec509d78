"""This module reads how often a policy has solved each problem of a data set, from a file of a former run.

It imports the standard library alone, because it runs in the workers of environments.
"""

from __future__ import annotations

from pathlib import Path

from fiberpo_megatron.environments.builtin.problems import parsed_line, short


class SolveRates:
    """Holds the solve rates of problems, by id.

    A line of the file is a JSON object with `id` and either `solve_rate` (a number from 0 to 1, of `samples` attempts)
    or `correct` (true or false, of one attempt). All attempts at a problem count alike. The file solve_rates.jsonl of a
    run is such a file. An id is that of the data set, or ends with the number of its row, as "math/train/17" does.

    Raises ValueError that names the file and the line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        sums: dict[str, tuple[float, float]] = {}
        environments: set[str] = set()
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        name, rate, samples, environment = _read(line, f"{path}, line {number}")
                        solved, attempts = sums.get(name, (0.0, 0.0))
                        sums[name] = solved + rate * samples, attempts + samples
                        environments.add(environment)
        except OSError as error:
            raise ValueError(f"cannot read solve_rates = {str(path)!r}: {error.strerror}; correct the path") from None
        if not sums:
            raise ValueError(
                f"solve_rates = {str(path)!r} holds no line; write one JSON object a line, or leave it out"
            )
        if len(environments) > 1:
            command = f"""grep '"environment": "{min(environments)}"' {path}"""
            raise ValueError(
                f"solve_rates = {str(path)!r} holds lines of the environments {', '.join(sorted(environments))}, whose "
                f"ids may be equal; keep the lines of one: {command}"
            )
        self._rates = {name: solved / attempts for name, (solved, attempts) in sums.items()}

    def __len__(self) -> int:
        return len(self._rates)

    def of(self, name: str | None, row: int) -> float | None:
        """Return the solve rate of the problem with this id and row; None if the file has none."""
        return self._rates.get(str(row) if name is None else _key(name))


def _read(line: bytes, source: str) -> tuple[str, float, int, str]:
    """Return the id, the rate, the attempts and the environment of a line."""
    record = parsed_line(line, source)
    if not isinstance(record, dict):
        raise ValueError(f"{source}: expected a JSON object with `id` and `solve_rate`, got {short(record)}")
    name, rate, correct = record.get("id"), record.get("solve_rate"), record.get("correct")
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f"{source}: `id` must be a string or a whole number, got {short(name)}")
    if rate is None and isinstance(correct, bool):
        rate = float(correct)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise ValueError(
            f"{source}: `solve_rate` must be a number from 0 to 1 (or `correct` a truth), got {short(rate)}"
        )
    samples = record.get("samples", 1)
    if isinstance(samples, bool) or not isinstance(samples, int) or not 0 < samples < 10**9:
        raise ValueError(f"{source}: `samples` must be a whole number of at least 1, got {short(samples)}")
    return _key(str(name)), float(rate), samples, str(record.get("environment", record.get("domain", "")))


def _key(name: str) -> str:
    """Return what ids of the same problem have in common: the number of the row, or the whole id."""
    last = name.rpartition("/")[2]
    return str(int(last)) if last.isdecimal() and len(last) < 19 else name
