"""The report of a run folder is one file, `report.html`, which needs no network and can be written during the run."""

from fiberpo_megatron.telemetry.report.page import write_report

__all__ = ["write_report"]
