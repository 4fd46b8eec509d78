"""This module runs the training of a seed through all that befalls it, process after process."""

import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiberpo_megatron import durable
from fiberpo_megatron.simulation import invariants
from fiberpo_megatron.simulation.clock import Deadlock, Killed
from fiberpo_megatron.simulation.invariants import Broken
from fiberpo_megatron.simulation.scenario import Scenario
from fiberpo_megatron.simulation.training import run_process
from fiberpo_megatron.simulation.world import World
from fiberpo_megatron.trainer.stop import Stopped


@dataclass(frozen=True)
class Simulated:
    """It is what became of a seed."""

    scenario: Scenario
    broken: Broken | None
    trace: list[tuple[float, str, dict[str, Any]]]
    """(virtual time in s, what, facts) of all that happened, in order."""
    digests: list[str]
    """Names of the weights after each step, from 0 on."""
    processes: int
    """Processes of the trainer, the last of which trained to the end."""


def simulate(seed: int) -> Simulated:
    """Run the training of a seed, and that of the same seed which nothing befalls where both have to agree."""
    scenario = Scenario.of(seed)
    found = simulate_training(scenario)
    if found.broken is None and scenario.repeats(found.processes) and scenario.quiet != scenario:
        expected = simulate_training(scenario.quiet)
        if expected.broken is not None:
            return expected
        try:
            invariants.resume_repeats(found.digests, expected.digests)
        except Broken as broken:
            return Simulated(scenario, broken, found.trace, found.digests, found.processes)
    return found


def simulate_training(scenario: Scenario) -> Simulated:
    """Run one training through all that befalls it."""
    folder = Path(tempfile.mkdtemp(prefix="simulation-", dir=_memory()))
    world = World(scenario, folder)
    broken: Broken | None = None
    processes = 0
    try:
        with durable.use(world.disk), _silence():
            most = sum(world.left.values()) + 3
            while processes < most:
                processes += 1
                if _ended(world):
                    break
            else:
                invariants.every_wait_ends(f"the run had not ended after {most} processes")
    except Broken as error:
        broken = error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    digests = [named for _, named in sorted(world.digests.items())]
    return Simulated(scenario, broken, world.trace, digests, processes)


def _ended(world: World) -> bool:
    """Run one process; return whether it trained to the end."""
    try:
        run_process(world)
    except Killed:
        world.disk.thaw()
    except Stopped as stopped:
        world.note("stopped", done=stopped.done)
        invariants.ends_for_a_reason(stopped, [reason for reason in world.reasons if reason == "SIGTERM"])
    except Deadlock:
        invariants.every_wait_ends("a process waits for what will never come")
    except Exception as error:
        world.note("ended", error=f"{type(error).__name__}: {error}"[:300])
        invariants.ends_for_a_reason(error, world.excuses())
    else:
        world.note("trained to the end")
        return True
    return False


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what production says about what befalls it from the terminal."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _memory() -> str | None:
    """Return a folder in memory, where there is one."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None
