"""What a run needs before it has GPUs: memory of every rank, time of every phase, and layouts that fit.

Arithmetic on a config and a Hugging Face config.json; no GPU, no weights, no process group. docs/planning.md says what
of it was checked against real runs and what is derived.
"""
