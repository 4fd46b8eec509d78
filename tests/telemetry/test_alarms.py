"""Every rule against a run that has its fault and one that has not, and what happens with an alarm."""

import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fiberpo_megatron.config import Config
from fiberpo_megatron.telemetry.alarms import Alarm, read_alarms
from fiberpo_megatron.telemetry.alarms.announce import Alarms, check_alarms, watched_rules
from fiberpo_megatron.telemetry.alarms.history import History
from fiberpo_megatron.telemetry.alarms.record import write_alarm
from fiberpo_megatron.telemetry.alarms.rule import Rule, Seen
from fiberpo_megatron.telemetry.alarms.rules import RULES
from fiberpo_megatron.telemetry.alarms.settings import AlarmsConfig
from fiberpo_megatron.telemetry.alarms.watch import AlarmWatch, WatchedRule

DATA = Path(__file__).parent / "data/alarms"
FAULTY = {
    "entropy_collapse": "hacked",
    "entropy_growth": "random",
    "long_responses": "real-longer",
    "truncation": "real-truncated",
    "reward_hacking": "hacked",
    "held_out_drop": "real-tail",
    "ratio_tail": "real-tail",
    "expert_drift": "one-expert",
    "mismatch_growth": "mismatch",
    "gradient_spikes": "spikes",
    "not_finite": "not-finite",
    "no_signal": "no-signal",
    "few_groups": "few-groups",
    "kl": "far",
    "idle_share": "idle",
    "straggler": "straggler",
    "step_time": "late",
    "disk": "disk",
    "engine_silent": "silent",
    "environment_failures": "failing",
}
"""The recorded run with the fault, by rule; tests/telemetry/record_runs.py says how each was made."""
HEALTHY = ("healthy", "real-healthy", "even-ranks", "filtered")


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def alarms(found: list[dict[str, Any]], settings: AlarmsConfig | None = None) -> list[Alarm]:
    watch = AlarmWatch(watched_rules(settings or AlarmsConfig()), hosts=("n0", "n1", "n2", "n3"))
    return [alarm for one in found for alarm in watch.see(one["kind"], one["step"], one)]


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_a_run_with_the_fault_raises_the_alarm(rule: str):
    found = [alarm for alarm in alarms(records(FAULTY[rule])) if alarm.rule == rule and alarm.state == "raised"]
    assert found, f"{FAULTY[rule]} has the fault of {rule}"
    alarm = found[0]
    assert alarm.since <= alarm.step and alarm.causes and alarm.value is not None and alarm.message


@pytest.mark.parametrize("name", HEALTHY)
def test_a_run_without_a_fault_raises_nothing(name: str):
    assert [alarm.text() for alarm in alarms(records(name))] == []


def test_every_rule_can_judge_a_healthy_run():
    """Silence is no proof where a rule never sees its metric. Two have none in these: without a failure there is no
    `failed_share`, and engines are in the first half of `silent`."""
    early = {"environment_failures", "engine_silent"}
    seen = set()
    for name in HEALTHY:
        history = History()
        for one in records(name):
            history.add(one["kind"], one["step"], one)
            seen |= {rule.name for rule in RULES if rule.kind == one["kind"] and rule.look(history) is not None}
    assert {rule.name for rule in RULES} - seen <= early
    healthy_engines = [one for one in records("silent") if one.get("engines/not_answering", 0) == 0]
    assert len(healthy_engines) > 8 and alarms(healthy_engines) == []


def test_the_straggler_is_named_with_its_machine():
    alarm = next(alarm for alarm in alarms(records("straggler")) if alarm.rule == "straggler")
    assert "rank 2 was the slowest" in alarm.message and "machine n2" in alarm.message


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_named_setting_exists(rule: Rule):
    section: Any = Config
    for part in rule.setting.partition(":")[0].split("."):
        field = section.model_fields[part]
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((kind for kind in kinds if isinstance(kind, type) and hasattr(kind, "model_fields")), None)


