"""The environment "gateway" lets agents that talk to OpenAI's API work on tasks, and trains on what they sampled.

An agent is a program or a function of yours. For each trajectory it gets the address of a server in this worker, and a
key. The server's answers are the policy's turns, token by token as the engine sampled them. Apart from the server this
module imports the standard library alone.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fiberpo_megatron import plugins
from fiberpo_megatron.environments import Conversation, Environment, Outcome, SingleTurn, Task, Turn
from fiberpo_megatron.environments.builtin.agent_process import AgentFailed, AgentReport, run_agent, shown

if TYPE_CHECKING:
    from fiberpo_megatron.environments.builtin.gateway_server import Session

AgentFunction = Callable[[Task, str, str], Any]
"""Takes (task, base address, key) and returns a number, an Outcome, None, or an awaitable of these."""
TICK_S = 0.1
"""How often an agent is looked after."""
REPORTED = ("reward", "correct", "rewards", "metrics", "answer")
"""Fields of the JSON object that a program prints about its trajectory."""


class Gateway(Environment):
    """Gives tasks of another environment to agents, which ask the policy through OpenAI's API."""

    def __init__(
        self,
        tasks: Mapping[str, Any],
        command: Sequence[str] | None = None,
        agent: str | None = None,
        reward: str = "agent",
        env: Mapping[str, str] | None = None,
        model: str = "policy",
        sampling: str = "refuse",
        idle_s: float = 45.0,
        max_requests: int = 256,
        max_parallel: int = 16,
        max_messages: int = 1024,
        max_body_kib: int = 4096,
        host: str = "127.0.0.1",
        ports: tuple[int, int] | None = None,
        advertised_host: str | None = None,
    ) -> None:
        """Open the server's port, and the environment that has the tasks.

        tasks: the environment that gives tasks, as `{use = "chat", options = {...}}`.
        command: the agent as a program with its arguments, in which {prompt} stands for the last message of the task.
            It gets OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL, and the task as one line of JSON on its standard
            input. In its last line that is a JSON object it may report `reward`, `answer`, `correct`, `rewards` and
            `metrics`.
        agent: the agent as the import path of a function, which takes (task, base_url, api_key) and returns a number,
            an Outcome, an answer (a text), or None. It may be `async`. Name either this or `command`.
        reward: agent: what the agent reports or returns. tasks: what `score` of the tasks' environment says about the
            answer that the agent reports, or about the policy's last answer where it reports none.
        env: further environment variables of the program.
        model: the name of the policy. Requests may name any model: there is no other.
        sampling: what happens to a request that asks for another temperature, another top_p, a seed, penalties or
            longer stop texts than the run's sampling has. refuse: it gets an error. ignore: these parameters are left
            out of account, which is counted.
        idle_s: seconds that an agent may go without a request before it has failed.
        max_requests: requests of one trajectory; an agent that sends more has failed.
        max_parallel: requests of one trajectory that are answered at the same time.
        max_messages: messages of one request.
        max_body_kib: size of the body of a request (KiB).
        host: the address on which the server listens. Choose another one than the loopback where agents run on other
            machines; requests are not encrypted, so keep that network private.
        ports: first and last port among which each worker takes a free one; unset: any free port.
        advertised_host: the name under which agents reach `host`; unset: `host`, or this machine's name.

        Raises ValueError that names the option, its value and the fix.
        """
        _need("starlette", "uvicorn")
        from fiberpo_megatron.environments.builtin.gateway_server import GatewayServer, open_socket

        _check_choice("reward", reward, ("agent", "tasks"))
        _check_choice("sampling", sampling, ("refuse", "ignore"))
        bounds = {"max_requests": max_requests, "max_parallel": max_parallel, "max_messages": max_messages}
        for name, value in {**bounds, "max_body_kib": max_body_kib}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} = {value!r} must be a whole number of at least 1")
        if isinstance(idle_s, bool) or not isinstance(idle_s, (int, float)) or not 0 < idle_s < 86_400:
            raise ValueError(f"idle_s = {idle_s!r} must be a number of seconds above 0 and below 86400")
        if (command is None) == (agent is None):
            raise ValueError("name the agent by either `command` or `agent`")
        self._command = None if command is None else _checked_command(command)
        self._function = None if agent is None else _function(agent)
        self._name = agent or (self._command or [""])[0]
        self._tasks = _task_environment(tasks, scores=reward == "tasks")
        self.train_size, self.held_out_size = self._tasks.train_size, self._tasks.held_out_size
        self.check_all_tasks = self._tasks.check_all_tasks
        self.chat_template_kwargs = self._tasks.chat_template_kwargs
        self._scores, self._env, self._model = reward == "tasks", dict(env or {}), model
        self._idle_s, self._max_requests, self._max_parallel = idle_s, max_requests, max_parallel
        opened = open_socket(host, [0] if ports is None else range(ports[0], ports[1] + 1))
        self._host = advertised_host or (socket.gethostname() if host in ("0.0.0.0", "::", "") else host)
        shown_host = f"[{self._host}]" if ":" in self._host else self._host
        self._server = GatewayServer(
            opened,
            f"http://{shown_host}:{opened.getsockname()[1]}/v1",
            model,
            ignore_sampling=sampling == "ignore",
            max_body=max_body_kib * 1024,
            max_messages=max_messages,
        )

    def train(self, index: int) -> Task:
        """Return the training task at `index` of the tasks' environment, as chat messages."""
        return _as_chat(self._tasks.train(index))

    def held_out(self, index: int) -> Task:
        """Return a held-out task of the tasks' environment, as chat messages."""
        return _as_chat(self._tasks.held_out(index))

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        """Let the agent work on a task, and say what it earned.

        Raises AgentFailed for an agent that ends with an error, that asks nothing, too much or too seldom, or that
        reports no reward.
        """
        from fiberpo_megatron.environments.builtin.gateway_server import Session

        session = Session(policy, self._max_requests, self._max_parallel)
        with self._server.session(session):
            found = await self._watched(asyncio.ensure_future(self._solve(task, session.key)), session)
        last = session.conversation.last
        if last is None:
            requests = session.counts["requests"]
            refused = f"; the gateway has refused all of its {requests} requests" if requests else ""
            raise AgentFailed(f"the agent {self._name!r} ended before the policy had answered anything{refused}")
        outcome = await self._outcome(task, found, last)
        counts = {**session.counts, **session.conversation.counts}
        names = ("requests", "refused", "ignored", "continued", "forked", "rewritten")
        metrics = {f"gateway_{name}": float(counts.get(name, 0)) for name in names}
        return Outcome(outcome.reward, outcome.rewards, outcome.correct, {**metrics, **outcome.metrics})

    async def _solve(self, task: Task, key: str) -> Any:
        """Return what the agent returned, or its report."""
        if self._function is not None:
            if inspect.iscoroutinefunction(self._function):
                return await self._function(task, self._server.url, key)
            found = await asyncio.to_thread(self._function, task, self._server.url, key)
            return await found if inspect.isawaitable(found) else found
        assert self._command is not None
        prompt = task.prompt if isinstance(task.prompt, str) else str(task.prompt[-1].get("content", ""))
        command = [word.replace("{prompt}", prompt) for word in self._command]
        fields = {"id": task.id, "prompt": task.prompt, "metadata": dict(task.metadata)}
        if not self._scores:
            fields["answer"] = task.answer  # an agent that is scored here need not see it
        return await run_agent(command, {**self._variables(key), **self._env}, fields)

    def _variables(self, key: str) -> dict[str, str]:
        """Return the environment variables by which OpenAI's clients find the policy."""
        direct = ",".join(filter(None, (os.environ.get("NO_PROXY", os.environ.get("no_proxy")), self._host)))
        return {
            "OPENAI_BASE_URL": self._server.url,
            "OPENAI_API_KEY": key,
            "OPENAI_MODEL": self._model,
            "NO_PROXY": direct,
            "no_proxy": direct,
        }

    async def _watched(self, work: asyncio.Future[Any], session: Session) -> Any:
        """Wait for the agent; end it when it asks too much, or nothing for too long."""
        quiet_s = 0.0
        try:
            while not work.done():
                if quiet_s >= self._idle_s:
                    raise AgentFailed(
                        f"the agent {self._name!r} asked nothing for idle_s = {self._idle_s:g} s and did not end; make "
                        "it faster, or raise idle_s (and deadline_s)"
                    )
                await asyncio.wait({work, session.failure}, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                if session.failure.done():
                    session.failure.result()
                quiet_s = quiet_s + TICK_S if session.quiet else 0.0  # a blocked event loop is not the agent's fault
            return work.result()
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait({work})  # a program is killed within END_S

    async def _outcome(self, task: Task, found: Any, last: Turn) -> Outcome:
        """Return the outcome of what the agent returned or reported."""
        if self._scores:
            turn = last
            answer = _answer(found)
            if answer is not None:
                turn = Turn(answer, "stop", last.token_ids)
            scored = self._tasks.score(task, turn)
            if inspect.isawaitable(scored):
                scored = await scored
            return scored if isinstance(scored, Outcome) else Outcome(scored)
        if isinstance(found, Outcome):
            return found
        if isinstance(found, AgentReport):
            fields = dict(found.fields or {})
            if "reward" in fields:
                fields = {name: fields[name] for name in REPORTED if name in fields and name != "answer"}
                return Outcome(**fields)
            raise AgentFailed(
                f"the agent {self._name!r} reported no reward; have it print a JSON object with `reward` in its last "
                f'line, or set reward = "tasks". Its output ends with:\n{shown(found.output)}'
            )
        if found is None or isinstance(found, str):
            raise AgentFailed(
                f"the agent {self._name!r} returned {found!r:.80}; return a number or an Outcome, or set reward = "
                '"tasks"'
            )
        return Outcome(found)


def _answer(found: Any) -> str | None:
    """Return the answer that an agent gave; None when it gave none."""
    if isinstance(found, AgentReport):
        found = (found.fields or {}).get("answer")
    return None if found is None or isinstance(found, Outcome) else str(found)


def _as_chat(task: Task) -> Task:
    """Return a task whose prompt is a chat, as agents write it: the end of a turn is then a stop token."""
    if not isinstance(task.prompt, str):
        return task
    return Task([{"role": "user", "content": task.prompt}], task.answer, task.metadata, task.id)


def _task_environment(tasks: Any, *, scores: bool) -> Any:
    """Return the environment that gives the tasks. Raises ValueError with the fix."""
    if not isinstance(tasks, Mapping) or not set(tasks) <= {"use", "options"} or not isinstance(tasks.get("use"), str):
        raise ValueError(f'tasks = {tasks!r:.200} must be {{use = "chat", options = {{...}}}}')
    options = tasks.get("options", {})
    plugin = plugins.find("environments", tasks["use"], "tasks.use")
    plugins.check_options(plugin, options, "tasks.use")
    if not isinstance(plugin.target, type) or not issubclass(plugin.target, Environment):
        raise ValueError(f"tasks.use: {plugin.path} is no environment")
    found = plugin.target(**options)
    if scores and getattr(plugin.target, "score", SingleTurn.score) is SingleTurn.score:
        raise ValueError(f'reward = "tasks", but {plugin.path} has no score(task, turn); set reward = "agent"')
    return found


def _function(path: str) -> AgentFunction:
    function: AgentFunction = plugins.find("agents", path, "agent").target
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError:
        raise ValueError(f"agent = {path!r} must be a function that takes (task, base_url, api_key)") from None
    return function


def _checked_command(command: Any) -> list[str]:
    if isinstance(command, str) or not command or not all(isinstance(word, str) and word for word in command):
        raise ValueError(f'command = {command!r} must be a list of texts, such as ["python", "agent.py", "{{prompt}}"]')
    return [sys.executable if word == "python" and i == 0 else word for i, word in enumerate(command)]


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}; use {' or '.join(choices)}")


def _need(*packages: str) -> None:
    """Raise ValueError when the worker's interpreter lacks a package."""
    lacking = [package for package in packages if importlib.util.find_spec(package) is None]
    if lacking:
        raise ValueError(
            f"the gateway needs {' and '.join(lacking)}, which {sys.executable} does not have; install them with "
            f"`pip install {' '.join(packages)}`"
        )
