"""The environment of programming problems: layouts of data, programs in answers, comparisons, rewards, services."""

import asyncio
import base64
import json
import pickle
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from fiberpo_megatron.environments import Outcome, Turn
from fiberpo_megatron.environments.builtin import remote_sandbox, unit_tests
from fiberpo_megatron.environments.builtin import sandbox as module
from fiberpo_megatron.environments.builtin.code import Code
from fiberpo_megatron.environments.builtin.program_outputs import last_program, same_output, same_value
from fiberpo_megatron.environments.builtin.sandbox import Sandbox
from fiberpo_megatron.environments.host import describe
from tests.environments.pools import pool_of, settings

DOUBLE = {"prompt": "Double it.", "tests": [{"input": f"{n}\n", "output": f"{2 * n}\n"} for n in range(3)]}
CASES = [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]
HIDDEN = [{"input": "[5]\n-5", "output": "0", "testtype": "functional"}]


def packed(cases: Any) -> str:
    return base64.b64encode(zlib.compress(json.dumps(cases).encode())).decode()


LIVECODEBENCH = {
    "question_content": "Add it all.",
    "starter_code": "class Solution:\n    def total(self, values: List[int], more: int) -> int:\n        ",
    "metadata": '{"func_name": "total"}',
    "public_test_cases": json.dumps(CASES),
    "private_test_cases": packed(HIDDEN),
}
APPS = {
    "question": "Add it all.",
    "starter_code": "",
    "input_output": json.dumps({"fn_name": "total", "inputs": [[[1, 2], 3], [[5], -5]], "outputs": [[6], [0]]}),
}
SOLUTION = (
    "class Solution:\n    def total(self, values: List[int], more: int) -> int:\n        return sum(values) + more"
)


@pytest.fixture(scope="module", autouse=True)
def one_trial() -> Iterator[None]:
    """Every instance tries its sandbox, which takes a tenth of a second or more; here the first one does it for all."""
    patch, chosen = pytest.MonkeyPatch(), {}
    choose = Sandbox._choose

    def choose_once(sandbox: Sandbox, kind: str) -> Any:
        if kind not in chosen:
            chosen[kind] = choose(sandbox, kind)
        return chosen[kind]

    patch.setattr(Sandbox, "_choose", choose_once)
    patch.setattr(module, "interpreter_folders", cache(module.interpreter_folders))
    yield
    patch.undo()


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def made(tmp_path: Path, record: object, **options: Any) -> Code:
    return Code(write(tmp_path / "problems.jsonl", record), **options)


def fenced(program: str) -> Turn:
    return Turn(f"Let me think.\n```python\n{program}\n```\nThat is it.")


def score(environment: Code, turn: Turn) -> Outcome:
    return asyncio.run(environment.score(environment.train(0), turn))


# ---- data sets ----


@pytest.mark.parametrize(
    ("layout", "record", "program"),
    [
        ("tests", DOUBLE, "print(2 * int(input()))"),
        ("tests", DOUBLE | {"tests": json.dumps(DOUBLE["tests"])}, "print(2 * int(input()))"),
        ("tests", {"prompt": "p", "fn_name": "total", "tests": [{"input": [[1, 2], 3], "output": 6}]}, SOLUTION),
        ("livecodebench", LIVECODEBENCH, SOLUTION),
        ("livecodebench", LIVECODEBENCH | {"private_test_cases": json.dumps(HIDDEN)}, SOLUTION),
        ("apps", APPS, SOLUTION),
        ("apps", APPS, "def total(values, more):\n    return sum(values) + more"),
        ("apps", {"question": "q", "input_output": {"inputs": [["1", "2"]], "outputs": ["3"]}},
         "print(int(input()) + int(input()))"),
    ],
)  # fmt: skip
def test_layouts_of_data_sets(tmp_path, layout, record, program):
    environment = made(tmp_path, record, layout=layout)
    assert score(environment, fenced(program)).correct is True
    assert score(environment, fenced(program.replace("int(", "str(").replace("sum(", "len("))).correct is False


