"""This module gives random access to the problems of a data set, filtered and ordered, in little memory.

A PromptFile reads the whole data set once, checks every row and notes at which byte each problem begins; a problem is
read again from the file when it is asked for. The notes about large data sets are kept in a cache folder
(`index_cache.py`), so that other workers and later runs start at once. Tables (parquet files, data set folders) are
written as JSON lines there, because only lines can be read one by one.

It imports the standard library alone, because it runs in the workers of environments.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fiberpo_megatron.environments.builtin import index_cache
from fiberpo_megatron.environments.builtin.index_cache import Index, IndexCache, identity
from fiberpo_megatron.environments.builtin.problems import Fields, Problem, looked_up, parsed_line, short
from fiberpo_megatron.environments.builtin.solve_rates import SolveRates
from fiberpo_megatron.environments.builtin.tables import table_files, table_rows

MARK = b"\xef\xbb\xbf"
"""The bytes with which some editors begin a file of UTF-8."""
SOLVE_RATE = "solve_rate"


@dataclass(frozen=True)
class Filters:
    """Says which problems of a data set are used, and in which order."""

    max_characters: int | None = None
    """Longest prompt that is used."""
    deduplicate: bool = False
    """Whether only the first of equal prompts is used."""
    solve_rates: str | None = None
    """A file for `SolveRates`."""
    solve_rate_range: tuple[float, float] = (0.0, 1.0)
    """Least and largest solve rate of a problem that is used. A problem whose solve rate is unknown is used."""
    difficulty: str | None = None
    """The field by whose numbers the problems are ordered, ascending; or "solve_rate": the most often solved first."""


class PromptFile:
    """Holds the problems of a data set by position.

    path: JSON lines, or what `table_files` takes. apart_from: the held-out problems, which must not be among these.

    Raises ValueError that names the file and the line or row, the value and the fix; where nothing is left, it says how
    many problems each filter has left out.
    """

    def __init__(
        self, path: str, fields: Fields, filters: Filters | None = None, apart_from: PromptFile | None = None
    ) -> None:
        self._path, self._fields, self._filters = path, fields, filters or Filters()
        self._tables = table_files(path)
        try:
            self._identities = [identity(file) for file in self._tables or [Path(path)]]
        except OSError as error:
            raise ValueError(
                f"cannot read the prompt file {error.filename}: {error.strerror}; correct the path in the options of "
                "the environment"
            ) from None
        rates_file = self._filters.solve_rates
        self._rates = None if rates_file is None else SolveRates(Path(rates_file))
        rates_identity = None if rates_file is None else identity(Path(rates_file))
        other = None if apart_from is None else apart_from.key
        self.key: str = json.dumps([self._identities, repr(fields), repr(self._filters), rates_identity, other])
        """All that the problems depend on."""
        cache = IndexCache(self.key)
        kept = cache.load(lines=self._tables is not None)
        if kept is None:
            self._index, lines, rows = self._read_through(cache, apart_from)
            if rows >= index_cache.CACHED_ROWS and cache.keep(self._index, lines):
                kept = cache.load(lines=self._tables is not None)  # all workers share the memory of a file
        if kept is not None:
            self._index, lines = kept
        self._lines = lines or Path(path).open("rb")  # noqa: SIM115 (it is read as long as the environment lives)
        self._opened = os.fstat(self._lines.fileno())

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: int) -> Problem:
        """Return the problem at a position. Raises ValueError when the file was changed since the start."""
        index = self._index
        line = os.pread(self._lines.fileno(), index.lengths[position], index.starts[position])
        now = os.fstat(self._lines.fileno())
        if self._tables is None and (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise ValueError(f"{self._path} was changed after this run had begun to read it; start the run again")
        return self._problem(line, index.rows[position], index.numbers[position])

    @property
    def left_out(self) -> dict[str, int]:
        """Return how many problems each filter has left out."""
        return dict(self._index.left_out)

    @property
    def moved(self) -> bool:
        """Return whether a problem's position may differ from its row."""
        return bool(self._index.left_out) or self._filters.difficulty is not None

    def digests(self) -> Iterator[tuple[bytes, int]]:
        """Yield the digest and the position of every problem."""
        for position in range(len(self)):
            yield self[position].digest(), position

    def _problem(self, line: bytes, row: int, number: int) -> Problem:
        if self._tables is None:
            source = f"{self._path}, line {number}"
            return self._fields.problem(parsed_line(line, source), row, source)
        source, record = json.loads(line)
        return self._fields.problem(record, row, source)

    def _read_through(self, cache: IndexCache, apart_from: PromptFile | None) -> tuple[Index, IO[bytes] | None, int]:
        """Check every row; return the index, the file that it points into where that is a new one, and the rows."""
        choice = _Choice(self._path, self._filters, self._rates, apart_from)
        starts, lengths, rows, numbers = array("Q"), array("I"), array("I"), array("I")
        lines = None if self._tables is None else cache.new_lines()
        row = -1
        for row, (start, line, number, problem) in enumerate(
            self._file_rows() if lines is None else self._table_rows()
        ):
            if not choice.takes(problem):
                continue
            if lines is not None:
                start = lines.tell()
                lines.write(line)
            starts.append(start)
            lengths.append(len(line))
            rows.append(row)
            numbers.append(number)
        if lines is not None:
            lines.flush()
        choice.check(row + 1, len(starts), self._fields)
        return Index(starts, lengths, rows, numbers, choice.left_out).ordered(choice.order()), lines, row + 1

    def _file_rows(self) -> Iterator[tuple[int, bytes, int, Problem]]:
        """Yield (first byte, line, its number, problem) of a file of JSON lines; blank lines are skipped."""
        row = start = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, start=1):
                mark = len(MARK) if number == 1 and line.startswith(MARK) else 0
                if line[mark:].strip():
                    yield start + mark, line[mark:], number, self._problem(line[mark:], row, number)
                    row += 1
                start += len(line)

    def _table_rows(self) -> Iterator[tuple[int, bytes, int, Problem]]:
        """Yield (0, the row as a JSON line, 0, problem) of the rows of tables."""
        row = 0
        names = self._fields.names
        for file in self._tables or []:
            for number, record in enumerate(table_rows(file, names, self._fields.optional)):
                source = f"{file}, row {number}"
                problem = self._fields.problem(record, row, source)
                line = json.dumps([source, {name: looked_up(record, name) for name in names}])
                yield 0, f"{line}\n".encode(), 0, problem
                row += 1


