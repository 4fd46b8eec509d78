"""This module holds the alarm rules about machines: time, ranks, engines, environments and disks."""

from collections import Counter
from statistics import median

from fiberpo_megatron.telemetry.alarms.history import SMOOTH, History
from fiberpo_megatron.telemetry.alarms.rule import Rule, Seen, level

LEAST_EXCESS = 0.01
"""Share of a step's time below which a slow rank costs nothing; it does not count for `probe`, which is a sample."""
EQUAL = ("generate", "old_log_probs", "reference", "train", "probe")
"""Phases in which peers have equal work; in the others rank 0 has more to do."""
HORIZON = 20
"""Steps for which a disk must have room."""
LEAST_GIB = 0.5
"""Room that is needed before a checkpoint was written."""


def _straggler(history: History) -> Seen | None:
    """Read the phase whose slowest rank is the same one in four of five steps, and the furthest behind."""
    total = history.now("seconds/total")
    found: list[Seen] = []
    looked = False
    for phase in EQUAL:
        ranks = history.recent(f"slowest/{phase}/rank", SMOOTH)
        shares = history.recent(f"slowest/{phase}/excess_share", SMOOTH)
        excess = history.recent(f"slowest/{phase}/excess_seconds", SMOOTH)
        if min(len(ranks), len(shares), len(excess)) < SMOOTH or not total:
            continue
        looked = True
        rank, often = Counter(ranks).most_common(1)[0]
        seconds, share = median(excess), median(shares)
        if often >= SMOOTH - 1 and (phase == "probe" or seconds > LEAST_EXCESS * total):
            what = "a small product of the same size" if phase == "probe" else f"the phase {phase}"
            words = (
                f"rank {rank:.0f} was the slowest in {often} of {SMOOTH} steps: {what} takes {seconds:.3g} s "
                f"({100 * share:.0f} %) longer than on the median of its peers"
            )
            found.append(Seen(f"slowest/{phase}/excess_seconds", share, words, int(rank)))
    if not looked:
        return None
    return max(found, key=lambda seen: seen.value, default=Seen("slowest/train/excess_seconds", 0.0, "no rank lags"))


def _step_time(history: History) -> Seen | None:
    now, plan = history.now("seconds/total"), history.now("expected/seconds/total")
    if now is None:
        return None
    if plan:
        words = f"a step takes {now:.3g} s, the plan expects {plan:.3g} s with these trajectories"
        return Seen("seconds/total", now / plan, words)
    start = history.start("seconds/total")
    if not start:
        return None
    words = f"a step takes {now:.3g} s, in the first steps it took {start:.3g} s; there is no plan"
    return Seen("seconds/total", now / start, words)


def _disk(history: History) -> Seen | None:
    free, checkpoint = history.latest("disk/free_gib"), history.latest("disk/checkpoint_gib")
    if free is None:
        return None
    needed = max(checkpoint or 0.0, LEAST_GIB)
    seen = history.recent("disk/free_gib", HORIZON + 1)
    slope = max(0.0, (seen[0] - seen[-1]) / (len(seen) - 1)) if len(seen) > 1 else 0.0
    room = (free - HORIZON * slope) / needed
    words = (
        f"{free:.3g} GiB are free for the run folder and get less by {slope:.2g} GiB a step; in {HORIZON} steps that "
        f"is room for {max(room, 0.0):.2g} times what a checkpoint needs ({needed:.2g} GiB)"
    )
    return Seen("disk/free_gib", room, words)


def _engines(history: History) -> Seen | None:
    silent = history.latest("engines/not_answering")
    if silent is None:
        return None
    return Seen(
        "engines/not_answering", silent, f"{silent:.0f} engines did not say how they are; engines.json names them"
    )


MACHINE_RULES: tuple[Rule, ...] = (
    Rule(
        "idle_share",
        "The training ranks wait for most of a step: for trajectories, engines or files.",
        limit=0.9,
        of="share of a step without forward or backward passes of the trainer",
        read=level("idle_share"),
        causes=("too few engines for the length of responses", "a few very long responses", "slow environments"),
        setting="rollout.engine.count: more engines, as `fiberpo plan` advises",
    ),
    Rule(
        "straggler",
        "One rank is the slowest in step after step, so that all others wait for it.",
        limit=0.2,
        of="time of the slowest rank above the median of its peers, as a share of the median",
        read=_straggler,
        causes=(
            "a GPU or CPU of its machine is throttled or broken",
            "another program runs on its machine",
            "its network adapter is degraded",
        ),
        setting='slurm.options: "--exclude=NODE", after `fiberpo doctor` on that machine',
    ),
    Rule(
        "step_time",
        "Steps take much longer than planned or, without a plan, than at the start.",
        limit=2.0,
        of="time of a step over what a plan expects of its trajectories, or over that of the first steps",
        read=_step_time,
        steps=5,
        margin=0.3,
        causes=(
            "the machine is shared or throttled",
            "responses have become longer (without a plan)",
            "storage or network is slow: compare the phases",
        ),
        setting="planning.calibration: a calibration of this machine, to see which phase is late",
    ),
    Rule(
        "disk",
        "The file system of the run folder fills up.",
        limit=2.0,
        of=f"checkpoints for which there will be room in {HORIZON} steps (at least {LEAST_GIB} GiB each)",
        read=_disk,
        below=True,
        steps=1,
        calm=1,
        margin=0.1,
        causes=("dumps of every trajectory", "too many checkpoints are kept", "others fill the file system"),
        setting="checkpoint.keep: fewer, or storage.dump = false",
    ),
    Rule(
        "engine_silent",
        "An engine does not answer a question about its load.",
        limit=0.0,
        of="engines that did not answer in time",
        read=_engines,
        steps=2,
        calm=2,
        causes=("it has crashed or hangs", "its machine is overloaded", "the network between the machines is broken"),
        setting="rollout.engine.extra_args: a `--watchdog-timeout`, and read its log in the folder engines",
    ),
    Rule(
        "environment_failures",
        "Many trajectories fail in their environments, and are zeroed or dropped.",
        limit=0.05,
        of="share of trajectories whose environment failed",
        read=level("failed_share"),
        causes=("an error in the environment's code", "a service that it uses is down", "its deadline is too short"),
        setting="environments.deadline_s: longer, after reading the files in the folder environments",
    ),
)
