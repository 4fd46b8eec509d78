"""This module publishes through a safetensors folder that every rank writes to and every engine can read."""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from torch import Tensor

from fiberpo_megatron import durable
from fiberpo_megatron.engines.errors import EngineRefused
from fiberpo_megatron.interfaces import WeightSource
from fiberpo_megatron.weight_sync.base import Deadline, PublisherContext
from fiberpo_megatron.weight_sync.delta import BASE_IS_MISSING, MANIFEST, Differences, whole
from fiberpo_megatron.weight_sync.rounds import Round, RoundPublisher
from fiberpo_megatron.weight_sync.safetensors_file import write_safetensors
from fiberpo_megatron.weight_sync.session import QUICK_S

SHARD_BYTES = 1024**3
MARKER = ".published"
"""This file marks the folders that a publisher wrote and may remove; it holds the run folder of the publisher's run.
(Earlier versions left it empty.)"""
CONFIGURATION_SUFFIXES = {".json", ".txt", ".model", ".jinja"}
"""Files that an engine reads beside the weights. Code of a model folder is not among them: no engine runs it."""
ROUNDS = "rounds"


class DiskPublisher(RoundPublisher):
    """Writes <folder>/<version>/, where engines read a round while the next is written, and removes older versions.

    `folder` must be the same on all ranks and readable by every engine; by default it is <run folder>/published. Each
    rank writes its share of the tensors to files of its own. Configuration and tokenizer files are copied from the
    model's folder. `shard_bytes` is about the size of a round, all ranks together. The folder is complete when its
    model.safetensors.index.json exists. Several runs may share a folder as long as their versions differ: none removes
    what another one published.

    With `delta` the first publication holds all weights, and later ones only the elements that changed, with checksums
    of the whole; the engines' plugin (engines/sglang_plugin) keeps a copy that it brings up to date, compares and
    loads. When an engine lacks the copy, because it was started again, all weights are published once more.
    """

    def __init__(
        self,
        context: PublisherContext,
        folder: str | Path | None = None,
        shard_bytes: int = SHARD_BYTES,
        delta: bool = False,
    ) -> None:
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes = {shard_bytes} must be at least 1")
        super().__init__(context, shard_bytes)
        self.folder = Path(folder or context.run_folder / "published").resolve()
        run = context.run_folder.resolve()
        self._run, self._alone = str(run), self.folder.is_relative_to(run)
        self._differences = Differences() if delta else None
        self._base: str | None = None
        """The version on which the next publication of differences builds; None when it has to hold all weights."""
        self._base_checksum = self._checksum = ""

    def publish(self, source: WeightSource, version: str) -> None:
        """Load the weights into every engine as `version`; see `RoundPublisher.publish`."""
        if self._differences is None:
            super().publish(source, version)
            return
        try:
            super().publish(source, version)
        except Exception as error:
            partial = self._base is not None
            self._base = None
            self._differences.forget()
            lost = isinstance(error, EngineRefused) and BASE_IS_MISSING in error.what
            if not partial or not self.ranks.gather(lost, "publishing all weights again", Deadline(QUICK_S))[0]:
                raise
            super().publish(source, version)
        self._differences.published()
        self._base, self._base_checksum = version, self._checksum

    def begin(self, plan: Sequence[Round], version: str, deadline: Deadline) -> None:
        """Make the folder of this version (rank 0)."""
        if not self.leads:
            return
        with durable.explained(self.folder):
            folder = self.folder / version
            self._make_room(folder)
            folder.mkdir(parents=True)
            (folder / MARKER).write_text(self._run)  # before anything else, so that a resumed run knows its folder
            durable.sync_tree(folder)
            (folder / ROUNDS).mkdir()
            copy_configuration(self.context.model, folder)

    def prepare(self, this: Round, tensors: list[tuple[str, Tensor]], version: str, deadline: Deadline) -> None:
        """Write this rank's tensors of the round."""
        own = this.buckets[self.context.rank]
        named = dict(zip(own.names, own.in_order(tensors), strict=True))
        if self._differences is not None:
            named = self._differences.changes(named)
        if named:
            with durable.explained(self.folder):
                write_safetensors(named, self.folder / version / file_name(this.number, self.context.rank))

    def send(self, this: Round, version: str, deadline: Deadline) -> "Future[None] | None":
        """Have every engine load the files of the round, out of a folder of links to them."""
        if not self.leads or self._differences is not None:
            return None
        with durable.explained(self.folder):
            folder = self.folder / version / ROUNDS / f"{this.number:05}"
            folder.mkdir()
            for rank, bucket in enumerate(this.buckets):
                if bucket.tensors:
                    name = file_name(this.number, rank)
                    (folder / name).symlink_to(Path("..", "..", name))
            for file in configuration(self.folder / version):
                (folder / file.name).symlink_to(Path("..", "..", file.name))
        reported = this.version(version)
        return self.engines.begin_on_all(
            lambda client: client.update_weights_from_disk(folder, reported, deadline.left())
        )

    async def pause(self, deadline: Deadline) -> None:
        """Pause the engines, unless they generate on until everything is written."""
        if self._differences is None:
            await super().pause(deadline)

    def conclude(self, version: str, deadline: Deadline) -> None:
        """Describe a publication of differences in delta.json, with the checksums of all ranks' tensors."""
        if self._differences is None:
            return
        mine = self._differences.checksums
        of_ranks = self.ranks.gather(mine, f"publishing weights {version}: checksums", deadline)
        checksums = {name: checksum for of_rank in of_ranks for name, checksum in of_rank.items()}
        self._checksum = whole(checksums)
        if self.leads:
            with durable.explained(self.folder):
                folder = self.folder / version
                described = {
                    "version": version,
                    "base": self._base,
                    "base_checksum": self._base_checksum,
                    "files": sorted(path.name for path in [*folder.glob("*.safetensors"), *configuration(folder)]),
                    "checksums": checksums,
                }
                (folder / MANIFEST).write_text(json.dumps(described))

    def finish(self, version: str, deadline: Deadline) -> None:
        """Have the engines load differences; complete the folder and remove older ones."""
        if self._differences is not None:
            self.engines.run(super().pause(deadline))
            folder, self.sent = self.folder / version, True
            self.engines.on_all(lambda client: client.update_weights_from_disk(folder, version, deadline.left()))
        with durable.explained(self.folder):
            if self._base is None:
                self._complete(version)
            for old in self.folder.iterdir():
                if old.name != version and self._is_ours(old):
                    remove(old)

    def _complete(self, version: str) -> None:
        """Write the index. It is not synced: a run publishes again after its machine was lost."""
        places, total = {}, 0
        for this in self.plan:
            for rank, bucket in enumerate(this.buckets):
                places.update(dict.fromkeys(bucket.names, file_name(this.number, rank)))
                total += bucket.nbytes
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (self.folder / version / "model.safetensors.index.json").write_text(json.dumps(index))

    def _make_room(self, folder: Path) -> None:
        if not folder.exists():
            return
        # with nothing but its marker, making or removing it was cut short, and the marker may be torn
        own = folder.is_dir() and not folder.is_symlink()
        empty = own and all(path.name == MARKER for path in folder.iterdir())
        if not empty and not self._is_ours(folder):
            raise FileExistsError(f"{folder} was not published by this run; change weight_sync.folder")
        remove(folder)

    def _is_ours(self, folder: Path) -> bool:
        """Return whether this run published a folder. What lies in the run folder is its own, also after a move."""
        marker = folder / MARKER
        if folder.is_symlink() or not marker.is_file():
            return False
        return self._alone or marker.read_text() in (self._run, "")


def file_name(number: int, rank: int) -> str:
    """Return the name of the file that a rank writes in a round."""
    return f"model-{number:05}-{rank:05}.safetensors"


def remove(folder: Path) -> None:
    """Delete a published folder, its marker last: what is left when that fails is known as this run's."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()
    durable.sync(folder)
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


def configuration(folder: Path) -> list[Path]:
    """List config.json, tokenizer files and similar ones, which an engine reads beside the weights."""
    return [
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix in CONFIGURATION_SUFFIXES and not path.name.endswith(".index.json")
    ]


def copy_configuration(model: Path, folder: Path) -> None:
    """Copy config.json, tokenizer files and similar ones, which an engine reads beside the weights."""
    for source in configuration(model):
        shutil.copyfile(source, folder / source.name)
