"""Sources of rollouts: what gives each training step its trajectories and takes the weights that the step made."""
