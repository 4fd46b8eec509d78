"""Whatever models, prompts, environments and damaged files say is kept, ends no run, and a report is made of it."""

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import closing
from html import unescape
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fiberpo_megatron.data.encoding import Encoder
from fiberpo_megatron.data.prompts import Place
from fiberpo_megatron.environments import Outcome, SingleTurn, Task, Turn, wire
from fiberpo_megatron.environments.builtin.chat import Chat
from fiberpo_megatron.rollout.dump import Origin, RolloutDump
from fiberpo_megatron.rollout.finished import FinishedGroups
from fiberpo_megatron.rollout.generator import Generator, Sampled
from fiberpo_megatron.telemetry.console import Console
from fiberpo_megatron.telemetry.report import write_report
from fiberpo_megatron.telemetry.report.page import render
from fiberpo_megatron.telemetry.report.run_data import load_run
from fiberpo_megatron.telemetry.report.text import LONGEST_TEXT
from fiberpo_megatron.telemetry.settings import TelemetryConfig
from fiberpo_megatron.telemetry.sinks import METRICS_FILE, open_sinks, read_records
from fiberpo_megatron.trainer.loop import rollout_summary
from fiberpo_megatron.types import Completion, RolloutGroup, WeightSpan, flatten
from tests.telemetry.test_rollout_log import write_rollouts
from tests.trainer.toy import LOOP, running

SPECIAL = [
    *("\x1b", "\x1b[2J", "\x9b31m", "\x07", "\x00", "\x7f", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\n", "\t"),
    *("\u2028", "\u2029", "\u202e", "\u2066", "\u200b", "\ufeff", "\U000e0041", "\ue000", "\uffff", "\ud83d", "\udc00"),
    *("<script>", "</pre>", "&lt;", '"', "'", "$x$", "\\", "{", "[/red]", "%", "_", "/", "漢", "🙂", "e\u0301"),
]
TEXT = st.lists(st.sampled_from(SPECIAL) | st.characters(exclude_categories=()) | st.just("x" * 3000), max_size=6).map(
    "".join
)
"""Control, bidirectional, surrogate, huge and empty text."""
ORIGIN = Origin(0, "0", "ab", {}, "cd")


class Bytes:
    """A tokenizer whose tokens are the bytes of the text, and that refuses what those of Hugging Face refuse."""

    eos_token_id = 256
    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        try:
            return list(text.encode())
        except UnicodeEncodeError as error:
            raise TypeError("TextEncodeInput must be Union[TextInputSequence, ...]") from error

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")


@pytest.fixture(autouse=True, scope="module")
def nothing_is_synced() -> Iterator[None]:
    """Hundreds of files are written here; tests/test_durable.py shows that they are synced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def is_whole(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in set(text))


def hidden(text: str, keep: str = "\n\t") -> set[str]:
    """Characters that steer a terminal or a browser."""
    return {
        c for c in set(text) if c not in keep and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    }


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines the way other programs do: by whatever ends a line for them."""
    text = path.read_bytes().decode("utf-8")
    assert not hidden(text, "\n") and len(text.splitlines()) == text.count("\n")
    return [json.loads(line) for line in text.splitlines()]


class Engine:
    """A sampler that answers every prompt with the same text, of any characters."""

    def __init__(self, text: str) -> None:
        self.token_ids = (*text.encode(errors="surrogatepass")[:500], Bytes.eos_token_id)

    async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **options: Any) -> list[Completion]:
        log_probs = np.full(len(self.token_ids), -np.inf, np.float32)
        spans = (WeightSpan("0", 0, len(self.token_ids)),)
        return [Completion(self.token_ids, log_probs, "stop", spans) for _ in seeds]


class Judge(SingleTurn):
    """Scores an answer with numbers of any name, or fails; all that crosses to a worker and back is JSON."""

    train_size = held_out_size = 1

    def __init__(self, name: str, fails: bool) -> None:
        self.name, self.fails = name or "unnamed", fails

    def score(self, task: Task, turn: Turn) -> Outcome:
        seen = wire.turn_from_json(across(wire.turn_to_json(turn)))
        assert Task(**across(wire.task_to_json(task))) == task and seen == turn
        if self.fails:
            raise ValueError(f"this is no answer: {seen.text} {self.name}")
        outcome = wire.checked_outcome(Outcome(1.0, {self.name: 0.5}, True, {self.name: 1e38}), "score()", bare=False)
        return Outcome(**across(wire.outcome_to_json(outcome)))


