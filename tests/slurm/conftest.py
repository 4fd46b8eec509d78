from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, cluster, why_not


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A SLURM cluster of two virtual nodes on this machine."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as found:
        yield found
