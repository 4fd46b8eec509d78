"""The rendered job on a real SLURM: two nodes, one Megatron rank on each, an SGLang server on the first."""

import json
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file

from fiberpo_megatron.cli.main import main
from fiberpo_megatron.config import load_config
from fiberpo_megatron.launch.slurm import write_job
from tests.end_to_end.test_training import CONFIG, ROOT, SMALL, command, processes_of, records
from tests.slurm.cluster import Cluster, wait_for
from tests.variations import varied

START_S = 240
"""A start takes about 25 s on two idle cores."""
STEPS = 8
OPTIONS = [
    "--trainer.steps", str(STEPS), "--evaluation.prompts", "0",
    "--slurm.gpus_per_node", "0", "--slurm.cpus_per_rank", "1",
    "--slurm.engine_nodes", "1", "--slurm.share_nodes", "true",
    "--slurm.time", "30", "--slurm.signal_s", "60",
]  # fmt: skip


Submit = Callable[..., str]


@pytest.fixture
def submit(slurm: Cluster, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Submit:
    """`fiberpo slurm --submit` in this process, which has imported everything; the job's id."""

    def run(folder: Path, *more: str) -> str:
        words = ["--model.path", str(model), "--run.folder", str(folder), *SMALL, *OPTIONS, *more]
        with monkeypatch.context() as place:
            place.chdir(ROOT)
            for name in ("SLURM_CONF", "PATH"):
                place.setenv(name, slurm.environment[name])
            assert main(["slurm", CONFIG, "--submit", *words]) == 0
        return capsys.readouterr().out.split()[2].rstrip(";")

    return run


def rewards(folder: Path) -> list[float]:
    if not (folder / "metrics.jsonl").exists():
        return []
    return [record["reward/mean"] for record in records(folder, "train")]


def start_now(slurm: Cluster, job: str) -> None:
    """SLURM lets a job that was queued again wait for two minutes. A few seconds it needs: the nodes have revoked the
    job's credential, and take a new one only with a later time in whole seconds."""
    wait_for(lambda: slurm.state(job) == "PENDING", 60, slurm.logs)
    time.sleep(4)
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: slurm.state(job) == "RUNNING", 60, slurm.logs)


def everything_said(folder: Path) -> str:
    return "\n".join(f"== {p}\n{p.read_text()[-3000:]}" for p in sorted(folder.glob("slurm/**/*.log")))


@pytest.mark.sglang
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "preempted", varied([False, True], [False]), ids=lambda preempted: "preempted too" if preempted else "stopped"
)
def test_a_job_that_is_stopped_and_requeued_ends_like_an_undisturbed_run(
    slurm: Cluster, submit: Submit, model: Path, engine: Any, tmp_path: Path, preempted: bool
):
    """Show that a requeue loses nothing and needs no attention. A third start, after a preemption without
    a signal, meets what test_kills.py has in every phase: a run that was killed."""
    folder = tmp_path / "job"
    job = submit(folder)

    def reached(steps: int) -> bool:
        assert slurm.state(job) in ("RUNNING", "PENDING"), everything_said(folder)
        return len(rewards(folder)) >= steps

    # 1. The signal before the time limit, as SLURM would send it
    wait_for(lambda: reached(2), START_S, lambda: everything_said(folder))
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: slurm.state(job) == "PENDING", 120, lambda: everything_said(folder))
    log = folder / f"slurm/{job}.log"
    assert "stopped before the time limit; queued again" in log.read_text()
    done = len(rewards(folder))
    assert (folder / f"slurm/{job}.0/rank_0.log").read_text().count("stopped as asked") == 1
    assert sorted((folder / "checkpoints").glob("step-*"))[-1].name == f"step-{done:08d}"
    wait_for(lambda: not processes_of(folder), 60)

    # 2. The second start goes on by itself; its engine serves only who has the key
    start_now(slurm, job)
    registered = folder / f"slurm/{job}.1/engines/n1.json"
    key_file = registered.with_name("api_key")
    wait_for(lambda: key_file.exists() and key_file.stat().st_size == 64, START_S, lambda: everything_said(folder))
    key = key_file.read_text()
    assert key_file.stat().st_mode & 0o777 == 0o600
    wait_for(lambda: reached(done + 1), START_S, lambda: everything_said(folder))
    check_engine(folder, registered, key)
    check_sockets(folder)
    assert "fiberpo: pass: all-reduce: gloo, 2 ranks" in (folder / f"slurm/{job}.1/rank_0.log").read_text()
    assert f"Resumed from {folder}/checkpoints/step-{done:08d}" in (folder / f"slurm/{job}.1/rank_0.log").read_text()
    if preempted:  # 3. The third finishes
        slurm.run("scontrol", "requeue", job)
        start_now(slurm, job)
    wait_for(lambda: slurm.state(job) == "COMPLETED", START_S, lambda: everything_said(folder))
    assert log.read_text().endswith("complete\n") and (folder / "slurm/complete").exists()
    assert not processes_of(folder) and not list(folder.rglob("api_key"))

    undisturbed = tmp_path / "undisturbed"
    words = ["--rollout.engine.urls", f'["{engine.url}"]', *OPTIONS]
    subprocess.run(command(model, undisturbed, *words), cwd=ROOT, check=True, timeout=240, stdout=subprocess.DEVNULL)
    assert rewards(folder) == rewards(undisturbed) and len(rewards(folder)) == STEPS
    ours, theirs = (load_file(f / "hf/model.safetensors") for f in (folder, undisturbed))
    for name, tensor in theirs.items():
        # another batch on the engine moves log-probs by 1e-6, and with them importance ratios
        assert (ours[name] - tensor).abs().max() < 1e-4, name


