"""This package holds the training loop, and what it needs between rollouts and the policy."""
