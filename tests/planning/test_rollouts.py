"""The simulated queue of tickets against cases worked by hand, bounds, and its closed form."""

import numpy as np
import pytest

from fiberpo_megatron.planning.decoding import Decoder
from fiberpo_megatron.planning.lengths import Lengths, longest, pack, responses
from fiberpo_megatron.planning.rollouts import Load, Schedule, alone, quick, simulate

ZERO = dict.fromkeys(
    ("dense", "experts", "token", "state", "cached", "kernels", "eager", "reduce", "reduce_token", "sampling"), 0.0
)


def decoder(step: float, per_request: float = 0.0) -> Decoder:
    """An engine whose step takes `step` seconds and `per_request` for each that runs."""
    return Decoder(
        **ZERO,
        popularity=(),
        graph_limit=512,
        scheduler=step,
        scheduler_request=per_request,
        layers=1,
        draft_tokens=0,
        accepted=1.0,
        prompt_token=0.0,
    )


def load(trajectories: int = 8, response: float = 100, limit: float = 100, running: int = 1000) -> Load:
    return Load(Lengths(0.0, response, limit, 0.7), trajectories, trajectories, running, 1.0)


def test_equal_responses_take_one_response_each_wave():
    assert alone(decoder(0.01), load()) == pytest.approx(1.0)  # 100 tokens of 10 ms, all at once
    assert alone(decoder(0.01), load(running=4)) == pytest.approx(2.0)  # 8 requests, 4 at a time
    assert alone(decoder(0.0, 0.001), load()) == pytest.approx(0.8)  # 8 requests of 1 ms each
    steady = load(trajectories=64, response=60, limit=400, running=16)
    even = 64 * 60 * 0.001  # the engine's work if it were always full
    tail = alone(decoder(0.0, 0.001), steady)
    assert tail == pytest.approx(even, rel=0.01)  # time by request: an empty place costs nothing
    assert alone(decoder(0.016), steady) > 1.1 * even  # time by step: the tail's empty places cost


def test_without_staleness_everything_follows_everything():
    cycle = simulate(decoder(0.01), load(), Schedule(0.0, True), 0.7, 0.2)
    assert cycle.step == pytest.approx(1.0 + 0.7 + 0.2)


@pytest.mark.parametrize(("train", "step"), [(0.4, 1.1), (3.0, 3.1)], ids=["engine-bound", "trainer-bound"])
def test_one_step_off_takes_the_larger_of_the_two(train: float, step: float):
    cycle = simulate(decoder(0.01), load(), Schedule(1.0, True), train, 0.1)
    assert cycle.step == pytest.approx(step)


def test_staleness_hides_training_until_the_engine_is_full():
    engine, work = decoder(0.0, 0.001), load(trajectories=32, response=60, limit=400)
    least = 32 * 60 * 0.001  # the engine's work
    steps = [simulate(engine, work, Schedule(s, False), 1.0, 0.0).step for s in (0.0, 1.0, 2.0, 4.0)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == pytest.approx(least + 1.0, rel=0.02) and steps[-1] == pytest.approx(least, rel=0.1)


def test_a_trainer_that_takes_what_has_ended_does_not_wait_for_the_longest():
    engine, work = decoder(0.01), load(trajectories=32, response=60, limit=800)
    tickets = simulate(engine, work, Schedule(0.5, False), 2.0, 0.0).step
    streamed = simulate(engine, work, Schedule(0.5, False, 4, False), 2.0, 0.0).step
    assert 2.0 <= streamed < 0.8 * tickets


@pytest.mark.parametrize("staleness", [0.0, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("train", [0.5, 3.0])
def test_closed_form_is_near_the_simulation(staleness: float, train: float):
    engine, work = decoder(0.005, 0.0002), load(trajectories=48, response=150, limit=400)
    for drain in (True, False):
        schedule = Schedule(staleness, drain)
        assert quick(engine, work, schedule, train, 0.1).step == pytest.approx(
            simulate(engine, work, schedule, train, 0.1).step,
            rel=0.25,  # a search ranks by it; the proposals are then simulated
        )


def test_a_plan_is_the_same_each_time():
    engine, work, schedule = (
        decoder(0.005, 0.0002),
        load(trajectories=48, response=150, limit=400),
        Schedule(2.0, False),
    )
    first = simulate(engine, work, schedule, 0.5, 0.1)
    simulate.cache_clear()
    assert simulate(engine, work, schedule, 0.5, 0.1) == first


def test_lengths_have_the_given_mean_and_limit():
    for mean in (200.0, 1000.0, 3000.0):
        drawn = responses(Lengths(100.0, mean, 4096.0, 0.7), 2048)
        assert drawn.mean() == pytest.approx(mean, rel=0.01) and drawn.max() <= 4096 and (np.diff(drawn) >= 0).all()
    short = Lengths(0.0, 100.0, 1e6, 0.7)
    assert 400 < longest(short, 100) < longest(short, 10_000) < 2000
    assert longest(Lengths(0.0, 3000.0, 4096.0, 0.7), 100) == 4096
    assert short.context == pytest.approx(100 * np.exp(0.7**2), rel=0.02)  # E[x^2] / E[x] of a log-normal


def test_packing():
    equal = Lengths(0.0, 100.0, 100.0, 0.7)
    assert pack(equal, 10, 250, 4, True) == pack(equal, 10, 250, 4, False)
    assert (pack(equal, 10, 250, 4, True).rows, pack(equal, 10, 250, 4, True).imbalance) == (5, 1.0)
    assert pack(equal, 1000, 250, 4, True).rows == 500  # more than the sample
    spread = Lengths(0.0, 100.0, 400.0, 0.7)
    in_step, at_end = pack(spread, 8, 400, 8, True).imbalance, pack(spread, 8, 400, 8, False).imbalance
    assert in_step >= at_end > 1.05
    assert pack(spread, 128, 400, 8, False).imbalance < at_end  # many trajectories even out
