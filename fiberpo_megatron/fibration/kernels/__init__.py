"""This package computes an objective call in fused Triton kernels; the torch operations of the folder above are their
reference.

`fused` makes the call; `run_plan` and `device_tree` are its steps on ids and on nodes. `run_kernels`, `token_kernels`
and `node_kernels` hold the kernels, `formulas` each objective's arithmetic on a block of tokens. Triton is optional:
only `fused` and what it imports need it.
"""
