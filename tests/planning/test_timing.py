"""The phases of a step: figures worked by hand, and what has to grow or shrink with what."""

import json
from dataclasses import replace

import pytest

from fiberpo_megatron.mcore.settings import ParallelConfig
from fiberpo_megatron.planning.collectives import all_reduce_seconds, all_to_all_seconds, bandwidth
from fiberpo_megatron.planning.decoding import make_decoder
from fiberpo_megatron.planning.hardware import GPUS, Assumptions
from fiberpo_megatron.planning.lengths import Lengths
from fiberpo_megatron.planning.publication import checkpoint_seconds, publish_seconds
from fiberpo_megatron.planning.published import DATA
from fiberpo_megatron.planning.scenario import Scenario, running_requests
from fiberpo_megatron.planning.shapes import read_shape
from fiberpo_megatron.planning.timing import engine_load, step_time
from fiberpo_megatron.planning.training import optimizer_seconds, passes, row_time

A = Assumptions()
H100 = GPUS["H100"]


def scenario(model: str = "qwen3_30b_a3b", **changes: object) -> Scenario:
    shape = read_shape(json.loads((DATA / "models" / model / "config.json").read_text()))
    base = Scenario(
        shape=shape,
        gpu=H100,
        trainer_gpus=32,
        engine_gpus=32,
        colocated=False,
        parallel=ParallelConfig(expert=8),
        engine_tensor=2,
        prompts=64,
        samples=32,
        optimiser_steps=4,
        lengths=Lengths(150.0, 3000.0, 3946.0, A.length_spread),
        row_tokens=4096,
        recompute=False,
    )
    return replace(base, **changes)


def test_collectives_by_hand():
    # 2 x 7/8 of 8 MB over 0.7 x 450 GB/s, and 10 us
    assert all_reduce_seconds(8, 8e6, H100, A) == pytest.approx(10e-6 + 2 * 7e6 / 315e9)
    # two domains: one hop up and one down, and each adapter carries an eighth of the sum twice at 0.8 x 50 GB/s
    assert all_reduce_seconds(16, 8e6, H100, A) == pytest.approx(
        all_reduce_seconds(8, 8e6, H100, A) + 2 * 16e-6 + 2 * 1e6 / 40e9
    )
    rack, half = GPUS["GB200"], GPUS["GB200-NVL36"]
    assert all_reduce_seconds(64, 1e6, rack, A) < all_reduce_seconds(64, 1e6, half, A)  # 72 in a domain, 36 in another
    assert bandwidth(8, H100, A) == bandwidth(2, H100, A) > bandwidth(9, H100, A)
    inside, across = all_to_all_seconds(8, 1e8, H100, A), all_to_all_seconds(16, 1e8, H100, A)
    assert inside == pytest.approx(10e-6 + 7e8 / 8 / 315e9) and across == pytest.approx(16e-6 + 5e7 / 40e9)


def test_a_row_by_hand():
    run = scenario(parallel=ParallelConfig())
    shape = run.shape
    row = row_time(run, shape, 4096, A)
    dense = 2 * (shape.dense_parameters + shape.table) * 4096 / (0.7 * 989e12)
    experts = max(2 * shape.routed * 4096 / (0.55 * 989e12), shape.expert_parameters * 2 / (0.8 * 3.35e12))
    assert row.products == pytest.approx(dense + experts) and row.collectives == 0
    assert row.forward == pytest.approx(row.products + row.attention + row.memory)
    assert row.backward == pytest.approx(2 * row.products + 2.5 * row.attention + 2 * row.memory)
    few = row_time(run, shape, 8, A)
    assert few.forward == pytest.approx(48 * 70 * A.train_kernel_us * 1e-6)  # Python is slower than the GPU


def test_layouts_cost_what_they_move():
    base = passes(scenario(), scenario().shape, A)
    tensor = passes(scenario(parallel=ParallelConfig(expert=8, tensor=2)), scenario().shape, A)
    assert tensor.row.collectives * 2 > base.row.collectives
    across = passes(scenario(parallel=ParallelConfig(expert=16)), scenario().shape, A)
    assert across.row.collectives > 3 * base.row.collectives  # the exchange of experts leaves the node
    rack = passes(scenario(parallel=ParallelConfig(expert=16), gpu=GPUS["GB200"]), scenario().shape, A)
    assert rack.row.collectives < base.row.collectives
    again = passes(scenario(recompute=True), scenario().shape, A)
    assert again.train == pytest.approx(base.train + base.forward)
    deep = passes(scenario(parallel=ParallelConfig(expert=8, pipeline=4)), scenario().shape, A)
    interleaved = passes(
        scenario(parallel=ParallelConfig(expert=8, pipeline=4, virtual_pipeline=4)), scenario().shape, A
    )
    assert interleaved.train < deep.train  # a shorter fill of the pipeline
    even = passes(scenario(lengths=Lengths(0.0, 4096.0, 4096.0, 0.7)), scenario().shape, A)
    assert even.train / 4096 < base.train / 3150  # rows of equal length leave no rank waiting


