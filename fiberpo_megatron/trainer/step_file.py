"""This module defines the file of a dumped training step, and reads and writes it. docs/certify.md documents it.

It is a safetensors file with one JSON text in its metadata. `fiberpo train --debug.dump_step` writes it, and any other
framework can write a smaller one. T tokens of all ranks, as in `fibration`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fiberpo_megatron import durable
from fiberpo_megatron.fibration import WEIGHTINGS, Objective, ObjectiveOutput
from fiberpo_megatron.fibration.levels import STATE_KEY, TRAJECTORY_KEY
from fiberpo_megatron.fibration.tokens import LONE
from fiberpo_megatron.trainer.batch import token_weights

METADATA = "fiberpo_step"
"""The entry of the file's metadata that holds the JSON text."""
VERSION = 1
PAGE = "docs/certify.md documents the format"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8, "BOOL": torch.bool}
_ALL_DTYPES = _DTYPES | _INTEGERS


class StepFileError(ValueError):
    """The file cannot be used; the message names the tensor, its shape and the fix."""


@dataclass(frozen=True)
class Tokens:
    """Holds what one call of an objective sees of T tokens, apart from the reduction."""

    log_ratio: Tensor
    """[T], float32 or float64."""
    advantages: Tensor
    """[T]"""
    weights: Tensor
    """[T] mu"""
    keys: dict[str, Tensor]
    """int64 [T] per key."""
    counts: dict[str, int]
    labels: dict[str, Tensor]
    """int64 [counts[key]] of some keys."""
    expert_share: Tensor | None = None
    """[T, P]"""
    old_log_probs: Tensor | None = None
    """[T] log pi_old; None if it is not known."""

    def __len__(self) -> int:
        return len(self.log_ratio)

    def take(self, index: Tensor | slice) -> Self:
        """Return the tokens at `index` (int64 [n], or a slice), in that order; counts and labels stay global."""
        return replace(
            self,
            log_ratio=self.log_ratio[index],
            advantages=self.advantages[index],
            weights=self.weights[index],
            keys={key: ids[index] for key, ids in self.keys.items()},
            expert_share=None if self.expert_share is None else self.expert_share[index],
            old_log_probs=None if self.old_log_probs is None else self.old_log_probs[index],
        )

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        """Return the tokens with log ratios of another dtype, or on another device."""
        return replace(
            self,
            log_ratio=self.log_ratio.to(device=device, dtype=dtype),
            advantages=self.advantages.to(device),
            weights=self.weights.to(device),
            keys={key: ids.to(device) for key, ids in self.keys.items()},
            labels={key: label.to(device) for key, label in self.labels.items()},
            expert_share=None if self.expert_share is None else self.expert_share.to(device),
            old_log_probs=None if self.old_log_probs is None else self.old_log_probs.to(device),
        )

    def call(
        self,
        objective: Objective,
        reduce: Callable[[Tensor], Tensor | None] | None = None,
        metrics: bool = True,
    ) -> ObjectiveOutput:
        """Return the objective's output for these tokens."""
        return objective(
            self.log_ratio,
            self.advantages,
            self.weights,
            keys=self.keys,
            counts=self.counts,
            labels=self.labels,
            expert_share=self.expert_share if objective.uses_experts else None,
            old_log_probs=self.old_log_probs,
            reduce=reduce,
            metrics=metrics,
        )


@dataclass(frozen=True)
class DumpedStep:
    """Holds one optimiser step of a file."""

    index: int
    """Number of the optimiser step in its training step, from 0."""
    tokens: Tokens
    coefficients: Tensor
    """[T]"""
    gated_ratio: Tensor | None
    """[T]; a peer's file need not have it."""
    token_ids: Tensor | None
    """int64 [T]; a peer's file need not have them."""
    token_index: Tensor | None
    """int64 [T]: where each token stands among all tokens of the training step's trajectories."""
    calls: list[list[int]]
    """Tokens of each call of the objective, by rank, in the order of the file."""
    single_pass: bool
    """Whether the calls were made one micro-batch at a time, without a reduction."""
    values: Tensor | None
    """float64 [calls]: the share of J that each call returned."""
    metrics: dict[str, float] | None

    def ranks(self) -> list[Tensor]:
        """Return the tokens of each rank, int64 [n], as places in the file."""
        sizes = [sum(calls) for calls in self.calls]
        return list(torch.arange(len(self.tokens)).split(sizes))

    def where(self, token: int) -> str:
        """Return which token of which trajectory this is, as a text for people."""
        trajectory = self.tokens.keys.get(TRAJECTORY_KEY)
        parts = []
        if trajectory is not None:
            own = int(trajectory[token])
            before = trajectory == own
            if self.token_index is not None:
                place = int((before & (self.token_index < self.token_index[token])).sum())
            else:
                place = int(before[:token].sum())
            parts.append(f"trajectory {own}, response token {place}")
        else:
            parts.append(f"token {token}")
        if self.token_ids is not None:
            parts.append(f"id {int(self.token_ids[token])}")
        return ", ".join(parts)


