"""These tests simulate trainings: what must hold does, a seed repeats, and a bug in production is found."""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fiberpo_megatron.rollout import finished
from fiberpo_megatron.rollout.fleet import Fleet
from fiberpo_megatron.rollout.generator import Generator
from fiberpo_megatron.rollout.sampler import EngineSampler
from fiberpo_megatron.rollout.tickets import Tickets
from fiberpo_megatron.simulation import __main__ as command
from fiberpo_megatron.simulation.clock import VirtualLoop
from fiberpo_megatron.simulation.engines import FAULTS
from fiberpo_megatron.simulation.invariants import INVARIANTS
from fiberpo_megatron.simulation.run import Simulated, simulate, simulate_training
from fiberpo_megatron.simulation.scenario import Scenario
from fiberpo_megatron.sources import supply
from fiberpo_megatron.sources.handover import CutShort
from fiberpo_megatron.sources.stored import StoredRollouts
from fiberpo_megatron.trainer import loop

SEEDS, BLOCK = 100, 20
MOST = 40
"""Seeds within which a planted bug has to be found."""
ENGINES = {"steps": 5, "staleness": 2, "partial": "segment", "engines": 3, "successors": False, "faults": 8}
MACHINES = {"steps": 5, "staleness": 2, "partial": "segment", "kills": 3, "machines": 1.0, "save_every": 1}
SLOW = {"train_s": 1.0, "silence_s": 2.0, "save_s": 0.0}
HARSH: dict[str, dict[str, Any]] = {
    "tokens_sampled": ENGINES | SLOW,
    "verified_first": ENGINES | SLOW,
    "kept_is_used": MACHINES | SLOW,
}
"""What is different from the scenario of a seed, where a bug shows in few of them: only engines fail, or only machines
are lost, while tokens of older weights are in flight."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A simulation is single-threaded, and production warns of everything that befalls it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@cache
def _sound(seed: int) -> Simulated:
    return simulate(seed)


def _holds(seeds: range) -> None:
    for seed in seeds:
        found = _sound(seed)
        assert found.broken is None, f"seed {seed} breaks {found.broken.name}: {found.broken}"


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_every_invariant_holds(first: int):
    _holds(range(first, first + BLOCK))


@pytest.mark.exhaustive
@pytest.mark.parametrize("first", range(SEEDS, 1000, 100))
def test_every_invariant_holds_in_many_more(first: int):
    _holds(range(first, first + 100))


def test_a_seed_repeats_event_by_event(monkeypatch: pytest.MonkeyPatch):
    for seed in range(8):
        first = _sound(seed)
        with monkeypatch.context() as patch:  # other processes fill the machine's disk meanwhile
            patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
            second = simulate(seed)
        assert first.digests == second.digests and first.processes == second.processes
        assert first.trace == second.trace


def test_what_a_full_disk_did_not_sync_may_be_lost_with_the_machine():
    """Production warns of it. In this seed the sync of two groups fails, and the machine is lost a second later."""
    found = simulate(9013)
    happened = [what for _, what, _ in found.trace]
    assert found.broken is None
    assert happened.index("disk full") < happened.index("machine lost")


def test_everything_that_may_befall_a_run_does():
    seen = sum((command._befell(_sound(seed)) for seed in range(40)), Counter[str]())
    assert {f"engine {one}" for one in FAULTS} | {"killed", "machine lost", "SIGTERM", "disk full"} <= seen.keys()


@pytest.mark.parametrize("began", [0.0, 1e6, 1.8e9])
def test_virtual_time_passes_wherever_it_begins(began: float):
    """1.8e9 is a time in seconds since 1970; floats are 2e-7 s apart there."""
    events = iter(range(100))
    loop = VirtualLoop(began, lambda: next(events))
    loop.sleep(0.25)
    assert loop.time() - began == pytest.approx(0.25, abs=1e-6)


# Planted bugs


@contextmanager
def _bug(*places: tuple[Any, str, Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for holder, name, value in places:
            patch.setattr(holder, name, value)
        yield


def _admits_too_early() -> Any:
    def versions(self: Tickets, step: int) -> range:
        return range(max(0, step - self.staleness - 1), step + 1)

    return _bug(
        (Tickets, "admitted", lambda self, version: min(version + self.staleness + 1, self.steps - 1)),
        (Tickets, "versions", versions),
    )


def _saves_a_step_late() -> Any:
    """A checkpoint is named after the step before the last one whose training it has."""
    save = loop._save
    return _bug((loop, "_save", lambda run, done, measured: save(run, done - 1, measured)))


def _checks_no_weights() -> Any:
    return _bug(
        (EngineSampler, "_check_weights", lambda self, engine, client, completions: None),
        (Generator, "_check", lambda self, versions, prompt, completion: None),
    )


def _serves_what_joins() -> Any:
    gather = Fleet._gather

    def all_serve(self: Fleet) -> None:
        gather(self)
        self._serving |= self.joining

    published = Fleet.published

    def at_once(self: Fleet, version: str) -> None:
        published(self, version)
        self._serve()

    return _bug((Fleet, "_gather", all_serve), (Fleet, "published", at_once))


def _loses_the_last_prompt() -> Any:
    share = supply.share
    return _bug((supply, "share", lambda items, rank, size: share(items, rank, size)[: max(1, len(items) - 1)]))


def _syncs_no_journal() -> Any:
    """Finished groups are written, and no machine that is lost has them."""
    return _bug((finished, "_end", lambda file, name: file.close()))


def _forgets_what_was_committed() -> Any:
    """A step's file is not looked at, and its groups went with it; later weights sample it again."""
    return _bug((StoredRollouts, "load", lambda self, step, prompts, weights: None))


