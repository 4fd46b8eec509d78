"""This package starts the processes of a run."""
