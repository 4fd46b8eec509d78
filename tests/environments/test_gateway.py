"""The gateway answers agents by OpenAI's own client: its form, its branches, its bounds, and what ends an agent."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fiberpo_megatron.environments import Outcome, Task, ToolCall, Turn
from fiberpo_megatron.environments.builtin.agent_process import SUPERVISOR, AgentFailed
from fiberpo_megatron.environments.builtin.gateway import Gateway
from fiberpo_megatron.environments.host import Failure
from fiberpo_megatron.environments.jobs import FIRST, BranchPoint, Say
from fiberpo_megatron.plugins import PluginError
from tests.environments.agents import TOOLS, WRONG
from tests.environments.pools import pool_of
from tests.trainer.toy import Speaker

TASKS = {"use": "tests.environments.agents:Words"}
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 64}
DEEDS = (
    "says_once", "streams", "talks", "at_once", "thinks", "asks_wrongly", "asks_elsewhere", "floods", "does_nothing",
)  # fmt: skip


class Policy:
    """Answers from a script, and remembers what it was asked in which branch."""

    def __init__(self, deed: str) -> None:
        self.deed = deed
        self.asked: list[tuple[BranchPoint, Any, Any, Any, Any]] = []

    def __call__(self) -> Say:
        return self.say

    async def say(self, new: Any, tools: Any, max_tokens: Any, stop: Any, branch: BranchPoint = FIRST) -> Turn:
        if new[-1]["content"] == "refuse":
            raise ValueError("the template refuses this")
        self.asked.append((branch, new, tools, max_tokens, stop))
        number = len(self.asked)
        await asyncio.sleep(0.01)
        if self.deed == "streams" or (self.deed == "talks" and number == 2):
            return Turn("around ", "stop", (1, 2, 3), (ToolCall("add", '{"b": 2, "a": 1}'),), 10)
        thought = "I see</think>\n\n" if self.deed == "thinks" else ""
        return Turn(f"{thought}answer {number}", "length" if self.deed == "says_once" else "stop", (1, 2), (), 9)


def run_agents(tasks: list[Task], folder: Path | None = None, **changes: Any) -> Any:
    """Let the agent work on each task, all at once; return results, policies and what was counted."""
    options = {"tasks": TASKS, **changes.pop("options")}
    policies = [Policy(task.answer) for task in tasks]

    async def scenario() -> Any:
        settings = {"workers": 1, "memory_gib": 4.0, "deadline_s": 30.0, **changes}
        async with pool_of("gateway", folder, options=options, **settings) as pool:
            runs = (pool.run(t, p, seed=0, sampling=SAMPLING) for t, p in zip(tasks, policies))
            return await asyncio.gather(*runs), pool.take_counts()

    results, counts = asyncio.run(scenario())
    return SimpleNamespace(results=results, policies=policies, counts=counts)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("gateway")
    tasks = [Task("do", deed, {"file": str(folder / deed)}, deed) for deed in DEEDS]
    options = {
        "agent": "tests.environments.agents:by_name", "max_requests": 40, "max_messages": 10, "max_body_kib": 4,
    }  # fmt: skip
    found = run_agents(tasks, folder / "logs", options=options)
    found.folder = folder
    return found


def of(everything: Any, deed: str) -> SimpleNamespace:
    place = DEEDS.index(deed)
    path = everything.folder / deed
    seen = json.loads(path.read_text()) if path.exists() else None
    return SimpleNamespace(result=everything.results[place], asked=everything.policies[place].asked, seen=seen)


def test_an_answer_has_the_form_of_openais(everything: Any) -> None:
    found = of(everything, "says_once")
    assert found.asked == [(FIRST, [{"role": "user", "content": "hello"}], None, 7, None)]
    assert found.seen["id"].startswith("chatcmpl-") and found.seen["object"] == "chat.completion"
    assert abs(found.seen["created"] - time.time()) < 600 and found.seen["model"] == "policy"
    (choice,) = found.seen["choices"]
    assert choice["message"]["content"] == "answer 1" and choice["message"]["tool_calls"] is None
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    usage = {name: found.seen["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert usage == {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    assert isinstance(found.result, Outcome) and found.result.reward == 1.0
    assert found.result.metrics["gateway_requests"] == 1 and found.result.metrics["gateway_rewritten"] == 0


def test_a_stream_has_the_text_the_calls_the_reason_and_the_usage(everything: Any) -> None:
    seen = of(everything, "streams").seen
    assert "".join(seen["texts"]) == "around " and seen["reasons"] == ["tool_calls"]
    (call,) = seen["calls"]
    assert call["function"] == {"name": "add", "arguments": '{"b": 2, "a": 1}'} and call["index"] == 0
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert [usage["total_tokens"] for usage in seen["usages"]] == [13]


def test_requests_go_on_behind_what_was_sampled_or_in_a_branch(everything: Any) -> None:
    """An echo may be written in another form; the trainer gets only what is new, and where it goes on."""
    found = of(everything, "talks")
    system = {"role": "system", "content": "be brief"}
    one, two, another = ({"role": "user", "content": text} for text in ("one", "two", "another two"))
    said = [(branch, new) for branch, new, *_ in found.asked]
    assert said[:2] == [(FIRST, [system, one]), (FIRST, [two])]
    assert said[2][0] == FIRST and [m["role"] for m in said[2][1]] == ["tool"] and said[2][1][0]["content"] == "3"
    assert said[3] == (BranchPoint(1, 0, 1), [another])
    assert said[4][0] == BranchPoint(2, 0, 0) and [m["role"] for m in said[4][1]] == ["user", "assistant", "user"]
    assert [tools for _, _, tools, *_ in found.asked] == [TOOLS, None, None, None, TOOLS]
    names = ("continued", "forked", "rewritten", "requests")
    assert [found.result.metrics[f"gateway_{name}"] for name in names] == [2, 1, 1, 5]


def test_requests_at_the_same_time_are_branches(everything: Any) -> None:
    found = of(everything, "at_once")
    branches = [branch for branch, *_ in found.asked]
    assert sorted(branches[:3]) == [FIRST, BranchPoint(1, 0, 0), BranchPoint(2, 0, 0)]
    assert len({branch.number for branch in branches[3:]}) == 2 and len(found.seen) == 5
    assert all([m["content"] for m in new] == ["and?"] for _, new, *_ in found.asked[3:])


def test_a_thought_need_not_be_echoed(everything: Any) -> None:
    found = of(everything, "thinks")
    assert (found.seen["content"], found.seen["reasoning_content"]) == ("answer 1", "I see")
    assert [(branch, len(new)) for branch, new, *_ in found.asked] == [(FIRST, 1), (FIRST, 1)]


def test_what_cannot_be_given_is_refused_by_name(everything: Any) -> None:
    found = of(everything, "asks_wrongly")
    for fields, (status, param, message) in zip(WRONG, found.seen, strict=True):
        name = next(iter(fields.get("extra_body", fields)))
        assert status == 400, message
        assert fields.get("messages") == [{"role": "user", "content": "refuse"}] or (param or "").startswith(name)
        assert name in message or "the template refuses this" in message
    ((_, _, tools, _, stop),) = found.asked
    assert (tools, stop) == (None, ["\n"])
    assert found.result.metrics["gateway_refused"] == len(WRONG)


def test_nothing_is_answered_without_the_key_of_a_running_trajectory(everything: Any) -> None:
    seen = of(everything, "asks_elsewhere").seen
    assert seen["models"] == ["policy"]
    assert seen["statuses"] == {
        "no key": [401, "invalid_api_key"], "another key": [401, "invalid_api_key"],
        "another scheme": [401, "invalid_api_key"], "another path": [404, "unknown_url"],
        "another model": [404, "model_not_found"], "another method": [405, "unknown_url"],
        "large": [413, "request_too_large"], "many messages": [400, None], "no JSON": [400, None],
        "deep JSON": [400, None],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("floods", "sent more than max_requests = 40 requests"),
        ("does_nothing", "ended before the policy had answered anything"),
    ],
)
def test_an_agent_that_does_too_much_or_nothing_has_failed(everything: Any, deed: str, message: str) -> None:
    result = of(everything, deed).result
    assert isinstance(result, Failure) and result.kind == "exception" and message in result.message, result
    assert len(of(everything, deed).asked) <= 40
    assert everything.counts["failures"] == 2, "all of them are counted"


PROGRAM = """
import json, os, subprocess, sys, time, urllib.request

