"""This module says which servers must not sample for a run, by what they say about themselves (`/server_info`).

Servers whose addresses are given were started by somebody else, perhaps with another SGLang or other arguments than a
run would use. What is here was reported to lose or bias something without an error. SGLang's pull requests and issues
are named by their numbers.
"""

import re
from collections.abc import Mapping

OLDEST = (0, 5, 23)
"""Before it a server refuses to empty its cache while requests wait in its queue, although it is paused (#33783, fixed
by what #32153 proposed). A publication then stops it, or it goes on with prefixes of the old weights."""


def known_faults(info: Mapping[str, object]) -> list[str]:
    """Return the faults of a server, a sentence each. A version that is no release is trusted."""
    faults = []
    said = info.get("version")
    release = re.match(r"(\d+)\.(\d+)\.(\d+)", said) if isinstance(said, str) else None
    if release is not None and (version := tuple(map(int, release.groups()))) < OLDEST and version > (0, 0, 0):
        faults.append(
            f"it is SGLang {said}, which keeps prefixes of old weights in its cache, or stops, when weights are "
            f"published while requests wait (#33783); use {'.'.join(map(str, OLDEST))}"
        )
    if info.get("hicache_storage_backend") is not None:
        faults.append(
            f"it keeps its cache in a storage (hicache_storage_backend = {info['hicache_storage_backend']!r:.60}), "
            "from which it reads prefixes of old weights after a publication (#26792); start it without"
        )
    return faults
