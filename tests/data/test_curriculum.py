"""The adaptive mix of domains: its formula, its rounding, its state."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fiberpo_megatron.data.curriculum import AdaptivePrompts, Mix, allot, build_prompts, shares
from fiberpo_megatron.data.prompts import Domain, Place
from fiberpo_megatron.data.settings import DataConfig
from fiberpo_megatron.types import RolloutBatch
from tests.distributed.parity import make_batch

DOMAINS = [
    Domain("easy", 1.0, train_size=92, held_out_size=8),
    Domain("medium", 1.0, train_size=9010, held_out_size=990),
    Domain("hard", 2.0, train_size=90_001_000, held_out_size=9_999_000),
]


def mix(*solve_rates: float, credit: tuple[float, ...] | None = None) -> Mix:
    return Mix(solve_rates, (0,) * len(solve_rates), credit or (0.0,) * len(solve_rates))


def prompts(**settings: object) -> AdaptivePrompts:
    built = build_prompts(DataConfig.model_validate({"curriculum": "adaptive", **settings}), DOMAINS)
    assert isinstance(built, AdaptivePrompts)
    return built


def rollouts_of(drawn: list[Place], accuracy: dict[int, float], samples: int = 4) -> RolloutBatch:
    """`samples` trajectories of each prompt, the first part of which are right."""
    domains = np.repeat([place.domain for place in drawn], samples)
    sample = np.tile(np.arange(samples), len(drawn))
    return replace(
        make_batch(),
        groups=np.repeat(np.arange(len(drawn)), samples),
        domains=domains,
        correct=sample < np.array([accuracy[d] * samples for d in domains]),
    )


def test_shares_by_hand() -> None:
    # 4 a (1 - a): 1, 0.64, and 0.04 lifted to the floor; times the weights
    assert shares(mix(0.5, 0.2, 0.99), [1, 1, 2], 0.1) == pytest.approx([1 / 1.84, 0.64 / 1.84, 0.2 / 1.84])
    assert shares(mix(0.0, 1.0), [1, 3], 0.1) == pytest.approx([0.25, 0.75])


def test_allotment_is_whole_and_owes_nothing_in_the_long_run() -> None:
    part = [0.61, 0.28, 0.07, 0.04]
    state, totals = mix(0.5, 0.5, 0.5, 0.5), np.zeros(4)
    for _ in range(50):
        counts, credit = allot(state, part, 5)
        assert sum(counts) == 5 and min(counts) >= 0
        assert sum(credit) == pytest.approx(0, abs=1e-9) and max(map(abs, credit)) < 1
        state, totals = replace(state, credit=tuple(credit)), totals + counts
    assert np.abs(totals - 250 * np.array(part)).max() < 1  # also domains whose share is below one prompt a step


def test_allotment_when_the_shares_have_moved() -> None:
    counts, credit = allot(mix(0.5, 0.5, credit=(-1.5, 1.5)), [0.1, 0.9], 4)
    assert counts == [0, 4] and credit == pytest.approx([-1.1, 1.1])


def test_mix_follows_what_is_half_solved_and_never_repeats_a_prompt_before_the_others() -> None:
    sets, accuracy = prompts(curriculum_rate=0.5), {0: 1.0, 1: 0.5, 2: 0.0}
    seen: list[tuple[int, int]] = []
    for step in range(12):
        drawn = sets.prompts_at(3, step, 8)
        assert drawn == sets.prompts_at(3, step, 8)  # asking changes nothing
        seen += [(p.domain, p.index) for p in drawn if p.domain]
        metrics = sets.observe(rollouts_of(drawn, accuracy))
    assert metrics["curriculum/solve_rate/easy"] > 0.95 and metrics["curriculum/solve_rate/hard"] < 0.05
    assert metrics["curriculum/solve_rate/medium"] == 0.5
    # weights 1, 1, 2 and factors 0.1, 1, 0.1: three quarters are of the middle one
    counts = np.bincount([p.domain for p in sets.prompts_at(3, 12, 40)])
    assert counts.tolist() == pytest.approx([40 / 13, 400 / 13, 80 / 13], abs=1)
    assert len(set(seen)) == len(seen)


def test_an_adaptive_mix_keeps_the_curriculum_inside_of_a_domain() -> None:
    eased = replace(DOMAINS[1], curriculum_steps=10, curriculum_start=0.01)
    sets = build_prompts(DataConfig(curriculum="adaptive"), [DOMAINS[0], eased])
    for step, window in ((0, 91), (5, 4551)):
        indices = [place.index for place in sets.prompts_at(0, step, 40) if place.domain == 1]
        assert len(set(indices)) == len(indices) == 20 and max(indices) < window
    assert max(place.index for place in sets.prompts_at(0, 10, 40) if place.domain == 1) > 4551


def test_state_goes_through_a_checkpoint_bitwise() -> None:
    straight, resumed = prompts(), prompts()
    for step in range(6):
        drawn = straight.prompts_at(0, step, 7)
        straight.observe(rollouts_of(drawn, {0: 0.75, 1: 0.25, 2: 0.0}))
        if step == 3:
            resumed.restore(json.loads(json.dumps(straight.state())))
        if step > 3:
            assert resumed.prompts_at(0, step, 7) == drawn
            resumed.observe(rollouts_of(drawn, {0: 0.75, 1: 0.25, 2: 0.0}))
    assert straight.mix == resumed.mix


def test_a_state_of_other_domains_or_of_no_curriculum_is_refused() -> None:
    sets = prompts()
    with pytest.raises(ValueError, match=r"domains \['a'\], this run has \['easy', 'medium', 'hard'\]"):
        sets.restore({"domains": ["a"]})
    with pytest.raises(ValueError, match="domains None"):
        sets.restore({})
    fixed = build_prompts(DataConfig(), DOMAINS)
    fixed.restore(fixed.state())
    with pytest.raises(ValueError, match='written with data.curriculum = "adaptive"'):
        fixed.restore(sets.state())


def test_rollouts_of_other_prompts_are_not_counted() -> None:
    sets = prompts()
    drawn = sets.prompts_at(0, 0, 8)
    with pytest.raises(AssertionError, match="the curriculum chose"):
        sets.observe(rollouts_of([replace(p, domain=0) for p in drawn], {0: 1.0}))


def test_prompts_whose_trajectories_were_all_dropped_count_as_drawn() -> None:
    """Their environment failed on every sample, so that the rollouts lack their groups."""
    sets, whole = prompts(), prompts()
    drawn = sets.prompts_at(0, 0, 8)
    lost = next(i for i, place in enumerate(drawn) if place.domain == 1)
    accuracy = {0: 1.0, 1: 0.5, 2: 0.0}
    sets.observe(rollouts_of([place for i, place in enumerate(drawn) if i != lost], accuracy))
    whole.observe(rollouts_of(whole.prompts_at(0, 0, 8), accuracy))
    assert sets.mix == whole.mix and sum(sets.mix.drawn) == 8


def test_groups_that_a_filter_has_dropped_are_observed() -> None:
    """One group of each domain is trained on, but the easy domain's others were all right, the hard one's all wrong."""
    sets, drawn = prompts(curriculum_rate=0.5), [Place(0, "train", 1), Place(2, "train", 1)]
    sets.prompts_at(0, 0, 8)
    sets.observe(rollouts_of(drawn, {0: 0.5, 2: 0.5}), {0: (14, 16), 1: (0, 0), 2: (2, 32)})
    assert sets.mix.solve_rates == (0.5 + 0.5 * (14 / 16 - 0.5), 0.5, 0.5 + 0.5 * (2 / 32 - 0.5))


def test_refills_are_mixed_like_the_prompts_that_the_step_drew() -> None:
    """Whatever was observed since, and after a checkpoint too."""
    sets = prompts(curriculum_rate=0.9)
    counts = np.bincount([place.domain for place in sets.prompts_at(3, 5, 40)], minlength=3) / 40
    before = sets.refills_at(3, 5, 1000)
    assert np.bincount([place.domain for place in before], minlength=3) / 1000 == pytest.approx(counts, abs=0.01)
    drawn = sets.prompts_at(3, 4, 8)
    sets.observe(rollouts_of(drawn, {0: 1.0, 1: 1.0, 2: 0.5}))
    resumed = prompts(curriculum_rate=0.9)
    resumed.restore(json.loads(json.dumps(sets.state())))
    assert sets.refills_at(3, 5, 1000) == resumed.refills_at(3, 5, 1000) == before