def across(fields: Any) -> Any:
    """What is left of values that cross a pipe."""
    return json.loads(wire.encode(fields))


def sampled(task: Task, response: str, name: str, fails: bool = False) -> RolloutGroup | None:
    """The group of a task whose answers come from a fake engine; None when its prompt is refused."""
    encoder = Encoder(Bytes(), ["env"], [{}], model=Path("/nowhere"), vocabulary=257, max_prompt_tokens=10**6)
    try:
        prompt = encoder.prompt(Place(0, "train", 0), Task(**across(wire.task_to_json(task))))
    except ValueError as error:
        assert "environment 'env', task " in str(error)
        return None
    environment = running(Judge(name, fails), on_failure="zero")
    generator = Generator(Engine(response), [environment], encoder, LOOP, seed=0)
    return LOOP.run(generator.group(prompt, 2, Sampled("0", frozenset(["0"]))))


def store(folder: Path, group: RolloutGroup) -> dict[str, float]:
    """Write a group wherever a run writes it, read it back, and return the step's metrics."""
    write_rollouts(folder, 0, group.trajectories, count=2, domains=["env"], keep=2)
    records = lines_of(folder / "rollouts/step_000000.jsonl")
    prompt = group.prompt
    for record, trajectory in zip(records, group.trajectories, strict=True):
        assert record["prompt"] == prompt.text and record.get("failure") == (trajectory.failure or None)
        assert record["answer"] == prompt.task.answer and record["response"] == trajectory.text
    with FinishedGroups(folder / "unfinished", ORIGIN, 0, [prompt], [0], lambda found: True) as finished:
        finished[0] = group
    with FinishedGroups(folder / "unfinished", ORIGIN, 0, [prompt], [0], lambda found: True) as finished:
        assert [t.text for t in finished[0].trajectories] == [t.text for t in group.trajectories]
        batch = flatten([finished[0]])
    dump = RolloutDump(folder / "dump")
    dump.write(batch, ORIGIN)
    assert dump.read(0).reward_parts.keys() == batch.reward_parts.keys()
    return rollout_summary(batch, ["env"])


def shown(folder: Path, metrics: dict[str, float]) -> None:
    """Pass metrics to the sinks and the console, and read the file back."""
    with closing(
        open_sinks(folder, TelemetryConfig(tensorboard=False), title="t", first_step=0, total_steps=1)
    ) as sinks:
        sinks.write(0, "train", metrics)
    (record,) = lines_of(folder / METRICS_FILE)
    assert record.keys() == {"step", "kind", *metrics} and read_records(folder / METRICS_FILE) == [record]
    file = StringIO()
    Console("t", total_steps=1, file=file).write(0, "train", metrics)
    assert not hidden(file.getvalue())


