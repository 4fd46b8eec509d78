"""This module holds published figures of GPUs (`GPUS`) and every constant of the model of time (`Assumptions`)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from fiberpo_megatron.planning.overheads import Overheads


@dataclass(frozen=True)
class Gpu:
    """This is one GPU in its vendor's reference system, as the vendor specifies it."""

    name: str
    memory_gb: float
    """10^9 bytes, as the driver reports them: vendors' GB are 2^30 bytes (80 GB are 85e9), less what the driver keeps.
    B300 and GB300: the data sheet's number."""
    tflops: float
    """Dense bfloat16 matrix products, 10^12 operations a second."""
    memory_gb_per_s: float
    nvlink_gb_per_s: float
    """One direction of the links between the GPUs of a domain: half of the number that is specified for both."""
    nvlink_domain: int
    """GPUs that these links connect; beyond them, traffic takes the network."""
    network_gb_per_s: float
    """One direction, of the network adapters of one GPU."""
    host_gb_per_s: float
    """One direction between the GPU and host memory (PCIe, or NVLink-C2C divided among the GPUs of one CPU)."""
    source: str
    host_gpus: int = 8
    """GPUs of one host."""


_NVIDIA_8 = "DGX reference node: NDR 400 Gb/s an adapter, PCIe 5"
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 85, 312, 2039, 300, 8, 25, 32, "NVIDIA A100 80GB SXM data sheet; DGX A100: HDR 200 Gb/s, PCIe 4"),
        Gpu("H100", 85, 989, 3350, 450, 8, 50, 64, f"NVIDIA H100 SXM data sheet; {_NVIDIA_8}"),
        Gpu("H200", 150, 989, 4800, 450, 8, 50, 64, f"NVIDIA H200 SXM data sheet; {_NVIDIA_8}"),
        Gpu("H800", 85, 989, 3350, 200, 8, 50, 64, "H100 with NVLink of 400 GB/s: DeepSeek-V3, arXiv 2412.19437"),
        Gpu(
            "H20", 102, 148, 4000, 450, 8, 50, 64, "NVIDIA H20 SXM brief: 96 GB, 148 TFLOPS, 4.0 TB/s, NVLink 900 GB/s"
        ),
        Gpu("B200", 191, 2250, 8000, 900, 8, 50, 64, f"NVIDIA HGX B200 data sheet; {_NVIDIA_8}"),
        Gpu("B300", 270, 2250, 8000, 900, 8, 100, 128, "NVIDIA HGX B300 data sheet: 2.1 TB for 8; 800 Gb/s, PCIe 6"),
        Gpu(
            "GB200", 197, 2500, 8000, 900, 72, 50, 225, "NVIDIA GB200 NVL72 data sheet; 400 Gb/s; C2C 900 GB/s for 2", 4
        ),
        Gpu("GB200-NVL36", 197, 2500, 8000, 900, 36, 50, 225, "NVIDIA GB200 NVL36: GB200 with a domain of 36", 4),
        Gpu(
            "GB300",
            279,
            2500,
            8000,
            900,
            72,
            100,
            225,
            "NVIDIA GB300 NVL72 data sheet; 800 Gb/s; C2C 900 GB/s for 2",
            4,
        ),
        Gpu("MI300X", 206, 1307, 5300, 448, 8, 50, 64, "AMD Instinct MI300X data sheet: 7 links of 128 GB/s both ways"),
        Gpu("MI325X", 274, 1307, 6000, 448, 8, 50, 64, "AMD Instinct MI325X data sheet: 7 links of 128 GB/s both ways"),
    )
}