@pytest.mark.parametrize("name", sorted({*FAULTY.values()}))
def test_an_interrupted_run_has_the_alarms_of_an_undisturbed_one(tmp_path: Path, name: str):
    def run(folder: Path, cuts: list[int]) -> list[Alarm]:
        folder.mkdir()
        everything, done = records(name), 0
        for cut in [*cuts, len(everything)]:
            step = next((one["step"] for one in everything[done:] if one["kind"] == "train"), 10**6)
            desk = Alarms(folder, AlarmsConfig(), lambda alarm: None, past=everything[:done], first_step=step)
            for one in everything[done:cut]:
                desk.see(one["kind"], one["step"], one)
            desk.close()
            done = cut
        return read_alarms(folder)

    undisturbed = run(tmp_path / "one", [])
    trains = [place for place, one in enumerate(records(name)) if one["kind"] == "train"]
    assert undisturbed and run(tmp_path / "two", trains[3::4]) == undisturbed


def test_steps_that_are_repeated_raise_their_alarm_once(tmp_path: Path):
    found = records("real-tail")
    first = Alarms(tmp_path, AlarmsConfig(), lambda alarm: None)
    for one in found:
        first.see(one["kind"], one["step"], one)
    before = read_alarms(tmp_path)
    kept = [one for one in found if one["step"] < 5 or one == {"kind": "eval", "step": 5}]
    again = Alarms(tmp_path, AlarmsConfig(), lambda alarm: None, past=kept, first_step=5)
    assert [alarm.step for alarm in read_alarms(tmp_path)] == [2]
    for one in found[len(kept) :]:
        again.see(one["kind"], one["step"], one)
    assert read_alarms(tmp_path) == before


def test_an_alarm_does_not_flap():
    rule = Rule("r", "", 1.0, "", lambda history: Seen("x", history.latest("x") or 0.0, "x"), (), "", steps=2, calm=2)
    watch = AlarmWatch([WatchedRule.of(rule)])
    values = [2, 0.5, 2, 2, 0.9, 2, 0.9, 0.9, 0.7, 0.9, 0.7, 0.7, 2]
    states = [[(a.state, a.since) for a in watch.see("train", step, {"x": float(v)})] for step, v in enumerate(values)]
    assert states[3] == [("raised", 2)], "two bad readings one after the other"
    assert states[11] == [("cleared", 2)], "two good ones; a value just under the limit is not good"
    assert [state for place, state in enumerate(states) if place not in (3, 11)] == [[]] * 11


def test_the_config_changes_rules():
    found = records("real-truncated")
    kinds = {alarm.rule for alarm in alarms(found)}
    assert "truncation" in kinds
    assert "truncation" not in {
        a.rule for a in alarms(found, AlarmsConfig.model_validate({"rules": {"truncation": "off"}}))
    }
    assert not alarms(found, AlarmsConfig(enabled=False))
    strict = AlarmsConfig.model_validate({"rules": {"truncation": {"limit": 0.01, "steps": 1, "action": "stop"}}})
    plain = next(a for a in alarms(found) if a.rule == "truncation")
    tight = next(a for a in alarms(found, strict) if a.rule == "truncation")
    assert tight.step < plain.step and (tight.severity, plain.severity) == ("stop", "warning")
    with pytest.raises(ValueError, match="there is no rule 'entropie'; the rules are disk, "):
        watched_rules(AlarmsConfig.model_validate({"rules": {"entropie": "off"}}))


class TooShort:
    """A rule of somebody's own."""

    name, causes, setting, limit, below = (
        "too_short",
        ("the reward pays for silence",),
        "batch.prompts: more",
        5.0,
        True,
    )

    def __init__(self, limit: float = 5.0) -> None:
        self.limit = limit

    def look(self, history: History) -> Seen | None:
        value = history.now("response_length/mean")
        return None if value is None else Seen("response_length/mean", value, f"responses have {value:.1f} tokens")


class Broken(TooShort):
    name: ClassVar[str] = "broken"

    def look(self, history: History) -> Seen | None:
        raise KeyError("mine")


def own(name: str, **options: Any) -> AlarmsConfig:
    return AlarmsConfig.model_validate({"own": [{"use": f"tests.telemetry.test_alarms:{name}", "options": options}]})


