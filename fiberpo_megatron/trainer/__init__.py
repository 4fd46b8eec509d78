"""The training loop and what it needs between rollouts and the policy."""
