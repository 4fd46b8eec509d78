"""This module holds published figures of GPUs, and the share of them that a run is assumed to reach."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Gpu:
    """This is one GPU of a node of eight, as its vendor specifies it."""

    name: str
    memory_gb: float
    """10^9 bytes."""
    tflops: float
    """Dense bfloat16 matrix products, 10^12 operations a second."""
    memory_gb_per_s: float
    nvlink_gb_per_s: float
    """One direction: half of the number that is specified for both."""
    network_gb_per_s: float
    """One direction, of one network adapter per GPU as in the vendor's reference node."""
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 312, 2039, 300, 25, "NVIDIA A100 80GB SXM data sheet; DGX A100: HDR 200 Gb/s"),
        Gpu("H100", 80, 989, 3350, 450, 50, "NVIDIA H100 SXM data sheet; DGX H100: NDR 400 Gb/s"),
        Gpu("H200", 141, 989, 4800, 450, 50, "NVIDIA H200 SXM data sheet; DGX H200: NDR 400 Gb/s"),
        Gpu("B200", 180, 2250, 8000, 900, 50, "NVIDIA HGX B200 data sheet; DGX B200: NDR 400 Gb/s"),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """These are guesses of what no data sheet says; replace them by your own measurements (`--assume name=value`)."""

    train_efficiency: float = 0.30
    """Share of `tflops` in the trainer's passes."""
    prefill_efficiency: float = 0.40
    """Share of `tflops` while an engine reads prompts."""
    decode_efficiency: float = 0.50
    """Share of memory bandwidth, and of `tflops`, while an engine generates."""
    link_efficiency: float = 0.70
    """Share of NVLink's and the network's bandwidth in collectives."""
    gpus_per_node: float = 8
    reserved_gb: float = 4.0
    """CUDA context, NCCL buffers, kernels and the allocator's fragments on every training GPU (10^9 bytes)."""
    expert_imbalance: float = 1.25
    """Tokens at the busiest rank's experts over their even share."""
    prompt_tokens: float = 256
    """Mean prompt; at most data.max_prompt_tokens."""
    response_share: float = 0.5
    """Mean response over rollout.max_response_tokens."""


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
        if not values[name] > 0 or (name.endswith(("_efficiency", "_share")) and values[name] > 1):
            raise ValueError(f"--assume {text}: the value must be positive, and a share at most 1")
    return replace(Assumptions(), **values)
