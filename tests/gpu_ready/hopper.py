"""Read command lines of SGLang as JSON from stdin, and print what its own ServerArgs make of each on a pretended H100.

It runs in a process of its own, in which torch says that there are eight GPUs of compute capability 9.0. Nothing is
started, and no kernel runs.
"""

import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import torch

GIB = 2**30
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 * GIB,
    multi_processor_count=132,
    shared_memory_per_block_optin=232448,
    warp_size=32,
)
FIELDS = (
    "attention_backend",
    "base_gpu_id",
    "chunked_prefill_size",
    "cuda_graph_config",
    "device",
    "disable_radix_cache",
    "dtype",
    "enable_deterministic_inference",
    "enable_memory_saver",
    "enable_return_routed_experts",
    "grammar_backend",
    "load_format",
    "max_running_requests",
    "mem_fraction_static",
    "moe_runner_backend",
    "sampling_backend",
    "skip_server_warmup",
    "skip_tokenizer_init",
    "sleep_on_idle",
    "tp_size",
)


def pretend() -> None:
    """Let torch, nvidia-smi and SGLang say that this machine has eight H100.

    SGLang's modules are imported before, as on a CPU, because on a GPU they import compiled kernels.
    """
    import sglang.srt.arg_groups.pipeline
    import sglang.srt.configs.model_config  # noqa: F401
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.utils import common

    torch.version.cuda = "13.0"
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 8
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (H100.major, H100.minor)
    torch.cuda.get_device_properties = lambda device=None: H100
    torch.cuda.get_device_name = lambda device=None: H100.name
    torch.cuda.mem_get_info = lambda device=None: (79 * GIB, H100.total_memory)
    real = subprocess.run

    def run(command, *arguments, **named):
        if "nvidia-smi" in (command if isinstance(command, str) else command[0]):
            out = "81559\n" * 8
            return SimpleNamespace(returncode=0, stdout=out if named.get("text") else out.encode(), stderr="")
        return real(command, *arguments, **named)

    subprocess.run = run
    for probe in vars(common).values():
        if hasattr(probe, "cache_clear"):
            probe.cache_clear()
    override_platform(has_flashinfer=True).install()


def resolved(arguments: list[str]) -> dict[str, object]:
    """Return the fields that SGLang decides for a command line."""
    from sglang.srt.server_args import prepare_server_args

    args = prepare_server_args(arguments)
    args.resolve_once()
    args.check_server_args()
    found = args.resolved_dict()
    return {name: found[name] for name in FIELDS}


if __name__ == "__main__":
    commands = json.load(sys.stdin)
    pretend()
    logging.disable(logging.WARNING)
    sys.stdout.write(json.dumps([resolved(command) for command in commands], default=str))
