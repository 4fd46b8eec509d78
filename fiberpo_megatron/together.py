"""This module lets some ranks work alone, with an outcome that all ranks share."""

from collections.abc import Iterator
from contextlib import contextmanager

from fiberpo_megatron.interfaces import Layout


@contextmanager
def together(layout: Layout, where: str) -> Iterator[None]:
    """Every rank enters; if the body raises on any rank, all ranks raise, so that no rank waits for one that
    stopped. A rank whose own body failed raises its own error; the others a RuntimeError that names it."""
    try:
        yield
    except Exception as error:
        layout.agree(f"{type(error).__name__}: {error}", where, reraise=False)
        raise
    layout.agree(None, where)
