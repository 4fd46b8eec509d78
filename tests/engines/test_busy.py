"""The times in which engines have work, against a clock that the test sets."""

from fiberpo_megatron.engines.busy import BusyTimes, idle_seconds


def test_overlapping_requests_are_one_time_and_a_running_one_is_cut_where_it_is_asked_for():
    now = [0.0]
    times = BusyTimes(clock=lambda: now[0])
    for at, call, engine in ((1, times.began, 0), (2, times.began, 0), (3, times.ended, 0), (5, times.ended, 0)):
        now[0] = at
        call(engine)
    now[0] = 6
    times.began(1)
    now[0] = 8
    assert times.take() == {0: [(1, 5)], 1: [(6, 8)]}
    now[0] = 9
    times.ended(1)
    assert times.take() == {1: [(8, 9)]} and times.take() == {}


def test_idle_is_what_no_rank_covers():
    assert idle_seconds(0, 10, []) == 10
    assert idle_seconds(0, 10, [(2, 4), (3, 6), (8, 9)]) == 5
    assert idle_seconds(0, 10, [(8, 12), (-3, 1)]) == 7
    assert idle_seconds(0, 10, [(-1, 20), (2, 3)]) == 0