def test_a_rule_of_your_own(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    found = records("real-healthy")
    assert [a.rule for a in alarms(found, own("TooShort"))] == ["too_short"]
    assert alarms(found, own("TooShort", limit=1.0)) == []
    with pytest.raises(ValueError, match=r"TooShort does not take the option 'limits'; did you mean 'limit'\?"):
        watched_rules(own("TooShort", limits=3))
    with pytest.raises(ValueError, match=r"test_alarms:History lacks the method look\(\)"):
        watched_rules(own("History"))
    desk = Alarms(tmp_path, own("Broken"), lambda alarm: None)
    with caplog.at_level(logging.WARNING):
        for one in found:
            desk.see(one["kind"], one["step"], one)
    assert [r.message for r in caplog.records] == [
        "the alarm rules failed at train 0 (KeyError: 'mine'); further ones are not reported"
    ]


class Receiver(BaseHTTPRequestHandler):
    """Takes what is posted; /slow answers late, /gone with an error."""

    posted: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        if self.path.startswith("/slow"):
            time.sleep(4.0)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(404 if self.path.startswith("/gone") else 200)
        self.end_headers()
        self.posted.append(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Receiver.posted.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def send(folder: Path, webhook: str, timeout_s: float = 5.0) -> float:
    """Let an alarm be raised with this webhook; return the seconds that the records took."""
    desk = Alarms(folder, AlarmsConfig(webhook=webhook, webhook_timeout_s=timeout_s), lambda alarm: None)
    began = time.perf_counter()
    for one in records("real-tail")[:5]:
        desk.see(one["kind"], one["step"], one)
    took = time.perf_counter() - began
    desk.close()
    return took


def test_a_webhook_gets_every_alarm(tmp_path: Path, address: str):
    (tmp_path / "secret").write_text(f"{address}/hook/SECRET\n")
    send(tmp_path, f"file:{tmp_path}/secret")
    [body] = Receiver.posted
    assert body["rule"] == "ratio_tail" and body["run"] == tmp_path.name
    assert body["text"].startswith(f"{tmp_path.name}: ALARM ratio_tail (warning), since step 2: ")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/gone/SECRET", "was answered with HTTP 404"),
        ("/slow/SECRET", r"could not be sent \(ReadTimeout\)|not sent within"),
    ],
)
def test_a_webhook_that_fails_is_a_warning_without_its_address(
    tmp_path: Path, address: str, path: str, why: str, capfd: pytest.CaptureFixture[str]
):
    took = send(tmp_path, address + path, timeout_s=1.5)
    said = capfd.readouterr().err
    assert took < 1.2, "a run does not wait for it"
    assert re.search(why, said) and "WARNING: the webhook at 127.0.0.1" in said
    assert "SECRET" not in said and read_alarms(tmp_path)


def test_an_address_that_is_none_is_refused_without_showing_it(tmp_path: Path):
    for bad in ("hooks.slack.com/SECRET", "ftp://x/SECRET", "https:///SECRET"):
        with pytest.raises(ValueError, match="telemetry.alarms.webhook is not an address") as refused:
            AlarmsConfig(webhook=bad)
        assert "SECRET" not in str(refused.value)
    config = Config.model_validate(
        {"model": {"path": "m"}, "telemetry": {"alarms": {"webhook": f"file:{tmp_path}/no"}}}
    )
    with pytest.raises(ValueError, match="cannot be read"):
        check_alarms(config)


def test_the_file_is_read_whatever_is_in_it(tmp_path: Path):
    one = alarms(records("real-tail"))[0]
    write_alarm(tmp_path / "alarms.jsonl", one)
    write_alarm(tmp_path / "alarms.jsonl", replace(one, value=None, message="\x1b[31m"))
    with (tmp_path / "alarms.jsonl").open("ab") as file:
        file.write(b'{"step": 1}\n[1]\n\xff\n{"step": 3, "rule"')
    found = read_alarms(tmp_path)
    assert found[0] == one and found[1].message == r"\x1b[31m" and found[1].value is None and len(found) == 2
    assert read_alarms(tmp_path / "nowhere") == []


def test_a_file_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "alarms.jsonl").mkdir()
    shown: list[Alarm] = []
    desk = Alarms(tmp_path, AlarmsConfig(), shown.append)
    with caplog.at_level(logging.WARNING):
        for one in records("real-tail"):
            desk.see(one["kind"], one["step"], one)
    assert len(shown) == 3 and len(caplog.records) == 1 and "is not in alarms.jsonl" in caplog.text


def test_the_page_says_what_each_rule_is():
    page = " ".join(Path("docs/alarms.md").read_text().split())
    for rule in RULES:
        section = page.split(f"### {rule.name} ")[1].split("### ")[0]
        for words in (rule.about, f"{rule.limit:g} ({rule.of})", *rule.causes, rule.setting.partition(": ")[2]):
            assert words in section, f"docs/alarms.md, {rule.name}: {words!r} is missing"
        assert f"`{FAULTY[rule.name]}`" in section