class StepFile:
    """Reads a file of one training step, one optimiser step at a time.

    Raises StepFileError for a file or a tensor that cannot be used; the message names it, its shape and the fix.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise StepFileError(f"{path} does not exist, or is no file; name a dumped step ({PAGE})")
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            metadata = self._file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise StepFileError(f"{path} is no whole safetensors file ({error}); write it again ({PAGE})") from error
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
        self.about = self._description(metadata.get(METADATA))
        self.steps = self._numbers()

    def _description(self, text: str | None) -> dict[str, Any]:
        try:
            about = json.loads(text or "{}")
        except json.JSONDecodeError as error:
            raise StepFileError(
                f"{self.path}: the metadata {METADATA!r} is no JSON ({error}); write it with json.dumps, or omit it"
            ) from error
        if not isinstance(about, dict):
            raise StepFileError(f"{self.path}: the metadata {METADATA!r} is {text!r}; write a JSON object")
        if about.get("version", VERSION) != VERSION:
            raise StepFileError(
                f"{self.path} has version {about['version']} of the format, and this package reads {VERSION}; use the "
                "package that wrote it"
            )
        return about

    def _numbers(self) -> list[int]:
        heads = {name.partition("/")[0] for name in self.shapes}
        found = {int(head) for head in heads if head.isdecimal()}
        plain = any(name in self.shapes for name in ("coefficients", "advantages", "log_ratio", "log_probs"))
        if found and plain:
            raise StepFileError(
                f"{self.path} has tensors with and without the number of an optimiser step; name all of them "
                "'0/coefficients', '0/advantages', ... or none"
            )
        self.numbered = bool(found)
        return sorted(found) or [0]

    @property
    def objective(self) -> tuple[str, dict[str, Any]] | None:
        """Return the objective's import path or short name and its options; None if the file does not say."""
        given = self.about.get("objective")
        if given is None:
            return None
        table = {"use": given} if isinstance(given, str) else given if isinstance(given, dict) else {}
        use, options = table.get("use"), table.get("options", {})
        if not isinstance(use, str) or not isinstance(options, dict):
            raise StepFileError(
                f'{self.path}: "objective" is {given!r}; write {{"use": "fiberpo", "options": {{"epsilon": 0.05}}}}'
            )
        return use, options

    def step(self, number: int, objective: Objective) -> DumpedStep:
        """Return one optimiser step, with what the file leaves out filled in for `objective`.

        A file without weights gets the objective's own; ids that are not dense are numbered where the file gives no
        counts, and keep their numbers as labels.
        """
        return _Reader(self, number, objective).read()

    def tensor(self, name: str) -> Tensor:
        """Return one tensor by its name in the file."""
        found: Tensor = self._file.get_tensor(name)
        return found