def test_the_prompt_has_the_starter_code_and_asks_for_a_block(tmp_path):
    task = made(tmp_path, LIVECODEBENCH | {"id": "abc"}, layout="livecodebench", id="id").train(0)
    (message,) = task.prompt
    assert message["content"].startswith("Add it all.\n\n```python\nclass Solution:\n    def total(")
    assert message["content"].endswith("one block of ```python code.")
    assert task.id == "abc" and task.metadata["tests"] == 2
    assert "test_cases" not in json.dumps(task.metadata), "tests may have megabytes, and are secret"
    task = made(tmp_path, DOUBLE, instruction="Go.", system="You are a programmer.").train(0)
    assert [message["content"] for message in task.prompt] == ["You are a programmer.", "Double it.\n\nGo."]


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("tests", {"tests": None}, r"`tests` must be a list of tests, got None"),
        ("tests", {"tests": []}, r"`tests` holds no test; leave the problem out"),
        ("tests", {"tests": [{"input": "1"}]}, r"`tests\[0\]` must be an object with `input` and `output`"),
        ("tests", {"tests": [{"input": 1, "output": "1"}]}, r"`tests\[0\]`: `input` must be a text or a list of lines"),
        ("tests", {"fn_name": "a b"}, r"`fn_name` must be the name of a function, got a b"),
        ("tests", {"fn_name": "f"}, r"`tests\[0\]`: `input` must be the list of the arguments of f"),
        ("tests", {"tests": "[1"}, r"`tests` is not JSON"),
        (
            "apps",
            {"input_output": '{"inputs": ["1"], "outputs": []}'},
            r"`input_output` must hold the lists `inputs` and",
        ),
        ("livecodebench", {"public_test_cases": "[[]]"}, r"`public_test_cases\[0\]` must be an object"),
        ("livecodebench", {"private_test_cases": packed(7)}, r"`private_test_cases` must be a list of tests, got 7"),
        ("livecodebench", {"private_test_cases": "@@"}, r"`private_test_cases` is not JSON"),
        ("livecodebench", {"private_test_cases": packed([])[:-8]}, r"`private_test_cases` is not JSON"),
        (
            "livecodebench",
            {"public_test_cases": json.dumps([{"input": "1", "output": "six"}])},
            r"`public_test_cases\[0\]`: `output` must be JSON",
        ),
    ],
)
def test_bad_tests_are_named(tmp_path, layout, change, message):
    record = {"tests": DOUBLE, "apps": APPS, "livecodebench": LIVECODEBENCH}[layout]
    with pytest.raises(ValueError, match=rf"problems\.jsonl, line 1: {message}"):
        made(tmp_path, record | change, layout=layout).train(0)


def test_pickled_tests_are_refused_unread(tmp_path):
    """As LiveCodeBench publishes them. Reading a pickle runs what it says."""

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "exploded",)

    pickled = base64.b64encode(zlib.compress(pickle.dumps(Bomb()))).decode()
    environment = made(tmp_path, LIVECODEBENCH | {"private_test_cases": pickled}, layout="livecodebench")
    with pytest.raises(ValueError, match=r"`private_test_cases` is pickled, .*convert the data set once.*json\.dumps"):
        environment.train(0)
    assert not (tmp_path / "exploded").exists()


def test_a_compressed_field_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(unit_tests, "DECODED_BYTES", 1 << 20)
    bomb = packed("0" * (2 << 20))
    assert len(bomb) < 10_000
    with pytest.raises(ValueError, match=r"holds more than 1 MiB when it is decompressed"):
        made(tmp_path, LIVECODEBENCH | {"private_test_cases": bomb}, layout="livecodebench").train(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "mbpp"}, r"layout = 'mbpp' is unknown; use one of tests, apps, livecodebench"),
        ({"reward": "most"}, r"reward = 'most' is unknown; use \"all\" or \"share\""),
        ({"sandbox": "jail"}, r"sandbox = 'jail' is unknown; use \"auto\""),
        ({"sandbox": "remote"}, r"sandbox = 'remote' and address = None: the two belong together"),
        ({"address": "http://h:1"}, r"sandbox = 'auto' and address = 'http://h:1': the two belong together"),
        ({"sandbox": "remote", "address": "h:1"}, r"address = 'h:1' is no address; write it as http://host:port"),
        ({"sandbox": "remote", "address": "http://me:pw@h:1"}, r"address holds a name or password"),
        ({"python": "/no/python"}, r"the interpreter '/no/python' of the programs cannot be run"),
        ({"memory_mib": 0}, r"the bound memory_mib = 0 must be above 0"),
        ({"max_tests": 0}, r"max_tests = 0 must be a whole number of at least 1"),
        ({"languages": "python"}, r"languages = 'python' must be a list of texts"),
        ({"float_tolerance": 2}, r"float_tolerance = 2 must be a number of at least 0 and below 1"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, DOUBLE, **options)


