"""The virtual cluster itself."""

import os

import psutil

from tests.slurm.cluster import Cluster


def test_two_nodes_that_listen_on_loopback_only(slurm: Cluster):
    assert slurm.run("srun", "-N2", "--mpi=none", "bash", "-c", "echo $SLURMD_NODENAME").split() in (
        ["n1", "n2"],
        ["n2", "n1"],
    )
    daemons = [p for p in psutil.Process(os.getpid()).children() if p.name() in ("slurmctld", "slurmd", "munged")]
    assert len(daemons) == 4
    assert {
        c.laddr.ip for daemon in daemons for c in daemon.net_connections("inet") if c.status == psutil.CONN_LISTEN
    } == {"127.0.0.1"}
