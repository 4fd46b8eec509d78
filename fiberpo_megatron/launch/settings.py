"""These settings describe a SLURM job: [slurm]."""

import datetime
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fiberpo_megatron.settings import Section


class SlurmConfig(Section):
    """These settings describe the job of `fiberpo slurm` (docs/slurm.md). Its ranks follow from [parallel], its servers
    from [rollout.engine]."""

    job_name: str = "fiberpo"
    """Name in the queue."""
    partition: str | None = None
    """Partition. Unset: the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    time: str = Field("24:00:00", pattern=r"^(\d+-)?\d+(:\d+){0,2}$")
    """Time limit of one start of the job ([days-]hours:minutes:seconds, or minutes)."""
    gpus_per_node: int = Field(8, ge=0)
    """GPUs of a node; 0 for a cluster without GPUs."""
    ranks_per_node: int | None = Field(None, ge=1)
    """Training ranks per node, one GPU each. Unset: gpus_per_node (without GPUs: 1), or all ranks if they are fewer."""
    cpus_per_rank: int = Field(8, ge=1)
    """CPU cores of a training rank; the engines of a node get as many as its ranks together."""
    engine_nodes: int = Field(1, ge=0)
    """Nodes that run `rollout.engine.count` servers each. 0: the servers are given by `rollout.engine.urls`."""
    share_nodes: bool = False
    """Put the engines on the first `engine_nodes` training nodes: on GPUs that the ranks leave free or, with
    rollout.engine.colocated, on the ranks' GPUs."""
    signal_s: int = Field(300, ge=10)
    """Seconds before the time limit at which the run is asked to save and stop: more than a step without its
    generation, an evaluation and a save."""
    requeue: bool = True
    """Queue the job again when it was stopped by its time limit. The run then continues from its newest checkpoint."""
    chain: int = Field(1, ge=1)
    """Jobs to submit, each after the previous one, for clusters that do not requeue."""
    dependency: str | None = None
    """What the (first) job waits for, e.g. "afterok:1234"."""
    array: str | None = Field(None, pattern=r"^[0-9,:%-]+$")
    """Indices of a job array, e.g. "0-3": independent runs with seed run.seed + index in <run folder>/array_<index>."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """How the processes are put into `image`: pyxis is srun's plugin for Enroot."""
    image: str | None = None
    """Container image (file, or for pyxis a registry's name)."""
    mounts: list[str] = []
    """Folders that are visible inside the container, "host:container[:ro]". The current folder always is, under its own
    path."""
    python: str | None = None
    """Python on the nodes. Unset: the one that runs `fiberpo slurm`; in a container: python."""
    options: list[str] = []
    """Further options of sbatch, e.g. "--exclude=node7"."""

    @field_validator("time", "array", mode="before")
    @classmethod
    def as_text(cls, value: object) -> object:
        """Turn numbers and times of day into text, because TOML reads 30 and 12:00:00 as such."""
        return str(value) if isinstance(value, (int, datetime.time)) else value

    @model_validator(mode="after")
    def one_line_each(self) -> "SlurmConfig":
        for name, value in self:
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and not text.isprintable():
                    raise ValueError(f"slurm.{name} has a line break or another control character: {text!r}")
        for option in self.options:
            if not option.startswith("-"):
                raise ValueError(f"slurm.options: {option!r} is not an option of sbatch; write it as --name=value")
        return self

    @model_validator(mode="after")
    def signal_comes_after_the_start(self) -> "SlurmConfig":
        days, _, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if days:  # days-hours:minutes:seconds
            hours, minutes, seconds = (*parts, 0, 0)[:3]
        else:  # minutes, minutes:seconds or hours:minutes:seconds
            hours, minutes, seconds = (0, *parts, 0)[:3] if len(parts) < 3 else parts
        limit = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
        if limit <= self.signal_s:
            raise ValueError(
                f"slurm.signal_s = {self.signal_s} and slurm.time = {self.time!r} ({limit} s): the job would be asked "
                "to stop when it starts; lower signal_s or raise time"
            )
        return self

    @model_validator(mode="after")
    def container_has_an_image(self) -> "SlurmConfig":
        if (self.container == "none") != (self.image is None):
            raise ValueError(
                f'slurm.container = "{self.container}" and slurm.image = {self.image!r}: set both, or neither'
            )
        return self
