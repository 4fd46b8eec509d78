"""This module finds rollouts that were generated before: a dump to replay, or a step that a kill interrupted."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from fiberpo_megatron.config import Config
from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.rollout.dump import DumpError, Origin, RolloutDump, prompts_digest
from fiberpo_megatron.rollout.filter import Filtered
from fiberpo_megatron.rollout.finished import FinishedGroups, origins
from fiberpo_megatron.together import together
from fiberpo_megatron.types import Prompt, RolloutBatch, RolloutGroup, flatten


class Store(Protocol):
    """It keeps rollouts on disk. Every rank calls it; `unfinished` is for leaders alone."""

    def load(self, step: int, prompts: Sequence[Prompt], weights: str) -> RolloutBatch | None:
        """Return the step's trajectories, equal on every rank, where they need not be generated. Raises when they are
        to be replayed and cannot be."""
        ...

    def filtered(self, step: int) -> Filtered | None:
        """Return what the filter saw of a step that `load` has returned; None if the step had no filter."""
        ...

    def save(
        self,
        step: int,
        prompts: Sequence[Prompt],
        weights: str,
        batch: RolloutBatch,
        filtered: Filtered | None = None,
    ) -> None:
        """Keep trajectories that were just generated, and what the filter saw of the step."""
        ...

    def unfinished(
        self,
        step: int,
        prompts: Sequence[Prompt],
        weights: str,
        mine: Sequence[int],
        refills: Sequence[Prompt] | None = None,
    ) -> AbstractContextManager[MutableMapping[int, RolloutGroup]]:
        """Give the finished groups of a step whose generation was cut short, by index of their prompt, as far as they
        are among `mine`. What is put into the mapping is kept for a resume. `refills`: prompts that take the places of
        dropped groups; the indices then are theirs, and `prompts` stay those of the step."""
        ...

    def saved(self, done: int) -> None:
        """Note that a checkpoint holds the first `done` steps."""
        ...


DUMP = "dump"
"""Folder of a run's stored rollouts."""
REFILLS = "refills"
"""Folder, inside that of a step's finished groups, of those that take the places of dropped ones."""
_RENAMED = {"data.tasks": "environments"}
"""Settings of earlier versions, as rollouts that they stored name them."""
_log = logging.getLogger(__name__)


def dump_of(folder: Path) -> RolloutDump:
    """Return the stored rollouts of a run folder, or of a folder of stored rollouts."""
    return RolloutDump(folder / DUMP if (folder / DUMP).is_dir() else folder)


