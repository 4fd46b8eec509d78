"""This package makes trajectories with the engines and environments, and keeps them on disk."""
