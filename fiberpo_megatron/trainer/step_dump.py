"""This module writes what the objective saw and gave in one training step, from all ranks, into one file.

`debug.dump_step` asks for it, and `fiberpo replay-step` computes the coefficients again. No rank holds another rank's
tokens: each writes its own into a part of its own after every optimiser step, and rank 0 joins the parts, one tensor of
one part at a time.
"""

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fiberpo_megatron import durable
from fiberpo_megatron.fibration import OBJECTIVES, Objective, ObjectiveOutput
from fiberpo_megatron.fibration.options import NOT_OPTIONS
from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.together import together
from fiberpo_megatron.trainer.batch import MiniBatch
from fiberpo_megatron.trainer.step_file import METADATA, VERSION, write_joined
from fiberpo_megatron.types import RolloutBatch, concatenated_response_tokens

FOLDER = "step_dumps"
"""Folder of the files in a run folder."""
ROLLOUT_FACTS = (
    "tokens",
    "response_mask",
    "rollout_log_probs",
    "lengths",
    "trajectories",
    "rewards",
    "groups",
    "domains",
)
"""What of the training step's trajectories is in the file."""


@dataclass(frozen=True)
class GateCall:
    """Holds one call of the objective as its gate saw it."""

    part: slice
    """Which of this rank's tokens the call was about."""
    log_probs: Tensor
    """[n]"""
    output: ObjectiveOutput
    weights: Tensor | None = None
    """[n] the weights that the masks of terms left; None if they are the mini-batch's."""


@dataclass(frozen=True)
class StepDumps:
    """Opens a dump for the training steps that `debug.dump_step` names."""

    folder: Path
    """The run folder."""
    steps: Sequence[int]
    use: str
    """`algorithm.objective.use`: the objective's short name or import path."""

    def begin(
        self, step: int, layout: Layout, rollouts: RolloutBatch, objective: Any, facts: Mapping[str, Any]
    ) -> "StepDump | None":
        """Return the dump of a training step, or None if none is asked for. Every rank calls it.

        `facts` are further JSON values that the file records.
        """
        if step not in self.steps:
            return None
        about = {
            "version": VERSION,
            "step": step,
            "objective": {"use": self._name(objective), "options": options_of(objective)},
            "kernels": objective.kernels,
            "exact_sums": objective.exact_sums,
            **facts,
        }
        return StepDump(self.folder / FOLDER / f"step-{step:08}.safetensors", layout, rollouts, objective, about)

    def _name(self, objective: Objective) -> str:
        return objective.name if objective.name in OBJECTIVES else self.use


