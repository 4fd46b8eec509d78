"""The stream of places: order, mix of environments, held-out tasks."""

from collections import Counter

import pytest

from examples.demo.environments import Addition, Sort
from fiberpo_megatron.data.prompts import Domain, Place, PromptSets, Schedule

ADDITION, SORT = Addition(digits=1), Sort(length=3)


def domain(name: str, environment: Addition | Sort, weight: float = 1.0) -> Domain:
    return Domain(name, weight, environment.train_size, environment.held_out_size)


def both() -> PromptSets:
    return PromptSets([domain("addition", ADDITION), domain("sort", SORT, 3.0)])


def text(place: Place) -> str:
    environment = (ADDITION, SORT)[place.domain]
    return (environment.train if place.split == "train" else environment.held_out)(place.index).prompt


def test_an_epoch_draws_every_prompt_once_in_another_order_each_time():
    sets = PromptSets([domain("addition", ADDITION)])
    size = sets.train_size
    places = [place for step in range(2 * size) for place in sets.prompts_at(0, step, 1)]
    assert {(place.domain, place.split) for place in places} == {(0, "train")}
    first, second = places[:size], places[size:]
    assert sorted(place.index for place in first) == sorted(place.index for place in second) == list(range(size))
    assert len({text(place) for place in first}) == size and first != second


def test_prompts_are_a_pure_function_of_seed_and_step():
    first, second = both(), both()
    first.prompts_at(3, 11, 32)
    assert first.prompts_at(3, 7, 32) == second.prompts_at(3, 7, 32)
    assert first.prompts_at(3, 7, 32) != first.prompts_at(4, 7, 32)
    assert first.prompts_at(3, 7, 32) != first.prompts_at(3, 8, 32)


def test_supervised_examples_come_in_another_order():
    sets = both()
    assert sets.examples_at(3, 7, 32) == both().examples_at(3, 7, 32)
    assert sets.examples_at(3, 7, 32) != sets.prompts_at(3, 7, 32)
    epoch = PromptSets([domain("addition", ADDITION)]).examples_at(0, 0, ADDITION.train_size)
    assert sorted(place.index for place in epoch) == list(range(ADDITION.train_size))


def test_domains_are_mixed_by_weight_in_every_batch():
    sets = both()
    assert sets.domains == ("addition", "sort")
    for step in range(50):
        share = Counter(p.domain for p in sets.prompts_at(0, step, 32))[1] / 32
        assert abs(share - 0.75) <= 1 / 32
    total = Counter(p.domain for step in range(125) for p in sets.prompts_at(0, step, 32))
    assert total == {0: 1000, 1: 3000}


def test_a_curriculum_draws_from_a_growing_part_of_the_tasks():
    """By hand: of 100 tasks the parts 0.2, 0.4, 0.6 and 0.8 in steps 0 to 3, then all."""
    eased = Domain("easy to hard", 1.0, 100, 0, curriculum_steps=4, curriculum_start=0.2)
    assert [eased.window(step) for step in range(6)] == [20, 40, 60, 80, None, None]
    sets = PromptSets([eased, Domain("plain", 1.0, 100, 0)])
    for step, window in enumerate([20, 40, 60, 80]):
        indices = [place.index for place in sets.prompts_at(0, step, 40) if place.domain == 0]
        assert len(set(indices)) == 20 and max(indices) < window, "without replacement inside of the part"
    assert sorted(p.index for p in sets.prompts_at(0, 0, 40) if p.domain == 0) == list(range(20))
    assert max(place.index for place in sets.prompts_at(0, 3, 40) if place.domain == 0) >= 60
    plain = PromptSets([Domain("easy to hard", 1.0, 100, 0), Domain("plain", 1.0, 100, 0)])
    assert sets.prompts_at(0, 4, 40) == plain.prompts_at(0, 4, 40), "afterwards the stream is the ordinary one"
    assert [p for p in sets.prompts_at(0, 1, 40) if p.domain] == [p for p in plain.prompts_at(0, 1, 40) if p.domain]
    assert sets.examples_at(0, 0, 40) == plain.examples_at(0, 0, 40), "supervised examples come from all tasks"
    assert sets.prompts_at(0, 1, 40) == PromptSets([eased, Domain("plain", 1.0, 100, 0)]).prompts_at(0, 1, 40)
    assert sets.prompts_at(0, 1, 40) != sets.prompts_at(1, 1, 40)


def test_a_step_may_draw_more_than_the_part_of_a_curriculum_has():
    sets = PromptSets([Domain("few", 1.0, 10, 0, curriculum_steps=2, curriculum_start=0.2)])
    assert Counter(place.index for place in sets.prompts_at(0, 0, 4)) == {0: 2, 1: 2}
    assert Counter(place.index for place in sets.prompts_at(0, 1, 12)) == dict.fromkeys(range(6), 2)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [0.001, 5.0, 2.0], [1e-9, 1.0], [1.0] * 7])
def test_the_schedule_counts_each_domain_without_gaps(weights):
    schedule = Schedule(weights)
    seen: Counter[int] = Counter()
    for position in range(3000):
        domain, place = schedule(position)
        assert place == seen[domain]
        seen[domain] += 1
    for domain, weight in enumerate(weights):
        assert seen[domain] / 3000 == pytest.approx(weight / sum(weights), abs=1.1e-3)
        assert seen[domain] > 0


def test_held_out_prompts_are_fixed_spread_and_never_trained():
    sets = both()
    held_out = sets.held_out(40)
    assert held_out == both().held_out(40) and {place.split for place in held_out} == {"held_out"}
    assert held_out[:20] == sets.held_out(20)
    counts = Counter(p.domain for p in held_out)
    assert counts == {0: 8, 1: 32}, "addition has only 8 held-out problems"
    assert Counter(p.domain for p in held_out[:16]) == {0: 8, 1: 8}
    trained = {text(p) for step in range(300) for p in sets.prompts_at(0, step, 16)}
    assert not trained & {text(p) for p in sets.held_out(10**6)}
    assert len(sets.held_out(10**6)) == sets.held_out_size == ADDITION.held_out_size + SORT.held_out_size


def test_refills_are_a_pure_function_of_the_step_and_come_without_replacement() -> None:
    sets = PromptSets([Domain("small", 1.0, 10, 1), Domain("large", 3.0, 10**6, 1)])
    found = sets.refills_at(7, 3, 40)
    assert found == sets.refills_at(7, 3, 60)[:40] and found != sets.refills_at(7, 4, 40)
    assert found != sets.refills_at(8, 3, 40)
    small = [place.index for place in found if place.domain == 0]
    assert len(small) == 10 and sorted(small) == list(range(10))  # all tasks, before one comes again
    assert sorted(p.index for p in sets.refills_at(7, 3, 80) if p.domain == 0) == sorted([*range(10)] * 2)
    assert {sets.refills_at(7, step, 1)[0].domain for step in range(20)} == {0, 1}, "no domain has every first refill"
    eased = PromptSets([Domain("eased", 1.0, 100, 1, curriculum_steps=10, curriculum_start=0.1)])
    assert (
        max(place.index for place in eased.refills_at(0, 0, 10))
        < 10
        <= max(place.index for place in eased.refills_at(0, 10, 10))
    )