class _Reader:
    """Reads and checks the tensors of one optimiser step."""

    def __init__(self, file: StepFile, number: int, objective: Objective) -> None:
        self.file, self.number, self.objective = file, number, objective
        self.prefix = f"{number}/" if file.numbered else ""
        steps = file.about.get("optimizer_steps", [])
        self.about: dict[str, Any] = steps[number] if number < len(steps) else {}
        self.size = -1

    def read(self) -> DumpedStep:
        coefficients = self._floats("coefficients", "one number per token: dJ/d log pi of the token, J maximised")
        log_ratio = self._log_ratio()
        advantages = self._floats("advantages", "one number per token: its advantage")
        keys, counts, labels = self._ids()
        share = self._share()
        self._check_needed(keys, share)
        weights = self._weights(keys)
        metrics, values = self._optional("metrics"), self._optional("values")
        names = self.about.get("metric_names", [])
        calls = self.about.get("calls", [[self.size]])
        if sum(map(sum, calls)) != self.size:
            raise self._error("coefficients", f"the metadata counts {sum(map(sum, calls))} tokens in `calls`")
        return DumpedStep(
            index=self.number,
            tokens=Tokens(log_ratio, advantages, weights, keys, counts, labels, share, self._old_log_probs()),
            coefficients=coefficients,
            gated_ratio=self._floats("gated_ratio", "") if self._has("gated_ratio") else None,
            token_ids=self._integers("token_ids") if self._has("token_ids") else None,
            token_index=self._integers("token_index") if self._has("token_index") else None,
            calls=calls,
            single_pass=bool(self.about.get("single_pass", False)),
            values=values,
            metrics=None if metrics is None else dict(zip(names, metrics.tolist())),
        )

    def _has(self, name: str) -> bool:
        return self.prefix + name in self.file.shapes

    def _optional(self, name: str) -> Tensor | None:
        return self.file.tensor(self.prefix + name) if self._has(name) else None

    def _error(self, name: str, what: str) -> StepFileError:
        shape = self.file.shapes.get(self.prefix + name)
        seen = f"tensor {self.prefix + name!r} {list(shape)}" if shape is not None else f"tensor {self.prefix + name!r}"
        return StepFileError(f"{self.file.path}: {seen}: {what} ({PAGE})")

    def _floats(self, name: str, meaning: str) -> Tensor:
        if not self._has(name):
            has = ", ".join(sorted(self.file.shapes)) or "no tensor"
            raise self._error(name, f"is missing; add it, float32 [T], {meaning}. The file has {has}")
        value = self.file.tensor(self.prefix + name)
        if value.dtype not in (torch.float32, torch.float64):
            raise self._error(name, f"has dtype {value.dtype}; write float32 or float64")
        return self._flat(name, value)

    def _flat(self, name: str, value: Tensor) -> Tensor:
        if value.dim() != 1:
            raise self._error(
                name, "has more than one dimension; write the response tokens alone, flat, without padding"
            )
        if self.size < 0:
            self.size = len(value)
            if not self.size:
                raise self._error(name, "has no token; write at least one")
        if len(value) != self.size:
            raise self._error(name, f"has {len(value)} entries, but coefficients has {self.size}; write one per token")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            at = int((~value.isfinite()).nonzero()[0])
            raise self._error(name, f"holds {float(value[at])} at token {at}; every token needs a finite number")
        return value

    def _integers(self, name: str) -> Tensor:
        value = self.file.tensor(self.prefix + name)
        if value.dtype not in (torch.int64, torch.int32):
            raise self._error(name, f"has dtype {value.dtype}; write int64")
        return self._flat(name, value).long()

    def _log_ratio(self) -> Tensor:
        if self._has("log_ratio"):
            return self._floats("log_ratio", "")
        if not self._has("log_probs"):
            raise self._error("log_ratio", "is missing; add it, float32 [T], or both log_probs and old_log_probs")
        now = self._floats("log_probs", "")
        old = self._floats(
            "old_log_probs", "the log-prob of the same token under the policy that the ratio starts from"
        )
        return now - old.to(now.dtype) if now.dtype == torch.float32 else now - old.double()

    def _old_log_probs(self) -> Tensor | None:
        if self._has("old_log_probs"):
            return self._floats("old_log_probs", "")
        if self.objective.reads_old_log_probs:
            raise self._error(
                "old_log_probs", f"is missing, and objective {self.objective.name!r} reads it; add it, float32 [T]"
            )
        return None

    def _ids(self) -> tuple[dict[str, Tensor], dict[str, int], dict[str, Tensor]]:
        start = f"{self.prefix}keys/"
        names = [name.removeprefix(self.prefix) for name in self.file.shapes if name.startswith(start)]
        counts = {name: int(count) for name, count in self.about.get("counts", {}).items()}
        keys: dict[str, Tensor] = {}
        labels: dict[str, Tensor] = {}
        for name in names:
            key, ids = name.removeprefix("keys/"), self._integers(name)
            low = LONE if key == STATE_KEY else 0
            if key not in counts:
                known, dense = torch.unique(ids[ids != LONE] if key == STATE_KEY else ids, return_inverse=True)
                if key == STATE_KEY:
                    ids = ids.masked_scatter(ids != LONE, dense)
                else:
                    ids, labels[key] = dense, known
                counts[key] = len(known)
            if int(ids.min()) < low or int(ids.max()) >= counts[key]:
                bad = int(ids.min()) if int(ids.min()) < low else int(ids.max())
                raise self._error(
                    name, f"holds the id {bad}, but counts says {counts[key]} ids from 0; correct one of them"
                )
            keys[key] = ids
            if self._has(f"labels/{key}"):
                labels[key] = self.file.tensor(f"{self.prefix}labels/{key}")
                if labels[key].dtype != torch.int64 or labels[key].shape != (counts[key],):
                    raise self._error(f"labels/{key}", f"must be int64 [{counts[key]}], one number per id")
        return keys, counts, labels

    def _share(self) -> Tensor | None:
        value = self._optional("expert_share")
        if value is not None and (value.dim() != 2 or len(value) != self.size or not value.is_floating_point()):
            raise self._error("expert_share", f"must be float [{self.size}, P], the rows summing to 1")
        return value

    def _check_needed(self, keys: Mapping[str, Tensor], share: Tensor | None) -> None:
        missing = self.objective.missing_keys((*keys, *(["expert"] if share is not None else [])))
        if not missing:
            return
        if missing[0] == "expert":
            raise self._error(
                "expert_share", f"is missing, and objective {self.objective.name!r} reads it; add it, float [T, P]"
            )
        raise self._error(
            f"keys/{missing[0]}",
            f"is missing, and objective {self.objective.name!r} reads it; add it, int64 [T], equal numbers for tokens "
            f"of one {missing[0]}",
        )

    def _weights(self, keys: Mapping[str, Tensor]) -> Tensor:
        if self._has("weights"):
            weights = self._floats("weights", "")
            if float(weights.min()) < 0:
                raise self._error("weights", f"holds {float(weights.min())}; weights must not be negative")
            return weights
        if TRAJECTORY_KEY not in keys:
            raise self._error(
                f"keys/{TRAJECTORY_KEY}", "is missing, and so is 'weights', which would be made of it; add one of them"
            )
        _, own, lengths = torch.unique(keys[TRAJECTORY_KEY], return_inverse=True, return_counts=True)
        kind = self.about.get("weighting") or self.file.about.get("weighting") or self.objective.weighting
        if kind not in WEIGHTINGS:
            choices = " or ".join(map(repr, WEIGHTINGS))
            raise StepFileError(f'{self.file.path}: "weighting" is {kind!r}; write {choices}')
        normaliser = self.about.get("normaliser") or self.file.about.get("normaliser")
        try:
            return torch.from_numpy(token_weights(lengths.numpy(), kind, normaliser))[own]
        except ValueError as error:
            raise StepFileError(f'{self.file.path}: {error}; add "normaliser" to the metadata, or weights') from None