# ---- programs and their outputs ----


@pytest.mark.parametrize(
    ("text", "needs_fence", "program"),
    [
        ("```python\na\n```\nor better\n```python\nb\n```", True, "b"),
        ("```python\na\n```\nIt prints\n```text\nb\n```", True, "a"),
        ("```\na\n```", True, "a"),
        ("```Python3\na\n\n  b\n```", True, "a\n\n  b"),
        ("```python\na\n```\n```python\ncut off", True, "a"),
        ("```python\ncut off", True, None),
        ("```python\ncut off", False, None),
        ("print(1)", True, None),
        ("print(1)", False, "print(1)"),
        ("```c\na\n```", False, None),
    ],
)
def test_the_last_block_is_the_program(text, needs_fence, program):
    assert last_program(text, {"python", "python3", ""}, needs_fence=needs_fence) == program


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("1 2\n3\n", "1 2 \n3", True),
        ("1 2\n3\n", "1 2\n3\n\n\n", True),
        ("1 2\n3", "1  2\n3", True),
        ("1\n2", "1 2", False),
        ("YES", "yes", False),
        ("3", "3.0", True),
        ("10000000", "10000001", False),
        ("1000000000000000000000001", "1000000000000000000000000", False),
        ("0.333333", "0.3333333333", True),
        ("0.333333", "0.334", False),
        ("1e-9", "0", True),
        ("nan", "nan", True),
        ("1.5", "inf", False),
        ("1.5", "9" * 10**5, False),
        ("", "", True),
        ("1", "", False),
    ],
)
def test_outputs_are_compared_as_the_benchmarks_do(expected, got, same):
    assert same_output(expected, got, 1e-6) is same


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ([1, 2], "[1, 2]", True),
        ([[1, 2]], "[1, 2]", True),
        ([0.1, {"a": 1}], '[0.10000000001, {"a": 1}]', True),
        (3, "3.0", True),
        (3, "3.0000001", False),
        ("a", "a", False),
        (0.5, "1" + "0" * 400, False),
        (None, "null", True),
        ([1], "[" * 10**5, False),
        ([1], "NaN", False),
    ],
)
def test_returned_values_are_compared_as_json(expected, got, same):
    assert same_value(expected, got, 1e-6) is same


# ---- rewards ----


def test_rewards_of_all_tests_and_of_their_share(tmp_path):
    half = "n = int(input())\nprint(2 * n if n < 2 else 'many')"
    outcome = score(made(tmp_path, DOUBLE), fenced(half))
    assert (outcome.reward, outcome.correct, outcome.rewards) == (0.0, False, {"tests": 2 / 3})
    outcome = score(made(tmp_path, DOUBLE, reward="share"), fenced(half))
    assert (outcome.reward, outcome.correct) == (pytest.approx(2 / 3), False)
    assert outcome.metrics["has_program"] == 1.0 and outcome.metrics["broke_sandbox"] == 0.0
    assert score(made(tmp_path, DOUBLE, max_tests=2), fenced(half)).reward == 1.0
    nothing = score(made(tmp_path, DOUBLE), Turn("I do not know."))
    assert (nothing.reward, nothing.metrics) == (0.0, {"has_program": 0.0})


def test_right_answers_never_enter_the_sandbox(tmp_path):
    """A program that reads all that it finds, its runner's arguments and memory included, finds no expected output."""
    secret = "4815162342"
    record = {"prompt": "p", "tests": [{"input": "1", "output": "1"}, {"input": "2", "output": secret}]}
    search = f"""
import gc, os, sys
texts = [repr(o) for o in gc.get_objects() if isinstance(o, (str, bytes, dict, list, tuple))]
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("cmdline", "environ", "mem"):
        try: texts.append(open(f"/proc/{{pid}}/{{name}}", "rb").read(10**6).decode("latin-1"))
        except OSError: pass
secret = "".join(["{secret[:5]}", "{secret[5:]}"])
print(1 if not any(secret in text for text in texts) else "found")
"""
    outcome = score(made(tmp_path, record, reward="share"), fenced(search))
    assert outcome.reward == 0.5 and outcome.metrics["has_program"] == 1.0


