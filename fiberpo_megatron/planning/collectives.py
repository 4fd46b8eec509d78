"""This module gives the seconds of collectives: bytes over the links that a group spans, and hops between domains."""

from math import ceil, log2

from fiberpo_megatron.planning.hardware import Assumptions, Gpu

GIGA, MICRO = 1e9, 1e-6


def bandwidth(ranks: int, gpu: Gpu, assumptions: Assumptions) -> float:
    """Return the bytes a second between neighbours of a group of adjacent ranks: NVLink inside a domain, else the
    network."""
    if ranks <= gpu.nvlink_domain:
        return assumptions.nvlink_efficiency * gpu.nvlink_gb_per_s * GIGA
    return assumptions.network_efficiency * gpu.network_gb_per_s * GIGA


def domains(ranks: int, gpu: Gpu) -> int:
    """Return the number of NVLink domains that `ranks` adjacent ranks lie in."""
    return ceil(ranks / gpu.nvlink_domain)


def all_reduce_seconds(ranks: int, size: float, gpu: Gpu, assumptions: Assumptions, small: bool = False) -> float:
    """Return the time of an all-reduce of `size` bytes, latency included.

    Inside a domain every rank sends and receives its share twice. Over domains each rank's adapter carries one share of
    the domain's sum, twice, in a tree of log2(domains) hops up and down. `small` messages, as in decoding, reach a
    lower share of the links than large ones: engines have a kernel of their own inside a domain, and NCCL's low-latency
    protocol between domains.
    """
    if ranks == 1:
        return 0.0
    nvlink, network = assumptions.nvlink_efficiency, assumptions.network_efficiency
    if small:
        nvlink, network = assumptions.small_message_efficiency, assumptions.small_network_efficiency
    inside = min(ranks, gpu.nvlink_domain)
    seconds = assumptions.nvlink_latency_us * MICRO
    seconds += 2 * size * (inside - 1) / inside / (nvlink * gpu.nvlink_gb_per_s * GIGA)
    count = domains(ranks, gpu)
    if count > 1:
        seconds += 2 * log2(count) * assumptions.network_latency_us * MICRO
        seconds += 2 * size / inside / (network * gpu.network_gb_per_s * GIGA)
    return seconds


def all_to_all_seconds(ranks: int, size: float, gpu: Gpu, assumptions: Assumptions) -> float:
    """Return the time in which every rank sends `size` bytes in equal parts to the `ranks` of a group.

    Parts for other domains take the network while those for the own domain take NVLink.
    """
    if ranks == 1:
        return 0.0
    inside = min(ranks, gpu.nvlink_domain)
    over_nvlink = size * (inside - 1) / ranks / (assumptions.nvlink_efficiency * gpu.nvlink_gb_per_s * GIGA)
    over_network = size * (ranks - inside) / ranks / (assumptions.network_efficiency * gpu.network_gb_per_s * GIGA)
    latency = assumptions.nvlink_latency_us if inside == ranks else assumptions.network_latency_us
    return max(over_nvlink, over_network) + latency * MICRO
