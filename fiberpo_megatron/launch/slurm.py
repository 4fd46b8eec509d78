"""`fiberpo slurm` writes a batch script for SLURM from a config, and submits it."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2

from fiberpo_megatron.config import Config, ConfigError, dump_config
from fiberpo_megatron.durable import replaced
from fiberpo_megatron.types import EXIT_ALARM, EXIT_STOPPED

SUBMIT_TIMEOUT_S = 60.0


class SubmitError(ValueError):
    """SLURM did not accept the job."""


@dataclass(frozen=True)
class Shape:
    """Describes which processes run on which nodes."""

    ranks: int
    ranks_per_node: int
    training_nodes: int
    engine_nodes: int
    share_nodes: bool
    first_gpu: int
    """Index of the engines' first GPU on their nodes."""

    @property
    def nodes(self) -> int:
        return self.training_nodes + (0 if self.share_nodes else self.engine_nodes)


def shape_of(config: Config) -> Shape:
    """Return the nodes and processes that the layout needs. Raises ConfigError when they do not fit."""
    slurm, engine, ranks = config.slurm, config.rollout.engine, config.parallel.world_size()
    per_node = slurm.ranks_per_node or max(slurm.gpus_per_node, 1)
    if ranks > per_node and ranks % per_node:
        raise ConfigError(
            f"[parallel] makes {ranks} ranks, which do not fill nodes of {per_node}; change parallel.data or "
            "slurm.ranks_per_node"
        )
    per_node = min(per_node, ranks)
    if slurm.gpus_per_node and per_node > slurm.gpus_per_node:
        raise ConfigError(
            f"slurm.ranks_per_node = {per_node} exceeds slurm.gpus_per_node = {slurm.gpus_per_node}; every rank needs "
            "its own GPU"
        )
    if bool(engine.urls) == bool(slurm.engine_nodes):
        raise ConfigError(
            f"slurm.engine_nodes = {slurm.engine_nodes} and {len(engine.urls)} rollout.engine.urls: give one of them, "
            "nodes on which the job starts servers or the addresses of running ones"
        )
    training = ranks // per_node
    if slurm.share_nodes and slurm.engine_nodes > training:
        raise ConfigError(
            f"slurm.share_nodes puts engines on {slurm.engine_nodes} of the training nodes, but there are {training}; "
            "lower slurm.engine_nodes"
        )
    needed = engine.count * engine.tensor
    if slurm.gpus_per_node and needed > slurm.gpus_per_node:
        raise ConfigError(
            f"rollout.engine.count x tensor = {needed} GPUs, but a node has slurm.gpus_per_node = {slurm.gpus_per_node}"
        )
    if engine.colocated and not slurm.share_nodes:
        raise ConfigError(
            "rollout.engine.colocated = true shares GPUs between ranks and engines; that needs slurm.share_nodes = true"
        )
    beside = slurm.share_nodes and slurm.gpus_per_node > 0 and not engine.colocated
    if beside and per_node + needed > slurm.gpus_per_node:
        raise ConfigError(
            f"slurm.share_nodes: {per_node} ranks and {needed} GPUs of engines on nodes of {slurm.gpus_per_node} GPUs; "
            "lower slurm.ranks_per_node or rollout.engine.count, or let them share with rollout.engine.colocated = true"
        )
    return Shape(ranks, per_node, training, slurm.engine_nodes, slurm.share_nodes, per_node if beside else 0)


def render(config: Config, config_file: Path, working_folder: Path) -> str:
    """Return the batch script; `config_file` is the resolved config that the job reads.

    Raises ConfigError for a value that the script cannot hold, so that no line of it comes from a value.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fiberpo_megatron.launch"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is a shell script, where every text goes through one of these filters
    )
    environment.filters |= {"line": _line, "sh": _for_bash, "sbatch": _for_sbatch, "pattern": _literal_pattern}
    slurm, here = config.slurm, _line(working_folder.resolve())
    if slurm.container != "none" and set(":,") & set(here):
        raise ConfigError(
            f"the current folder {here} cannot be mounted in a container: its name has a colon or a "
            "comma; run the command in a folder without them"
        )
    return environment.get_template("job.sbatch.jinja").render(
        slurm=slurm,
        shape=shape_of(config),
        python=slurm.python or (sys.executable if slurm.container == "none" else "python"),
        run_folder=config.run.folder.resolve(),
        seed=config.run.seed,
        threads=config.run.threads_per_rank,
        config_file=config_file.resolve(),
        working_folder=here,
        mounts=[f"{here}:{here}", *slurm.mounts],
        exit_stopped=EXIT_STOPPED,
        exit_alarm=EXIT_ALARM,
    )


def _line(value: object) -> str:
    """Return the value as text of a single line. Raises ConfigError for one with other characters."""
    text = str(value)
    if not text.isprintable():
        raise ConfigError(
            f"{ascii(text)} has a line break or another character that is not printable, which a batch script cannot "
            "hold; rename that folder (run.folder, the current one), or change that setting"
        )
    return text


def _for_bash(value: object) -> str:
    return shlex.quote(_line(value))


def _for_sbatch(value: object) -> str:
    """Return the value as a word of an #SBATCH line, where a backslash protects the next character inside of quotes
    too."""
    text = _line(value)
    if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII):
        return text
    return "'" + re.sub(r"([\\'])", r"\\\1", text) + "'"


def _literal_pattern(value: object) -> str:
    """Return a path as the part of sbatch's --output that stands for itself: %j and others are patterns there."""
    text = _line(value)
    if "\\" in text:
        raise ConfigError(
            f"{text}: SLURM reads a backslash in the path of a log as the end of all patterns; choose a run.folder "
            "without one"
        )
    return text.replace("%", "%%")


def write_job(config: Config, resume: bool) -> Path:
    """Write the resolved config and the script into the run folder; return the script's path.

    Raises ConfigError when an index of the array already has a run and `resume` is not set.
    """
    runs = sorted(config.run.folder.glob("array_*/metrics.jsonl"))
    if runs and not resume:
        raise ConfigError(f"{runs[0].parent} already holds a run; go on with --resume, or choose another run.folder")
    folder = config.run.folder / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    config_file, script = folder / "config.toml", folder / "job.sbatch"
    text = render(config, config_file, Path.cwd())
    for path, content in ((config_file, dump_config(config)), (script, text)):
        with replaced(path, text=True) as file:
            file.write(content)
    for name in ("complete", "stalled"):  # with --resume there may be more to do
        for mark in config.run.folder.glob(f"**/slurm/{name}"):
            mark.unlink()
    return script


Sbatch = Callable[[list[str]], str]


def submit(script: Path, chain: int, sbatch: Sbatch | None = None) -> list[str]:
    """Submit `chain` jobs, each to start when the previous one has ended; return their ids. Raises SubmitError."""
    ids: list[str] = []
    for _ in range(chain):
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        ids.append((sbatch or _sbatch)(["--parsable", *after, str(script)]).strip().split(";")[0])
    return ids


def _sbatch(arguments: list[str]) -> str:
    try:
        done = subprocess.run(["sbatch", *arguments], capture_output=True, text=True, timeout=SUBMIT_TIMEOUT_S)
    except FileNotFoundError:
        raise SubmitError(
            f"sbatch is not installed here; copy {arguments[-1]} to a login node and submit it there"
        ) from None
    except subprocess.TimeoutExpired:
        raise SubmitError(f"sbatch did not answer within {SUBMIT_TIMEOUT_S:.0f} s; see `sinfo`") from None
    if done.returncode:
        raise SubmitError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout
