"""Which trajectories may run when: random orders, kills and speeds."""

import random

import pytest

from fiberpo_megatron.rollout.tickets import Tickets


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
