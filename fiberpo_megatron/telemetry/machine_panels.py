"""This module makes the panels of a run's machines: time, efficiency, ranks, engines, memory and GPUs."""

from collections.abc import Iterator

from fiberpo_megatron.telemetry.panel_maker import Curve, Panel, PanelMaker

PHASES = {
    "generate": "#0072B2",
    "exchange": "#7fb3d5",
    "score": "#9fd3c7",
    "pack": "#b7b7b7",
    "old_log_probs": "#009E73",
    "gate": "#CC79A7",
    "train": "#D55E00",
    "publish": "#E69F00",
    "verify": "#f4d58d",
    "evaluate": "#8c6bb1",
    "checkpoint": "#6b7280",
}
"""Phases of a step in their order, with their colours; the time of other timers lies inside these."""


def speed(panels: PanelMaker) -> Iterator[Panel | None]:
    """Return panels that show how long a step and its phases take."""
    yield _phases(panels)
    yield panels.lines("Throughput", {"tokens_per_second": "prompt and response tokens over the whole step"})
    yield panels.lines(
        "Packing",
        {"useful_token_share": "positions that are not padding", "load_imbalance": "most loaded rank above the mean"},
    )
    yield panels.lines(
        "Micro-batches of a rank", {"micro_batches": "measured", "expected/micro_batches": "expected by the plan"}
    )
    yield panels.lines(
        "Time of a step and its plan",
        {
            "seconds/total": "measured",
            "expected/seconds/total": "expected with these trajectories",
            "planned/seconds/total": "planned before the start",
        },
        note="evaluations and checkpoints fall into single steps; the plan spreads checkpoints over all",
    )
    yield panels.lines("Time in the gate", {"gate/time_share": "all", "gate/reduce_share": "its reductions"})


def _phases(panels: PanelMaker) -> Panel | None:
    """Return the seconds of each phase; the gate's time is subtracted from training, of which it is a part."""
    minus = {"train": "seconds/gate"}
    curves = [
        Curve(f"seconds/{phase}", phase.replace("_", " "), colour=colour, minus=minus.get(phase))
        for phase, colour in PHASES.items()
    ]
    title, note = "Seconds per phase", "on the rank that writes the metrics"
    panel = panels.make(title, curves, form="stack", note=note)
    return panel or panels.make(title, [Curve("seconds/total", "total")], form="stack", note=note)


def efficiency(panels: PanelMaker) -> Iterator[Panel | None]:
    """Return panels that show how much of the machines the run uses."""

    def by_phase(title: str, pattern: str, note: str) -> Panel | None:
        found = panels.matching(pattern)
        curves = [Curve(n, phase.replace("_", " "), colour=PHASES.get(phase)) for n, phase in found.items()]
        return panels.make(title, curves, note=note)

    yield by_phase("Model FLOP utilisation", r"mfu/(.+)", "useful operations over the GPUs' peak")
    yield by_phase("Operations of each GPU", r"tflops_per_gpu/(.+)", "useful operations of a phase over its time")
    yield by_phase("Tokens of each GPU", r"tokens_per_second_per_gpu/(.+)", "over the time of the phase")
    yield panels.lines(
        "Time that counts",
        {"goodput": "goodput", "idle_share": "training waits"},
        note="goodput: time in steps that count, of the time since the run first began",
    )
    yield panels.lines("Time lost to restarts", {"restart/lost_seconds": "so far"})
    yield panels.lines("Energy of a trained token", {"energy/joules_per_token": "GPUs of this machine"})


def slowest(panels: PanelMaker) -> Iterator[Panel | None]:
    """Return panels that show which rank is slowest, and by how much."""
    excess = panels.matching(r"slowest/(.+)/excess_seconds")
    labels = {name: phase.replace("_", " ") for name, phase in excess.items()}
    yield panels.lines("Excess of the slowest rank", labels, note="over the median of the ranks, by phase")
    ranks = panels.matching(r"slowest/(.+)/rank")
    curves = [Curve(name, phase.replace("_", " "), markers=True) for name, phase in ranks.items()]
    yield panels.make("Slowest rank", curves, unit="rank", note="a rank that stays is a straggler")


def engines(panels: PanelMaker) -> Iterator[Panel | None]:
    """Return panels that show the states of the rollout engines."""
    yield panels.lines("Engines", {"engines/serving": "serving", "engines/not_answering": "not answering"})
    yield panels.lines("Queued requests", {"engines/queued": "after the step"})


def memory(panels: PanelMaker) -> Iterator[Panel | None]:
    """Return panels that show the peaks of memory, and the room on the disk."""
    yield panels.lines(
        "Peak of memory",
        {
            "memory/peak_gib": "GPU, tensors",
            "memory/reserved_peak_gib": "GPU, with the allocator's cache",
            "memory/host_peak_gib": "host",
        },
        note="of the fullest rank",
    )
    yield panels.lines("Free disk space", {"disk/free_gib": "file system of the run folder"})
    yield panels.lines("Size of a checkpoint", {"disk/checkpoint_gib": "newest"})


def gpus(panels: PanelMaker) -> Iterator[Panel | None]:
    """Return panels that show what the GPUs of the machine say about themselves."""
    for title, what in (
        ("Utilisation", "utilisation"),
        ("Memory in use", "memory_used"),
        ("Power", "power"),
        ("Temperature", "temperature"),
        ("Clocks held back", "throttled"),
        ("Uncorrected ECC errors", "ecc_uncorrected"),
    ):
        found = panels.matching(rf"gpu/(.+)/{what}")
        yield panels.lines(title, {name: f"GPU {index}" for name, index in found.items()})
    panels.used.update((kind, name) for kind, found in panels.names.items() for name in found if "gpu/" in name)
