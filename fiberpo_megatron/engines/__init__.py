"""SGLang over HTTP: clients, server processes, their registry, and the stand-ins for machines without a GPU.

`sglang` is started as a process; nothing here imports it, nor torch.distributed.
"""