class StoredRollouts:
    """Implements the loop's Store. Every rank calls its methods; the first leader reads and writes whole steps, every
    leader the groups of a step that it generates.

    A step's trajectories stay on disk until a checkpoint holds the step (`storage.unfinished`) or for good
    (`storage.dump`). Those of an interrupted run are used again where a version of the weights means the same weights:
    either this run has loaded them, or the run that made them trained with the same configuration and layout.
    """

    def __init__(self, config: Config, vocabulary: int, layout: Layout, start: int, resume: bool) -> None:
        self._config = config.storage
        self._needs_routing = config.needs_rollout_routing
        self._needs_scores = {fact: section for fact, (section, _) in config.scoring_servers.items()}
        self._layout = layout
        self._own = RolloutDump(config.run.folder / DUMP)
        self._replayed = dump_of(config.storage.replay) if config.storage.replay else None
        self._writes = self._replayed is None and (config.storage.dump or config.storage.unfinished)
        self._dropped = 0
        self._settings = shared_settings(config, vocabulary)
        self._start = start
        self._run, self._sampling = _digests(config, layout.world_size)
        steps = range(start, config.trainer.steps)
        with together(layout, "looking for stored rollouts"):
            if self._replayed is not None and self._reads:
                for step in steps:
                    _check_settings(self._replayed, step, self._settings)
            if self._writes and self._reads and not resume:
                self._own.drop(before=sys.maxsize)  # left by a run that never recorded a step
            elif self._writes and self._reads:
                self._drop_others(start)
        found = [step for step in self._own.steps() if step in steps] if self._writes and self._reads else []
        self._unfinished = set(json.loads(layout.share_text(json.dumps(found) if layout.rank == 0 else None)))

    @property
    def _reads(self) -> bool:
        """The first leader: it is rank 0."""
        return self._layout.rank == 0

    def load(self, step: int, prompts: Sequence[Prompt], weights: str) -> RolloutBatch | None:
        """Return the step's trajectories if they are on disk, equal on every rank; None if they have to be generated.

        Raises DumpError (RuntimeError on the other ranks) when they are to be replayed and cannot be.
        """
        if self._replayed is None and step not in self._unfinished:
            return None
        batch, layout = None, self._layout
        with together(layout, f"reading the rollouts of step {step}"):
            if self._reads and self._replayed is not None:
                batch = self._replay(self._replayed, step, prompts)
            elif self._reads:
                batch = self._reuse(step, prompts, weights)
        if not layout.any_rank(batch is not None):
            return None
        share = batch if batch is not None else flatten([])
        joined = layout.gather_rollouts(share if layout.is_leader else None)
        if len(joined.routing_rows):
            with together(layout, f"reading the expert routing of step {step}"):
                dump = self._replayed or self._own
                held = dump.read_routes(step, layout.data_rank, layout.data_size) if layout.is_leader else {}
            joined = replace(joined, **held)
        return joined

    def filtered(self, step: int) -> Filtered | None:
        """See the protocol."""
        found = None
        with together(self._layout, f"reading what was dropped in step {step}"):
            if self._reads:
                found = (self._replayed or self._own).filtered(step)
        found = json.loads(self._layout.share_text(json.dumps(found) if self._layout.rank == 0 else None))
        return None if found is None else Filtered.from_json(found)

    def save(
        self,
        step: int,
        prompts: Sequence[Prompt],
        weights: str,
        batch: RolloutBatch,
        filtered: Filtered | None = None,
    ) -> None:
        """See the protocol."""
        if not self._writes:
            return
        origin, routes = self._origin(step, prompts, weights), 0
        if len(batch.routing_rows):
            routes = self._layout.data_size
            with together(self._layout, f"writing the expert routing of step {step} to {self._own.folder}"):
                if self._layout.is_leader:
                    self._own.write_routes(batch, origin, self._layout.data_rank)
        with together(self._layout, f"writing the rollouts of step {step} to {self._own.folder}"):
            if self._reads:
                self._own.write(batch, origin, routes, None if filtered is None else filtered.as_json())

    def unfinished(
        self,
        step: int,
        prompts: Sequence[Prompt],
        weights: str,
        mine: Sequence[int],
        refills: Sequence[Prompt] | None = None,
    ) -> AbstractContextManager[MutableMapping[int, RolloutGroup]]:
        """See the protocol."""
        if not self._writes:
            none: MutableMapping[int, RolloutGroup] = {}
            return nullcontext(none)
        origin = self._origin(step, prompts, weights)
        folder = self._own.unfinished(step)
        finished = FinishedGroups(
            folder if refills is None else folder / REFILLS,
            origin,
            self._layout.rank,
            prompts if refills is None else refills,
            mine,
            lambda found: self._can_stand_for(found, origin),
        )
        if finished.left and self._reads and refills is None:
            print(f"Step {step}: {len(finished.left)} of {len(prompts)} prompts had been generated before", flush=True)
        return finished

    def saved(self, done: int) -> None:
        """A checkpoint holds the first `done` steps: what was kept for a resume is no longer needed."""
        if done > self._dropped and self._writes and self._reads and not self._config.dump:
            self._own.drop(before=done)
            self._dropped = done

    def _replay(self, dump: RolloutDump, step: int, prompts: Sequence[Prompt]) -> RolloutBatch:
        origin = dump.origin(step)
        if origin.prompts != prompts_digest(prompts):
            raise DumpError(
                f"{dump.path(step)} holds rollouts of other prompts than this run's step {step}: the prompt files, the "
                "tokenizer or the curriculum differ; replay with those of the run that made the dump"
            )
        batch = dump.read(step)
        if not len(batch.lengths):
            return batch  # a filter has dropped all groups
        if self._needs_routing and not len(batch.routing_rows):
            raise DumpError(
                f"{dump.path(step)} has no expert routing, which this run's [algorithm] needs; make the dump with "
                "rollout.return_routing = true"
            )
        for fact, section in self._needs_scores.items():
            if not len(getattr(batch, fact)):
                raise DumpError(
                    f"{dump.path(step)} has no {fact}, which this run's {section} asks for: the rollouts were stored "
                    f"without scores, and a replay asks no server; make the dump with {section} set, or unset it"
                )
        return batch

    def _reuse(self, step: int, prompts: Sequence[Prompt], weights: str) -> RolloutBatch | None:
        """The trajectories that an interrupted run had generated for this step, unless they are of other weights."""
        try:
            if self._can_stand_for(self._own.origin(step), self._origin(step, prompts, weights)):
                return self._own.read(step)
            reason = "they were generated by another configuration"
        except DumpError as error:
            reason = str(error)
        _log.warning("step %d is generated again, its stored rollouts are not used: %s", step, reason)
        return None

    def _origin(self, step: int, prompts: Sequence[Prompt], weights: str) -> Origin:
        return Origin(step, weights, prompts_digest(prompts), self._settings, self._run, self._sampling)

    def _can_stand_for(self, found: Origin, wanted: Origin) -> bool:
        """Whether trajectories of one origin are what this run would sample: loaded weights are the same whatever
        happens to them now."""
        loaded = wanted.weights == str(self._start)
        return wanted == (replace(found, run=wanted.run) if loaded else found)

    def _drop_others(self, start: int) -> None:
        """Delete what another configuration or layout generated after the checkpoint of step `start`: this run will not
        have those weights, and once it had saved its own of that version, they could be taken for them."""
        stored = {*self._own.steps(), *self._own.unfinished_steps()}
        for step in sorted(step for step in stored if step > start):
            if any(found.run != self._run and found.weights != str(start) for found in self._origins(step)):
                _log.warning("the stored rollouts of step %d are of another configuration: deleted", step)
                self._own.forget([step])

    def _origins(self, step: int) -> Iterator[Origin]:
        """Of everything that is stored of a step and says where it comes from."""
        with suppress(DumpError):  # is reported when the step comes
            yield self._own.origin(step)
        yield from origins(self._own.unfinished(step))


