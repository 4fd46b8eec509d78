"""This package holds the sources of rollouts, which give each training step its trajectories and take its weights."""
