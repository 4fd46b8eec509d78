"""Publishing by broadcast from trainer rank 0 to the engines (NCCL, gloo without GPU)."""

import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import torch

from fiberpo_megatron.engines.addresses import local_address
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.errors import EngineError, EngineRefused, EngineTimeout
from fiberpo_megatron.weight_sync.base import Deadline, Publisher, Weights
from fiberpo_megatron.weight_sync.buckets import Bucket, buckets
from fiberpo_megatron.weight_sync.group import UpdateGroup

MIB = 1024**2
QUICK_S = 10.0
"""Bound of a call that only tidies up."""
GRACE_S = 2.0
"""How long an engine may take to say why a collective failed."""


class DistributedPublisher(Publisher):
    """Broadcasts flat buckets in a process group of its own, which is made at the first publication.

    `bucket_mib`: size of one broadcast. `backend` unset: nccl where torch sees a GPU, else gloo.

    A refusal before the first bucket leaves the old weights in place; after a failure in the middle the error
    says that the engine may hold a mixture. The group is then given up; the next publication makes a new one.
    """

    def __init__(
        self,
        engines: Sequence[EngineAddress],
        *,
        model: Path,
        leader: bool,
        timeout_s: float,
        bucket_mib: int,
        backend: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(engines, model=model, leader=leader, timeout_s=timeout_s, transport=transport)
        self.bucket_bytes = bucket_mib * MIB
        self.backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        self.device = torch.device("cuda" if self.backend == "nccl" else "cpu")
        self._group: UpdateGroup | None = None

    def _send(self, weights: Weights, version: str, deadline: Deadline) -> None:
        group = self._group or self._connect(deadline)
        sent = 0
        with self._paused():
            self._begin(deadline)
            try:
                for bucket, last in buckets(weights, self.bucket_bytes):
                    self._broadcast(group, bucket, version if last else None, deadline)
                    sent += len(bucket.names)
            except BaseException as error:
                self._give_up(group)
                if sent or isinstance(error, EngineError):
                    error.add_note(f"after {sent} sent tensors: the engines may hold a mixture of weights")
                raise
            self._on_all(lambda client: client.end_weight_update(deadline.left()))

    def _begin(self, deadline: Deadline) -> None:
        """Open the update on every engine before anything is broadcast: a refusal must not leave one waiting.

        An engine refuses while an update is open: a trainer that was killed in the middle of one leaves it so. Then all
        are closed and opened once more.
        """
        try:
            self._on_all(lambda client: client.begin_weight_update(deadline.left()))
        except EngineRefused:
            self._end_quietly()
            try:
                self._on_all(lambda client: client.begin_weight_update(deadline.left()))
            except EngineError:
                self._end_quietly()
                raise

    def _broadcast(self, group: UpdateGroup, bucket: Bucket, version: str | None, deadline: Deadline) -> None:
        """Send one bucket. The first failure counts: an engine that refuses leaves the broadcast waiting."""
        calls = [
            self._submit(
                client.update_weights_from_distributed(
                    bucket.names, bucket.dtypes, bucket.shapes, group.name, version, deadline.left()
                )
            )
            for client in self.clients
        ]
        flat = bucket.flat(self.device)
        self._complete(
            _in_thread(lambda: group.broadcast(flat)),
            calls,
            deadline,
            f"the broadcast of {len(bucket.names)} tensors ({bucket.bytes} bytes) to it did not complete",
        )

    def _connect(self, deadline: Deadline) -> UpdateGroup:
        """A new group with every tensor-parallel rank of every engine: rank 0 is this process."""
        sizes = self._on_all(lambda client: client.tensor_parallel_size())
        offsets = list(accumulate(sizes, initial=1))
        host = local_address([urlsplit(client.url).hostname or "" for client in self.clients])
        name = f"fiberpo-{uuid.uuid4().hex[:8]}"
        group = UpdateGroup(name, self.backend, host, offsets[-1], self.timeout_s)
        calls = [
            self._submit(
                client.init_weights_update_group(
                    host, group.port, offset, group.size, name, self.backend, deadline.left()
                )
            )
            for client, offset in zip(self.clients, offsets)
        ]
        self._complete(
            _in_thread(group.connect),
            calls,
            deadline,
            f"the process group of rank 0 and {group.size - 1} engine ranks at {host}:{group.port} was not complete",
        )
        self._group = group
        return group

    def _complete(self, own: "Future[None]", calls: Sequence["Future[None]"], deadline: Deadline, what: str) -> None:
        """Wait for this side's part of a collective and for the engines' answers; the first failure counts, and an
        engine's answer says more than this side's."""
        wait([own, *calls], timeout=deadline.left(), return_when=FIRST_EXCEPTION)
        if own.done() and own.exception() is not None:
            wait(calls, timeout=GRACE_S, return_when=FIRST_EXCEPTION)
        failed = [call for call in calls if call.done() and call.exception() is not None]
        late = [client for client, call in zip(self.clients, calls) if not call.done()]
        cause = own.exception() if own.done() else None
        for call in calls:
            call.cancel()
        if failed:
            failed[0].result()
        if late or cause is not None or not own.done():
            engine = (late or self.clients)[0]
            fix = "Check the network between them, raise weight_sync.timeout_s, or use weight_sync.method = 'disk'"
            raise EngineTimeout(engine.url, f"{what} in time", fix, engine.address.log) from cause

    def _give_up(self, group: UpdateGroup) -> None:
        """After a failure: the group's state is unknown, and an update must not stay open."""
        group.close()
        self._group = None
        self._end_quietly()

    def _end_quietly(self) -> None:
        with suppress(EngineError):  # the failure that led here is the one to report
            self._on_all(lambda client: client.end_weight_update(QUICK_S))

    def close(self) -> None:
        """Leave the group and release connections and threads; idempotent."""
        if self._group is not None:
            name = self._group.name
            with suppress(EngineError):  # an engine may be gone already
                self._on_all(lambda client: client.destroy_weights_update_group(name, QUICK_S))
            self._group.close()
            self._group = None
        super().close()


def _in_thread(work: Callable[[], None]) -> "Future[None]":
    """Run in a daemon thread: one that hangs in a rendezvous does not keep the process alive."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="update-group", daemon=True).start()
    return future
