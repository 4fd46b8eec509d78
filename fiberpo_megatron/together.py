"""This module lets some ranks work alone, with an outcome that all ranks share."""

from collections.abc import Iterator
from contextlib import contextmanager

from fiberpo_megatron.interfaces import Layout


@contextmanager
def together(layout: Layout, where: str, patience_s: float | None = None) -> Iterator[None]:
    """Every rank enters; if the body raises on any rank, all ranks raise, so that no rank waits for one that
    stopped. A rank whose own body failed raises its own error; the others a RuntimeError that names it.

    `patience_s`: seconds for which ranks wait for those whose body takes long; without it, for as long as a collective
    waits (`run.distributed_timeout_s`). A rank that has waited so long raises TimeoutError with the missing ranks.
    """
    try:
        yield
    except Exception as error:
        if patience_s is not None:
            layout.wait_for_all(where, patience_s)
        layout.agree(f"{type(error).__name__}: {error}", where, reraise=False)
        raise
    if patience_s is not None:
        layout.wait_for_all(where, patience_s)
    layout.agree(None, where)
