"""Fused Triton kernels for the passes over tokens; `passes.py` beside this folder is their reference.

`formulas` holds each objective's arithmetic on a block of tokens, `blocks` the kernels around it, `fused`
launches them. Triton is optional: only `fused` and what it imports need it.
"""
