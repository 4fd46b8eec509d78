"""Cases that vary what others cover: `make test` leaves them out, `make test-all` runs them."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def varied(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Return the cases, all but those of `kept` marked as exhaustive; a name in `kept` that is no case is an error."""
    cases = list(cases)
    unknown = [case for case in kept if case not in cases]
    assert not unknown, f"{unknown} are no cases"
    return [case if case in kept else pytest.param(case, marks=pytest.mark.exhaustive) for case in cases]
