"""This package talks to SGLang over HTTP: clients, server processes, their registry, and stand-ins for use without a
GPU.

`sglang` is started as a process; nothing in this package imports it or torch.distributed.
"""
