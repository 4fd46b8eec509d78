"""This module reads published points: measured step times of runs, with what is stated about them.

docs/planning.md (Published runs) describes the format. The package's own points are `planning/data/published.json`.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.mcore.settings import ParallelConfig
from fiberpo_megatron.planning.hardware import GPUS, Assumptions
from fiberpo_megatron.planning.lengths import Lengths
from fiberpo_megatron.planning.scenario import Scenario
from fiberpo_megatron.planning.shapes import ModelShape, read_shape

DATA = Path(__file__).parent / "data"
PHASES = ("step", "generate", "old_log_probs", "reference", "update", "publish", "wait")
"""Phases that a point may state. `wait` is the trainer's, where generation and training overlap."""

_UNSTATED_MEAN = (0.1, 0.5)
"""Mean response over the longest, where a source does not state it."""
_COLOCATED_SHARE, _SEPARATE_SHARE = 0.6, 0.8
"""Shares of memory of engines (NeMo-RL's recipes have these for colocated and for separate engines)."""
_LEAST_CACHE_SHARE = 0.1
"""Least share of memory that is left for the KV cache of an engine whose share is not stated."""

Range = float | tuple[float, float] | None
"""A number; (low, high) where a source leaves it open; None if it does not state it."""


class Point(BaseModel):
    """This is one published point. Fields that may be None or a pair make the prediction a range."""

    model_config = ConfigDict(extra="allow", strict=False)

    id: str = Field(min_length=1)
    model: str
    """Folder with config.json; a relative one is looked for beside the file."""
    gpu: str
    gpus: int = Field(ge=1)
    """GPUs of training and generation together."""
    mode: Literal["colocated", "separate"]
    trainer_gpus: int | None = Field(None, ge=1)
    staleness: float | None = Field(None, ge=0)
    layout: tuple[int, int, int, int] | None = None
    """Tensor, context, expert, pipeline."""
    engine_tensor: int | None = Field(None, ge=1)
    prompts: int = Field(ge=1)
    samples: int = Field(ge=1)
    optimiser_steps: int = Field(ge=1)
    max_length: float = Field(gt=0)
    """Tokens of the longest trajectory, prompt included."""
    mean_length: Range = None
    """Tokens of the mean trajectory, prompt included."""
    prompt_length: float | None = Field(None, gt=0)
    recompute: bool | None = None
    seconds: dict[str, float]

    source: str = ""
    """Where it was published."""
    reference: bool | None = None
    """Whether a reference model computes log-probs. Unset: true if `seconds` has it, false if `seconds` has other
    passes, else open."""
    old_log_probs: bool = True
    """Whether the trainer computes the old log-probs; false where the engine's are used."""
    teacher: str | None = None
    """Folder with the config.json of a teacher that scores every trajectory on the trainer's GPUs."""
    cuda_graphs: bool = True
    """Whether engines decode from CUDA graphs."""
    row_tokens: int | None = Field(None, ge=1)
    """Token budget of a packed row. Unset: max_length."""
    memory_share: float | None = Field(None, gt=0, le=1)
    """Share of a GPU's memory that engines use."""
    draft_tokens: int = Field(0, ge=0)
    """Tokens that speculative decoding drafts in a step."""
    note: str = ""

    @field_validator("recompute", mode="before")
    @classmethod
    def _recompute(cls, value: object) -> object:
        return {"full": True, "none": False, "selective": False}.get(value, value) if isinstance(value, str) else value

    @field_validator("gpu")
    @classmethod
    def _gpu(cls, value: str) -> str:
        if value not in GPUS:
            raise ValueError(f"{value!r} is not known; choose from {', '.join(GPUS)}")
        return value

    @field_validator("layout", mode="after")
    @classmethod
    def _layout(cls, value: tuple[int, int, int, int] | None) -> tuple[int, int, int, int] | None:
        if value is not None and min(value) < 1:
            raise ValueError("sizes of [tensor, context, expert, pipeline] must be at least 1")
        return value

    @field_validator("seconds", mode="after")
    @classmethod
    def _seconds(cls, value: dict[str, float]) -> dict[str, float]:
        for name, seconds in value.items():
            if name not in PHASES:
                raise ValueError(f"{name!r} is no phase; choose from {', '.join(PHASES)}")
            if not seconds > 0:
                raise ValueError(f"{name} = {seconds} must be positive")
        if not value:
            raise ValueError('nothing is stated; give at least {"step": ...}')
        return value

    @model_validator(mode="after")
    def _together(self) -> "Point":
        pair = self.mean_length if isinstance(self.mean_length, tuple) else (self.mean_length, self.mean_length)
        low, high = pair
        prompt = self.prompt_length or 0
        if low is not None and high is not None and not prompt < low <= high <= self.max_length:
            raise ValueError(
                f"mean_length = {self.mean_length} must lie between prompt_length = {self.prompt_length} and "
                f"max_length = {self.max_length}"
            )
        if self.mode == "separate" and self.trainer_gpus is not None and self.trainer_gpus >= self.gpus:
            raise ValueError(f"trainer_gpus = {self.trainer_gpus} of gpus = {self.gpus} leave none for the engines")
        if self.mode == "colocated" and self.trainer_gpus not in (None, self.gpus):
            raise ValueError(f"trainer_gpus = {self.trainer_gpus}: colocated engines share all gpus = {self.gpus}")
        if self.mode == "colocated" and self.staleness:
            raise ValueError(f"staleness = {self.staleness} needs engines of their own; set mode = separate")
        return self


