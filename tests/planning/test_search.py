"""The search: what it proposes fits, nothing that it looked at is better, and its settings give the same plan again."""

import json
import time
from pathlib import Path

import pytest

from fiberpo_megatron.cli.main import main
from fiberpo_megatron.config import load_config
from fiberpo_megatron.planning.estimate import KEPT_SHARE, keeping, make_plan
from fiberpo_megatron.planning.explain import found_text, reason_lines
from fiberpo_megatron.planning.hardware import GPUS, Assumptions
from fiberpo_megatron.planning.options import settings
from fiberpo_megatron.planning.picture import roofline_svg
from fiberpo_megatron.planning.roofline import bounds
from fiberpo_megatron.planning.search import Found, Goal, propose

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "examples/qwen3_30b_a3b/train.toml"
MODELS = ROOT / "fiberpo_megatron/planning/data/models"
GPU = GPUS["H100"]
SHORT = ["--rollout.max_response_tokens", "2048", "--batch.micro_batch_tokens", "4096", "--batch.prompts", "64"]


DENSE = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
"""Qwen3-4B"""


def search(gpus: int, *words: str, model: str = "qwen3_30b_a3b", goal: Goal | None = None) -> Found:
    folder = MODELS / model
    config = load_config(TRAIN, ["--model.path", str(folder), *SHORT, *words])
    hf_config = json.loads((folder / "config.json").read_text())
    return propose(config, hf_config, gpus, GPU.memory_gb * 1e9, GPU, Assumptions(), goal=goal or Goal())


@pytest.fixture(scope="module")
def found() -> Found:
    return search(32)


@pytest.fixture(scope="module")
def synchronous() -> Found:
    return search(32, goal=Goal(staleness=(0,)))


def test_proposals_fit_and_come_best_first(found: Found):
    assert len(found.plans) > 4 and not any(plan.problems for plan in found.plans)
    times = [plan.time.total for plan in found.plans]
    assert times == sorted(times)
    assert all(plan.training_gpus + plan.engine_gpus <= 32 for plan in found.plans if not plan.scenario.colocated)
    assert all(plan.time.total >= times[0] or plan.problems for _, plan in found.others)
    assert any(plan.scenario.staleness for plan in found.plans), "staleness is searched"


def test_the_same_question_has_the_same_answer(found: Found):
    again = search(32)
    assert [settings(plan) for plan in again.plans] == [settings(plan) for plan in found.plans]
    assert again.candidates == found.candidates


def test_the_settings_of_each_proposal_give_its_plan_again(found: Found, capsys: pytest.CaptureFixture[str]):
    for plan in found.plans[:3]:
        words = ["plan", str(TRAIN), "--gpus", "32", "--gpu", "H100", "--json"]
        words += ["--model.path", str(MODELS / "qwen3_30b_a3b"), *SHORT, *settings(plan)]
        assert main(words) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["seconds"]["total"] == plan.time.total
        assert said["training_gpus"] == plan.training_gpus and said["engine_gpus"] == plan.engine_gpus
        assert said["stages"][0]["total"] == plan.stages[0].total


def test_no_neighbour_of_the_best_layout_is_faster(synchronous: Found):
    """Each is planned in full, with the same engines."""
    hf_config = json.loads((MODELS / "qwen3_30b_a3b/config.json").read_text())
    plan = synchronous.plans[0]
    tried = 0
    for name in ("tensor", "pipeline", "context", "expert"):
        for factor in (2, 0.5):
            size = getattr(plan.config.parallel, name) * factor
            if size < 1 or size != int(size):
                continue
            parallel = plan.config.parallel.model_copy(update={name: int(size), "data": None})
            other = plan.config.model_copy(update={"parallel": parallel})
            try:
                planned = make_plan(other, hf_config, 32, GPU.memory_gb * 1e9, GPU, Assumptions())
            except ValueError:
                continue  # it does not divide
            tried += 1
            assert planned.problems or planned.time.total >= plan.time.total * 0.999, (name, size)
    assert tried


def test_as_many_forward_passes_are_kept_as_fit():
    words = ["--model.path", str(MODELS / "qwen3_30b_a3b"), *SHORT, "--parallel.expert", "1"]
    config = load_config(TRAIN, words)
    memory = GPU.memory_gb * 1e9
    found = propose(config, DENSE, 4, memory, GPU, Assumptions(), goal=Goal(staleness=(0,)))
    kept = {plan.config.kept_forwards for plan in found.plans}
    assert len(kept) > 1 and max(kept) > 1
    assert all(plan.config.kept_forwards == plan.most_kept_forwards for plan in found.plans)
    assert all(plan.largest.total <= KEPT_SHARE * memory for plan in found.plans if plan.config.kept_forwards > 1)
    first = found.plans[0]
    assert "--batch.kept_forwards" in settings(first)
    (fewer,) = [plan for words, plan in found.others if words == "that keeps one forward pass"]
    assert fewer.config.kept_forwards == 1 and fewer.time.total > first.time.total
    assert fewer.config.parallel == first.config.parallel
    for bound in bounds(first, Assumptions()):
        assert sum(seconds for _, seconds in bound.parts) == pytest.approx(bound.seconds)
    # what the planner says of a further one is what the plan with it takes
    one_more = make_plan(keeping(first.config, first.most_kept_forwards + 1), DENSE, 4, memory, GPU, Assumptions())
    assert one_more.largest.total == first.largest.total + first.largest.further > KEPT_SHARE * memory


