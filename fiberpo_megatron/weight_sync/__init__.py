"""Carries the trainer's weights to the rollout engines: a base, one file per way, and the check after it."""
