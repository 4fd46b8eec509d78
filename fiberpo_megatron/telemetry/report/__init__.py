"""`report.html` of a run folder: one file, no network, readable while the run is still going."""

from fiberpo_megatron.telemetry.report.page import write_report

__all__ = ["write_report"]