@pytest.mark.parametrize("word", ["model.router_aux_loss=0.001", "batch.kept_forwards=4"])
def test_a_proposal_keeps_no_forward_pass_where_none_can_be_kept(word: str):
    """Its settings are valid: a pipeline keeps none, and an auxiliary loss forbids it."""
    name, value = word.split("=")
    found = search(16, f"--{name}", value)
    for plan in found.plans:
        assert plan.config.parallel.pipeline > 1 or name != "batch.kept_forwards"
        assert plan.config.batch.kept_forwards == 1 and plan.most_kept_forwards == 0
    path = ["--model.path", str(MODELS / "qwen3_30b_a3b")]
    load_config(TRAIN, [*path, *SHORT, f"--{name}", value, *settings(found.plans[0])])


def test_a_price_finds_a_cheaper_run_on_fewer_gpus():
    dear, cheap = search(32), search(32, goal=Goal(price=2.5, steps=100))
    goal = Goal(price=2.5, steps=100)
    first = cheap.candidates[0]
    assert first.gpus <= 32
    assert goal.cost(cheap.plans[0], first.gpus) <= goal.cost(dear.plans[0], 32)
    assert goal.cost(cheap.plans[0], first.gpus) == pytest.approx(
        2.5 * first.gpus * cheap.plans[0].time.total * 100 / 3600
    )


def test_words_name_what_limits_the_plan_and_what_this_version_lacks(found: Found, synchronous: Found):
    text = found_text(found, Goal(steps=10), Assumptions())
    assert "What limits the first one:" in text and "Why it is the first:" in text
    assert "--parallel.tensor" in text
    assert found.candidates[0].staleness, "overlap is worth more than what it costs here"
    assert "--rollout.staleness " in text and "--rollout.partial retract" in text
    assert any("without staleness" in line or "colocated" in line for line in reason_lines(found))
    assert {candidate.staleness for candidate in synchronous.candidates} == {0}
    assert "rollout.staleness 0" in found_text(synchronous, Goal(), Assumptions())


def test_parts_of_the_phases_add_up_and_are_drawn(found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan = found.plans[0]
    phases = bounds(plan, Assumptions())
    assert {"generation", "training", "optimizer"} <= {bound.phase for bound in phases}
    for bound in phases:
        assert sum(seconds for _, seconds in bound.parts) == pytest.approx(bound.seconds)
    training = next(bound for bound in phases if bound.phase == "training")
    assert training.operations / training.seconds / 1e12 < GPU.tflops
    picture = roofline_svg(plan, Assumptions())
    assert picture.startswith("<svg") and picture.count("<circle") >= 2 and "generation" in picture
    words = ["plan", str(TRAIN), "--gpus", "32", "--model.path", str(MODELS / "qwen3_30b_a3b")]
    assert main([*words, *SHORT, *settings(plan), "--picture", str(tmp_path / "plan.svg")]) == 0
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    assert main([*words, *SHORT, *settings(plan), "--picture", str(tmp_path / "none/plan.svg")]) == 2
    assert "--picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--price", "2"], "--price 2.0 belongs to --search"),
        (["--search", "--steps", "0"], "--steps 0 must be above 0"),
        (["--staleness", "-1"], "--staleness -1 must be 0 or more"),
        (["--scale"], "give CONFIG.toml and --gpus N, CONFIG.toml and --scale"),
    ],
)
def test_options_that_nothing_would_read_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(TRAIN), "--gpus", "32", *words]) == 2
    assert said in capsys.readouterr().err


def test_1024_gpus_take_seconds():
    """It takes 2 s of one core; the bound leaves room for slow machines."""
    began = time.process_time()
    found = search(1024, model="qwen3_235b_a22b")
    assert found.plans and time.process_time() - began < 20


def test_colocated_engines_get_the_weights_from_memory_that_they_share(synchronous: Found):
    """A way that the config chose itself stays, with its options."""
    colocated = next(plan for plan in synchronous.plans if plan.scenario.colocated)
    words = settings(colocated)
    assert words[words.index("--weight_sync.method") + 1] == "ipc"
    reserved = Assumptions().reserved_gb * 1e9 + 2 * colocated.config.weight_sync.bucket_mib * 2**20
    assert colocated.stages[0].reserved == reserved, "the buffers of publications are counted"
    own = search(32, "--weight_sync.method", "disk", goal=Goal(staleness=(0,)))
    plan = next(plan for plan in own.plans if plan.scenario.colocated)
    assert plan.config.weight_sync.method.use == "disk" and "--weight_sync.method" not in settings(plan)
