"""Tests that need an NVIDIA GPU: kernels, host waits, memory and FP8 of the real device. `pytest -m gpu` runs them.

On a machine without a GPU they are skipped, and import neither Triton nor Megatron-Core.
"""