class StepDump:
    """Collects one training step's dump. Every rank makes it and calls `finish`; `add` only where a gate was called."""

    def __init__(
        self, path: Path, layout: Layout, rollouts: RolloutBatch, objective: Objective, about: dict[str, Any]
    ) -> None:
        self.path, self._layout, self._rollouts, self._objective = path, layout, rollouts, objective
        self._about = about
        self._scratch = path.with_name(f".{path.name}.parts")
        place = [layout.data_rank, layout.context_rank] if layout.is_last_stage else None
        self._places = layout.gather_json(place)
        self._first = next(rank for rank, at in enumerate(self._places) if at is not None)
        self.writes = place is not None and self._places.index(place) == layout.rank
        """Whether this rank writes: among the tensor-parallel ranks, which hold the same tokens, the first does."""
        self._steps = 0
        with together(layout, "making the folder of the step dump"):
            if layout.rank == 0:
                shutil.rmtree(self._scratch, ignore_errors=True)
                with durable.explained(self._scratch):
                    self._scratch.mkdir(parents=True)
        self._error: Exception | None = None

    def add(
        self,
        part: MiniBatch,
        old_log_probs: Tensor,
        calls: Sequence[GateCall],
        single_pass: bool,
        metrics: Mapping[str, float],
    ) -> None:
        """Write this rank's tokens of the next optimiser step. An error is kept for `finish`, in which ranks meet."""
        number, self._steps = self._steps, self._steps + 1
        if not self.writes or self._error is not None:
            return
        try:
            self._write(number, part, old_log_probs, calls, single_pass, metrics)
        except Exception as error:  # the other ranks are on their way into the next collective
            self._error = error

    def _write(
        self,
        number: int,
        part: MiniBatch,
        old_log_probs: Tensor,
        calls: Sequence[GateCall],
        single_pass: bool,
        metrics: Mapping[str, float],
    ) -> None:
        def joined(values: Sequence[Tensor], like: Tensor) -> Tensor:
            return (torch.cat(list(values)) if values else like[:0]).detach().cpu().contiguous()

        outputs = [call.output for call in calls]
        seen = (
            torch.cat([torch.arange(call.part.start, call.part.stop) for call in calls]) if calls else torch.arange(0)
        )
        index = concatenated_response_tokens(part.micro_batches).cpu()[seen]
        empty = old_log_probs.float()
        tensors = {
            "log_probs": joined([call.log_probs for call in calls], empty),
            "old_log_probs": old_log_probs.cpu()[seen],
            "advantages": part.advantages.cpu()[seen],
            "weights": _weights(part, calls, seen),
            "coefficients": joined([out.gradient for out in outputs], empty),
            "gated_ratio": joined([out.gated_ratio for out in outputs], empty),
            "token_ids": torch.from_numpy(self._rollouts.tokens)[index],
            "token_index": index,
            "values": torch.tensor([float(out.value) for out in outputs], dtype=torch.float64),
            **{f"keys/{key}": ids.cpu()[seen] for key, ids in part.keys.items()},
        }
        if part.expert_share is not None:
            tensors["expert_share"] = part.expert_share.cpu()[seen]
        if self._layout.rank == self._first:
            tensors |= {f"labels/{key}": label.cpu() for key, label in part.labels.items()}
            tensors["metrics"] = torch.tensor(list(metrics.values()), dtype=torch.float64)
        device = calls[0].log_probs.device if calls else old_log_probs.device
        about = {
            "counts": part.counts,
            "calls": [len(call.log_probs) for call in calls],
            "single_pass": single_pass,
            "metric_names": list(metrics),
            "machine": machine(self._objective, device),
        }
        save_file(
            {f"{number}/{name}": tensor.contiguous() for name, tensor in tensors.items()},
            self._part(number, self._layout.rank),
            {METADATA: json.dumps(about)},
        )

    def _part(self, number: int, rank: int) -> Path:
        return self._scratch / f"{number:06}-{rank:06}.safetensors"

    def finish(self) -> None:
        """Join the parts of all ranks into the file. Every rank calls it; all raise where one could not write."""
        with together(self._layout, f"writing the dump of step {self._about['step']}"):
            if self._error is not None:
                raise self._error
        with together(self._layout, f"joining the dump of step {self._about['step']}"):
            if self._layout.rank == 0:
                self._join()

    def _join(self) -> None:
        writers = [rank for rank, at in enumerate(self._places) if at is not None and self._places.index(at) == rank]
        parts, steps, machine = [], [], None
        for number in range(self._steps):
            files = [self._part(number, rank) for rank in writers]
            abouts = [_about(file) for file in files]
            machine = abouts[0].pop("machine")
            steps.append(abouts[0] | {"calls": [about["calls"] for about in abouts]})
            parts += files
        about = {
            **self._about,
            "machine": machine,
            "ranks": [self._places[rank] for rank in writers],
            "optimizer_steps": steps,
        }
        facts = {f"rollouts/{name}": torch.from_numpy(getattr(self._rollouts, name)) for name in ROLLOUT_FACTS}
        write_joined(self.path, parts, facts, about)
        durable.remove_tree(self._scratch)


def _weights(part: MiniBatch, calls: Sequence[GateCall], seen: Tensor) -> Tensor:
    """Return the weights that the objective was called with."""
    masked = [call.weights for call in calls if call.weights is not None]
    return torch.cat(masked).cpu() if masked else part.weights.cpu()[seen]


def _about(part: Path) -> dict[str, Any]:
    with safe_open(part, framework="pt") as file:
        about: dict[str, Any] = json.loads(file.metadata()[METADATA])
    return about


def options_of(objective: Objective) -> dict[str, Any]:
    """Return the options of a built objective as JSON values. Raises ValueError where one is none."""
    fields = [field for field in dataclasses.fields(objective) if field.init and field.name not in NOT_OPTIONS]
    options = {field.name: getattr(objective, field.name) for field in fields}
    try:
        written: dict[str, Any] = json.loads(
            json.dumps({name: value for name, value in options.items() if value is not None}, allow_nan=False)
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the step dump cannot name the options {options} of objective {objective.name!r}: {error}; use numbers "
            "and texts"
        ) from error
    return written


def machine(objective: Objective, device: torch.device) -> dict[str, Any]:
    """Return on what an objective's calls run. Where two of these are equal, so are the bits of the results."""
    cuda = device.type == "cuda"
    triton = importlib.util.find_spec("triton") is not None
    wanted = objective.kernels is not False and objective.kernel is not None and (cuda or bool(objective.kernels))
    return {
        "torch": torch.__version__,
        "torch_build": torch.version.git_version,
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "backend": "triton" if wanted and triton else "torch",
    }
