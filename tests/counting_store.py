"""A rendezvous store for many simulated ranks in one process, which counts what they ask of it."""

import threading
from datetime import timedelta

from torch.distributed import DistError


class CountingStore:
    """Has the methods of torch's stores that the package uses."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.calls = 0
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self.calls += 1
            self.values[key] = value.encode()
            self._changed.notify_all()

    def add(self, key: str, amount: int) -> int:
        with self._changed:
            self.calls += 1
            self.values[key] = str(int(self.values.get(key, b"0")) + amount).encode()
            return int(self.values[key])

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            self.calls += 1
            return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        with self._changed:
            self.calls += 1
            return [self.values[key] for key in keys]

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        with self._changed:
            self.calls += 1
            if not self._changed.wait_for(lambda: all(key in self.values for key in keys), timeout.total_seconds()):
                raise DistError("wait timeout")
