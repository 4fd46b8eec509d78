"""No line of a batch script comes from a value: every rendered value, read back as SLURM and bash read it."""

import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fiberpo_megatron.config import Config, ConfigError, load_config
from fiberpo_megatron.launch.slurm import render
from tests.launch.sbatch import log_name, options

EXAMPLE = Path(__file__).parents[2] / "examples/slurm/one_node.toml"
HOSTILE = st.text(
    st.one_of(
        st.sampled_from("\n\r\x0b\x0c\x00\x1b\x85\u2028\u2029\u202e\udcff'\"`$\\%#!*;&|<>(){}[]~ \t-=:,"),
        st.sampled_from(list("aZ09._é漢\U0001f600jAaxtN")),
        st.characters(),
    ),
    max_size=24,
)
PART = HOSTILE.map(lambda text: text.replace("/", "_").replace("\0", "_")).filter(
    lambda text: text not in ("", ".", "..")
)
WORDS = HOSTILE.filter(bool)
LINES = len(render(load_config(EXAMPLE), Path("/x/config.toml"), Path("/x")).split("\n"))


def job(run: Path, container: str, **values: object) -> Config:
    """A config whose values were not checked: what the script holds must be safe by itself."""
    config = load_config(EXAMPLE)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"folder": run}),
            "slurm": config.slurm.model_copy(update={"container": container} | values),
        }
    )


def assigned(script: str, *names: str) -> list[str]:
    """What bash has in variables after the script's assignments, which are single lines."""
    lines = [line for line in script.split("\n") if re.match(rf"({'|'.join(names)})\+?=", line)]
    shown = "".join(f"printf '%s\\0' \"${{{name}[@]}}\"\n" for name in names)
    program = "\n".join(["PWD=/here", "STEP=()", *lines, shown])
    done = subprocess.run(["bash", "-u"], input=program.encode(), capture_output=True, env={"LC_ALL": "C"}, check=True)
    assert done.stderr == b""
    return done.stdout.decode().split("\0")[:-1]


@settings(max_examples=150, deadline=None, database=None)
@given(run=PART, here=PART, config=PART, words=st.lists(WORDS, min_size=6, max_size=6), container=st.booleans())
@example(run="a\nrm -rf ~", here="h", config="c", words=list("abcdef"), container=False)
@example(
    run="100% of %j", here="h", config="c", words=["it's", "a\\'b", 'say "x"', "#no", "$(id)", "~"], container=True
)
@example(run="r", here="a\u2028b", config="c", words=list("abcdef"), container=False)
@example(run="r", here="h", config="c\r", words=list("abcdef"), container=True)
@example(run="back\\slash", here="h", config="c", words=list("abcdef"), container=False)
@example(run="r", here="a:\n", config="c", words=list("abcdef"), container=True)
@example(run="r\\", here="back\\slash", config="it's", words=["\\", "\\n", "'", "'\\''", "\\\\", '"'], container=True)
def test_values_come_back_as_they_are_or_are_refused(run, here, config, words, container):
    folder, working, file = Path("/runs") / run, Path("/work") / here, Path("/configs") / config
    name, account, partition, image, mount, python = words
    more = {"image": image, "mounts": [mount]} if container else {}
    described = job(folder, "apptainer" if container else "none", job_name=name, account=account, partition=partition,
                    python=python, **more)  # fmt: skip
    used = [run, here, config, name, account, partition, python, *([image, mount] if container else [])]
    refused = (
        any(not text.isprintable() for text in used) or "\\" in run or (container and set(":,") & set(str(working)))
    )
    if refused:
        with pytest.raises(ConfigError) as error:
            render(described, file, working)
        assert str(error.value).isprintable()
        return
    script = render(described, file, working)
    assert len(script.split("\n")) == LINES + 2  # account and partition
    found = options(script)
    for option, value in {"job-name": name, "account": account, "partition": partition, "chdir": str(working)}.items():
        assert found.count(f"--{option}={value}") == 1, found
    [output] = [word.removeprefix("--output=") for word in found if word.startswith("--output=")]
    assert log_name(output, 77) == f"{folder}/slurm/77.log"
    assert all(word.startswith("--") for word in found)
    assert assigned(script, "PYTHON", "CONFIG", "RUN") == [python, str(file), str(folder)]
    if container:
        bound = ["--bind", f"{working}:{working}", "--bind", mount]
        assert assigned(script, "INSIDE") == ["apptainer", "exec", "--nv", *bound, "--pwd", "/here", image]


SRUN = """#!/bin/bash
while [ "$1" != bash ]; do [[ "$1" == *%* ]] && echo "$1" >> "$STUBS/patterns"; shift; [ $# -gt 0 ] || exit 0; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURMD_NODENAME=n1
exec "$@"
"""
PYTHON = """#!/bin/bash
echo "$@"
if [ -z "${RANK-}" ]; then touch "$STUBS/engine"; exit; fi
echo "errors of rank $RANK: $TORCHELASTIC_ERROR_FILE"
for _ in {1..1000}; do [ -e "$STUBS/engine" ] && exit; sleep 0.02; done # the script stops the engines after the ranks
"""


def test_logs_and_settings_of_a_job_whose_paths_are_odd(tmp_path: Path):
    """A stub stands for srun and starts its process; srun would read every % in the name of a log as a pattern."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    python = stubs / "py 100%t it's"
    for path, text in ((stubs / "srun", SRUN), (stubs / "scontrol", "#!/bin/bash\n"), (python, PYTHON)):
        path.write_text(text)
        path.chmod(0o755)
    folder = tmp_path / '100%t of %j $(id) it\'s "é" #1'
    old = folder / "slurm/5.0/engines/api_key"
    old.parent.mkdir(parents=True)
    old.write_text("of a start that was killed")
    (tmp_path / "job.sh").write_text(render(job(folder, "none", python=str(python)), folder / "config.toml", tmp_path))
    environment = {"PATH": f"{stubs}:/usr/bin:/bin", "STUBS": str(stubs), "LC_ALL": "C"}
    environment |= {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n", "SLURM_RESTART_COUNT": "1"}
    done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith(": complete\n"), done.stderr
    logs = folder / "slurm/5.1"
    rank = (logs / "rank_0.log").read_text().splitlines()
    assert rank[0] == (f"-m fiberpo_megatron.cli.rank train {folder}/config.toml --resume --registry {logs}/engines")
    assert rank[1] == f"errors of rank 0: {logs}/errors/rank_0.json"
    engine = (logs / "engines_0.log").read_text()
    assert f"engine {folder}/config.toml --registry {logs}/engines" in engine and engine.count("--host n1") == 1
    assert not (stubs / "patterns").exists()
    assert not list(folder.rglob("api_key"))
