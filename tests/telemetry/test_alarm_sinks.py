"""Where alarms are shown: the console, W&B's alerts, and sinks that take none or fail."""

import io
from types import SimpleNamespace
from typing import Any

from fiberpo_megatron.telemetry.console import Console
from fiberpo_megatron.telemetry.sinks import OptionalSink, Sinks, WandbSink
from tests.telemetry.test_alarms import alarms, records

ALARM = alarms(records("real-tail"))[0]


class Plain:
    def write(self, step: int, kind: Any, metrics: Any) -> None: ...

    def close(self) -> None: ...


class Failing(Plain):
    def alarm(self, alarm: Any) -> None:
        raise ConnectionError("down")


def test_the_console_says_figure_causes_and_setting(capsys):
    file = io.StringIO()
    sinks = Sinks(
        [Console("t", total_steps=9, file=file), OptionalSink("plain", Plain()), OptionalSink("f", Failing())]
    )
    sinks.alarm(ALARM)
    said = file.getvalue()
    assert (
        "ALARM ratio_tail (warning), since step 2" in said and "likely causes: " in said and "try batch.epochs" in said
    )
    assert "did not take the alarm ratio_tail (ConnectionError: down)" in capsys.readouterr().err


def test_wandb_gets_an_alert():
    sink, sent = WandbSink.__new__(WandbSink), []
    sink._run = SimpleNamespace(alert=lambda **named: sent.append(named), log=sent.append)
    sink.alarm(ALARM)
    assert sent[0]["title"] == "ratio_tail at step 3" and sent[0]["level"] == "WARN" and "try batch" in sent[0]["text"]
    assert sent[1] == {"alarm/step": 3, "alarm/ratio_tail": 1.0}
