"""This module sends alarms to an address of yours: a thread posts each as JSON, and training never waits for it."""

import queue
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from urllib.parse import urlsplit

import httpx

from fiberpo_megatron.printable import printable
from fiberpo_megatron.telemetry.alarms.record import Alarm

MOST_WAITING = 100
"""Alarms that wait to be sent; further ones are dropped with a warning."""


class Webhook:
    """Posts alarms to one address. What cannot be delivered is a warning on stderr, and nothing else.

    The body is the object of alarms.jsonl with two more fields: `run`, the name of the run folder, and `text`, which
    chat services such as Slack and Mattermost show.
    """

    def __init__(self, address: str, run: str, timeout_s: float) -> None:
        """`timeout_s` bounds one delivery, and what `close` waits for the rest."""
        self._address, self._run, self._timeout_s = address, run, timeout_s
        self._host = urlsplit(address).hostname
        self._waiting: queue.Queue[Alarm | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._deliver, name="alarms", daemon=True)
        self._thread.start()

    def send(self, alarm: Alarm) -> None:
        """Have an alarm sent. This returns at once."""
        try:
            self._waiting.put_nowait(alarm)
        except queue.Full:
            self._warn(f"{MOST_WAITING} alarms wait already, so that the alarm {alarm.rule} is not sent")

    def close(self) -> None:
        """Wait until everything was sent, for `timeout_s` at most."""
        deadline = time.monotonic() + self._timeout_s
        with suppress(queue.Full):  # the warning below says what is left
            self._waiting.put(None, timeout=self._timeout_s)
        self._thread.join(timeout=max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"{self._waiting.qsize()} alarms or more were not sent within {self._timeout_s:g} s at the end")

    def _deliver(self) -> None:
        while (alarm := self._waiting.get()) is not None:
            body = {**asdict(alarm), "run": self._run, "text": f"{self._run}: {alarm.text()}"}
            try:
                # trust_env: unlike an engine, a chat service may be behind the site's proxy
                with httpx.Client(timeout=self._timeout_s, follow_redirects=False) as client:
                    answer = client.post(self._address, json=body)
                if not answer.is_success:
                    self._warn(f"the alarm {alarm.rule} was answered with HTTP {answer.status_code}")
            except Exception as error:  # a message may hold the address, whose path is a secret: its type has to do
                self._warn(f"the alarm {alarm.rule} could not be sent ({type(error).__name__})")

    def _warn(self, text: str) -> None:
        print(printable(f"WARNING: the webhook at {self._host}: {text}"), file=sys.stderr, flush=True)
