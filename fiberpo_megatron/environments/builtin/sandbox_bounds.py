"""This module says what a sandboxed program may use, and what it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FILES = 10_000
"""How many files a program may make in its folder."""


@dataclass(frozen=True)
class Bounds:
    """Says what a program may use. All bounds hold for each input, except `program_s`."""

    wall_s: float = 6.0
    """Seconds by the clock."""
    cpu_s: int | None = None
    """Seconds of the processor, for each process of the program. None: `wall_s`, rounded up."""
    program_s: float = 30.0
    """Seconds by the clock for all inputs of a program together."""
    memory_mib: int = 1024
    """Memory of each process (address space), and of all together (resident), in MiB."""
    processes: int = 16
    """Processes and threads that may run at the same time."""
    open_files: int = 64
    """Open files of each process."""
    output_kib: int = 1024
    """Output to stdout, or the JSON of a returned value (KiB)."""
    folder_mib: int = 64
    """Room in the program's folder, and size of each file (MiB)."""

    def for_runner(self, *, count_by_kernel: bool, count_files: bool) -> dict[str, Any]:
        """Return the bounds as code_runner.py reads them."""
        return {
            "wall_s": self.wall_s,
            "cpu_s": int(-(-self.wall_s // 1)) if self.cpu_s is None else self.cpu_s,
            "memory_bytes": self.memory_mib << 20,
            "folder_bytes": self.folder_mib << 20,
            "output_bytes": self.output_kib << 10,
            "open_files": self.open_files,
            "processes": self.processes,
            "files": FILES if count_files else 0,
            "count_by_kernel": count_by_kernel,
        }

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"the bound {name} = {value!r} must be above 0")


@dataclass(frozen=True)
class ProgramRun:
    """Says what a program did with one input."""

    status: str
    """ok: it ended with exit code 0; error: it ended otherwise; timeout, memory, processes, output, files: it exceeded
    that bound and was killed; ended: it broke its sandbox, or an earlier input used up the time of the program."""
    stdout: str = ""
    stderr: str = ""
    """The end of stderr."""
    value: str | None = None
    """What the called function returned, as JSON; None if no function was called or the status is not ok."""
    code: int | None = None
    """Exit code, negative for a signal; None if it was killed for a bound."""
    seconds: float = 0.0
    """Time by the clock."""
    left: int = 0
    """Processes that it left behind and that were killed."""


ENDED = "ended"
