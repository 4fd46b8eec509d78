"""This package holds the mathematics of what a run adds to an objective: pure functions on flat tensors, torch alone.

[n] are response tokens in any order and any number of parts: a function here looks at each token alone, so that
micro-batches, packing and layouts cannot change a result. docs/objectives.md lists the terms with their sources.
"""
