"""The report's comparison with the plan: which phase is named, and which causes, from what the records show."""

from typing import Any

import pytest

from fiberpo_megatron.telemetry.report import panels
from fiberpo_megatron.telemetry.report.page import render
from fiberpo_megatron.telemetry.report.plan import CAUSES, TIMERS, compare
from fiberpo_megatron.telemetry.report.run_data import RunData

PLANNED = {"generate": 10.0, "old_log_probs": 1.0, "train": 5.0, "publish": 2.0, "host": 0.5, "checkpoint": 1.0}


def record(step: int, **changed: float) -> dict[str, Any]:
    """A step that went as planned, except for what is changed; metrics that hold a slash are passed with two bars."""
    metrics: dict[str, Any] = {"step": step, "response_length/mean": 500.0, "response_length/max": 900.0}
    metrics |= {"useful_token_share": 0.98, "load_imbalance": 0.02, "micro_batches": 4.0, "turns/mean": 1.0}
    metrics |= {"planned/response_length/mean": 500.0, "expected/micro_batches": 4.0, "gate/time_share": 0.01}
    for name, seconds in PLANNED.items():
        metrics |= {f"planned/seconds/{name}": seconds, f"expected/seconds/{name}": seconds}
        metrics |= {f"seconds/{timer}": seconds / len(TIMERS[name]) for timer in TIMERS[name]}
    total = sum(PLANNED.values())
    metrics |= {"planned/seconds/total": total, "expected/seconds/total": total, "seconds/total": total}
    return metrics | {name.replace("__", "/"): value for name, value in changed.items()}


def verdict(config: dict[str, Any] | None = None, **changed: float) -> str:
    records = [record(0, seconds__generate=100.0), *(record(step, **changed) for step in (1, 2, 3))]
    found = compare(RunData("run", config or {}, {"train": records}, []))
    assert found is not None and found.steps == 3  # the first step's start is left out
    return " ".join(found.verdict)


def test_a_run_without_a_plan_is_not_compared():
    assert compare(RunData("run", {}, {"train": [{"step": 0, "seconds/total": 1.0}]}, [])) is None
    assert compare(RunData("run", {}, {}, [])) is None


def test_what_is_near_its_plan_needs_no_cause():
    assert verdict().startswith("Every phase is near its plan")


def test_the_phase_that_costs_most_seconds_is_named():
    text = verdict(seconds__generate=14.0, seconds__publish=2.5, seconds__verify=2.0)  # +40 % and +125 %
    assert "Furthest from its plan is generate: 14 s a step, planned 10 s (+40 %)." in text
    text = verdict(seconds__train=9.0, seconds__generate=11.0)
    assert "Furthest from its plan is train: 9 s a step, planned 5 s (+80 %)." in text
    text = verdict(seconds__generate=4.0)
    assert "(-60 %)" in text and "The machine is faster here than the plan assumes" in text


def test_lengths_are_told_from_the_rest():
    longer = {"expected__seconds__generate": 14.0, "response_length__mean": 700.0}
    text = verdict(seconds__generate=14.2, **longer)
    assert "The trajectories that the steps had change the plan by +4 s: the mean response was 700 tokens" in text
    assert "planned were 500" in text and "not explained" not in text
    text = verdict(seconds__generate=20.0, **longer)
    assert "change the plan by +4 s" in text and "A difference of +6 s is not explained by lengths." in text


TRAIN, GENERATE = {"seconds__train": 9.0}, {"seconds__generate": 14.0}
CASES: list[tuple[dict[str, float], dict[str, Any], str]] = [
    (GENERATE | {"turns__mean": 3.5}, {}, "A trajectory has 3.5 turns"),
    (GENERATE | {"failed_share": 0.05}, {}, "Environments failed in 5.0 % of the trajectories"),
    (GENERATE | {"response_length__max": 4000.0}, {}, "The longest response has 8.0 times the mean's tokens"),
    (
        GENERATE,
        {
            "batch": {"prompts": 64, "samples_per_prompt": 8},
            "rollout": {"max_concurrent_requests": 512, "engine": {"count": 2, "max_running_requests": 64}},
        },
        "256 responses of a step meet 64 places on each engine",
    ),
    (
        GENERATE,
        {"rollout": {"max_concurrent_requests": 32, "engine": {"max_running_requests": 64}}},
        "The trainer keeps 32 requests in flight, but the engines have 64 places",
    ),
    (GENERATE, {"rollout": {"engine": {"extra_args": ["--disable-cuda-graph"]}}}, "without CUDA graphs"),
    (TRAIN | {"micro_batches": 6.0}, {}, "A rank had 6.0 micro-batches in a step, expected were 4.0"),
    (TRAIN | {"useful_token_share": 0.7}, {}, "Only 70 % of the computed positions are tokens"),
    (TRAIN | {"load_imbalance": 0.4}, {}, "The most loaded data-parallel rank has 40 % more positions"),
    (TRAIN | {"expert__mass__0": 0.9, "expert__mass__1": 0.1}, {}, "The busiest expert partition gets 1.8 times"),
    (TRAIN | {"gate__time_share": 0.2, "gate__reduce_share": 0.15}, {}, "gates take 20 % of a step, 15 % of it"),
    (TRAIN, {"model": {"recompute": "selective"}}, "computes parts of each layer again"),
    (TRAIN, {"algorithm": {"routing_replay": "old"}}, "records or replays the experts of every token"),
    (TRAIN | {"gpu__0__throttled": 0.5}, {}, "GPU clocks were held back 50 % of the time"),
    ({"seconds__publish": 9.0}, {"weight_sync": {"method": {"use": "disk"}}}, "through a folder on disk"),
    ({"seconds__checkpoint": 9.0}, {"checkpoint": {"every_steps": 2}}, "each checkpoint, which is written every 2"),
]


@pytest.mark.parametrize(("changed", "config", "said"), CASES, ids=[said[:30] for _, _, said in CASES])
def test_causes_are_those_that_the_records_show(changed: dict[str, float], config: dict[str, Any], said: str):
    found = verdict(config, **changed)
    assert said in found
    assert "No record shows a cause" not in found
    others = [text for _, _, text in CASES if text != said]
    assert not [text for text in others if text in found]


def test_every_cause_has_a_case():
    assert len(CASES) == len(CAUSES) + 1  # packing has two


def test_without_a_cause_the_report_says_what_to_do():
    text = verdict({"rollout": {"max_concurrent_requests": 4096}}, **GENERATE)
    assert "No record shows a cause: compare the engine's log" in text
    assert "`fiberpo doctor` times it" in verdict(seconds__publish=9.0)


def test_the_page_has_the_table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(panels, "line_chart", lambda *lines, **options: "<svg/>")  # drawing takes most of a second
    monkeypatch.setattr(panels, "stacked_chart", lambda *parts, **options: "<svg/>")
    records = [record(step, seconds__train=9.0) for step in range(3)]
    page = render(RunData("run", {}, {"train": records}, []))
    assert "<td>train</td><td class='number'>5.00</td><td class='number'>5.00</td><td class='number'>9.00</td>" in page
    assert "<td class='number'>+80 %</td>" in page
    assert "Furthest from its plan is train" in page and "Time of a step and its plan" in page
    assert "expected/seconds/" not in page  # not among the other metrics
