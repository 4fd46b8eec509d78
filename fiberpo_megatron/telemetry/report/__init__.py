"""The report of a run folder is one file, `report.html`, which needs no network and can be written during the run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fiberpo_megatron.telemetry.report.page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    """Load `write_report` when it is asked for: it needs matplotlib, which readers of a run's data do not."""
    if name != "write_report":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fiberpo_megatron.telemetry.report.page import write_report

    return write_report