task = json.loads(sys.stdin.readline())
deed, _, argument = sys.argv[1].partition(" ")
body = {"messages": [{"role": "user", "content": deed}]}
if deed == "answers":
    body |= {"temperature": 0, "stop": ["Observation:"]}
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
request = urllib.request.Request(url, json.dumps(body).encode(), headers)
assert json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"] == "answer 1"
assert os.environ["OPENAI_MODEL"] == "policy" and os.listdir(os.environ["TMPDIR"]) == []
if deed == "reports":
    assert task["answer"] == "right" and task["id"] == "reports"
    print(json.dumps({"reward": 0}))
    print(json.dumps({"reward": 0.75, "correct": False, "rewards": {"style": 1}, "answer": "x"}))
    print("bye {")
if deed == "answers":
    assert "answer" not in task
    print(json.dumps({"answer": "right", "reward": -5}))
if deed == "fails":
    sys.exit("no luck")
if deed == "forgets":
    print("done")
if deed == "lingers":
    child = "import os, sys, time; os.setsid(); path = sys.argv[1]; open(path + '.new', 'w').write(str(os.getpid())); "
    child += "os.rename(path + '.new', path); time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", child, argument])
    time.sleep(60)
"""


def run_programs(folder: Path, *deeds: str, idle_s: float = 45.0, **options: Any) -> dict[str, Any]:
    """Let a program do these deeds, all at once; return the result of each. One that lingers has `idle_s` seconds from
    the time at which it does."""
    path = folder / "agent.py"
    path.write_text(PROGRAM)
    tasks = [Task([{"role": "user", "content": deed}], "right", {}, deed.split()[0]) for deed in deeds]
    gateway = Gateway(tasks=TASKS, command=["python", str(path), "{prompt}"], **options)

    async def scenario() -> list[Any]:
        runs = (gateway.run(task, Speaker(Policy(str(task.id)).say, 0)) for task in tasks)
        found = asyncio.gather(*runs, return_exceptions=True)
        while any("lingers" in deed for deed in deeds) and not (folder / "pid").exists():
            await asyncio.sleep(0.05)  # bounded by the timeout of the test
        gateway._idle_s = min(gateway._idle_s, idle_s)
        return await found

    return {deed.split()[0]: result for deed, result in zip(deeds, asyncio.run(scenario()))}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("programs")
    deeds = ("reports", "fails", "forgets", f"lingers {folder / 'pid'}")
    return SimpleNamespace(results=run_programs(folder, *deeds, idle_s=4.0), pid=folder / "pid")


def test_a_program_reports_its_reward_in_its_last_line_of_json(programs: Any) -> None:
    result = programs.results["reports"]
    assert (result.reward, result.correct, result.rewards) == (0.75, False, {"style": 1.0}), result


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("fails", "ended with exit code 1; its last errors:\nno luck"),
        ("forgets", "reported no reward.*Its output ends with:\ndone"),
        ("lingers", "asked nothing for idle_s = 4 s"),
    ],
)
def test_a_program_that_fails_says_how(programs: Any, deed: str, message: str) -> None:
    result = programs.results[deed]
    assert isinstance(result, AgentFailed) and re.search(message, str(result), re.DOTALL), result


def test_all_that_a_program_has_started_ends_with_it(programs: Any) -> None:
    """Also what has left its session, when the program is silent for too long."""
    pid = int(programs.pid.read_text())
    deadline = time.monotonic() + 5
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.02)


def test_all_that_a_program_has_started_ends_with_the_worker(tmp_path: Path) -> None:
    """The supervisor sees that its worker is dead, however that died, because the pipe between them ends."""
    child = "import os, sys, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(60)"
    program = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    theirs, ours = os.pipe()
    command = [sys.executable, "-IS", str(SUPERVISOR), str(theirs), sys.executable, "-c", program]
    with subprocess.Popen(command, pass_fds=[theirs], stdout=subprocess.PIPE, text=True) as supervisor:
        os.close(theirs)
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        os.close(ours)  # as the kernel does for a worker that was killed
        assert supervisor.wait(10) == 128 + signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


LATE_WAIT = """
import runpy, subprocess, sys, threading, time