@settings(max_examples=40, deadline=None)
@given(prompt=TEXT, answer=TEXT, note=TEXT, response=TEXT, name=TEXT, fails=st.booleans())
@example(prompt="p", answer="half \ud83d", note="", response="\x85", name="n", fails=False)
@example(prompt="p", answer="a", note="\ud83d", response="\u2028\u2029\x85\ud83d\x1b[2J", name="\x00\ud83d", fails=True)
@example(prompt="\udc00", answer="a", note="", response="", name="../../x.npy", fails=False)
@example(prompt="p", answer="a", note="1" * 5000, response="", name="", fails=True)
def test_text_is_kept_from_the_data_to_the_files(
    prompt: str, answer: str, note: str, response: str, name: str, fails: bool
) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "train.jsonl").write_text(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
        try:
            task = Chat(str(folder / "train.jsonl"), chat_template=False).train(0)
        except ValueError as error:  # it is refused where it is loaded, or taken as it is
            assert "train.jsonl, line 1: `" in str(error)
            assert not (prompt.strip() and answer.strip() and is_whole(prompt + answer))
        else:
            assert (task.prompt, task.answer) == (prompt, answer) and is_whole(prompt + answer)
        task = Task(prompt, answer, {"note": note, name: name}, note or None)  # an environment checks less
        group = sampled(task, response, name, fails)
        assert (group is not None) == (prompt != "" and is_whole(prompt))
        if group is not None:
            shown(folder, store(folder, group))


NAMES = [
    *("reward/\x1b[2J\ud83d/mean", "environment/_hidden\u202e/mean", "environment/x\x00", "gate/a\u2028b/plus/pass"),
    *("expert/mass/\x85", "expert/drift/" + "x" * 3000, "accuracy/<b>", "gpu/", "gpu/\x1b/power", "\ud83d", "", "_"),
    *("$\\frac$", "reward/mean", "reward/std", "accuracy", "ratio/max", "seconds/train", "seconds/gate", "loss"),
]
NUMBERS = st.sampled_from([0.0, -1.0, 1e308, -1e308, 5e-324, math.inf, math.nan, 10**400, -(10**400), True, 2**63])
JUNK = st.sampled_from(
    [None, "text\x1b", [], {}, [[["a"]]], {"a": {"\ud83d": "\x85"}}, "<script>", [1, 10**400, None, 0.5]]
)
RECORD = st.dictionaries(st.sampled_from(NAMES), NUMBERS | JUNK, max_size=3)
STEP = st.sampled_from([0, 1, 2, 3, 10**12, 10**13, -1, True, "1", None, 1.5, math.inf])
KIND = st.sampled_from(["train", "eval", "sft", "\x1b\ud83d", None, 3])
LINE = (
    st.builds(lambda record, step, kind: json.dumps(record | {"step": step, "kind": kind}).encode(), RECORD, STEP, KIND)
    | st.sampled_from([b"", b"oops", b"[1]", b"null", b"\xff\xfe", b"[" * 10**5, b'{"step": 1, "ki', b"1" * 5000]
                      + [b"\x85", b"\xc2\x85"])
)  # fmt: skip
ROLLOUT = st.dictionaries(
    st.sampled_from(
        ["prompt", "response", "answer", "reward", "correct", "log_probs", "rewards", "metadata", "failure"]
    ),
    TEXT | NUMBERS | JUNK,
).map(lambda record: json.dumps(record).encode()) | st.sampled_from([b"oops", b"3", b"\xff", b"[" * 10**5])
FILE_NAME = st.sampled_from(
    ["step_000000.jsonl", "step_000001.jsonl", "step_000007.jsonl", "step_x.jsonl", "step_000009.jsonl\udcff",
     "a\u202eb", "step_1.jsonl", "step_9999999999999999999999.jsonl", ".step_000001.jsonl.partial"]
)  # fmt: skip
CONFIG = st.sampled_from(
    [b"", b"[run", b"\xff", b"[[[[" * 10**4, b"environments = 3", b"environments = [1, {}]", b'parallel = "x"',
     b'parallel = {tensor = "two", data = 8}', b'algorithm.objective = [1]\n[model]\npath = "\\u001b[2J\\u202e"',
     b".".join([b"a"] * 5000) + b" = 1", b"trainer = 3\nsft = 4", b'run = {seed = 1979-05-27, name = "\\u0085"}']
)  # fmt: skip


def page_of(folder: Path) -> str:
    """Write the report, check that it is a clean page, and return its text."""
    page = write_report(folder).read_bytes().decode("utf-8")
    assert not hidden(page) and "could not be made" not in page and "<script" not in page
    assert page.count("<svg") == page.count("</svg>") == page.count("<figure>")
    return unescape(page)


@settings(max_examples=8, deadline=None)
@given(st.lists(LINE, max_size=4), st.dictionaries(FILE_NAME, st.lists(ROLLOUT, max_size=4), max_size=4), CONFIG)
@example(
    [
        json.dumps(dict.fromkeys(NAMES, 1e308 * (-1) ** step) | {"step": step, "kind": "train"}).encode()
        for step in (0, 1)
    ]
    + [json.dumps(dict.fromkeys(NAMES, 10**400) | {"step": 2, "kind": "eval"}).encode()],
    {},
    b"",
)
def test_a_report_is_made_of_whatever_a_run_folder_holds(
    lines: list[bytes], rollouts: dict[str, list[bytes]], config: bytes
) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        (folder / METRICS_FILE).write_bytes(b"\n".join(lines))
        (folder / "config.toml").write_bytes(config)
        (folder / "rollouts").mkdir()
        for name, samples in rollouts.items():
            (folder / "rollouts" / name).write_bytes(b"\n".join(samples))
        page = page_of(folder)
        steps = [name for name in rollouts if re.fullmatch(r"step_\d{6}\.jsonl", name)]
        others = [name for name in rollouts if name not in steps and not name.startswith(".")]
        assert (f"rollouts/: {len(others)} name" in page) == bool(others)
        assert page.count("<h3>Step ") == min(3, len(steps))
        assert ("config.toml cannot be read" in page) == (config[:4] in (b"[run", b"\xff", b"[[[["))


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    record = json.dumps({"step": 0, "kind": "train", "loss": 1.0})
    (tmp_path / METRICS_FILE).write_text(f"{record}\noops\n[1]\n{record}\n{record[:20]}")
    (tmp_path / "config.toml").write_text("[run\n")
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts/step_000003.jsonl").write_text('{"prompt": "p\\u0085\\u2028"}\n{"prom\n')
    (tmp_path / "rollouts/notes\x1b.txt").write_text("")
    (tmp_path / "rollouts/step_000004.jsonl").mkdir()
    problems = load_run(tmp_path).problems
    assert problems == (
        problems[0],
        "metrics.jsonl: 2 lines, the first is line 2, are no records of metrics",
        "rollouts/: 2 names are not that of a step's file, the first is 'notes\\x1b.txt'",
        "rollouts/step_000003.jsonl: line 2 is no trajectories",
    )
    assert problems[0].startswith("config.toml cannot be read (TOMLDecodeError: ")
    page = page_of(tmp_path)
    assert "Left out of this report" in page and all(problem in page for problem in problems)
    assert r"<pre>p\x85\u2028</pre>" in page


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path) -> None:
    """Opening a named pipe would wait for whoever writes into it."""
    (tmp_path / "rollouts").mkdir()
    for name in (METRICS_FILE, "config.toml", "rollouts/step_000001.jsonl"):
        os.mkfifo(tmp_path / name)
    assert load_run(tmp_path).problems == (
        "config.toml is not a file",
        "metrics.jsonl is not a file",
        "rollouts/: 1 name is not that of a step's file, the first is 'step_000001.jsonl'",
    )
    assert "No metrics yet" in page_of(tmp_path)


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029", "\x1c", "\x0b", "\ud83d"])
def test_a_character_does_not_end_a_finished_run(tmp_path: Path, character: str) -> None:
    group = sampled(Task(f"p{character}" if is_whole(character) else "p", f"a{character}"), character, "n")
    assert group is not None
    write_rollouts(tmp_path, 0, group.trajectories, count=2, domains=["env"], keep=2)
    assert len(load_run(tmp_path).rollouts[0][1]) == 2
    assert json.dumps(character)[1:-1] in page_of(tmp_path) or ascii(character)[1:-1] in page_of(tmp_path)