def test_decoding():
    run = scenario()
    engine = make_decoder(run, A)
    shape = run.shape
    empty = engine.step(1, 0)
    assert engine.step(128, 0) > empty and engine.step(128, 128 * 4000) > engine.step(128, 128 * 1000)
    # a full batch touches almost all experts: their reading is most of a step
    reading = shape.expert_parameters * 2 / 2 / (A.expert_memory_efficiency * 3.35e12)
    assert (
        0.9 * reading
        < engine.step(256, 0)
        - make_decoder(run, replace(A, expert_memory_efficiency=1.0)).step(256, 0)
        + reading * A.expert_memory_efficiency
        < 1.01 * reading
    )
    assert make_decoder(scenario(graph_limit=0), A).step(8, 0) > 2 * engine.step(8, 0)
    assert make_decoder(scenario(graph_limit=64), A).step(65, 0) > make_decoder(scenario(graph_limit=64), A).step(64, 0)
    drafted = make_decoder(scenario(draft_tokens=2), A)
    assert drafted.accepted == pytest.approx(1 + 0.8 + 0.64)
    assert engine.step(8, 0) < drafted.step(8, 0) < drafted.accepted * engine.step(8, 0)
    wide, near = (make_decoder(scenario(engine_tensor=16, gpu=GPUS[name]), A) for name in ("H100", "GB200"))
    assert wide.reduce > 4 * near.reduce  # two nodes against one domain
    assert wide.scheduler > engine.scheduler  # the schedule crosses to another host
    linear = make_decoder(scenario("qwen3_5_35b_a3b"), A)
    assert linear.state > 0 and linear.cached < engine.cached


def test_prompts_are_read_and_cached_once_for_a_group():
    shared, each = (engine_load(scenario(prefix_sharing=flag), A) for flag in (True, False))
    assert (shared.trajectories, shared.prompts, each.prompts) == (128, 4, 128)
    long = Lengths(3000.0, 100.0, 200.0, 0.7)
    apart = scenario(lengths=long, prefix_sharing=False)
    assert running_requests(scenario(lengths=long), A) > 1.5 * running_requests(apart, A)
    assert running_requests(scenario(running_limit=7), A) == 7
    assert running_requests(scenario(cache_gb=0.0), A) == 1


def test_phases_that_a_run_has_or_has_not():
    plain = step_time(scenario(), A)
    assert plain.reference == plain.teacher == plain.memory_turns == plain.checkpoint == plain.hidden == 0
    assert plain.total == pytest.approx(plain.generate + plain.training + plain.publish)
    teacher = step_time(scenario(teacher=scenario("qwen3_235b_a22b").shape), A)
    assert teacher.teacher > 3 * plain.old_log_probs
    reference = step_time(scenario(reference=True), A)
    assert reference.reference > plain.old_log_probs  # its weights come from host memory
    colocated = step_time(scenario(colocated=True), A)
    assert colocated.memory_turns > A.wake_s
    parked = step_time(scenario(colocated=True, weights_to_host=True, pinned=False), A)
    assert parked.memory_turns > 3 * colocated.memory_turns
    offloaded = step_time(scenario(colocated=True, cpu_offload=True), A)
    assert offloaded.memory_turns == A.wake_s and offloaded.optimizer > plain.optimizer
    stale = step_time(scenario(staleness=1.0), A)
    assert stale.hidden > 0 and stale.total < plain.total and stale.total >= stale.training
    gates = step_time(scenario(gate_passes=0.75), A).train
    assert gates > plain.train
    assert plain.train < step_time(scenario(gate_passes=0.75, kept_forwards=1), A).train < gates
    # the first of four optimiser steps goes on from the old log-probs; a reference has computed before them
    all_kept = step_time(scenario(gate_passes=0.75, kept_forwards=1000), A)
    assert all_kept.train == pytest.approx(plain.train - plain.old_log_probs / 4)
    with_reference = step_time(scenario(gate_passes=0.75, kept_forwards=1000, reference=True), A)
    assert with_reference.train == pytest.approx(all_kept.train)


def test_publications():
    ways = {
        way: publish_seconds(scenario(publication=way, parallel=ParallelConfig(expert=8, pipeline=2)), A)
        for way in ("broadcast", "stages", "shards", "disk", "device")
    }
    model = scenario().shape.total * 2
    assert ways["broadcast"] - ways["stages"] == pytest.approx(model / 2 / 40e9)  # two stages send at once
    assert ways["disk"] > ways["broadcast"] > ways["stages"] > ways["device"]
    assert ways["shards"] == pytest.approx(model * 16 / 32 / 40e9)  # 16 engines of 2 GPUs


def test_checkpoints_and_the_optimizer():
    every = checkpoint_seconds(scenario(checkpoint_every=1), A)
    assert every == pytest.approx(scenario().shape.total * 14 / 4 / 2e9)  # 4 hosts write 2 GB/s each
    assert checkpoint_seconds(scenario(checkpoint_every=10), A) == pytest.approx(every / 10)
    assert checkpoint_seconds(scenario(checkpoint_every=1, checkpoint_asynchronous=True), A) < every / 10
    assert checkpoint_seconds(scenario(), A) == 0
    alone = optimizer_seconds(scenario(trainer_gpus=8), A)
    assert optimizer_seconds(scenario(), A) > alone  # gradients of experts are summed over nodes
    whole = scenario(parallel=ParallelConfig(expert=8, distributed_optimizer=False))
    assert optimizer_seconds(whole, A) > optimizer_seconds(scenario(), A)


def test_faster_hardware_is_never_slower():
    slow = step_time(scenario(), A)
    for name in ("H200", "B200", "GB200", "GB300"):
        fast = step_time(scenario(gpu=GPUS[name]), A)
        assert fast.total < slow.total, name
    assert step_time(scenario(gpu=GPUS["H20"]), A).train > 3 * slow.train
    assert step_time(scenario(gpu=GPUS["H800"]), A).train > slow.train


def test_what_a_filter_draws_is_generated_and_not_trained_on():
    """Twice the prompts are twice the trajectories of an engine; the trainer has those that it keeps."""
    plain, drawn = scenario(), scenario(oversample=2.0)
    assert engine_load(drawn, A).trajectories == 2 * engine_load(plain, A).trajectories
    before, after = step_time(plain, A), step_time(drawn, A)
    assert after.generate > 1.2 * before.generate and after.host == 2 * before.host
    assert (after.train, after.old_log_probs) == (before.train, before.old_log_probs)
