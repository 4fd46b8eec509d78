"""This module is the trainer's view of the model: it implements `interfaces.Policy` on Megatron-Core."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.interfaces import PendingSave
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.model import PolicyModel, build_model, draw_weights
from fiberpo_megatron.mcore.optimizers import Optimizer, make_optimizer
from fiberpo_megatron.mcore.optimizers.build import build_optimizer, non_finite_gradient, wrap_data_parallel
from fiberpo_megatron.mcore.optimizers.choose import check_layout
from fiberpo_megatron.mcore.optimizers.gather import ParameterGather
from fiberpo_megatron.mcore.optimizers.offload import TrainingMemory
from fiberpo_megatron.mcore.parallel.layout import FP8_ROW_MULTIPLE, ParallelLayout
from fiberpo_megatron.mcore.reference import ReferenceWeights
from fiberpo_megatron.mcore.router import correction_biases, kept_on_error
from fiberpo_megatron.mcore.routing import Routing
from fiberpo_megatron.mcore.schedule import Schedule
from fiberpo_megatron.spans import span
from fiberpo_megatron.types import (
    Coefficients,
    Gate,
    MicroBatch,
    OptimizerStep,
    RoutingMode,
    TokenScores,
    response_slices,
)

if TYPE_CHECKING:
    from fiberpo_megatron.mcore.weights.source import MegatronWeights

_UNCHANGED = "the optimizer step (weights unchanged)"


@dataclass(frozen=True)
class AccumulatedGradient:
    """Describes what went into the gradient buffers."""

    coefficients: tuple[Coefficients, ...]
    """One per call of the gate; empty on ranks that are not on the last pipeline stage."""
    error: str | None
    """What this rank saw that is not finite."""
    kept_forwards: int
    """Micro-batches that went on from the pass before."""


class MegatronPolicy:
    """Holds a model and its optimizer, and runs the passes over them. Build one with `build_policy`."""

    def __init__(
        self,
        models: list[PolicyModel],
        hf_config: Mapping[str, Any],
        layout: ParallelLayout,
        config: Config,
        total_steps: int,
        optimizer: Optimizer | None = None,
    ) -> None:
        self.layout = layout
        self.hf_config = hf_config
        self.models = models
        distributed = config.parallel.distributed_optimizer
        self.chunks = wrap_data_parallel(models, config.parallel)
        self.optimizer_kind = optimizer or make_optimizer(config.optimizer)
        check_layout(self.optimizer_kind, config.parallel)
        self.optimizer, self.scheduler = build_optimizer(
            self.chunks,
            self.optimizer_kind,
            config.optimizer,
            dtype=config.model.dtype,
            distributed=distributed,
            total_steps=total_steps,
        )
        self.gather = ParameterGather(self.chunks)
        self.memory = TrainingMemory(self.chunks, self.optimizer, config.optimizer.cpu_offload)
        self.routing = Routing(models, layout)
        self._replay = config.algorithm.routing_replay != "none"
        chunk = config.model.log_prob_chunk_tokens
        self.schedule = Schedule(self.chunks, models, layout, chunk, self.routing)
        self._aux_loss = config.model.router_aux_loss
        self._kept_forwards = config.kept_forwards
        self._trust_others = config.checkpoint.trust_others
        self._reference: ReferenceWeights | None = None

    def log_probs(
        self,
        micro_batches: Sequence[MicroBatch],
        temperature: float,
        *,
        routing: RoutingMode = "off",
        entropy: bool = True,
        keep: bool = False,
    ) -> TokenScores | None:
        """Run a forward pass without gradient. The last stage returns the scores of this rank's response tokens.

        `routing`: "record" adds the experts of every token to `self.routing`, "replay" takes them from there. Without
        `entropy` the entropies are zeros, which saves their computation. With `keep` the first `batch.kept_forwards`
        forward passes are kept for the next pass, which is that of an optimiser step over these micro-batches.
        Raises ValueError on every rank when a token to be replayed has no route.
        """
        self._require_routes(routing, micro_batches)
        with self.routing.use(routing):
            kept = self._kept_forwards if keep else 0
            scores = self.schedule.forward(micro_batches, temperature, entropy=entropy, keep=kept)
        if not self.layout.is_last_stage:
            return None
        return TokenScores(torch.cat([s.log_probs for s in scores]), torch.cat([s.entropy for s in scores]))

    def keep_reference(self, folder: Path | None) -> None:
        """Keep reference weights in host memory: those of a Hugging Face folder or, with None, the current ones.

        Every rank calls it. Raises ValueError on every rank when the folder does not hold this model's weights.
        """
        from fiberpo_megatron.mcore import weights

        self.gather.finish()
        self._reference = ReferenceWeights(self.models)
        if folder is not None:
            with self._reference.exchanged():
                weights.load_hf(self.models, self.hf_config, folder, self.layout)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Let `log_probs` compute with the reference's weights inside the block (see `mcore/reference.py`)."""
        if self._reference is None:
            raise RuntimeError("no reference weights are kept; call keep_reference() before the first optimiser step")
        self.gather.finish()
        with self._reference.exchanged():
            yield

    @property
    def reference_bytes(self) -> int:
        """Return the bytes of this rank's reference weights in host memory."""
        return 0 if self._reference is None else self._reference.host_bytes

    def _require_routes(self, routing: RoutingMode, micro_batches: Sequence[MicroBatch]) -> None:
        if routing == "replay":
            self.layout.agree(self.routing.missing(micro_batches), "routing replay", raises=ValueError)

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        gate: Gate,
        temperature: float,
        *,
        log_probs: Tensor | None = None,
        single_pass: bool = False,
    ) -> OptimizerStep:
        """Take one optimiser step that maximises the gate's objective (see `interfaces.Passes.step`)."""
        with kept_on_error(correction_biases(self.models)):
            gradient = self.accumulate(micro_batches, gate, temperature, log_probs=log_probs, single_pass=single_pass)
            norm = self.optimizer.begin_step()
            self._require_finite(gradient.error, norm)
        self.scheduler.step(1)
        with self.memory.state("an optimiser step"), span("optimizer"):
            self.optimizer.step()
        self.gather.begin()
        return OptimizerStep(
            gradient_norm=norm,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            coefficients=gradient.coefficients,
            extra_forward=log_probs is None and not single_pass,
            kept_forwards=gradient.kept_forwards,
        )

    def accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        gate: Gate,
        temperature: float,
        *,
        log_probs: Tensor | None = None,
        single_pass: bool = False,
    ) -> "AccumulatedGradient":
        """Leave minus the objective's gradient, summed over micro-batches and ranks, in the gradient buffers.

        With `model.router_bias_update_rate` Megatron moves the correction biases here, by the load of this pass.
        With the distributed optimizer each data-parallel rank's buffer is whole only in that rank's shard.
        """
        try:
            return self._accumulate(micro_batches, gate, temperature, log_probs, single_pass)
        finally:
            self.schedule.forget()

    def _accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        gate: Gate,
        temperature: float,
        log_probs: Tensor | None,
        single_pass: bool,
    ) -> "AccumulatedGradient":
        self.memory.require("an optimiser step")
        calls = _GateCalls(gate, response_slices(micro_batches))
        routing: RoutingMode = "replay" if self._replay else "off"
        self._require_routes(routing, micro_batches)
        if not single_pass:
            if log_probs is None:
                scores = self.log_probs(micro_batches, temperature, routing=routing, entropy=False, keep=True)
                log_probs = scores.log_probs if scores else None
            last = self.layout.is_last_stage
            self.layout.agree(calls.check(log_probs) if last else None, _UNCHANGED, raises=FloatingPointError)
            self.layout.agree(calls.all_at_once(log_probs) if last else None, "the objective")
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self._aux_loss:
            self._scale_aux_loss(micro_batches)
        with self.routing.use(routing):
            kept = self.schedule.forward_backward(micro_batches, temperature, calls.loss)
        if single_pass:
            self.layout.agree(calls.error, _UNCHANGED, raises=FloatingPointError)
            self.layout.agree(calls.failure, "the objective")
        return AccumulatedGradient(tuple(calls.coefficients), calls.error, kept)

    def _scale_aux_loss(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Scale the auxiliary loss to a mean over tokens: Megatron weighs that of a micro-batch by its tokens."""
        counts = [(batch.source_tokens >= 0).sum() for batch in micro_batches]
        local = torch.stack(counts).sum().double()
        tokens = float(self.layout.sum_over_tokens(local))
        for model in self.models:
            model.config.moe_aux_loss_coeff = self._aux_loss / tokens

    def _require_finite(self, error: str | None, norm: float) -> None:
        """Raise FloatingPointError on every rank where the gradient or what it was made of is not finite.

        `norm` is that of the whole gradient, which the optimizer needs anyway: it is not finite where any element is
        not.
        """
        self.layout.agree(error, _UNCHANGED, raises=FloatingPointError)  # the cause, where a rank knows it
        if not self.layout.any_rank(not math.isfinite(norm)):
            return
        parameter = non_finite_gradient(self.chunks)
        error = f"the gradient of {parameter} is not finite" if parameter is not None else None
        self.layout.agree(error, _UNCHANGED, raises=FloatingPointError)
        error = f"the norm of the gradient is {norm}: its elements are finite, but their squares overflow"
        self.layout.agree(error, _UNCHANGED, raises=FloatingPointError)

    @property
    def weights(self) -> "MegatronWeights":
        """Return the source of the current weights under their Hugging Face names."""
        from fiberpo_megatron.mcore.weights.source import MegatronWeights

        return MegatronWeights(self.models, self.hf_config, self.layout, self.gather.finish)

    def release_memory(self) -> None:
        """Drop the gradients and park the optimizer's state in host memory; log-probs and exports still work."""
        self.gather.finish()
        self.schedule.forget()
        self.memory.release()

    def restore_memory(self) -> None:
        """Bring back what `release_memory` removed. The next step is bitwise the one without it."""
        self.memory.restore()

    def save(self, folder: str, state: Mapping[str, object]) -> None:
        """Write model, optimizer, schedule and the trainer's state as a distributed checkpoint."""
        from fiberpo_megatron.mcore import checkpoint

        self.gather.finish()
        with self.memory.state("saving a checkpoint"):
            checkpoint.save(self, folder, state)

    def begin_save(self, folder: str, state: Mapping[str, object]) -> PendingSave:
        """Write a checkpoint as `save` does, but in a thread beside the training until `finish` is called."""
        from fiberpo_megatron.mcore import checkpoint

        self.gather.finish()
        with self.memory.state("saving a checkpoint"):  # what the thread writes are copies
            return checkpoint.begin_save(self, folder, state)

    def load(self, folder: str) -> dict[str, object]:
        """Read a checkpoint that was written under any layout, and return the trainer's state."""
        from fiberpo_megatron.mcore import checkpoint

        self.gather.finish()
        with self.memory.state("loading a checkpoint"):
            return checkpoint.load(self, folder, trust_others=self._trust_others)


class _GateCalls:
    """Calls the gate of one step: once for all tokens, or once per micro-batch inside the loss."""

    def __init__(self, gate: Gate, slices: Sequence[slice]) -> None:
        self._gate = gate
        self._slices = slices
        self._all: Coefficients | None = None
        self.coefficients: list[Coefficients] = []
        self.error: str | None = None
        """What is not finite; raised after the pass, because raising inside it would leave other ranks waiting."""
        self.failure: str | None = None
        """What the gate raised inside a pass."""

    def check(self, log_probs: Tensor | None) -> str | None:
        """Return a text that counts the log-probs that are not finite, or None. It precedes the gate's collectives."""
        assert log_probs is not None, "the last pipeline stage knows its log-probs"
        bad = int((~log_probs.isfinite()).sum())
        return f"{bad} of {len(log_probs)} log-probs are not finite" if bad else None

    def all_at_once(self, log_probs: Tensor | None) -> str | None:
        """Compute the coefficients of all tokens; return what the gate raised, as text."""
        assert log_probs is not None, "the last pipeline stage knows its log-probs"
        end = self._slices[-1].stop if self._slices else 0
        try:
            self._all = self._call(log_probs, slice(0, end))
        except Exception as error:  # every rank raises it together, in `agree`
            return f"{type(error).__name__}: {error}"
        return None

    def loss(self, index: int, log_probs: Tensor, entropy: Tensor) -> Tensor:
        """Return -sum_j (c_j log p_j + e_j H_j) over one micro-batch: its gradient is minus that of the objective."""
        if index >= len(self._slices):
            return log_probs.sum()  # a micro-batch that only fills up the schedule, without tokens
        where = self._slices[index]
        if self._all is None:
            found, where = self._of_micro_batch(log_probs, where), slice(None)
        else:
            found = self._all
        loss = -(found.gradient[where].detach().to(log_probs) * log_probs).sum()
        if found.entropy is None:
            return loss
        return loss - (found.entropy[where].detach().to(entropy) * entropy).sum()

    def _of_micro_batch(self, log_probs: Tensor, where: slice) -> Coefficients:
        try:
            self.error = self.error or self.check(log_probs)
            return self._call(log_probs.detach(), where)
        except Exception as error:  # reported after the pass, which the other ranks are in the middle of
            self.failure = self.failure or f"{type(error).__name__}: {error}"
            return Coefficients(torch.zeros_like(log_probs))

    def _call(self, log_probs: Tensor, where: slice) -> Coefficients:
        coefficients = self._gate(log_probs, where)
        self.coefficients.append(coefficients)
        for values in (coefficients.gradient, coefficients.entropy):
            if values is not None and not values.isfinite().all() and self.error is None:
                bad = int((~values.isfinite()).sum())
                self.error = f"{bad} of {len(values)} coefficients of the objective are not finite"
        return coefficients


def build_policy(
    config: Config,
    hf_config: Mapping[str, Any],
    layout: ParallelLayout,
    total_steps: int | None = None,
    optimizer: Optimizer | None = None,
) -> MegatronPolicy:
    """Build the policy of a run: its weights are drawn from `run.seed`, or read from `model.path`.

    `total_steps` is the length of the learning-rate schedule in optimiser steps; by default that of the RL run.
    `optimizer` takes the place of the one that `optimizer.kind` names.
    """
    if total_steps is None:
        total_steps = config.trainer.steps * config.batch.mini_batches * config.batch.epochs
    architecture = read_architecture(hf_config)
    if config.model.fp8 != "none":
        layout.align_rows(FP8_ROW_MULTIPLE)
    models = build_model(architecture, config.model, layout)
    if config.model.random_init:
        draw_weights(models, architecture, config.run.seed)
    else:
        from fiberpo_megatron.mcore import weights

        weights.load_hf(models, hf_config, Path(config.model.path), layout)
    return MegatronPolicy(models, hf_config, layout, config, total_steps, optimizer)