@dataclass(frozen=True)
class Published:
    """This is a point with the shapes of its models."""

    point: Point
    shape: ModelShape
    teacher: ModelShape | None = None
    unread: tuple[str, ...] = field(default=())
    """Fields of the file that nothing reads."""


def read_points(path: Path) -> list[Published]:
    """Read a JSON list of points.

    Raises ValueError with one message that names file, point and field, and OSError for a file that cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path}: a list of points [{{...}}, ...] is needed, found {type(found).__name__}")
    points = [_read_point(path, number, value) for number, value in enumerate(found)]
    ids = [published.point.id for published in points]
    twice = next((name for name in ids if ids.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: point {twice}: id stands in the file twice; give each point its own")
    return points


def _read_point(path: Path, number: int, value: object) -> Published:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: point {number + 1} is a {type(value).__name__}; an object {{...}} is needed")
    name = value.get("id", f"number {number + 1}")
    try:
        point = Point.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:1]) or "its fields together"
        message = first["msg"].removeprefix("Value error, ")
        given = f" (found {first['input']!r})" if first["loc"] and first["type"] != "missing" else ""
        raise ValueError(f"{path}: point {name}: {where}: {message}{given}") from error
    shape = _shape(path, point.id, "model", point.model)
    teacher = _shape(path, point.id, "teacher", point.teacher) if point.teacher else None
    published = Published(point, shape, teacher, tuple(point.model_extra or ()))
    for layout in _layouts(published):
        _check_layout(path, point, layout)
    return published


def _shape(path: Path, name: str, where: str, folder: str) -> ModelShape:
    config = (path.parent / folder) / "config.json"
    try:
        return read_shape(read_object(config))
    except OSError as error:
        raise ValueError(f"{path}: point {name}: {where}: {config} cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise ValueError(f"{path}: point {name}: {where}: {config} has no {error.args[0]!r}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: point {name}: {where}: {config}: {error}") from error


def _check_layout(path: Path, point: Point, layout: tuple[int, int, int, int]) -> None:
    tensor, context, expert, pipeline = layout
    for trainer in _trainer_gpus(point):
        ranks = tensor * context * pipeline
        if trainer % ranks or (trainer // pipeline) % expert:
            raise ValueError(
                f"{path}: point {point.id}: layout: {list(layout)} ([tensor, context, expert, pipeline]) does not "
                f"divide {trainer} training GPUs"
            )
        engines = point.gpus if point.mode == "colocated" else point.gpus - trainer
        if point.engine_tensor is not None and engines < point.engine_tensor:
            raise ValueError(
                f"{path}: point {point.id}: engine_tensor: {point.engine_tensor} GPUs for an engine, {engines} generate"
            )


def _trainer_gpus(point: Point) -> list[int]:
    if point.mode == "colocated":
        return [point.gpus]
    if point.trainer_gpus is not None:
        return [point.trainer_gpus]
    return sorted({max(1, point.gpus // 4), max(1, point.gpus // 2)})


def _layouts(published: Published) -> list[tuple[int, int, int, int]]:
    """Return the stated layout, or the smallest that fits and the next one.

    A layout fits if parameters and gradients (6 bytes each) and sharded optimizer state take at most 70 % of a GPU.
    """
    point, shape = published.point, published.shape
    if point.layout is not None:
        return [point.layout]
    trainer = _trainer_gpus(point)[0]
    fitting = []
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        tensor = min(ranks, 8)
        pipeline = ranks // tensor
        expert = 8 if shape.experts and (trainer // pipeline) % 8 == 0 else 1
        if trainer % ranks or (trainer // pipeline) % expert or pipeline > shape.layers:
            continue
        dense = shape.total - shape.expert_parameters
        held = dense / ranks + shape.expert_parameters / (expert * pipeline)
        if 6 * held + 12 * shape.total / trainer < 0.7 * GPUS[point.gpu].memory_gb * 1e9:
            fitting.append((tensor, 1, expert, pipeline))
    return fitting[:2] or [(min(8, trainer), 1, 1, 1)]


def _engine_tensors(published: Published, engine_gpus: int, share: float) -> list[int]:
    """Return the stated size of an engine, or the smallest with room for a cache as large as the weights, and twice
    it."""
    point, shape = published.point, published.shape
    if point.engine_tensor is not None:
        return [point.engine_tensor]
    room = share * GPUS[point.gpu].memory_gb * 1e9 / 2
    size = next((size for size in (1, 2, 4, 8, 16, 32) if 2 * shape.total / size < room), 64)
    return sorted({min(size, engine_gpus), min(2 * size, engine_gpus)})


def _with_room(shape: ModelShape, engine_tensor: int, share: float, point: Point, assumptions: Assumptions) -> float:
    """Return the share of memory, raised where the weights would leave no room: a run that was published had some."""
    memory = GPUS[point.gpu].memory_gb
    needed = shape.total * 2 / engine_tensor / 1e9 + assumptions.engine_reserved_gb
    return max(share, min(0.95, needed / memory + _LEAST_CACHE_SHARE))


def _means(point: Point, prompt: float) -> Sequence[float]:
    if point.mean_length is None:
        return [prompt + share * (point.max_length - prompt) for share in _UNSTATED_MEAN]
    return point.mean_length if isinstance(point.mean_length, tuple) else (point.mean_length,)


def scenarios(published: Published, assumptions: Assumptions) -> list[Scenario]:
    """Return every scenario that agrees with what a point states: one, if it states everything."""
    point = published.point
    share = point.memory_share or (_COLOCATED_SHARE if point.mode == "colocated" else _SEPARATE_SHARE)
    prompt = min(point.prompt_length or assumptions.prompt_tokens, point.max_length / 2)
    passes = {"old_log_probs", "update"} & point.seconds.keys()
    known = True if "reference" in point.seconds else (False if passes else None)
    reference = known if point.reference is None else point.reference
    open_staleness = (0.0,) if point.mode == "colocated" else (0.0, 1.0)
    found = []
    for trainer, layout, mean, recompute, referenced, staleness in product(
        _trainer_gpus(point),
        _layouts(published),
        _means(point, prompt),
        (True, False) if point.recompute is None else (point.recompute,),
        (True, False) if reference is None else (reference,),
        open_staleness if point.staleness is None else (point.staleness,),
    ):
        engine_gpus = point.gpus if point.mode == "colocated" else point.gpus - trainer
        for engine in _engine_tensors(published, engine_gpus, share):
            tensor, context, expert, pipeline = layout
            found.append(
                Scenario(
                    shape=published.shape,
                    gpu=GPUS[point.gpu],
                    trainer_gpus=trainer,
                    engine_gpus=engine_gpus,
                    colocated=point.mode == "colocated",
                    parallel=ParallelConfig(tensor=tensor, context=context, expert=expert, pipeline=pipeline),
                    engine_tensor=engine,
                    prompts=point.prompts,
                    samples=point.samples,
                    optimiser_steps=point.optimiser_steps,
                    lengths=Lengths(prompt, mean - prompt, point.max_length - prompt, assumptions.length_spread),
                    row_tokens=point.row_tokens or int(point.max_length),
                    recompute=recompute,
                    staleness=staleness,
                    # one step off: weights are exchanged between two batches; beyond it requests go on
                    drain=staleness in (0.0, 1.0),
                    # a fraction of a step: trainers that take whatever has ended
                    streaming=staleness != int(staleness),
                    old_log_probs=point.old_log_probs,
                    reference=referenced,
                    teacher=published.teacher,
                    pinned=False,
                    weights_to_host=point.mode == "colocated",
                    memory_share=point.memory_share or _with_room(published.shape, engine, share, point, assumptions),
                    graph_limit=None if point.cuda_graphs else 0,
                    draft_tokens=point.draft_tokens,
                    publication="device" if point.mode == "colocated" else "stages",
                )
            )
    return found


def note_unread(points: Sequence[Published]) -> None:
    """Say on stderr which fields of the points nothing reads."""
    for published in points:
        if published.unread:
            print(f"point {published.point.id}: not read: {', '.join(published.unread)}", file=sys.stderr)


def built_in() -> list[Published]:
    """Return the package's own points."""
    return read_points(DATA / "published.json")


def trainer_rates() -> Mapping[str, Any]:
    """Return the package's published rates of training alone, and of publications (`planning/data/parts.json`)."""
    return read_object(DATA / "parts.json")
