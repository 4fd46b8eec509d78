"""Carries the trainer's weights to the rollout engines: one small base, one file per way, and the check after it."""
