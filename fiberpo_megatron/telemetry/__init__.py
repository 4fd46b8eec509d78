"""What a run tells: metrics and their sinks, timers, GPU readings, sample rollouts and the report."""
