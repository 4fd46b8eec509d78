"""This module takes rollouts that were stored earlier, in place of engines."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from fiberpo_megatron.data.prompts import PromptSets
from fiberpo_megatron.evaluation.settings import EvaluationSet
from fiberpo_megatron.interfaces import Evaluated, Layout
from fiberpo_megatron.rollout.filter import Filtered
from fiberpo_megatron.sources.stored import Store
from fiberpo_megatron.sources.supply import Read, observed
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.together import together
from fiberpo_megatron.types import RolloutBatch


@dataclass
class ReplaySource:
    """It implements `interfaces.RolloutSource` with the trajectories of `storage.replay`: no engine is started, nothing
    is published, and there is no held-out evaluation."""

    layout: Layout
    prompts: PromptSets
    read: Read
    store: Store
    timers: PhaseTimers
    seed: int
    prompts_per_step: int
    filters: bool = False
    """Whether the run has a filter; what it saw of a step is stored with the step."""
    _filtered: Filtered | None = field(default=None, init=False)

    @property
    def domains(self) -> Sequence[str]:
        return self.prompts.domains

    def take(self, step: int, version: int | None = None) -> RolloutBatch | None:
        """Return the stored trajectories of the step. Raises DumpError when they are not there or of other prompts."""
        places = self.prompts.prompts_at(self.seed, step, self.prompts_per_step)
        with self.timers("tasks"), together(self.layout, f"reading the tasks of step {step}"):
            prompts = self.read(places) if self.layout.is_leader else []
        with self.timers("stored_rollouts"):
            rollouts = self.store.load(step, prompts, str(step))
        assert rollouts is not None, "what is replayed is never generated"
        if self.filters:
            self._filtered = self.store.filtered(step)
        return rollouts

    def training(self, *, publishes: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def publish(self, version: int) -> None:
        """Do nothing: there is no engine."""

    def held_out(self, version: int, of: EvaluationSet | None = None) -> Evaluated | None:
        """Return None, because there is no engine that samples."""
        return None

    def observe(self, rollouts: RolloutBatch) -> Mapping[str, float]:
        return observed(self.prompts, rollouts, self._filtered)

    def quarantine(self, engines: Sequence[int], why: str) -> None:
        """Do nothing: a replay has no engines."""

    def saved(self, done: int) -> None:
        self.store.saved(done)

    def state(self) -> Mapping[str, object]:
        return self.prompts.state()
