"""From timings to constants: those that made the timings are found again, and the plan then gives the same seconds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fiberpo_megatron.calibration.calibrate import DEFAULT_MODEL, SIZES, for_ranks
from fiberpo_megatron.calibration.decoding import EngineTimes, Generation, plan_generations
from fiberpo_megatron.calibration.fit import (
    device_constants,
    engine_constants,
    nonnegative,
    probe_scenario,
    trainer_constants,
    unit_of,
    with_calls,
)
from fiberpo_megatron.calibration.links import LinkTimes
from fiberpo_megatron.calibration.passes import LAYERS, ModelTimes, PassTimes, shortened
from fiberpo_megatron.calibration.products import best, time_copies, time_products
from fiberpo_megatron.calibration.ranks import RankTimes
from fiberpo_megatron.calibration.timing import timed
from fiberpo_megatron.config import Config, load_config
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.planning.decoding import make_decoder
from fiberpo_megatron.planning.hardware import Assumptions, Gpu
from fiberpo_megatron.planning.training import optimizer_seconds, row_time

ROOT = Path(__file__).parents[2]
HF_CONFIG = {**DEFAULT_MODEL, **SIZES["cpu"]}
GPU = Gpu("cpu", 16, 0.05, 10, 0.5, 10**6, 0.5, 10, "")
BASE = Assumptions(train_kernel_us=1e-6, nvlink_efficiency=1.0)
ROUNDS = 5


def config() -> Config:
    return load_config(ROOT / "examples/demo/train.toml", ["--model.path", str(ROOT / "examples/demo/model")])


def rounds(seconds: float, spread: float = 0.0) -> list[float]:
    """Rounds around a median, the same distance up and down."""
    return [seconds * (1 + spread * offset) for offset in (-2, -1, 0, 1, 2)]


def rank_times(**true: float) -> RankTimes:
    """What ranks would measure on a machine with these constants, at half of the usual shares of speed."""
    passes = []
    for layers in LAYERS:
        for tokens in (256, 1024, 4096):
            scenario = probe_scenario(config(), shortened(HF_CONFIG, layers), GPU, 2, 16, tokens)
            row = row_time(scenario, scenario.shape, tokens, BASE)
            work, exchanged = row.forward - row.collectives, row.collectives
            forward = true["pass_s"] + layers * true["layer_s"] + 2 * work + exchanged
            backward = true["backward_pass_s"] + layers * true["backward_layer_s"]
            train = forward + backward + 2 * (row.backward - exchanged) + exchanged
            passes.append(PassTimes(layers, tokens, 16, rounds(forward, 0.01), rounds(train, 0.01)))
    models = []
    for layers in LAYERS:
        scenario = probe_scenario(config(), shortened(HF_CONFIG, layers), GPU, 2, 1, 1)
        halved = replace(BASE, memory_efficiency=BASE.memory_efficiency / 2)
        optimizer = true["optimizer_s"] + layers * true["optimizer_layer_s"] + optimizer_seconds(scenario, halved)
        saved = true["checkpoint_s"] + layers * true["checkpoint_layer_s"]
        models.append(ModelTimes(layers, rounds(optimizer), rounds(layers * true["publish_layer_s"]), rounds(saved)))
    links = [
        LinkTimes("all_reduce", 4096, rounds(0.0005)),
        LinkTimes("all_reduce", 10**8, rounds(0.1)),
        LinkTimes("all_to_all", 5 * 10**7, rounds(0.1)),
    ]
    products = {"float32/512x512x512": rounds(0.05, 0.02), "bfloat16/256x256x256": rounds(0.01)}
    return RankTimes(2, True, products, rounds(10.0), links, passes, models)


TRUE = {
    "pass_s": 0.011,
    "layer_s": 0.02,
    "backward_pass_s": 0.007,
    "backward_layer_s": 0.03,
    "optimizer_s": 0.005,
    "optimizer_layer_s": 0.004,
    "publish_layer_s": 0.006,
    "checkpoint_s": 0.2,
    "checkpoint_layer_s": 0.1,
}


def test_the_trainers_constants_are_found_again():
    found = trainer_constants(rank_times(**TRUE), config(), HF_CONFIG, GPU, BASE)
    for name, value in TRUE.items():
        assert found[f"assumptions.{name}"].value == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert found["assumptions.matmul_efficiency"].value == pytest.approx(BASE.matmul_efficiency / 2, rel=1e-3)
    layer = found["assumptions.layer_s"]
    assert layer.low < layer.value < layer.high < 1.05 * layer.value and layer.unit == "s"


def test_the_device_is_what_its_best_products_and_slowest_links_say():
    found = device_constants(rank_times(**TRUE), memory_gb=16)
    assert found["device.float32_tflops"].value == 0.05
    assert found["device.float32_tflops"].low == pytest.approx(0.049)
    assert found["device.link_gb_per_s"].value == pytest.approx(0.5)  # the all-to-all's
    assert found["assumptions.nvlink_latency_us"].value == pytest.approx(500)
    assert found["device.memory_gb"].value == 16
    several = device_constants(replace(rank_times(**TRUE), one_machine=False), memory_gb=16)
    assert several["device.network_gb_per_s"].value == pytest.approx(0.5) and "device.link_gb_per_s" not in several
    alone = device_constants(replace(rank_times(**TRUE), links=[]), memory_gb=16)
    assert not any("link" in name or "latency" in name for name in alone)


def test_the_engines_constants_are_found_again():
    step, request, response, generation, slower = 0.015, 0.0007, 0.002, 0.03, 4.0
    slow = replace(BASE, engine_step_ms=0.0, engine_request_us=0.0, decode_kernel_us=1e-6)
    decoder = make_decoder(probe_scenario(config(), HF_CONFIG, GPU, 1, 1, 1), slow)
    works = plan_generations(256, 16384, 256)
    for work in works:
        cached = work.responses * (work.prompt + work.tokens / 2)
        seconds = generation + work.responses * (response + slower * work.prompt * decoder.prompt_token)
        seconds += work.tokens * (step + request * work.responses + decoder.step(work.responses, cached))
        work.seconds.extend(rounds(seconds, 0.01))
    score = [0.0004] * ROUNDS
    found = engine_constants(EngineTimes(works, rounds(0.01)), score, config(), HF_CONFIG, GPU, BASE)
    value = {name.partition(".")[2]: constant.value for name, constant in found.items()}
    assert value["engine_step_ms"] == pytest.approx(1e3 * step, rel=1e-3)
    assert value["engine_request_us"] == pytest.approx(1e6 * request, rel=1e-3)
    assert value["response_s"] == pytest.approx(response + score[0], rel=1e-3)
    assert value["generate_s"] == pytest.approx(generation, rel=1e-2)
    assert value["prefill_efficiency"] == pytest.approx(BASE.prefill_efficiency / slower, rel=1e-2)
    assert value["decode_memory_efficiency"] == BASE.decode_memory_efficiency


def test_an_engine_that_beats_the_assumed_share_of_its_bandwidth_raises_it():
    slow = replace(BASE, engine_step_ms=0.0, engine_request_us=0.0, decode_kernel_us=1e-6)
    decoder = make_decoder(probe_scenario(config(), HF_CONFIG, GPU, 1, 1, 1), slow)
    works = [Generation(count, 8, tokens) for count in (1, 64) for tokens in (4, 32)]
    for work in works:
        cached = work.responses * (work.prompt + work.tokens / 2)
        work.seconds.extend(rounds(0.8 * work.tokens * decoder.step(work.responses, cached)))
    found = engine_constants(EngineTimes(works, rounds(0.01)), [], config(), HF_CONFIG, GPU, BASE)
    share = found["assumptions.decode_memory_efficiency"].value
    assert share == pytest.approx(BASE.decode_memory_efficiency / 0.8, rel=1e-6)


def test_calls_are_part_of_a_publication():
    found = trainer_constants(rank_times(**TRUE), config(), HF_CONFIG, GPU, BASE)
    whole = with_calls(found, rounds(0.01, 0.1), 7)["assumptions.publish_s"]
    assert whole.value == pytest.approx(found["assumptions.publish_s"].value + 0.07)
    assert whole.low < whole.value < whole.high


def test_nonnegative_finds_the_best_of_the_allowed():
    rows = [[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]
    assert nonnegative(rows, [3.0, 5.0, 7.0]) == pytest.approx([1.0, 2.0])
    falling = nonnegative(rows, [3.0, 2.0, 1.0])
    assert falling[1] == 0.0 and falling[0] > 0


def test_units():
    assert [unit_of(name) for name in ("layer_s", "engine_step_ms", "device.link_gb_per_s", "memory_efficiency")] == [
        "s",
        "ms",
        "10^9 bytes/s",
        "share",
    ]


def test_models_are_shortened_to_layers_with_experts():
    family = {**HF_CONFIG, "mlp_only_layers": [0, 1]}
    assert read_architecture(family).experts.dense_layers == (0, 1)
    short = read_architecture(shortened(family, 3))
    assert short.layers == 3 and short.experts.dense_layers == ()


def test_layouts_fit_the_ranks_at_hand():
    wanted = config().model_copy(
        update={
            "parallel": config().parallel.model_copy(update={"tensor": 4, "pipeline": 4, "context": 2, "expert": 8})
        }
    )
    eight, two = for_ranks(wanted, 8).parallel, for_ranks(wanted, 2).parallel
    assert (eight.tensor, eight.context, eight.pipeline, eight.expert, eight.data) == (4, 2, 1, 8, 1)
    assert (two.tensor, two.context, two.expert, two.data) == (2, 1, 2, 1)


def test_generations_fit_the_engine():
    works = plan_generations(256, 16384, 256)
    assert {work.responses for work in works} >= {1, 16, 64, 256}
    assert all(work.responses * (work.prompt + work.tokens) <= 16384 for work in works)
    assert max(work.prompt for work in works) == 128
    assert max(work.responses for work in plan_generations(64, 10**6, 4096)) == 64


def test_products_and_copies_are_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fiberpo_megatron.calibration.products.REPEATED", 1e7)
    shapes = {"cpu": {torch.float32: ((64, 64, 64), (64, 128, 128)), torch.bfloat16: ((16, 16, 16),)}}
    monkeypatch.setattr("fiberpo_megatron.calibration.products.PRODUCTS", shapes)
    monkeypatch.setattr("fiberpo_megatron.calibration.products.COPY_BYTES", {"cpu": 2**20})
    found = time_products(torch.device("cpu"), lambda: None)
    assert set(found) == {"float32/64x64x64", "float32/64x128x128", "bfloat16/16x16x16"}
    assert all(rate > 0 for rates in found.values() for rate in rates)
    assert sum(best(found, "float32")) == max(sum(rates) for name, rates in found.items() if "float32" in name)
    assert all(0.01 < rate < 10_000 for rate in time_copies(torch.device("cpu"), lambda: None))


def test_work_is_timed_in_turns():
    order: list[str] = []
    found = timed(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        torch.device("cpu"),
        lambda: order.append("-"),
        rounds=2,
    )
    assert "".join(order) == "-a-b" * 3  # the first round is not counted
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}
    assert np.all(np.array(list(found.values())) >= 0)
