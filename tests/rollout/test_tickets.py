"""Which trajectories may run when: random orders, kills and speeds."""

import random

import pytest

from fiberpo_megatron.rollout.filter import Choice, Ended, Filter, Filtered
from fiberpo_megatron.rollout.tickets import Tickets
from fiberpo_megatron.types import RolloutGroup
from tests.rollout.groups import group


def test_a_step_owns_its_tickets_and_the_last_step_is_the_runs():
    tickets = Tickets(per_step=3, staleness=2, steps=5)
    assert [list(tickets.of_step(step)) for step in (0, 2)] == [[0, 1, 2], [6, 7, 8]]
    assert [tickets.admitted(version) for version in range(6)] == [2, 3, 4, 4, 4, 4]
    assert [list(tickets.versions(step)) for step in (0, 1, 4)] == [[0], [0, 1], [2, 3, 4]]
    assert Tickets(3, 0, 5).admitted(2) == 2 and list(Tickets(3, 0, 5).versions(2)) == [2]


@pytest.mark.parametrize(("per_step", "staleness", "steps"), [(0, 0, 1), (1, -1, 1), (1, 0, -1)])
def test_numbers_that_make_no_sense_are_refused(per_step: int, staleness: int, steps: int):
    with pytest.raises(ValueError, match="pass at least 1 prompt"):
        Tickets(per_step, staleness, steps)


def test_random_orders_train_each_ticket_once_and_no_token_is_too_old():
    """10,000 runs in which trajectories end in any order, and kills go back to the last checkpoint."""
    draw = random.Random(0)
    for _ in range(10_000):
        tickets = Tickets(draw.randint(1, 3), draw.randint(0, 4), draw.randint(1, 6))
        trained: list[int] = []
        step = version = checkpoint = 0
        running: dict[int, int] = {}
        ended: dict[int, int] = {}
        admitted = -1
        while step < tickets.steps:
            for new in range(admitted + 1, tickets.admitted(version) + 1):
                running |= dict.fromkeys(tickets.of_step(new), version)
            admitted = max(admitted, tickets.admitted(version))
            while not all(ticket in ended for ticket in tickets.of_step(step)):
                assert running, f"{tickets}: nothing runs, and step {step} waits"
                ticket = draw.choice(list(running))
                ended[ticket] = running.pop(ticket)
            for ticket in tickets.of_step(step):
                assert ended[ticket] in tickets.versions(step) and ticket // tickets.per_step == step
                assert 0 <= step - ended[ticket] <= tickets.staleness
                trained.append(ticket)
            step += 1
            version = step
            if draw.random() < 0.3:
                checkpoint = step
            elif draw.random() < 0.1:  # a kill: what has ended is on disk, what runs is asked for again
                step = version = checkpoint
                trained = trained[: tickets.per_step * checkpoint]
                running, admitted = {}, tickets.admitted(version)
                first = tickets.of_step(step)[0]
                ended = {ticket: at for ticket, at in ended.items() if ticket >= first}
                for again in range(step, admitted + 1):
                    running |= {ticket: version for ticket in tickets.of_step(again) if ticket not in ended}
        assert trained == list(range(tickets.per_step * tickets.steps))


def of(*useful: bool | None) -> dict[int, Ended]:
    """Groups that have ended, by number; None: has not."""
    return {i: Ended(one, domain=0, right=int(one), answers=2) for i, one in enumerate(useful) if one is not None}


