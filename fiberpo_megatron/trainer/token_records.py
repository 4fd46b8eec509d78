"""This module collects what a training step did to single tokens, and has rank 0 write it to <run>/tokens.

A few whole trajectories of each step are recorded: which, every rank knows from the batch alone. No rank holds all of
their tokens, so each notes its own after every optimiser step, and at the end of the training step all ranks exchange
these notes, whose size `telemetry.tokens_per_step` bounds. Nothing here changes what is trained.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fiberpo_megatron.config import Config
from fiberpo_megatron.fibration.explain import STATES, CallTrace, Explanation
from fiberpo_megatron.interfaces import Layout, Routing
from fiberpo_megatron.telemetry.step_files import spread
from fiberpo_megatron.telemetry.token_log import write_tokens
from fiberpo_megatron.trainer.batch import MiniBatch
from fiberpo_megatron.trainer.token_lines import Notes, RecordedTrajectory, StepFacts, lines, packed
from fiberpo_megatron.types import Coefficients, RolloutBatch, TokenScores, concatenated_response_tokens

_log = logging.getLogger(__name__)


def recorded_trajectories(
    rollouts: RolloutBatch, samples: int, bound: int, kept: NDArray[np.bool_] | None = None
) -> list[RecordedTrajectory]:
    """Return the trajectories of which tokens are recorded, in the order of the batch.

    They are those that `telemetry.rollouts_per_step` (`samples`) writes, as far as they fit into `bound` tokens after
    the prompts; one that does not fit is left out, and so are those that `kept` [B] leaves out of the training.
    Branches of a trajectory are recorded one after the other, prompts included.
    """
    lengths, sequences = rollouts.lengths, rollouts.sequences
    firsts = np.cumsum(sequences) - sequences
    rollouts, left, found = rollouts.per_trajectory(), bound, []
    kept = None if kept is None else kept[firsts]
    offsets = rollouts.offsets
    trained = np.arange(len(rollouts.lengths)) if kept is None else np.cumsum(kept) - 1
    starts = offsets if kept is None else np.concatenate([[0], np.cumsum(rollouts.lengths * kept)])
    for place in spread(samples, len(rollouts.lengths)):
        mask = rollouts.response_mask[offsets[place] : offsets[place + 1]]
        prompt, size = int(mask.argmax()), int(rollouts.lengths[place])
        if (kept is not None and not kept[place]) or not mask.any() or size - prompt > left:
            continue
        begin, own = int(starts[place]), slice(firsts[place], firsts[place] + sequences[place])
        branches = tuple((begin + np.cumsum(lengths[own])[:-1]).tolist())
        found.append(RecordedTrajectory(place, int(trained[place]), begin, begin + prompt, begin + size, branches))
        left -= size - prompt
    return found


@dataclass
class TokenRecords:
    """Opens the records of each training step."""

    folder: Path
    """The run folder."""
    bound: int
    """`telemetry.tokens_per_step`"""
    samples: int
    """`telemetry.rollouts_per_step`"""
    keep: int
    """`telemetry.rollout_steps_kept`"""
    pieces: Callable[[Sequence[int]], list[str]]
    """Gives the text of each token."""
    domains: Sequence[str]
    """Names of the environments."""
    _notes: bool | None = field(default=None, init=False)

    def begin(
        self, step: int, layout: Layout, rollouts: RolloutBatch, kept: NDArray[np.bool_] | None, objective: str
    ) -> "StepTokens | None":
        """Return what records a training step; None, on all ranks alike, when nothing is recorded.

        `rollouts` are all of the step's trajectories, of which those that `kept` [B] marks are trained on (None: all).
        """
        if not self.bound:
            return None
        if self._notes is None:  # among the tensor-parallel ranks, which hold the same tokens, the first takes notes
            places = layout.gather_json([layout.data_rank, layout.context_rank] if layout.is_last_stage else None)
            self._notes = layout.is_last_stage and places.index(places[layout.rank]) == layout.rank
        found = recorded_trajectories(rollouts, self.samples, self.bound, kept)
        if not found:
            return None
        trained = rollouts if kept is None else rollouts.select(kept)
        facts = StepFacts(step, objective, tuple(self.domains), trained.per_trajectory(), self.pieces)
        return StepTokens(self, layout, facts, found, self._notes)


def token_records(config: Config, pieces: Callable[[Sequence[int]], list[str]], domains: Sequence[str]) -> TokenRecords:
    """Return the records of a run; `pieces` gives the text of each token, `domains` are the environments' names."""
    telemetry = config.telemetry
    bound, samples, keep = telemetry.tokens_per_step, telemetry.rollouts_per_step, telemetry.rollout_steps_kept
    return TokenRecords(config.run.folder, bound, samples, keep, pieces, domains)


