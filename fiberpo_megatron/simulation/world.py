"""This module has one simulated world: engines, a disk, a clock, and what befalls them. It outlives the trainer's
processes, and remembers what the invariants are about."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fiberpo_megatron.simulation.clock import Killed, VirtualLoop
from fiberpo_megatron.simulation.disk import SimulatedDisk, full
from fiberpo_megatron.simulation.engines import FAULTS, Engine, Engines, Fault, digest
from fiberpo_megatron.simulation.invariants import every_wait_ends
from fiberpo_megatron.simulation.policy import TENSORS, VOCABULARY
from fiberpo_megatron.simulation.scenario import Scenario

NEW_S = 1.0
"""Seconds, and those of two passes over a mini-batch, within which a publication is verified."""
EVENTS = 60_000
"""Events in which a process ends, one way or another."""
SECONDS = 20_000.0
"""Virtual seconds in which it does."""
SYNC_S = 2.0
"""Seconds after which what was kept has to survive the loss of a machine."""


class World:
    """It is the world of a seed. `folder` is empty; the folders of the run and of the model come to lie in it."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario, self.folder, self.model = scenario, folder / "run", folder / "model"
        for made in (self.folder, self.model):
            made.mkdir()
        (self.model / "config.json").write_text(json.dumps({"model_type": "simulated"}))
        self._faults = Random(f"faults {scenario.seed}")
        self._kills = Random(f"kills {scenario.seed}")
        self._disk_faults = Random(f"disk {scenario.seed}")
        self.left = {name: getattr(scenario, name) for name in ("faults", "kills", "stops", "full")}
        """What may still befall it, by kind."""
        self._engine_began = -SECONDS
        self.trace: list[tuple[float, str, dict[str, Any]]] = []
        """(time, what, facts) of all that happened, in order."""
        self.loop: VirtualLoop | None = None
        self._time, self._events = 0.0, 0
        self._kill_at: int | None = None
        self._stop_at: float | None = None
        self.reasons: list[str] = []
        """Why the present process may end: not because of an engine while there are others."""
        self._faulty: set[int] = set()
        """Engines to which something has happened since it began."""
        self._ended = False
        self.disk = SimulatedDisk(self.folder, self._disk_event)
        own = np.zeros((VOCABULARY, VOCABULARY), np.float32)
        halves = dict(zip(TENSORS, np.split(own, 2)))
        draw = Random(f"engines {scenario.seed}")
        engines = [
            Engine(n, scenario.successors, draw.choice([0.01, 0.05, 0.3]), draw.choice([0.3, 5.0]), 30000 + 100 * n)
            for n in range(scenario.engines)
        ]
        self.engines = Engines(engines, halves, 0, self._fault, self.note)
        self.published: dict[str, set[str]] = {}
        """Digests of the weights that were published under each version, in any lineage."""
        self.kept: dict[int, dict[int, tuple[float, Sequence[object]]]] = {}
        """When a group was kept on disk, and what it was, by step and number."""
        self.committed: dict[int, bytes] = {}
        """Digest of the trajectories that were on disk as a whole, by step."""
        self.digests: dict[int, str] = {0: digest(own)}
        """Digest of the weights after so many steps."""
        self.skipped: set[int] = set()
        """Steps in which a filter left nothing to train on."""

    # Time

    @property
    def now(self) -> float:
        return self._time if self.loop is None else self.loop.time()

    def note(self, what: str, **facts: Any) -> None:
        """Remember that something happened."""
        self.trace.append((round(self.now, 6), what, facts))
        if what == "engine began":
            self._engine_began = self.now

    def begin(self) -> VirtualLoop:
        """Begin a process of the trainer."""
        began, self.loop = self._time, None
        self._events, self._ended = 0, False
        self._kill_at = self._kills.randrange(1, 1500) if self.left["kills"] else None
        waits = self._kills.random() < 0.5  # most events lie in sampling, and most of the time in training
        self._stop_at = began + self._kills.uniform(0, 6) if self.left["stops"] else None
        self.reasons, self._faulty = [], set()
        self.loop = VirtualLoop(began, self._event)
        if self._kill_at is not None and waits:
            self._kill_at = EVENTS
            self.loop.call_later(self._kills.uniform(0, 12), self._kill)
        self.engines.attach(self.loop.time, fresh=self.scenario.successors and self._faults.random() < 0.5)
        self._engine_began = -SECONDS  # what was started before it began excuses nothing
        self.note("process began")
        return self.loop

    def end(self) -> None:
        """End the process: nothing befalls what is left of it."""
        assert self.loop is not None
        self._time, self._ended = self.loop.time(), True
        self.loop.close()
        self.loop = None

    def stop(self) -> bool:
        """Return whether the process has got a SIGTERM."""
        if self._stop_at is None or self.now < self._stop_at:
            return False
        if self.left["stops"] and "SIGTERM" not in self.reasons:
            self.left["stops"] -= 1
            self.reasons.append("SIGTERM")
            self.note("SIGTERM")
        return True

    def excuses(self) -> list[str]:
        """Return why the present process may end."""
        # one that was started again at its address in the middle of a publication has other weights after it
        since = self.now - self._engine_began
        replaced = not self.scenario.successors and since < NEW_S + 2 * self.scenario.train_s
        return [*self.reasons, *["an engine was replaced during a publication"] * replaced]

    # What befalls it

    def _event(self) -> None:
        if self._ended:
            return
        self._events += 1
        if self._kill_at is not None and self._events >= self._kill_at:
            self._kill()
        if self._events > EVENTS or self.now > self._time + SECONDS:
            every_wait_ends(f"after {self._events} events and {self.now - self._time:.0f} s it still goes on")

    def _kill(self) -> None:
        if self._ended or self._kill_at is None:
            return
        self._kill_at = None
        self.left["kills"] -= 1
        machine = self._kills.random() < self.scenario.machines
        self.reasons.append("killed")
        self.note("machine lost" if machine else "killed")
        self.disk.freeze(self._kills if machine else None)
        if machine:
            safe = self.now - SYNC_S
            self.kept = {
                step: {number: one for number, one in groups.items() if one[0] < safe}
                for step, groups in self.kept.items()
                if not self._warned(step)
            }
            for engine in self.engines.engines if self.scenario.successors else ():
                self.engines.end(engine, starts=True)
        raise Killed

    def _warned(self, step: int) -> bool:
        """Return whether production has warned that a file of an unfinished step is perhaps not on the disk."""
        folder = f"step_{step:06d}.unfinished"
        return any(folder in path.parts for path in self.disk.unsynced)

    def _disk_event(self, what: str, name: str) -> None:
        if self._ended or "killed" in self.reasons:
            return
        self.note(f"disk {what}", name=name)
        if self._kill_at is not None and self._disk_faults.random() < 0.03:
            self._kill()
        if self.left["full"] and what in ("open", "sync", "rename") and self._disk_faults.random() < 0.05:
            self.left["full"] -= 1
            self.reasons.append("disk full")
            self.note("disk full", name=name)
            raise full(name)

    def _fault(self, engine: Engine, path: str) -> tuple[Fault, float] | None:
        if not self.left["faults"] or self._faults.random() > 0.04:
            return None
        self.left["faults"] -= 1
        found = self._faults.choice(FAULTS), self._faults.choice([0.02, 0.5, 5.0, 90.0])
        self._faulty.add(engine.number)
        if len(self._faulty) == len(self.engines.engines):
            self.reasons.append("every engine has failed")
        if found[0] == "late":
            self.reasons.append("an engine that answers holds a publication back")
        self.note("fault", engine=engine.number, path=path, fault=found[0], seconds=found[1])
        return found
