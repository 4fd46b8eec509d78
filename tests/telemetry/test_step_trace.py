"""The trace of a step: Chrome's format read back, its arithmetic by hand, and the picture in the report."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from fiberpo_megatron.telemetry.report.page import render
from fiberpo_megatron.telemetry.report.run_data import load_run
from fiberpo_megatron.telemetry.report.trace import trace_section, verdict_of
from fiberpo_megatron.telemetry.sinks import METRICS_FILE
from fiberpo_megatron.telemetry.step_trace import ENGINES, TRACES, TRAJECTORIES, StepTrace, read_trace, write_trace
from tests.traces import read_trace as read_events

START = 1_700_000_000.0
"""Some moment, in s since 1970."""


def track(name: str, sample: int, stretches: list[tuple[str, float, float]], **facts: Any) -> dict[str, Any]:
    """What is known of a trajectory whose stretches follow each other; times in s after START."""
    seconds: dict[str, float] = {}
    for phase, begin, end in stretches:
        seconds[phase] = seconds.get(phase, 0.0) + end - begin
    moved = [(phase, START + begin, START + end) for phase, begin, end in stretches]
    segments = [
        (0, begin, end, 7, ("2", "3") if begin < START else ("3",), "stop")
        for phase, begin, end in moved
        if phase == "sampling"
    ]
    return {
        "leader": 0, "name": name, "sample": sample, "began": moved[0][1], "ended": moved[-1][2],
        "tokens": 7 * len(segments), "requests": len(segments), "seconds": seconds, "stretches": moved,
        "segments": segments, **facts,
    }  # fmt: skip


TRACKS = [
    track("sums/1", 0, [("sampling", -2, 1)]),
    track("sums/1", 1, [("queued", 0, 1), ("sampling", 1, 2), ("environment", 2, 3)]),
    track("sums/2", 0, [("queued", 0, 2), ("sampling", 2, 7), ("scoring", 7, 8)]),
    track("sums/2", 1, [("sampling", 3, 4)], ended=None),
]
BLOCKS = [
    ("step", START - 1, START + 13),
    ("evaluate", START - 1, START),
    ("generate", START, START + 8.5),
    ("gate", START + 9, START + 10),
    ("train", START + 9, START + 11),
    ("publish", START + 11, START + 12.5),
]


@pytest.fixture
def trace(tmp_path: Path) -> StepTrace:
    return read_trace(write_trace(tmp_path, 3, TRACKS, BLOCKS, keep=2))


def test_what_is_written_is_read_back(trace: StepTrace):
    assert (trace.step, trace.begin, trace.end) == (3, START - 1, START + 13)
    assert [(one.name, one.sample) for one in trace.trajectories] == [
        ("sums/2", 0), ("sums/1", 1), ("sums/1", 0), ("sums/2", 1)
    ]  # fmt: skip
    last = trace.last
    assert last is not None and last is trace.trajectories[0]
    assert (last.tokens, last.requests, last.engines, last.ended) == (7, 1, (0,), START + 8)
    assert last.seconds == {"queued": 2, "sampling": 5, "scoring": 1}
    assert [(phase, begin - START, end - START) for phase, begin, end in last.stretches] == [
        ("queued", 0, 2), ("sampling", 2, 7), ("scoring", 7, 8), ("waiting", 8, 8.5), ("training", 8.5, 11)
    ]  # fmt: skip
    assert trace.trajectories[3].ended is None and len(trace.trajectories[3].stretches) == 1


def test_it_is_a_trace_of_chromes_format_and_requests_that_overlap_have_threads_of_their_own(tmp_path: Path):
    events = read_events(write_trace(tmp_path, 3, TRACKS, BLOCKS, keep=2))
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {1: "trainer, rank 0", TRAJECTORIES: "trajectories of step 3", ENGINES: "engine 0"}
    threads = [event["tid"] for event in events if event["name"] == "thread_name"]
    assert len(threads) == len(set(threads)) == 4 + 2, "two requests at most were at the engine at the same time"
    requests = [event for event in events if event.get("cat") == "request"]
    assert len(requests) == 4 and {event["pid"] for event in requests} == {ENGINES}
    assert requests[0]["args"] == {
        "tokens": 7, "finish_reason": "stop", "leader": 0, "weight_versions": ["2", "3"], "lag": 1
    }  # fmt: skip
    slices = [event for event in events if event["ph"] == "X"]
    for thread in {(event["pid"], event["tid"]) for event in slices}:
        open_until: list[int] = []
        mine = [event for event in slices if (event["pid"], event["tid"]) == thread]
        for event in sorted(mine, key=lambda one: (one["ts"], -one["dur"])):
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            end = event["ts"] + event["dur"]
            assert not open_until or end <= open_until[-1], "slices of a thread lie in each other or apart"
            open_until.append(end)


def test_the_parts_of_a_step_are_those_of_a_calculation_by_hand(trace: StepTrace):
    """The median of the ends 1, 3 and 8 is 3. Before it the trainer waits for three seconds:

    from 0 to 1: one samples, two are queued
    from 1 to 2: one samples, one is queued
    from 2 to 3: one is in its environment, one samples
    """
    assert trace.tail_s == pytest.approx(5)
    expected = {
        "evaluate": 1, "queued": 2 / 3 + 1 / 2, "sampling": 1 / 3 + 1 / 2 + 1 / 2, "environment": 1 / 2,
        "waiting": 5, "train": 2, "publish": 1.5, "other": 14 - 1 - 8 - 2 - 1.5,
    }  # fmt: skip
    assert trace.parts() == pytest.approx(expected)
    assert sum(trace.parts().values()) == pytest.approx(trace.end - trace.begin)


def test_a_step_that_was_sampled_before_is_all_waiting_or_none(tmp_path: Path):
    """With sampling ahead half of the trajectories may have ended before the trainer waits for them."""
    early = [track("a", i, [("sampling", -9, -9 + i)]) for i in range(1, 5)]
    blocks = [("step", START - 4.5, START), ("generate", START - 4.5, START - 3)]
    late = read_trace(write_trace(tmp_path, 1, [*early, track("a", 5, [("sampling", -9, -4)])], blocks, keep=2))
    assert late.parts() == pytest.approx({"waiting": 0.5, "other": 4.0}) and late.tail_s == pytest.approx(2)
    none = read_trace(write_trace(tmp_path, 1, early, blocks, keep=2))
    assert none.parts() == pytest.approx({"waiting": 0.0, "other": 4.5})


def test_the_report_names_the_trajectory_that_everybody_waited_for(trace: StepTrace):
    took, waited = verdict_of(trace)
    assert took == "It took 14 s, with 4 trajectories."
    assert waited == (
        "All waited for sums/2, sample 0 (engine 0, 7 tokens in 1 request), which ended 5 s after the median "
        "trajectory. It took 8 s: queued 2 s, sampling 5 s, being scored 1 s."
    )
    page = trace_section([trace])
    assert "<h3>Step 3</h3>" in page and page.count("<svg") == 1
    row = "<td>waiting for the slowest</td><td><span class='number'>5</span></td><td><span class='number'>35.7 %"
    assert row in page
    row = "<td>queued</td><td><span class='number'>1.17</span></td><td><span class='number'>8.3 %"
    assert f"{row}</span></td><td><span class='number'>1</span></td><td><span class='number'>2</span></td>" in page
    assert trace_section([]) == ""


def test_a_step_whose_trajectories_were_all_on_disk_has_the_phases_of_the_trainer(tmp_path: Path):
    trace = read_trace(write_trace(tmp_path, 3, [], BLOCKS, keep=2))
    assert trace.last is None and trace.tail_s == 0
    assert trace.parts() == pytest.approx({"evaluate": 1, "train": 2, "publish": 1.5, "other": 9.5})
    assert list(verdict_of(trace)) == ["It took 14 s, with 0 trajectories."]
    assert "<td>train</td><td><span class='number'>2</span>" in trace_section([trace])


def test_the_report_shows_the_slowest_step_and_the_last_one(tmp_path: Path):
    lines = [f'{{"kind": "train", "step": {step}, "seconds/total": {s}}}\n' for step, s in enumerate((9, 30, 10, 8))]
    (tmp_path / METRICS_FILE).write_text("".join(lines))
    for step in (0, 1, 3):
        write_trace(tmp_path, step, TRACKS, BLOCKS, keep=9)
    data = load_run(tmp_path)
    assert [trace.step for trace in data.traces] == [1, 3] and not data.problems
    page = render(data)
    assert "<h2>Time of a step</h2>" in page and page.index("<h3>Step 1</h3>") < page.index("<h3>Step 3</h3>")
    TRACES.path(tmp_path, 3).write_bytes(b"no gzip")
    damaged = load_run(tmp_path)
    assert [trace.step for trace in damaged.traces] == [1]
    assert any("traces/step_000003.json.gz cannot be read" in problem for problem in damaged.problems)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"otherData": {"version": 2, "step": 1}, "traceEvents": []}', '{"otherData": 3', "\x00"]
)
def test_a_file_that_is_no_trace_of_a_step_is_an_error_that_names_it(tmp_path: Path, text: str):
    path = TRACES.path(tmp_path, 1)
    path.parent.mkdir()
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ValueError, match=r"traces/step_000001.json.gz is not the trace of a step"):
        read_trace(path)


def test_old_traces_are_thinned_out(tmp_path: Path):
    for step in range(9):
        write_trace(tmp_path, step, TRACKS, BLOCKS, keep=4)
    assert [step for step, _ in TRACES.stored(tmp_path)[0]] == [0, 4, 7, 8]