def check_engine(folder: Path, registered: Path, key: str) -> None:
    (server,) = json.loads(registered.read_text())["engines"]
    assert len(key) == 64 and registered.parent.stat().st_mode & 0o777 == 0o700
    assert httpx.get(f"{server['url']}/model_info", trust_env=False).status_code == 401
    allowed = httpx.get(f"{server['url']}/model_info", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
    assert allowed.status_code == 200
    said = [p for p in folder.rglob("*") if p.is_file() and key.encode() in p.read_bytes()]
    assert said == [registered.with_name("api_key")], "further engines may join, until the run ends"
    for process in psutil.process_iter(["cmdline"]):
        assert key not in " ".join(process.info["cmdline"] or [])


def check_sockets(folder: Path) -> None:
    """Ranks, their store, gloo, the update group, engines and srun listen on the nodes' address alone."""
    listening = set()
    for process in processes_of(folder):
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                sockets = [c for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN]
                listening |= {(c.laddr.ip, each.name()) for c in sockets}
    assert {ip for ip, _ in listening} == {"127.0.0.1"}, listening
    assert len({name for _, name in listening}) >= 3, f"srun, python and SGLang's scheduler: {listening}"


def test_the_cause_of_a_failure_is_the_last_thing_the_job_says(slurm: Cluster, submit: Submit, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("")
    mine = f'[{{name = "mine", use = "chat", options = {{name = "mine", train = "{tmp_path}/empty.jsonl"}}}}]'
    urls = ["--rollout.engine.urls", '["http://127.0.0.1:9"]', "--slurm.engine_nodes", "0"]
    folder = tmp_path / "job"
    job = submit(folder, *urls, "--slurm.share_nodes", "false", "--environments", mine)
    wait_for(lambda: slurm.state(job) == "FAILED", START_S, lambda: everything_said(folder))
    *_, cause, where = (folder / f"slurm/{job}.log").read_text().splitlines()
    assert cause.startswith("fiberpo: rank ") and "empty.jsonl" in cause
    assert where.startswith(f"fiberpo: log of that rank: {folder}/slurm/{job}.0/rank_")
    assert "Traceback" in Path(where.partition(": ")[2].partition(": ")[2]).read_text()
    assert not (folder / "slurm/complete").exists()


@pytest.mark.parametrize("nodes", [1, 2])
def test_slurm_accepts_the_script(slurm: Cluster, nodes: int, tmp_path: Path):
    words = ["--slurm.ranks_per_node", str(2 // nodes), "--run.folder", str(tmp_path / "a run 100%j it's #1")]
    config = load_config(CONFIG, [*words, *OPTIONS, "--slurm.dependency", "singleton", "--slurm.array", "0-1"])
    said = slurm.run("sbatch", "--test-only", str(write_job(config, resume=False)))
    assert "to start at" in said and ("n[1-2]" in said) == (nodes == 2)
