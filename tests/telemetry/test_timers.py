import pytest

from fiberpo_megatron.telemetry.timers import PhaseTimers


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_nest_and_start_anew():
    clock = Clock()
    timers = PhaseTimers(clock)
    with timers("outer"):
        for _ in range(2):
            with timers("train"):
                clock.now += 1.5
        clock.now += 1.0
    timers.add("gate", 0.25)
    clock.now += 0.5
    assert timers.read() == {
        "seconds/outer": 4.0,
        "seconds/train": 3.0,
        "seconds/gate": 0.25,
        "seconds/total": 4.5,
    }
    assert timers.read() == {"seconds/total": 0.0}


def test_a_failing_phase_is_timed_and_fails():
    clock = Clock()
    timers = PhaseTimers(clock)
    with pytest.raises(KeyError), timers("train"):
        clock.now += 2.0
        raise KeyError
    assert timers.read() == {"seconds/train": 2.0, "seconds/total": 2.0}


def test_the_running_phase_is_the_innermost():
    clock = Clock()
    timers = PhaseTimers(clock)
    clock.now += 2.0
    assert timers.phase() == ("start", 2.0)
    with timers("publish"):
        clock.now += 1.0
        with timers("verify"):
            clock.now += 0.5
            assert timers.phase() == ("verify", 0.5)
        assert timers.phase() == ("publish", 1.5)
    clock.now += 4.0
    assert timers.phase() == ("after publish", 4.0)
