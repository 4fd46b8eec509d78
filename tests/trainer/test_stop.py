"""Stopping on request: what is saved, where, and that the signals do what they say."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from fiberpo_megatron.trainer.loop import train
from fiberpo_megatron.trainer.stop import Stopped, StoppedByAlarm, StopRequest
from tests.trainer.test_loop import training


def asked_at(number: int) -> Callable[[], bool]:
    """True from the `number`-th question on; two questions a step: after its rollouts, and at its end."""
    questions = iter(range(1, 1000))
    return lambda: next(questions) >= number


@pytest.mark.parametrize(
    ("question", "done", "saved"),
    [(1, 0, []), (2, 1, [1]), (3, 1, [1]), (4, 2, [2]), (5, 2, [2])],
    ids=["before anything", "end of step 1", "rollouts of step 2", "end of step 2", "rollouts of step 3"],
)
def test_a_stop_saves_what_is_done_once(question: int, done: int, saved: list[int]):
    run, memory = training(checkpoint={"every_steps": 0})
    with pytest.raises(Stopped, match=f"after {done} steps; continue with --resume") as stopped:
        train(replace(run, stop=asked_at(question)))
    assert stopped.value.done == done and memory.saved == saved
    assert len(memory.values("train", "reward/mean")) == done


def test_a_stop_after_a_regular_checkpoint_does_not_save_again():
    run, memory = training(checkpoint={"every_steps": 1})
    with pytest.raises(Stopped):
        train(replace(run, stop=asked_at(3)))
    assert memory.saved == [1]


def test_a_stop_in_the_last_step_is_an_ordinary_end():
    run, memory = training()
    train(replace(run, stop=asked_at(6)))
    assert memory.saved[-1] == 3


@pytest.fixture
def handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_signals_are_noted(handlers: None):
    stop = StopRequest()
    stop.listen(signal.SIGUSR1)
    assert not stop()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop()
    os.kill(os.getpid(), signal.SIGTERM)  # of the launcher, when another rank has ended: this one ends by itself


def test_a_second_sigterm_ends_the_process():
    code = (
        "import signal, time; from fiberpo_megatron.trainer.stop import StopRequest; stop = StopRequest()\n"
        "stop.listen(signal.SIGUSR1, signal.SIGTERM); print('listening', flush=True)\n"
        "while True:\n    time.sleep(0.01); stop() and print('asked', flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    for number in (signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM


def test_an_error_that_ends_a_rank_does_not_steer_a_terminal():
    code = "from fiberpo_megatron.trainer.stop import leave; leave(ValueError('half \\ud83d\\x1b[2J\\nline'))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-2:] == [r"fiberpo: rank ?: half \ud83d\x1b[2J", "line"]
    assert "\x1b" not in ended.stderr


def test_an_alarm_stops_the_run_after_saving_and_every_rank_names_it():
    run, memory = training(trainer={"steps": 5}, checkpoint={"every_steps": 0})
    memory.alarm, memory.alarm_after = (
        "ALARM entropy_collapse (stop), since step 1: words",
        4,
    )  # eval 0, steps 0 and 1, eval 2
    with pytest.raises(StoppedByAlarm, match=r"ALARM entropy_collapse (.|\n)*--resume continues") as stopped:
        train(run)
    assert stopped.value.done == 2 and memory.saved == [2]