supervisor = runpy.run_path(sys.argv.pop(1), run_name="supervisor")
names, reaped = supervisor["main"].__globals__, threading.Event()
kill, wait = names["kill_descendants"], subprocess.Popen.wait

def kill_and_stay():
    kill()
    reaped.set()
    if threading.current_thread() is not threading.main_thread():
        time.sleep(30)

def wait_late(process):
    reaped.wait(30)
    return wait(process)

names["kill_descendants"], subprocess.Popen.wait = kill_and_stay, wait_late
sys.exit(supervisor["main"]())
"""


def test_a_program_that_the_other_thread_has_reaped_does_not_count_as_one_that_succeeded() -> None:
    """`Popen.wait` returns 0 for a process that something else has waited for."""
    theirs, ours = os.pipe()
    command = [sys.executable, "-IS", "-c", LATE_WAIT, str(SUPERVISOR), str(theirs), sys.executable, "-c"]
    with subprocess.Popen([*command, "import time; time.sleep(60)"], pass_fds=[theirs]) as supervisor:
        os.close(theirs)
        os.close(ours)
        assert supervisor.wait(20) == 128 + signal.SIGKILL


def solve_with(agent: str) -> Outcome:
    """Let a function of `agents` solve one task."""
    gateway = Gateway(tasks=TASKS, agent=f"tests.environments.agents:{agent}")
    task = Task([{"role": "user", "content": "hello"}], "right", {}, agent)
    return asyncio.run(gateway.run(task, Speaker(Policy(agent).say, 0)))


def test_a_function_may_block() -> None:
    found = solve_with("blocking")
    assert (found.reward, found.rewards) == (0.5, {"style": 0.25}) and found.metrics["length"] == len("answer 1")


def test_a_function_that_returns_nothing_says_how_to_reward() -> None:
    with pytest.raises(AgentFailed, match=r"returned None; return a number or an Outcome, or set reward = \"tasks\""):
        solve_with("returns_nothing")


def test_the_tasks_may_score_and_then_the_agent_does_not_see_the_answer(tmp_path: Path) -> None:
    result = run_programs(tmp_path, "answers", reward="tasks", sampling="ignore")["answers"]
    assert result.reward == 1.0 and result.metrics["gateway_ignored"] == 1, result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name the agent by either `command` or `agent`"),
        ({"command": "agent.py"}, "command = 'agent.py' must be a list of texts"),
        ({"agent": "tests.environments.agents:client"}, "must be a function that takes"),
        ({"command": ["x"], "sampling": "allow"}, "sampling = 'allow'; use refuse or ignore"),
        ({"command": ["x"], "tasks": "chat"}, "tasks = 'chat' must be"),
        ({"command": ["x"], "tasks": {"use": "tests.environments.agents:Nothing"}}, "Nothing"),
        ({"command": ["x"], "max_requests": 0}, "max_requests = 0 must be a whole number"),
        ({"command": ["x"], "idle_s": 0}, "idle_s = 0 must be a number of seconds"),
        ({"command": ["x"], "host": "203.0.113.1"}, "host = '203.0.113.1': none of the ports"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, PluginError), match=message):
        Gateway(**{"tasks": TASKS, **options})
