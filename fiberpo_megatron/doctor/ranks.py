"""This check lets ranks talk to each other, to find which are missing, which are slow, and whose clock is off.

Every rank reports to the store that it has started and what its machine looks like; rank 0 waits for each by number.
Then all take part in a timed all-reduce (NCCL, or gloo without a GPU), and rank 0 exchanges a message and a clock with
one rank of every machine (on one machine, with every rank). `python -m fiberpo_megatron.doctor.ranks` runs one rank.
"""

import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fiberpo_megatron.doctor import machine
from fiberpo_megatron.doctor.gpu_software import shared_variables
from fiberpo_megatron.doctor.report import Finding
from fiberpo_megatron.rendezvous import ranks_store, start_key

DEADLINE_S = 60.0
ALL_REDUCE_BYTES, MESSAGE_BYTES, ROUNDS = 32 * 2**20, 4 * 2**20, 3
SLOW_FACTOR = 3.0
"""A rank is slow when its exchange with rank 0 takes this many times the median's."""
CLOCK_SKEW_S = 1.0


def machine_findings() -> list[Finding]:
    """Return the findings that can differ from node to node."""
    return [*machine.gpus(), *machine.shared_memory(), *machine.open_files(), *machine.cores()]


def meet(deadline_s: float = DEADLINE_S) -> list[Finding]:
    """Check communication between the launcher's ranks; every rank calls this, rank 0 gets the findings, the others
    none.

    Raises TimeoutError on a rank that does not find rank 0.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=deadline_s)
    store = ranks_store(timeout)
    said: dict[str, Any] = {"host": socket.gethostname(), "gpus": None, "findings": [], "variables": shared_variables()}
    if os.environ.get("LOCAL_RANK", "0") == "0":
        said["gpus"], said["findings"] = machine.gpu_count(), [asdict(finding) for finding in machine_findings()]
    present, missing = gather(store, rank, size, deadline_s, said)
    found = _of_machines(present)
    if missing:
        if rank:
            return []
        seen = f"{_ranks(missing)} of {size} did not come within {deadline_s:g} s"
        fix = "See the logs of those ranks; check that their hosts reach MASTER_ADDR:MASTER_PORT"
        return [*found, Finding("ranks", "fail", seen, fix)]
    hosts = {number: said["host"] for number, said in present.items()}
    return found + _talk(dist.PrefixStore(start_key("doctor"), store), rank, size, timeout, hosts)


def gather(
    store: Any, rank: int, size: int, deadline_s: float, said: Mapping[str, Any]
) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """Return what every rank says, on rank 0 only, and the ranks that said nothing in time; every rank calls this.

    Rank 0 reads what others say and shares who is missing, so that the number of requests to the store grows with the
    ranks, not with their square.
    """
    store.set(start_key(f"doctor/here/{rank}"), json.dumps(said))
    if rank == 0:
        present, missing = _wait_for(store, size, deadline_s)
        store.set(start_key("doctor/missing"), json.dumps(missing))
        return present, missing
    store.wait([start_key("doctor/missing")], timedelta(seconds=2 * deadline_s))
    return {}, json.loads(store.get(start_key("doctor/missing")))


def _wait_for(store: Any, size: int, deadline_s: float) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """Return what every rank reported, and the ranks that reported nothing."""
    until = time.monotonic() + deadline_s
    present, missing = {}, []
    for rank in range(size):
        try:
            store.wait([start_key(f"doctor/here/{rank}")], timedelta(seconds=max(0.01, until - time.monotonic())))
            present[rank] = json.loads(store.get(start_key(f"doctor/here/{rank}")))
        except (dist.DistError, RuntimeError):
            missing.append(rank)
    return present, missing


def _of_machines(present: dict[int, dict[str, Any]]) -> list[Finding]:
    """Return the findings of every node, with the node's name if there are several."""
    several = len({said["host"] for said in present.values()}) > 1
    found = []
    for said in present.values():
        for finding in (Finding(**values) for values in said["findings"]):
            name = f"{said['host']}: {finding.check}" if several else finding.check
            found.append(Finding(name, finding.status, finding.seen, finding.fix))
    found += _of_variables(present)
    gpus = {said["host"]: said["gpus"] for said in present.values() if said["gpus"] is not None}
    most = max(gpus.values(), default=0)
    if short := {host: count for host, count in gpus.items() if count < most}:
        seen = f"{', '.join(f'{host} has {count}' for host, count in short.items())}, the others have {most}"
        fix = "Leave those nodes out (slurm.options, --exclude=NODE) until nvidia-smi shows all of their GPUs again"
        found.append(Finding("GPU count", "fail", seen, fix))
    return found