class _Choice:
    """Chooses and orders the problems of a data set as its filters say."""

    def __init__(self, path: str, filters: Filters, rates: SolveRates | None, apart_from: PromptFile | None) -> None:
        self._path, self._filters, self._rates, self._apart_from = path, filters, rates, apart_from
        self._held_out = {} if apart_from is None else dict(apart_from.digests())
        self._shared: dict[int, Problem] = {}
        """Problems that are among the held-out ones, by their position there."""
        self._seen: set[bytes] = set()
        self._difficulties = array("d")
        self._known = 0
        self.left_out: Counter[str] = Counter()

    def takes(self, problem: Problem) -> bool:
        """Return whether a problem is used, and take note of it."""
        filters = self._filters
        if filters.max_characters is not None and problem.characters() > filters.max_characters:
            self.left_out[f"max_characters = {filters.max_characters}"] += 1
            return False
        rate = None if self._rates is None else self._rates.of(problem.id, problem.row)
        low, high = filters.solve_rate_range
        if rate is not None:
            self._known += 1
            if not low <= rate <= high:
                self.left_out[f"solve_rate_range = [{low:g}, {high:g}]"] += 1
                return False
        if self._held_out or filters.deduplicate:
            digest = problem.digest()
            if digest in self._held_out and not filters.deduplicate:
                self._shared.setdefault(self._held_out[digest], problem)
            if filters.deduplicate:
                if digest in self._held_out or digest in self._seen:
                    self.left_out["deduplicate = true"] += 1
                    return False
                self._seen.add(digest)
        if filters.difficulty == SOLVE_RATE:
            self._difficulties.append(2.0 if rate is None else 1 - rate)  # an unknown one comes last
        elif problem.difficulty is not None:
            self._difficulties.append(problem.difficulty)
        return True

    def check(self, rows: int, used: int, fields: Fields) -> None:
        """Raise ValueError when nothing is left, when a filter had no effect, or for held-out problems among these."""
        if not rows:
            raise ValueError(
                f"{self._path} holds no prompts; write one JSON object a line with `{fields.prompt}` and "
                f"`{fields.answer}`, or a table with these columns"
            )
        if self._rates is not None and not self._known:
            raise ValueError(
                f"solve_rates = {self._filters.solve_rates!r} has {len(self._rates)} ids, and none is that of a "
                f"problem in {self._path}; give the file of a run with this data set, or set `id` to the field of the "
                "problems' names"
            )
        if not used:
            taken = ", ".join(f"{name} took {count}" for name, count in self.left_out.items())
            raise ValueError(f"no prompt of the {rows} in {self._path} is left: {taken}; loosen one of these options")
        if self._shared and self._apart_from is not None:
            position, first = next(iter(self._shared.items()))
            raise ValueError(
                f"{len(self._shared)} held-out prompt(s) are also training prompts, first "
                f"{self._apart_from[position].source} = {first.source}: {short(first.prompt)}; remove them from one of "
                "the files, or set deduplicate = true, which leaves them out of the training"
            )

    def order(self) -> Sequence[int] | None:
        """Return the positions in order of difficulty; None if the order stays."""
        if self._filters.difficulty is None:
            return None
        return sorted(range(len(self._difficulties)), key=self._difficulties.__getitem__)
