"""This module reads the rows of parquet files and of data set folders that Hugging Face `datasets` has saved.

Rows are read one batch after the other, so that memory does not grow with the file. It needs pyarrow, which is
imported when the first table is read: files of JSON lines need the standard library alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

BATCH_ROWS = 1000
"""Rows that are decoded together."""
Choose = Callable[[Sequence[str]], list[str]]
"""Returns the columns to read among those of a table."""


def table_files(path: str) -> list[Path] | None:
    """Return the files that hold the rows of a data set, in order; None if the path is no table's.

    `path` names a parquet file, several by a pattern ("data/train-*.parquet"), a folder of parquet files, or the folder
    of one split that `save_to_disk` has written. Raises ValueError that says which folder to name instead.
    """
    place = Path(path)
    if has_magic(path) and not place.exists():
        files = sorted(map(Path, glob(path)))
        if not files or any(file.suffix != ".parquet" for file in files):
            found = ", ".join(map(str, files[:3])) or "nothing"
            raise ValueError(f"the pattern {path} must match parquet files, it matches {found}; correct it")
        return files
    if not place.is_dir():
        return [place] if place.suffix in (".parquet", ".arrow") else None
    if (place / "dataset_dict.json").is_file():
        splits = json.loads((place / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"{path} holds the splits {', '.join(splits)}; name the folder of one: {place / splits[0]}")
    if (place / "state.json").is_file():
        parts = json.loads((place / "state.json").read_text())["_data_files"]
        return [place / part["filename"] for part in parts]
    files = sorted(place.glob("*.parquet"))
    if not files:
        raise ValueError(
            f"{path} is a folder with neither parquet files nor what `save_to_disk` of datasets writes (state.json); "
            "name a file, or the folder of a data set"
        )
    return files


def table_rows(path: Path, fields: Sequence[str], optional: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file in order, with the columns that hold these fields.

    A name with dots means a column of that name, or a field inside of a column. Raises ValueError that names the file,
    and the column that is missing (unless it is `optional`) or the damage.
    """
    pyarrow = _pyarrow(path)
    try:
        reader = _parquet if path.suffix == ".parquet" else _arrow
        batches = reader(path, lambda names: _columns(names, fields, optional, path))
        for batch in batches:
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot read the data set {path}: {reason}; correct the path in the options of the environment, or write "
            "the file again"
        ) from None


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs the pyarrow package ({error}); run `pip install pyarrow`, or write the data set as "
            "JSON lines"
        ) from None
    return pyarrow


def _parquet(path: Path, choose: Choose) -> Iterator[Any]:
    import pyarrow.parquet

    # without pre_buffer: a row group, which may be the whole file, is decoded page by page
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        columns = choose(file.schema_arrow.names)
        yield from file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False)


def _arrow(path: Path, choose: Choose) -> Iterator[Any]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:  # what datasets writes
            file.seek(0)
            batches = reader = pyarrow.ipc.open_stream(file)
        columns = choose(reader.schema.names)
        for batch in batches:
            yield batch.select(columns)


def _columns(names: Sequence[str], fields: Sequence[str], optional: Sequence[str], path: Path) -> list[str]:
    """Return the columns of a table that hold these fields."""
    found = []
    for field in fields:
        held = [name for name in (field, field.split(".")[0]) if name in names]
        if held:
            found.append(held[0])
        elif field not in optional:
            raise ValueError(
                f"{path} has no column `{field}`; it has {', '.join(names)}. Name the right one in the options of the "
                "environment"
            )
    return list(dict.fromkeys(found))
