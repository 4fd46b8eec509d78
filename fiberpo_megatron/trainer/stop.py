"""This module stops a run: on request after saving (SIGUSR1 or SIGTERM, own exit code), or at once after an error."""

import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from fiberpo_megatron.printable import printable


class Stopped(Exception):
    """The run was asked to stop and has: the first `done` steps are in a checkpoint (with 0, there is none)."""

    def __init__(self, done: int) -> None:
        self.done = done
        super().__init__(f"stopped as asked, after {done} steps; continue with --resume")


class StopRequest:
    """This object knows whether its process was asked to stop; call it to ask.

    A signal only leaves a note: ranks get it at different moments, so the loop asks all of them at the same point.
    """

    def __init__(self) -> None:
        self._asked: list[int] = []

    def __call__(self) -> bool:
        return bool(self._asked)

    def listen(self, *numbers: signal.Signals) -> None:
        """Take these signals as requests to stop. A second SIGTERM ends the process at once; a first one that is not
        listened to has no effect any more once another signal asked."""
        for number in numbers:
            signal.signal(number, self._note)
            signal.siginterrupt(number, False)  # calls of gloo, NCCL and the network go on

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and number in self._asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # a launcher sends it when the first rank has ended
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._asked.append(number)


class StoppedByAlarm(Stopped):
    """An alarm with `action = "stop"` has stopped the run: the first `done` steps are in a checkpoint."""

    def __init__(self, done: int, alarm: str) -> None:
        super().__init__(done)
        self.args = (
            f"stopped by an alarm, after {done} steps, which are saved. {alarm}\nLook at it first; --resume continues "
            "from here, and does not stop again before this alarm has cleared",
        )


def never() -> bool:
    """Return False: the run is never asked to stop."""
    return False


def leave(error: Exception) -> NoReturn:
    """End this rank at once with an error: other ranks may sit in a collective, so nothing is waited for, neither
    background threads nor exit hooks. Any thread may call it.

    The error is written where the launcher reads it, its traceback to stderr, with the message as the last line.
    """
    get_error_handler().record_exception(error)
    last = f"fiberpo: rank {os.environ.get('RANK', '?')}: {error}"
    print(printable("".join([*traceback.format_exception(error), last]), keep="\n\t"), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
