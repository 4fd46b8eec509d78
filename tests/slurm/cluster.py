"""A real SLURM on this machine: munged, slurmctld and slurmd as virtual nodes, all on loopback, none of it left.

`python -m tests.slurm.cluster FOLDER [NODES]` keeps one until SIGINT or SIGTERM, for jobs by hand.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fiberpo_megatron.engines.addresses import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/socket/munge
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
SlurmctldTimeout=300
SlurmdTimeout=300
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2\n"


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root to start jobs"
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    return f"{', '.join(missing)} not installed (tools/install_slurm.sh)" if missing else None


@dataclass(frozen=True)
class Cluster:
    """Idle nodes n1, n2, .. with two CPUs each."""

    folder: Path
    environment: dict[str, str]

    def run(self, *words: str, check: bool = True) -> str:
        """stdout and stderr of one of SLURM's commands."""
        done = subprocess.run(
            words, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}"
        return done.stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, .."""
        shown = self.run("scontrol", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0]

    def logs(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in self.folder.glob("*.log"))


@contextmanager
def cluster(folder: Path, size: int = 2) -> Iterator[Cluster]:
    """Start it below `folder`; at the end jobs are cancelled and the daemons are gone."""
    nodes = [f"n{number + 1}" for number in range(size)]
    spool = ((f"spool-{name}", 0o755) for name in nodes)
    for name, mode in (("munge", 0o700), ("socket", 0o711), ("state", 0o700), *spool):
        (folder / name).mkdir(mode=mode, parents=True)
    for parent in [folder, *folder.parents]:  # munge wants its socket reachable for everybody
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    controller, *ports = free_ports(1 + size, "127.0.0.1")
    host = socket.gethostname()
    listed = "".join(NODE.format(name=name, host=host, port=port) for name, port in zip(nodes, ports))
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, controller=controller) + listed)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SYSTEM_PATH}
    found = Cluster(folder, environment)
    munge = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    with ExitStack() as stack:

        def daemon(*words: str) -> None:
            output = stack.enter_context((folder / f"{'-'.join(words[:1])}-{words[-1][-2:]}.out").open("wb"))
            process = subprocess.Popen(
                words, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
            )
            stack.callback(_end, process)

        daemon("munged", "--foreground", f"--socket={folder}/socket/munge", *munge)
        wait_for(lambda: (folder / "socket/munge").exists(), 30, found.logs)
        daemon("slurmctld", "-D")
        for name in nodes:
            daemon("slurmd", "-D", "-N", name)
        wait_for(lambda: found.run("sinfo", "-h", "-o", "%D %T", check=False).strip() == f"{size} idle", 60, found.logs)
        stack.callback(_cancel_all, found)
        yield found


def wait_for(condition: Callable[[], bool], seconds: float, tell: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not come true within {seconds:.0f} s\n{tell()}"
        time.sleep(0.2)


def _cancel_all(found: Cluster) -> None:
    found.run("scancel", "--user=root", check=False)
    wait_for(lambda: not found.run("squeue", "-h").strip(), 60, found.logs)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    with cluster(place, *map(int, sys.argv[2:3])):
        print(f"export SLURM_CONF={place}/slurm.conf PATH=$PATH:/usr/sbin", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit("cancelling all jobs"))
        while True:
            time.sleep(3600)