@dataclass(frozen=True)
class Assumptions(Overheads):
    """These are the constants that no data sheet of a GPU gives; docs/planning.md (Constants) has the source of each.

    One set holds for all GPUs, models and modes. `--assume name=value` replaces one, and a calibration those that it
    measures.
    """

    matmul_efficiency: float = 0.70
    """Share of `tflops` in large dense matrix products."""
    expert_matmul_efficiency: float = 0.55
    """Share of `tflops` in the grouped matrix products of experts."""
    attention_efficiency: float = 0.50
    """Share of `tflops` in flash attention, forward and backward together."""
    memory_efficiency: float = 0.80
    """Share of memory bandwidth in norms, activations, permutations and the optimizer."""
    prefill_efficiency: float = 0.50
    """Share of `tflops` while an engine reads prompts."""
    decode_memory_efficiency: float = 0.75
    """Share of memory bandwidth in decoding: reading dense weights, and keys and values."""
    expert_memory_efficiency: float = 0.59
    """Share of memory bandwidth in decoding: reading the weights of experts, each of which gets few tokens."""
    nvlink_efficiency: float = 0.70
    """Share of NVLink's bandwidth in large collectives."""
    network_efficiency: float = 0.80
    """Share of the network's bandwidth in large collectives."""
    small_message_efficiency: float = 0.12
    """Share of NVLink's bandwidth in the all-reduces of decoding (some 100 KB)."""
    small_network_efficiency: float = 0.25
    """Share of the network's bandwidth in the all-reduces of decoding."""
    nvlink_latency_us: float = 10.0
    """Microseconds of a small all-reduce inside an NVLink domain."""
    network_latency_us: float = 16.0
    """Microseconds of one hop between domains; an all-reduce over n domains has 2 log2(n) of them."""
    train_kernel_us: float = 8.0
    """Microseconds in which the trainer's Python issues one kernel: the floor of small micro-batches."""
    decode_kernel_us: float = 4.6
    """Microseconds that a kernel of decoding takes beside its reading, replayed from a CUDA graph."""
    eager_kernel_us: float = 44.0
    """Microseconds in which an engine without CUDA graphs issues one kernel of decoding."""
    graph_limit: float = 512
    """Largest number of running requests for which an engine captures CUDA graphs; larger batches run without."""
    engine_step_ms: float = 2.0
    """Milliseconds of the engine's scheduler and sampling per decoding step."""
    engine_request_us: float = 38.0
    """Microseconds of the engine's scheduler per running request and decoding step."""
    engine_host_ms: float = 2.3
    """Milliseconds per decoding step in which an engine's schedule reaches each further host over the network."""
    engine_reserved_gb: float = 4.0
    """CUDA context, graphs and activations of an engine on every GPU, outside weights and KV cache (10^9 bytes)."""
    pageable_copy_efficiency: float = 0.065
    """Share of the link to host memory in copies to and from pageable memory, by all GPUs of a host at once."""
    pinned_copy_efficiency: float = 0.75
    """The same for pinned memory."""
    wake_s: float = 3.0
    """Seconds in which colocated engines wake, map their memory and flush their caches, once a step."""
    trajectory_ms: float = 2.0
    """Milliseconds of the controller per trajectory and step: rewards, tokens to tensors, records."""
    storage_gb_per_s: float = 2.0
    """Rate at which one node writes a checkpoint (10^9 bytes a second)."""
    reserved_gb: float = 4.0
    """CUDA context, NCCL buffers, kernels and the allocator's fragments on every training GPU (10^9 bytes)."""
    expert_imbalance: float = 1.25
    """Tokens at the busiest rank's experts over their even share."""
    expert_spread: float = 0.65
    """Standard deviation of the logarithm of an expert's popularity."""
    length_spread: float = 0.7
    """Standard deviation of the logarithm of a response's length before it is cut."""
    draft_acceptance: float = 0.8
    """Probability that a drafted token is accepted, given that those before it were."""
    prompt_tokens: float = 256
    """Mean prompt where nothing states it; at most data.max_prompt_tokens."""
    response_share: float = 0.5
    """Mean response over rollout.max_response_tokens where nothing states it."""


_ZERO_ALLOWED = ("engine_step_ms", "engine_request_us", "engine_host_ms", "trajectory_ms", "wake_s")


def assume(given: Sequence[str]) -> Assumptions:
    """Return the default assumptions with ["name=value", ..] replaced.

    Raises ValueError for an unknown name or a value out of range.
    """
    names = [field.name for field in fields(Assumptions)]
    values = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in names:
            raise ValueError(f"--assume {text}: {name!r} is not an assumption; choose from {', '.join(names)}")
        try:
            values[name] = float(value)
        except ValueError:
            raise ValueError(f"--assume {text}: {value!r} is not a number") from None
        positive = values[name] >= 0 if name in _ZERO_ALLOWED or hasattr(Overheads, name) else values[name] > 0
        if not positive or (name.endswith(("_efficiency", "_share", "_acceptance")) and values[name] > 1):
            raise ValueError(f"--assume {text}: the value must be positive, and a share at most 1")
    return replace(Assumptions(), **values)