def test_programs_run_in_the_workers_and_it_is_said_how(tmp_path):
    """With a retry after a wrong program, as a conversation."""
    path = write(tmp_path / "problems.jsonl", DOUBLE)
    options = {"train": path, "max_turns": 2, "retry_message": "Again."}
    config = settings("code", options=options, deadline_s=60.0, workers=1)
    described = describe(config)
    assert "programs run in a sandbox of " in described.about and "no network" in described.about
    said = []

    def converse() -> Any:
        async def say(new: Any, tools: Any, max_tokens: Any, stop: Any) -> Turn:
            said.append(new)
            return fenced("print(2)" if len(said) == 1 else "print(2 * int(input()))")

        return say

    async def scenario() -> Any:
        async with pool_of("code", tmp_path / "run", options=options, deadline_s=60.0, workers=1) as pool:
            (task,) = await pool.tasks("train", [0])
            return await pool.run(task, converse, seed=0), pool.take_counts()

    outcome, counts = asyncio.run(scenario())
    assert outcome.correct is True and not counts
    assert said[1:] == [[{"role": "user", "content": "Again."}]]
    assert described.about in (tmp_path / "run/env_rank00000_worker0.log").read_text()


# ---- a sandbox service ----


class Service(BaseHTTPRequestHandler):
    """Speaks the part of SandboxFusion's interface that is used: POST /run_code."""

    answers: ClassVar[list[Any]] = []
    """What is answered instead of running programs, in this order: a status code, or the fields of an answer."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/run_code" and set(request) <= {
            "code", "language", "stdin", "compile_timeout", "run_timeout", "files", "fetch_files"
        }  # fmt: skip
        answer = self.answers.pop(0) if self.answers else self.run(request)
        body = json.dumps(answer).encode()
        self.send_response(answer if isinstance(answer, int) else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        folder = self.server.folder  # type: ignore[attr-defined]
        (folder / "code.py").write_text(request["code"])
        done = subprocess.run(
            [sys.executable, "code.py"], cwd=folder, input=request["stdin"], capture_output=True, text=True,
            timeout=request["run_timeout"],
        )  # fmt: skip
        result = {"status": "Finished", "execution_time": 0.1, "return_code": done.returncode}
        result |= {"stdout": done.stdout, "stderr": done.stderr}
        status = "Success" if done.returncode == 0 else "Failed"
        return {"status": status, "message": "", "compile_result": None, "run_result": result}

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def service(folder: Path, answers: list[Any] | None = None) -> Iterator[str]:
    handler = type("Handler", (Service,), {"answers": answers or []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.folder = folder  # type: ignore[attr-defined]
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_sandbox_service_runs_the_same_tests(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_sandbox, "PAUSE_S", 0.01)
    busy = {"status": "SandboxError", "message": "no pod is free", "run_result": None}
    with service(tmp_path, answers=[503, busy]) as address:
        environment = made(tmp_path, LIVECODEBENCH, layout="livecodebench", sandbox="remote", address=address)
        assert environment.about.startswith(f"programs run on the sandbox service at {address}")
        assert score(environment, fenced(SOLUTION)).correct is True
        assert score(environment, fenced(SOLUTION.replace("+ more", ""))).correct is False
        broken = score(environment, fenced("import os\nos.kill(os.getppid(), 9)"))
        assert broken.reward == 0.0 and broken.metrics["broke_sandbox"] == 1.0


def test_a_service_that_is_down_is_a_counted_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_sandbox, "PAUSE_S", 0.01)
    environment = made(tmp_path, DOUBLE, sandbox="remote", address="http://127.0.0.1:9")
    with pytest.raises(
        RuntimeError, match=r"at http://127.0.0.1:9 did not run a program in 3 attempts: the connection"
    ):
        score(environment, fenced("print(1)"))
    odd = {"status": "Success", "message": "", "run_result": {"status": "Finished", "stdout": "hello"}}
    for answers, message in (([404] * 3, "status 404"), ([odd], "did not start the runner; it wrote hello")):
        with service(tmp_path, answers=answers) as address:
            environment = made(tmp_path, DOUBLE, sandbox="remote", address=address)
            with pytest.raises(RuntimeError, match=message):
                score(environment, fenced("print(1)"))
