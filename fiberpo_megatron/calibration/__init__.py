"""Calibration measures the machine at hand for `fiberpo plan --calibration FILE` (docs/planning.md, Calibration).

It times matrix products, memory, collectives, the trainer's passes, an engine and the disk, each several times, and
turns them into the constants of the planner's model.
"""
