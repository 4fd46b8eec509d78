"""This package watches a run's metrics: rules find what goes wrong, and alarms say so with likely causes and a setting
to try (docs/alarms.md)."""

from fiberpo_megatron.telemetry.alarms.record import ALARMS_FILE, Alarm, drop_alarms, read_alarms

__all__ = ["ALARMS_FILE", "Alarm", "drop_alarms", "read_alarms"]
