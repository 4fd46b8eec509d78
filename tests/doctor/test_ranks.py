"""Ranks that meet, one that does not come, and the whole command."""

import json
import os
from pathlib import Path

import pytest

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.cli.main import main
from fiberpo_megatron.doctor import ranks
from fiberpo_megatron.doctor.report import Finding

ROOT = Path(__file__).parents[2]


def meet(world_size: int, deadline_s: float) -> list[Finding]:
    os.environ["WORLD_SIZE"] = str(world_size)
    return ranks.meet(deadline_s)


def test_two_ranks_are_timed():
    found, others = run_ranks(2, meet, 2, 60.0)
    assert others == []
    by_name = {finding.check: finding for finding in found}
    assert by_name["all-reduce"].status == "pass" and "gloo, 2 ranks: 32 MiB" in by_name["all-reduce"].seen
    assert by_name["clocks"].status == "pass" and {"shared memory", "open files", "GPU"} <= set(by_name)


def test_a_rank_that_does_not_come_is_named():
    found, others = run_ranks(2, meet, 3, 3.0)
    assert others == []
    missing = found[-1]
    assert (missing.check, missing.status) == ("ranks", "fail")
    assert missing.seen == "rank 2 of 3 did not come within 3 s"


def test_slow_ranks_and_wrong_clocks_are_named():
    hosts = {0: "a", 1: "b", 2: "c", 3: "d"}
    assert ranks._slow({1: 0.010, 2: 0.011, 3: 0.012}, hosts).status == "pass"
    slow = ranks._slow({1: 0.010, 2: 0.080, 3: 0.012}, hosts)
    assert slow.status == "warn" and "rank 2 slow" in slow.seen and "rank 2 on c takes 80.0 ms" in slow.seen
    assert ranks._clocks({1: 0.2, 2: -0.3}, hosts).status == "pass"
    off = ranks._clocks({1: 0.2, 2: -40.0}, hosts)
    assert off.status == "warn" and "clock of c (rank 2) is off by -40.0 s" in off.seen


def test_a_node_that_has_lost_a_gpu_is_named():
    present = {rank: {"host": f"n{rank // 2}", "gpus": None, "findings": []} for rank in range(6)}
    for rank, count in ((0, 8), (2, 7), (4, 8)):
        present[rank]["gpus"] = count
    (finding,) = ranks._of_machines(present)
    assert finding.status == "fail" and finding.seen == "n1 has 7, the others have 8" and "--exclude" in finding.fix
    present[2]["gpus"] = 8
    assert ranks._of_machines(present) == []


def test_one_rank_of_every_machine_is_compared():
    assert ranks._partners(2, 8) == [1] and ranks._partners(1, 1) == []
    assert ranks._partners(4, 4) == [1, 2, 3] and ranks._partners(16, 4) == [4, 8, 12]


def test_the_command_fails_with_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    demo = str(ROOT / "examples/demo/train.toml")
    words = ["doctor", demo, "--json", "--model.path", str(tmp_path), "--run.folder", str(tmp_path / "run")]
    assert main(words) == 1
    told = json.loads(capsys.readouterr().out)
    failed = {finding["check"] for finding in told["findings"] if finding["status"] == "fail"}
    assert failed == {"model files", "tokenizer"} and told["ok"] is False
    assert {"all-reduce", "Python", "write speed"} <= {finding["check"] for finding in told["findings"]}
