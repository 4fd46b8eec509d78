"""What a rank holds in each phase: on its GPU and in host memory, expert routing and saving included."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from fiberpo_megatron.cli.main import main
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.planning.estimate import Plan
from fiberpo_megatron.planning.phases import PHASES, PhaseBytes, batch_bytes, phase_bytes, route_bytes
from tests.planning.test_estimate import MODELS, ROOT, config, hf_config, plan

ROUTES = ("--algorithm.routing_replay", "rollout")


def peaks(of: Plan, stage: int = 0) -> dict[str, PhaseBytes]:
    return {peak.phase: peak for peak in phase_bytes(of) if peak.stage == stage}


def test_routes_take_one_byte_a_slot_and_are_spread_over_all_ranks():
    """2^20 tokens, 48 layers, 8 of 128 experts a token."""
    whole = 2**20 * 48 * 8

    def routes(stage: int = 0, *words: str, **parallel: int) -> tuple[int, int]:
        sizes = [word for name, size in parallel.items() for word in (f"--parallel.{name}", str(size))]
        run = config(
            *ROUTES, "--parallel.tensor", "1", "--parallel.expert", "1", "--parallel.data", "1", *sizes, *words
        )
        found = route_bytes(run, read_architecture(hf_config("qwen3_30b_a3b")), stage, 2**20)
        return found.host, found.answers

    assert routes() == (whole, whole)
    assert routes(data=8) == (whole // 8, whole // 8)
    assert routes(1, data=2, pipeline=2, context=2, tensor=2) == (whole // 16, whole // 2)
    assert routes(0, "--algorithm.routing_replay", "old") == (whole, 0)  # recorded, and no engine was asked
    returned = ("--algorithm.routing_replay", "none", "--rollout.return_routing", "true")
    assert routes(0, *returned) == (2 * whole, whole)  # recorded as well, to be compared
    assert routes(0, "--algorithm.routing_replay", "none") == (0, 0)
    many = replace(read_architecture(hf_config("qwen3_30b_a3b")))
    many = replace(many, experts=replace(many.experts, count=512))  # type: ignore[type-var]
    assert route_bytes(config(*ROUTES, "--parallel.data", "1"), many, 0, 2**20).answers == 2 * whole


def test_every_phase_has_its_peak():
    found = peaks(plan(*ROUTES))
    assert tuple(found) == PHASES
    stage = plan(*ROUTES).stages[0]
    assert found["train"].device == stage.total == max(peak.device for peak in found.values())
    assert stage.total - plan().stages[0].total == stage.routes.device > 0
    assert found["log-probs"].host == batch_bytes(config(*ROUTES), plan().work.tokens) + stage.routes.host
    assert found["exchange"].leader > found["exchange"].host + stage.routes.answers
    assert all(peak.leader >= peak.host for peak in found.values())


def test_old_log_probs_keep_the_activations_that_the_first_step_goes_on_from():
    """A pass without them holds a layer's activations at a time."""

    def device(*words: str) -> int:
        found = peaks(plan(*words))
        assert found["log-probs"].device <= found["train"].device
        return found["log-probs"].device

    without = device("--model.fp8", "hybrid")
    assert without < device() < device("--batch.kept_forwards", "2") < device("--batch.kept_forwards", "3")
    assert device("--batch.kept_forwards", "2", "--algorithm.kl.coefficient", "0.1") > device()


def test_saving_copies_what_a_rank_writes_only_beside_the_training():
    held, copied = (
        peaks(plan("--checkpoint.asynchronous", value))["save"].host - peaks(plan())["train"].host
        for value in ("false", "true")
    )
    states = plan().stages[0].states
    assert copied == states.parameters + states.optimizer
    assert held < 0.1 * copied, "a few tensors at a time"


def test_colocated_engines_leave_the_trainer_its_parameters():
    words = ("--rollout.engine.colocated", "true", "--rollout.engine.count", "8", "--weight_sync.method", "ipc")
    shared = plan(*words, gpus=16)
    found, stage = peaks(shared), shared.stages[0]
    assert found["generate"].device == stage.states.parameters + stage.reserved
    assert found["generate"].host == stage.states.optimizer and found["train"].host < stage.states.optimizer


def test_more_ranks_hold_less():
    few, many = (plan(*ROUTES, "--parallel.data", str(data), gpus=16 + 2 * data) for data in (8, 16))
    for phase in PHASES:
        one, other = peaks(few)[phase], peaks(many)[phase]
        assert other.device <= one.device and other.leader <= one.leader, phase
    assert peaks(many)["train"].host < peaks(few)["train"].host


QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
"""The published sizes of a model whose config.json is not part of this repository."""


@pytest.mark.parametrize(
    ("example", "billions"),
    [
        ("qwen3_30b_a3b/train.toml", 30.5),
        ("slurm/one_node.toml", 8.2),
        ("slurm/four_nodes.toml", 30.5),
        ("slurm/thirty_two_nodes.toml", 235.1),
    ],
)
def test_the_cluster_examples_have_the_peaks_that_their_comments_say(
    example: str, billions: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The plan in the comment, of the config's own model, gives the figure in the comment, and fits."""
    text = (ROOT / "examples" / example).read_text()
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    said = re.search(r"a training GPU holds (\d+) GB at most", comment, re.IGNORECASE)
    command = re.search(rf"fiberpo plan examples/{example} --gpus (\d+) --gpu-memory (\d+)", comment)
    assert said is not None and command is not None
    model = MODELS / Path(tomllib.loads(text)["model"]["path"]).name.lower().replace("-", "_")
    if not model.is_dir():
        assert model.name == "qwen3_8b"
        model = tmp_path
        (model / "config.json").write_text(json.dumps(QWEN3_8B))
    words = ["plan", str(ROOT / "examples" / example), "--model.path", str(model)]
    words += ["--gpus", command[1], "--gpu-memory", command[2]]
    assert main(words) == 0
    page = capsys.readouterr().out
    assert "GB of a training rank at the peak of each phase:" in page and "| 0: host of a leader |" in page
    assert f": {billions:.1f}" in re.sub(r"(\d+\.\d\d)e9 parameters", lambda it: f"{float(it[1]):.1f}", page)
    assert main([*words, "--json"]) == 0
    phases = json.loads(capsys.readouterr().out)["phases"]
    assert [one["phase"] for one in phases][: len(PHASES)] == list(PHASES)
    assert round(max(one["device"] for one in phases) / 1e9) == int(said[1])


def test_buffers_that_publish_by_ipc_are_kept_in_every_phase():
    both = [plan("--weight_sync.bucket_mib", "128", "--weight_sync.method", way) for way in ("distributed", "ipc")]
    sent, kept = map(peaks, both)
    more = {phase: kept[phase].device - sent[phase].device for phase in PHASES}
    assert more.pop("publish") == 0 and set(more.values()) == {2 * 128 * 2**20}
    assert both[1].stages[0].total - both[0].stages[0].total == 2 * 128 * 2**20
