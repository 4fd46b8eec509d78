"""This module publishes by broadcast from trainer rank 0 to the engines (NCCL, gloo without a GPU)."""

import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from itertools import accumulate
from urllib.parse import urlsplit

import torch

from fiberpo_megatron.engines.addresses import local_address
from fiberpo_megatron.engines.errors import EngineError, EngineRefused, EngineTimeout
from fiberpo_megatron.weight_sync.base import Deadline, LeaderPublisher, PublisherContext, Weights
from fiberpo_megatron.weight_sync.buckets import Bucket, buckets
from fiberpo_megatron.weight_sync.group import UpdateGroup

MIB = 1024**2
QUICK_S = 10.0
"""Seconds that a call may take that only tidies up."""
GRACE_S = 2.0
"""Seconds that an engine may take to say why a collective failed."""


class DistributedPublisher(LeaderPublisher):
    """Broadcasts flat buckets in a process group of its own, which is made at the first publication.

    `bucket_mib` is the size of one broadcast in MiB. `backend` is "nccl" or "gloo"; by default nccl where torch sees a
    GPU, else gloo.

    A refusal before the first bucket leaves the old weights in place; after a failure in the middle the error
    says that the engine may hold a mixture. The group is then given up; the next publication makes a new one.
    """

    def __init__(self, context: PublisherContext, bucket_mib: int = 256, backend: str | None = None) -> None:
        super().__init__(context)
        if bucket_mib < 1:
            raise ValueError(f"bucket_mib = {bucket_mib} must be at least 1")
        if backend not in (None, "nccl", "gloo"):
            raise ValueError(f'backend = "{backend}" must be "nccl" or "gloo"')
        self.bucket_bytes = bucket_mib * MIB
        self.backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        self.device = torch.device("cuda" if self.backend == "nccl" else "cpu")
        self._group: UpdateGroup | None = None

    def send(self, weights: Weights, version: str, deadline: Deadline) -> None:
        """Broadcast all buckets; the engines take the version with the last."""
        group = self._group or self._connect(deadline)
        sent = 0
        with self.paused():
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
            self.engines.on_all(lambda client: client.end_weight_update(deadline.left()))

    def _begin(self, deadline: Deadline) -> None:
        """Open the update on every engine before anything is broadcast: a refusal must not leave one waiting.

        An engine refuses while an update is open, which a trainer leaves behind that was killed in the middle of one.
        Then the update is closed on all engines and opened once more.
        """
        try:
            self.engines.on_all(lambda client: client.begin_weight_update(deadline.left()))
        except EngineRefused:
            self._end_quietly()
            try:
                self.engines.on_all(lambda client: client.begin_weight_update(deadline.left()))
            except EngineError:
                self._end_quietly()
                raise

    def _broadcast(self, group: UpdateGroup, bucket: Bucket, version: str | None, deadline: Deadline) -> None:
        """Send one bucket. The first failure counts: an engine that refuses leaves the broadcast waiting."""
        calls = [
            self.engines.submit(
                client.update_weights_from_distributed(
                    bucket.names, bucket.dtypes, bucket.shapes, group.name, version, deadline.left()
                )
            )
            for client in self.engines.clients
        ]
        flat = bucket.flat(self.device)
        self._complete(
            _in_thread(lambda: group.broadcast(flat)),
            calls,
            deadline,
            f"the broadcast of {len(bucket.names)} tensors ({bucket.bytes} bytes) to it did not complete",
        )

    def _connect(self, deadline: Deadline) -> UpdateGroup:
        """Return a new group of this process, as rank 0, and every tensor-parallel rank of every engine."""
        sizes = self.engines.on_all(lambda client: client.tensor_parallel_size())
        offsets = list(accumulate(sizes, initial=1))
        host = local_address([urlsplit(client.url).hostname or "" for client in self.engines.clients])
        name = f"fiberpo-{uuid.uuid4().hex[:8]}"
        group = UpdateGroup(name, self.backend, host, offsets[-1], self.context.timeout_s)
        calls = [
            self.engines.submit(
                client.init_weights_update_group(
                    host, group.port, offset, group.size, name, self.backend, deadline.left()
                )
            )
            for client, offset in zip(self.engines.clients, offsets)
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
        """Wait for this side's part of a collective and for the engines' answers.

        The first failure is raised. An engine's answer says more than this side's error, so it is waited for briefly.
        """
        wait([own, *calls], timeout=deadline.left(), return_when=FIRST_EXCEPTION)
        if own.done() and own.exception() is not None:
            wait(calls, timeout=GRACE_S, return_when=FIRST_EXCEPTION)
        failed = [call for call in calls if call.done() and call.exception() is not None]
        late = [client for client, call in zip(self.engines.clients, calls) if not call.done()]
        cause = own.exception() if own.done() else None
        for call in calls:
            call.cancel()
        if failed:
            failed[0].result()
        if late or cause is not None or not own.done():
            engine = (late or self.engines.clients)[0]
            fix = "Check the network between them, raise weight_sync.timeout_s, or use weight_sync.method = 'disk'"
            raise EngineTimeout(engine.url, f"{what} in time", fix, engine.address.log) from cause

    def _give_up(self, group: UpdateGroup) -> None:
        """Drop the group after a failure: its state is unknown, and an update must not stay open."""
        group.close()
        self._group = None
        self._end_quietly()

    def _end_quietly(self) -> None:
        with suppress(EngineError):  # the failure that led here is the one to report
            self.engines.on_all(lambda client: client.end_weight_update(QUICK_S))

    def close(self) -> None:
        """Leave the process group. A second call does nothing."""
        if self._group is not None:
            name = self._group.name
            with suppress(EngineError):  # an engine may be gone already
                self.engines.on_all(lambda client: client.destroy_weights_update_group(name, QUICK_S))
            self._group.close()
            self._group = None


def _in_thread(work: Callable[[], None]) -> "Future[None]":
    """Run `work` in a daemon thread, which does not keep the process alive if it hangs in a rendezvous."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="update-group", daemon=True).start()
    return future
