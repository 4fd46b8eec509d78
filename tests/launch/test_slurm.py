"""The batch script: what it asks for, that shells accept it, and that no value of a config can run code in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fiberpo_megatron.cli.main import main
from fiberpo_megatron.config import Config, ConfigError, load_config
from fiberpo_megatron.launch.slurm import SubmitError, render, shape_of, submit, write_job

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/slurm"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"


def job(*overrides: str, example: str = "one_node") -> Config:
    return load_config(EXAMPLES / f"{example}.toml", overrides)


def script(config: Config, folder: Path = Path("/shared")) -> str:
    return render(config, folder / "config.toml", folder)


@pytest.mark.parametrize(
    ("example", "lines"),
    [
        (
            "one_node",
            [
                "#SBATCH --nodes=1",
                "#SBATCH --ntasks-per-node=4",
                "#SBATCH --gpus-per-node=8",
                "#SBATCH --signal=B:USR1@900",
                "#SBATCH --requeue",
                'TRAINING=("${HOSTS[@]:0:1}")',
                'ENGINES=("${HOSTS[@]:0:1}")',
                '  --first-gpu 4 "${OVERRIDES[@]}" 2> "$LOGS/srun_engines.log" &',
                "INSIDE=()",
            ],
        ),
        (
            "four_nodes",
            [
                "#SBATCH --nodes=4",
                "#SBATCH --job-name=qwen3-30b",
                'TRAINING=("${HOSTS[@]:0:2}")',
                'ENGINES=("${HOSTS[@]:2:2}")',
                '"${STEP[@]}" --nodes=2 --ntasks=16 --ntasks-per-node=8 \\',
                "MOUNTS=/shared:/shared,/models:/models:ro,/data:/data:ro",
                "STEP+=(--container-image=/containers/fiberpo-megatron.sqsh"
                ' --container-mounts="$MOUNTS" --container-workdir="$PWD")',
                '  --first-gpu 0 "${OVERRIDES[@]}" 2> "$LOGS/srun_engines.log" &',
            ],
        ),
        (
            "thirty_two_nodes",
            [
                "#SBATCH --nodes=32",
                "#SBATCH --time=1-00:00:00",
                "#SBATCH --no-requeue",
                "#SBATCH --switches=1",
                'ENGINES=("${HOSTS[@]:16:16}")',
                '"${STEP[@]}" --nodes=16 --ntasks=128 --ntasks-per-node=8 \\',
                "INSIDE=(apptainer exec --nv --bind /shared:/shared --bind /models:/models:ro --bind /data:/data:ro"
                ' --pwd "$PWD" /containers/fiberpo-megatron.sif)',
            ],
        ),
    ],
)
def test_the_examples(example: str, lines: list[str], tmp_path: Path):
    text = script(job(example=example))
    for line in lines:
        assert line in text.splitlines(), line
    check_shell(text, tmp_path)
    assert ("scontrol requeue" in text) == (example != "thirty_two_nodes")


def check_shell(text: str, folder: Path) -> None:
    path = folder / "job.sh"
    path.write_text(text)
    for command in (["bash", "-n"], [SHELLCHECK]):
        done = subprocess.run([*command, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_array_is_independent_runs_and_urls_need_no_engine_step(tmp_path: Path):
    urls = ["--rollout.engine.urls", '["http://a:1"]', "--slurm.engine_nodes", "0", "--slurm.share_nodes", "false"]
    text = script(job("--slurm.array", "0-3", "--slurm.dependency", "afterok:12", "--run.seed", "5", *urls))
    assert "#SBATCH --array=0-3" in text and "#SBATCH --dependency=afterok:12" in text
    assert "RUN=" in text and "/array_$SLURM_ARRAY_TASK_ID\n" in text
    assert 'OVERRIDES=(--run.folder "$RUN" --run.seed "$((5 + SLURM_ARRAY_TASK_ID))")' in text
    assert "registry" not in text and "ENGINE" not in text
    check_shell(text, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--parallel.data", "3"], r"6 ranks, which do not fill nodes of 4; change parallel.data"),
        (["--slurm.ranks_per_node", "16", "--parallel.data", "8"], "16 exceeds slurm.gpus_per_node = 8"),
        (["--slurm.engine_nodes", "0"], r"engine_nodes = 0 and 0 rollout.engine.urls: give one of them"),
        (["--rollout.engine.urls", '["http://a:1"]'], "engine_nodes = 1 and 1 rollout.engine.urls"),
        (["--slurm.engine_nodes", "2"], "2 of the training nodes, but there are 1"),
        (["--rollout.engine.count", "9"], "= 18 GPUs, but a node has slurm.gpus_per_node = 8"),
        (
            ["--slurm.share_nodes", "false", "--rollout.engine.colocated", "true"],
            "colocated = true shares GPUs .* needs slurm.share_nodes",
        ),
        (["--slurm.container", "pyxis"], "set both, or neither"),
        (["--slurm.options", '["--nice\\nrm -r /"]'], "control character"),
        (["--slurm.options", '["nice"]'], "not an option of sbatch"),
        (["--slurm.time", "tomorrow"], "slurm.time"),
        (["--slurm.array", "$(id)"], "slurm.array"),
        (
            ["--slurm.time", "15"],
            r"signal_s = 900 and slurm.time = '15' \(900 s\): the job would be asked to stop when",
        ),
        (["--slurm.time", "15:00"], r"'15:00' \(900 s\)"),
        (["--slurm.time", "00:14:59"], r"'00:14:59' \(899 s\)"),
        (["--slurm.time", "1-0:30", "--slurm.signal_s", "90000"], r"'1-0:30' \(88200 s\)"),
    ],
)
def test_what_does_not_fit_is_said(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        shape_of(job(*overrides))


def test_engines_share_the_ranks_gpus_where_there_are_no_others():
    words = ["--slurm.ranks_per_node", "8", "--parallel.data", "4"]
    with pytest.raises(
        ConfigError, match="8 ranks and 4 GPUs of engines on nodes of 8 GPUs; lower .* or let them share"
    ):
        shape_of(job(*words))
    config = job(*words, "--rollout.engine.colocated", "true")
    assert shape_of(config).first_gpu == 0 and shape_of(config).nodes == 1
    assert shape_of(job()).first_gpu == 4


def test_times_and_indices_need_no_quotes():
    assert job("--slurm.time", "12:30:00").slurm.time == "12:30:00"
    assert job("--slurm.time", "90").slurm.time == "90" and job("--slurm.array", "7").slurm.array == "7"


def test_values_are_never_run(tmp_path: Path):
    """A stub stands for every program; whatever the shell itself would run leaves a file."""
    mark = tmp_path / "ran"
    evil = f"$(touch {mark})`touch {mark}`; touch {mark}; '\" x"
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name in ("srun", "scontrol"):
        (stubs / name).write_text("#!/bin/bash\nexit 0\n")
        (stubs / name).chmod(0o755)
    folder = tmp_path / f"run {evil.replace('/', '_')}"
    config = job("--slurm.container", "apptainer", "--slurm.image", "x.sif")
    values = {"job_name": evil, "account": evil, "image": evil, "mounts": [evil], "python": evil}
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"folder": folder}),
            "slurm": config.slurm.model_copy(update=values),
        }
    )
    text = render(config, folder / "slurm/config.toml", tmp_path)
    path = tmp_path / "job.sh"
    path.write_text(text)
    environment = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n"}
    done = subprocess.run(["bash", path], env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0 and "complete" in done.stdout, done.stderr
    assert (folder / "slurm/complete").exists() and not mark.exists()


STOPPED_BY_THE_LIMIT = """#!/bin/bash
trap 'exit 85' USR1
until grep -q '^SigCgt:.*[2367abef]..$' "/proc/$PPID/status"; do sleep 0.02; done # the script listens to USR1
if [ -e progress ]; then mkdir -p checkpoints/step-00000003; fi
kill -USR1 "$PPID"
while true; do sleep 0.02; done
"""


def test_a_job_that_gets_nowhere_is_not_queued_for_ever(tmp_path: Path):
    """A stub stands for srun and the time limit; of four starts only the second leaves a checkpoint."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in (("srun", STOPPED_BY_THE_LIMIT), ("scontrol", "#!/bin/bash\n")):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    urls = ["--rollout.engine.urls", '["http://a:1"]', "--slurm.engine_nodes", "0", "--slurm.share_nodes", "false"]
    path = tmp_path / "job.sh"
    path.write_text(script(job(*urls, "--run.folder", str(tmp_path)), tmp_path))
    environment = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n"}
    said = []
    for start in range(4):
        (tmp_path / "progress").touch() if start == 1 else (tmp_path / "progress").unlink(missing_ok=True)
        done = subprocess.run(["bash", path], env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        said.append((done.returncode, "; queued again" in done.stdout))
    assert said == [(85, True), (85, True), (85, True), (1, False)]
    assert "two starts in a row saved no step and no rollouts: not queued again. Raise slurm.time" in done.stdout


def test_a_chain_is_submitted_one_after_the_other():
    seen = []

    def sbatch(arguments: list[str]) -> str:
        seen.append(arguments)
        return f"{40 + len(seen)};cluster\n"

    assert submit(Path("job.sbatch"), 3, sbatch) == ["41", "42", "43"]
    assert seen == [["--parsable", *after, "job.sbatch"] for after in ([], ["--dependency=afterany:41"],
                    ["--dependency=afterany:42"])]  # fmt: skip


def test_without_sbatch_it_says_where_the_script_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubmitError, match="sbatch is not installed here; copy /x/job.sbatch to a login node"):
        submit(Path("/x/job.sbatch"), 1)


def test_dry_run_writes_nothing_and_a_job_is_kept_in_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    words = ["slurm", str(EXAMPLES / "one_node.toml"), "--run.folder", str(folder)]
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n") and not folder.exists()
    config = job("--run.folder", str(folder))
    (folder / "slurm").mkdir(parents=True)
    (folder / "slurm/complete").touch()
    path = write_job(config, resume=False)
    assert path == folder / "slurm/job.sbatch" and path.read_text() == render(
        config, folder / "slurm/config.toml", Path.cwd()
    )
    assert load_config(folder / "slurm/config.toml") == config and not (folder / "slurm/complete").exists()
    (folder / "array_0").mkdir()
    (folder / "array_0/metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="array_0 already holds a run; go on with --resume"):
        write_job(config, resume=False)
    write_job(config, resume=True)
