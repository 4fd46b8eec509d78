"""This module lets an object that has `close` be used in a `with` statement."""

from types import TracebackType
from typing import Self


class Closeable:
    """This is the base of objects that are closed at the end of a `with` statement."""

    def close(self) -> None:
        """Release what the object holds; idempotent."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
