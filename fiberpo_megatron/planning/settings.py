"""This module defines the settings of what a run expects of itself: [planning]."""

from pathlib import Path

from fiberpo_megatron.settings import Section


class PlanningConfig(Section):
    calibration: Path | None = None
    """File of `fiberpo calibrate`, from which the run says at its start, and in every step's record, how long a step
    should take. Unset: calibration.json in the run folder or in the folder above it, if there is one; else the vendor's
    figures of the GPU."""
    assume: list[str] = []
    """Assumptions of that plan, such as "response_share=0.3" (docs/planning.md, Constants)."""