def write_joined(
    path: Path, parts: Sequence[Path], extra: Mapping[str, Tensor], about: Mapping[str, Any], mode: int | None = None
) -> None:
    """Write one file of the tensors in `parts`, each joined along its first dimension in the order of the parts.

    One tensor of one part is in memory at a time. `extra` are further tensors. The file appears when it is whole.
    """
    files = [safe_open(part, framework="pt") for part in parts]
    names = list(dict.fromkeys(name for file in files for name in file.keys()))  # noqa: SIM118
    header: dict[str, Any] = {"__metadata__": {METADATA: json.dumps(about, allow_nan=False)}}
    found: list[tuple[str, torch.dtype, list[int]]] = []
    for name in names:
        slices = [file.get_slice(name) for file in files if name in file.keys()]  # noqa: SIM118
        kinds = {(part.get_dtype(), *part.get_shape()[1:]) for part in slices}
        if len(kinds) > 1:
            raise ValueError(f"{path}: ranks hold {name} in different types or shapes: {sorted(kinds)}")
        shape = list(slices[0].get_shape())
        shape[0] = sum(part.get_shape()[0] for part in slices)
        found.append((name, _ALL_DTYPES[slices[0].get_dtype()], shape))
    found += [(name, tensor.dtype, list(tensor.shape)) for name, tensor in extra.items()]
    found.sort(key=lambda entry: -entry[1].itemsize)  # the widest first, so that every tensor is aligned
    spelled = {dtype: name for name, dtype in _ALL_DTYPES.items()}
    at = 0
    for name, dtype, shape in found:
        size = dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": spelled[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with durable.replaced(path, mode=mode) as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name, _, _ in found:
            if name in extra:
                out.write(_bytes(extra[name]))
                continue
            for file in files:
                if name in file.keys():  # noqa: SIM118
                    out.write(_bytes(file.get_tensor(name)))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