def test_a_choice_by_hand():
    """Two groups are wanted, three tickets owned, two refills allowed."""
    both = Filter("reward", wanted=2, owned=3, most_refills=2)
    assert both.choose({}, 3) == Choice((), 0, False, 0)
    assert both.choose(of(True, None, True), 3) == Choice((0,), 1, False, 0)  # ticket 1 may come before ticket 2
    assert both.choose(of(True, True, None), 3) == Choice((0, 1), 2, True, 0)  # whatever ticket 2 does
    assert both.choose(of(True, False, True), 3) == Choice((0, 2), 3, True, 0)
    assert both.choose(of(None, False, False), 3) == Choice((), 0, False, 1)  # one is missing, whatever ticket 0 does
    assert both.choose(of(None, False, False, True), 4) == Choice((), 0, False, 0)
    assert both.choose(of(False, False, False, True), 4) == Choice((3,), 4, False, 1)
    assert both.choose(of(False, False, False, True, False), 5) == Choice((3,), 5, True, 0)  # it stays short
    assert Filter("reward", 2, 3, 0).choose(of(False, False, False), 3) == Choice((), 3, True, 0)


@pytest.mark.parametrize(("wanted", "owned", "refills"), [(0, 1, 0), (3, 2, 0), (1, 1, -1)])
def test_a_filter_that_makes_no_sense_is_refused(wanted: int, owned: int, refills: int):
    with pytest.raises(ValueError, match="pass at least 1 group"):
        Filter("reward", wanted, owned, refills)


def test_what_makes_a_group_useful():
    by_reward, by_answer = Filter("reward", 1, 1, 0), Filter("correct", 1, 1, 0)
    shaped = group(rewards=(0.1, 0.2), correct=(False, False), domain=1)
    assert by_reward.ended(shaped) == Ended(True, 1, 0, 2) and by_answer.ended(shaped) == Ended(False, 1, 0, 2)
    mixed = group(rewards=(1.0, 1.0), correct=(True, False))
    assert not by_reward.ended(mixed).useful and by_answer.ended(mixed) == Ended(True, 0, 1, 2)
    lost = RolloutGroup(mixed.prompt, ())  # the environment failed on all of its trajectories
    assert by_reward.ended(lost) == Ended(False, 0, 0, 0)


def chosen_in_order(filter: Filter, useful: list[bool]) -> tuple[list[int], int]:
    """The same choice, from all outcomes at once: (numbers, groups looked at), one group after the other."""
    chosen: list[int] = []
    for number in range(filter.owned + filter.most_refills):
        if useful[number]:
            chosen.append(number)
        if len(chosen) == filter.wanted:
            return chosen, number + 1
    return chosen, filter.owned + filter.most_refills


def test_random_orders_filters_and_kills_choose_what_the_outcomes_say():
    """10,000 steps whose groups end in any order, with kills that leave some of what has ended: each takes the first
    useful groups, draws no refill that it does not need, and waits for nothing that cannot come."""
    draw = random.Random(1)
    short = aborted = 0
    for _ in range(10_000):
        wanted = draw.randint(1, 4)
        filter = Filter("reward", wanted, wanted + draw.randint(0, 3), draw.randint(0, 5))
        share = draw.random()
        useful = [draw.random() < share for _ in range(filter.owned + filter.most_refills)]
        ended: dict[int, Ended] = {}
        drawn = filter.owned
        while not (choice := filter.choose(ended, drawn)).certain:
            drawn += choice.refills
            waiting = [number for number in range(drawn) if number not in ended]
            assert waiting, f"{filter}: nothing runs, and the step waits"
            number = draw.choice(waiting)
            ended[number] = Ended(useful[number], number % 2, int(useful[number]), 2)
            if draw.random() < 0.05:  # a kill: what is on disk is there, refills are drawn again as they are needed
                drawn = filter.owned
                ended = {n: one for n, one in ended.items() if n < drawn and draw.random() < 0.7}
        numbers, looked_at = chosen_in_order(filter, useful)
        assert list(choice.chosen) == numbers and choice.looked_at == looked_at
        assert drawn == max(filter.owned, looked_at)  # the last refill was needed
        found = Filtered.of(filter, ended, choice, drawn)
        assert sum(right for right, _ in found.solved.values()) == len(numbers)  # all useful ones that were looked at
        assert Filtered.from_json(found.as_json()) == found
        short += len(numbers) < filter.wanted
        aborted += looked_at < filter.owned
    assert short > 500 and aborted > 500