def shared_settings(config: Config, vocabulary: int) -> dict[str, Any]:
    """Return what a run and the dump that it replays must have in common, as JSON values."""
    filter = config.batch.filter
    return ({} if filter is None else {"batch.filter": filter.model_dump(mode="json")}) | {
        "run.seed": config.run.seed,
        "batch.prompts": config.batch.prompts,
        "batch.samples_per_prompt": config.batch.samples_per_prompt,
        "rollout.temperature": config.rollout.temperature,
        "data.curriculum": config.data.curriculum,
        "environments": [environment.name for environment in config.environments],
        "model vocabulary": vocabulary,
    }


def _check_settings(dump: RolloutDump, step: int, ours: Mapping[str, Any]) -> None:
    """DumpError when a step is missing or was made with other settings."""
    theirs = {_RENAMED.get(name, name): value for name, value in dump.origin(step).settings.items()}
    differing = [
        f"{name} = {theirs.get(name)!r} (this run: {ours.get(name)!r})"
        for name in sorted(ours.keys() | theirs.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise DumpError(
            f"{dump.path(step)} was made with {', '.join(differing)}; replay it with the same settings, or make "
            "another dump"
        )


def _digests(config: Config, world_size: int) -> tuple[str, str]:
    """16 hex digits of every setting that decides the weights, with the number of ranks, and of those that decide what
    is sampled from given weights. With staleness the first are the second: any run that samples alike may use them."""
    described = config.model_dump(
        mode="json", include={"model": True, "rollout": True, "data": True, "environments": True, "run": {"seed"}}
    )
    described["rollout"]["engine"] = config.rollout.engine.dtype  # the servers' addresses and sizes decide nothing
    for name in ("max_concurrent_requests", "partial", "chunk_tokens"):  # they decide when, not what
        del described["rollout"][name]
    staleness = described["rollout"].pop("staleness")
    training = config.model_dump(mode="json", include={"parallel", "optimizer", "algorithm", "batch", "trainer"})
    if config.batch.filter is None:  # earlier versions had none
        del training["batch"]["filter"]
    if config.scoring_servers:  # their addresses decide nothing, but groups without scores cannot stand beside others
        described["scores"] = sorted(config.scoring_servers)
    sampling = described | {"model": {"path": described["model"]["path"], "dtype": described["model"]["dtype"]}}
    if staleness:  # which weights sample a token depends on timing; the log-probs beside it stay true whatever trains
        sampling |= {"staleness": staleness}
        return _digest(sampling), _digest(sampling)
    return _digest(described | training | {"ranks": world_size}), _digest(sampling)


def _digest(values: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()