def test_a_part_that_cannot_be_made_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(open_sinks(tmp_path, TelemetryConfig(tensorboard=False), title="t", first_step=0, total_steps=1)) as s:
        s.write(0, "train", {"reward/mean": 1.0, "entropy": 0.5, "seconds/total": 1.0})

    def broken(*arguments: Any, **options: Any) -> str:
        raise ArithmeticError("no such \x1b chart")

    monkeypatch.setattr("fiberpo_megatron.telemetry.report.panels.line_chart", broken)
    page = render(load_run(tmp_path))
    assert "the chart &#x27;Reward&#x27; could not be made (ArithmeticError: no such \\x1b chart)" in page
    assert "Seconds per phase" in page and "mean reward, first and last" in page


def test_thousands_of_names_make_a_report_of_bounded_size(tmp_path: Path) -> None:
    """An environment may make names of its numbers from what the policy says."""
    metrics = {f"environment/{i}/mean": 1.0 for i in range(3000)} | {f"other/{i}": 1.0 for i in range(3000)}
    with closing(open_sinks(tmp_path, TelemetryConfig(tensorboard=False), title="t", first_step=0, total_steps=1)) as s:
        s.write(0, "train", metrics)
    data = load_run(tmp_path)
    problems: list[str] = []
    from fiberpo_megatron.telemetry.report import panels

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(panels, "line_chart", lambda lines, **options: f"<svg>{len(lines)}</svg>")
        sections = panels.build_sections(data, problems)
    found = {section.title: section.drawings for section in sections}
    drawing = found["Environments"][0]
    assert drawing.svg == "<svg>40</svg>" and "the first 40 of 3000 are drawn" in drawing.panel.note
    assert len(found["Other metrics"]) == panels.MOST_PANELS
    assert problems == ["the section 'Other metrics' has more than 150 charts; metrics.jsonl has all numbers"]


def test_long_texts_are_cut_with_their_length(tmp_path: Path) -> None:
    group = sampled(Task("p", "a" * 10**6), "r", "n")
    assert group is not None
    write_rollouts(tmp_path, 0, group.trajectories, count=1, domains=["env"], keep=2)
    page = page_of(tmp_path)
    assert f"{'a' * LONGEST_TEXT} … (1000000 characters)" in page and len(page) < 50_000
