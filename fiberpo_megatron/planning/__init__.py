"""Planning says what a run needs before it has GPUs: memory of every rank, time of every phase, and layouts that fit.

It is arithmetic on a config and a Hugging Face config.json; it needs no GPU, no weights and no process group.
docs/planning.md says what of it was checked against real runs and what is derived.
"""