def _of_variables(present: Mapping[int, Mapping[str, Any]]) -> list[Finding]:
    """Return a failure if ranks have different variables of NCCL or CUDA: they would hang, or share no communicator."""
    values: dict[str, dict[str | None, list[int]]] = {}
    names = {name for said in present.values() for name in said.get("variables", {})}
    for name in sorted(names):
        for rank, said in present.items():
            values.setdefault(name, {}).setdefault(said["variables"].get(name), []).append(rank)
    found = []
    for name, ranks in values.items():
        if len(ranks) == 1:
            continue
        few, *_, most = sorted(ranks, key=lambda value: len(ranks[value]))
        seen = f"{name} is {few or 'unset'} on {_ranks(ranks[few][:8])}, and {most or 'unset'} on the others"
        found.append(Finding("variables", "fail", seen, f"Set {name} alike on all nodes, in the job's script"))
    return found


def _talk(store: dist.Store, rank: int, size: int, timeout: timedelta, hosts: Mapping[int, str]) -> list[Finding]:
    gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if gpu:  # SLURM may show every rank of a machine one GPU, which then has number 0
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        seconds = _timed(lambda: dist.all_reduce(torch.ones(ALL_REDUCE_BYTES // 4, device=device)), gpu)
        exchanged, skews = _exchange(rank, _partners(size, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    finally:
        dist.destroy_process_group()
    if rank:
        return []
    carried = 2 * (size - 1) / size * ALL_REDUCE_BYTES / seconds / 1e9
    name = "NCCL" if gpu else "gloo"
    seen = f"{name}, {size} ranks: {ALL_REDUCE_BYTES / 2**20:.0f} MiB in {seconds * 1e3:.1f} ms ({carried:.2f} GB/s)"
    return [Finding("all-reduce", "pass", seen), _slow(exchanged, hosts), _clocks(skews, hosts)]


def _timed(work: Callable[[], object], gpu: bool) -> float:
    """Return the seconds of one round; the first round, which connects, is not counted."""
    work()
    if gpu:
        torch.cuda.synchronize()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        work()
    if gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / ROUNDS


def _partners(size: int, on_a_machine: int) -> list[int]:
    """Return the ranks with which rank 0 compares: the first of every other machine, or all others on one machine."""
    return list(range(1, size)) if on_a_machine >= size else list(range(on_a_machine, size, on_a_machine))


def _exchange(rank: int, partners: Sequence[int]) -> tuple[dict[int, float], dict[int, float]]:
    """Measure, on rank 0, a round trip to every partner over gloo (s), and the partner's clock minus rank 0's (s)."""
    message, clock = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8), torch.zeros(1, dtype=torch.float64)
    seconds, skews = {}, {}
    for peer in partners:
        for _ in range(2):  # the first connects
            if rank == 0:
                began = time.perf_counter()
                dist.send(message, peer)
                dist.recv(message, peer)
                seconds[peer] = time.perf_counter() - began
                asked = time.time()
                dist.send(clock, peer)
                dist.recv(clock, peer)
                skews[peer] = clock.item() - (asked + time.time()) / 2
            elif rank == peer:
                dist.recv(message, 0)
                dist.send(message, 0)
                dist.recv(clock, 0)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0)
    return seconds, skews


def _slow(seconds: Mapping[int, float], hosts: Mapping[int, str]) -> Finding:
    if not seconds:
        return Finding("links", "pass", "there is only one rank")
    usual = statistics.median(seconds.values())
    slow = [rank for rank, taken in seconds.items() if taken > SLOW_FACTOR * usual]
    seen = f"{MESSAGE_BYTES / 2**20:.0f} MiB to a rank and back in {usual * 1e3:.1f} ms (median)"
    if not slow:
        return Finding("links", "pass", seen)
    worst = max(slow, key=lambda rank: seconds[rank])
    slower = f"{_ranks(slow)} slow, rank {worst} on {hosts[worst]} takes {seconds[worst] * 1e3:.1f} ms"
    return Finding("links", "warn", f"{seen}; {slower}", "Check the network and the load of those ranks' hosts")


def _clocks(skews: Mapping[int, float], hosts: Mapping[int, str]) -> Finding:
    worst = max(skews, key=lambda rank: abs(skews[rank]), default=None)
    if worst is None or abs(skews[worst]) < CLOCK_SKEW_S:
        return Finding("clocks", "pass", f"they are within {CLOCK_SKEW_S:g} s of each other")
    seen = (
        f"the clock of {hosts[worst]} (rank {worst}) is off by {skews[worst]:+.1f} s from that of {hosts[0]} (rank 0)"
    )
    return Finding("clocks", "warn", seen, "Have the hosts' time kept by chrony or ntpd: logs cannot be compared")


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def main(path: Path) -> int:
    """Run one of the local ranks that `fiberpo doctor` starts; rank 0 writes the findings to `path`."""
    found = meet()
    if os.environ["RANK"] == "0":
        path.write_text(json.dumps([asdict(finding) for finding in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