class StepTokens:
    """Records one training step. Every rank makes it and calls `finish`; `start` and `add` only where log-probs are."""

    def __init__(
        self,
        records: TokenRecords,
        layout: Layout,
        facts: StepFacts,
        trajectories: Sequence[RecordedTrajectory],
        notes: bool,
    ) -> None:
        self._records, self._layout, self._facts = records, layout, facts
        self._trajectories, self._takes_notes = trajectories, notes
        self._place = torch.full((len(facts.rollouts.tokens),), -1)
        flat = torch.cat([torch.arange(one.first, one.end) for one in trajectories])
        self._place[flat] = torch.arange(len(flat))
        self._flat = flat
        self._parts: list[Notes] = []
        self._local: list[Tensor] = []
        self._error: str | None = None
        self.seconds = 0.0
        """Time spent here so far."""

    def start(self, parts: Sequence[MiniBatch], scores: Sequence[TokenScores | None]) -> None:
        """Find which tokens of each mini-batch this rank holds, and keep their entropies and old log-probs."""
        self._guarded(lambda: self._start(parts, scores))

    def _start(self, parts: Sequence[MiniBatch], scores: Sequence[TokenScores | None]) -> None:
        for part, known in zip(parts, scores, strict=True):
            places = self._place[concatenated_response_tokens(part.micro_batches)]
            local = (places >= 0).nonzero().squeeze(1)
            notes = Notes(places[local].tolist())
            if known is not None:
                notes.columns["log_prob"] = _chosen(known.log_probs, local)
                notes.columns["entropy"] = _chosen(known.entropy, local)
            self._local.append(local)
            self._parts.append(notes)

    def add(
        self,
        index: int,
        part: MiniBatch,
        old_log_probs: Tensor,
        log_probs: Sequence[Tensor],
        coefficients: Sequence[Coefficients],
        weights: Tensor | None,
        trace: CallTrace | None,
    ) -> None:
        """Note one optimiser step.

        Args:
            index: which of the mini-batches it was about.
            part: the mini-batch as the objective saw it.
            old_log_probs: [n] of this rank's tokens.
            log_probs: those that the gate was called with, call after call; n tokens altogether.
            coefficients: what it answered.
            weights: [n] what the masks of terms left of the weights; None if they are the mini-batch's.
            trace: explains tokens of the call about all n of them. None before the last optimiser step on the tokens.
        """
        arguments = index, part, old_log_probs, log_probs, coefficients, weights, trace
        self._guarded(lambda: self._add(*arguments))

    def _add(
        self,
        index: int,
        part: MiniBatch,
        old_log_probs: Tensor,
        log_probs: Sequence[Tensor],
        coefficients: Sequence[Coefficients],
        weights: Tensor | None,
        trace: CallTrace | None,
    ) -> None:
        local, notes = self._local[index], self._parts[index]
        if not len(local):
            return
        x = torch.cat(list(log_probs)) - old_log_probs.to(log_probs[0].device)
        notes.log_ratios.append(_chosen(x, local))
        notes.coefficients.append(_chosen(torch.cat([one.gradient for one in coefficients]), local))
        if trace is None:
            return
        notes.columns["advantage"] = _chosen(part.advantages, local)
        notes.columns["weight"] = _chosen(part.weights if weights is None else weights, local)
        if part.importance is not None:
            notes.columns["importance_weight"] = _chosen(part.importance, local)
        explained = trace.explain(local)
        notes.columns["gated_ratio"] = explained.gated_ratio.tolist()
        if explained.free is not None:
            notes.columns["free"] = explained.free.long().tolist()
        if explained.clip is not None:
            clip = explained.clip
            notes.figures = list(clip.figures)
            bounds = {"figure": clip.figure, "value": clip.value, "low": clip.low, "high": clip.high}
            notes.columns |= {f"clip_{name}": tensor.tolist() for name, tensor in bounds.items()}
        notes.levels = _levels(explained, notes.at, part)

    def finish(self, routing: Routing | None) -> None:
        """Exchange the notes and write the file. Every rank calls it, with what recorded its routing, if anything did.

        What goes wrong is a warning of rank 0: the training does not depend on it.
        """
        began = time.perf_counter()
        experts: dict[str, Any] = {}
        engine: dict[str, Any] = {}
        try:
            if routing is not None:
                experts = packed(routing.chosen(self._flat - 1))
                engine = packed(routing.chosen(self._flat - 1, engine=True))
        except Exception as error:
            self._error = self._error or f"{type(error).__name__}: {error}"
        notes = [one.json() for one in self._parts] if self._takes_notes else []
        mine = {"error": self._error, "notes": [] if self._error else notes, "experts": experts, "engine": engine}
        everyone = self._layout.gather_json(mine, root_only=True)
        if self._layout.rank == 0:
            errors = [f"rank {rank}: {one['error']}" for rank, one in enumerate(everyone) if one["error"]]
            try:
                if errors:
                    raise RuntimeError(errors[0])
                records = lines(self._facts, self._trajectories, everyone)
                write_tokens(self._records.folder, self._facts.step, records, keep=self._records.keep)
            except Exception as error:  # the other ranks are on their way into the next collective
                _log.warning("the token records of step %d are not written: %s", self._facts.step, error)
        self.seconds += time.perf_counter() - began

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do it where this rank takes notes. An error is kept for `finish`, in which the ranks meet."""
        if not self._takes_notes or self._error is not None:
            return
        began = time.perf_counter()
        try:
            work()
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"
        self.seconds += time.perf_counter() - began


def _chosen(values: Tensor, index: Tensor) -> list[float]:
    found: list[float] = values.detach().index_select(0, index.to(values.device)).cpu().tolist()
    return found


def _levels(explained: Explanation, places: Sequence[int], part: MiniBatch) -> list[dict[str, Any]]:
    """The gates of each level as JSON values; ids go by their labels where a mini-batch has some."""
    found = []
    for level in explained.levels:
        ids = zip(level.keys, level.ids, strict=True)
        named = {key: part.labels[key][row] if key in part.labels else row for key, row in ids}
        columns = {key: row.tolist() for key, row in named.items()}
        facts = (level.aggregate, level.residual, level.budget, level.state)
        nodes = [
            {
                "id": {key: column[node] for key, column in columns.items()},
                "S": aggregate,
                "D": residual,
                "C": budget,
                "k": tokens,
                "state": [STATES[one] for one in state],
            }
            for node, (aggregate, residual, budget, state, tokens) in enumerate(
                zip(*(fact.T.tolist() for fact in facts), level.tokens.tolist(), strict=True)
            )
        ]
        of = zip(level.token.tolist(), level.node.tolist(), level.share.tolist(), strict=True)
        found.append(
            {
                "name": level.level,
                "keys": list(level.keys),
                "nodes": nodes,
                "of": [(places[token], node, share) for token, node, share in of],
            }
        )
    return found
