"""Trajectories: sampling them with the engines, and keeping them on disk."""