def _draws_with_the_clock() -> Any:
    """A resumed run samples with other seeds."""
    seed = Generator._seed

    def other(self: Generator, prompt: Any, name: str) -> int:
        return seed(self, prompt, f"{name} {round(self.loop.time())}")  # type: ignore[attr-defined]

    return _bug((Generator, "_seed", other))


def _ends_a_step_early() -> Any:
    train = loop.train

    def shorter(run: Any, start: int = 0) -> None:
        train(replace(run, steps=max(start, run.steps - 1)), start)

    from fiberpo_megatron.simulation import training

    return _bug((training, "train", shorter))


def _cannot_go_on_without_an_engine() -> Any:
    return _bug((Fleet, "goes_on_without", lambda self, error: False))


def _never_sends_again() -> Any:
    return _bug((CutShort, "_release", lambda self: None))


PLANTED: dict[str, Callable[[], Any]] = {
    "lag_bounded": _admits_too_early,
    "trained_once": _saves_a_step_late,
    "tokens_sampled": _checks_no_weights,
    "verified_first": _serves_what_joins,
    "no_ticket_lost": _loses_the_last_prompt,
    "kept_is_used": _syncs_no_journal,
    "committed_is_used": _forgets_what_was_committed,
    "resume_repeats": _draws_with_the_clock,
    "all_steps_trained": _ends_a_step_early,
    "ends_for_a_reason": _cannot_go_on_without_an_engine,
    "every_wait_ends": _never_sends_again,
}


def test_every_invariant_has_a_planted_bug():
    assert PLANTED.keys() == {one.__name__ for one in INVARIANTS}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str):
    """It is found within some seeds, by the invariant that it is about; without it the seed is sound."""

    def trained(seed: int) -> Simulated:
        if name not in HARSH:
            return simulate(seed)
        return simulate_training(replace(Scenario.of(seed).quiet, **HARSH[name]))

    with PLANTED[name]():
        for seed in range(MOST):
            found = trained(seed)
            if found.broken is not None and found.broken.name == name:
                break
        else:
            pytest.fail(f"{MOST} seeds did not break {name}")
    assert trained(seed).broken is None


def test_the_command_names_a_broken_invariant_and_how_to_replay_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr("sys.argv", ["simulation", "--seeds", "1"])
    assert command.main() == 0
    assert "1 of 1 seeds" in capsys.readouterr().out
    with _ends_a_step_early():
        assert command.main() == 1
    said = capsys.readouterr().out
    assert "Seed 0 breaks all_steps_trained" in said
    assert "python -m fiberpo_megatron.simulation --seeds 1 --first-seed 0 --verbose" in said
