"""Telemetry holds what a run reports: metrics and their sinks, timers, GPU readings, sample rollouts and the report."""
