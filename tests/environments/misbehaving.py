"""These environments do what an environment must not do; `task.answer` says which deed is wanted."""

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import threading
import time

from fiberpo_megatron.environments import Environment, Outcome, SingleTurn, Task, worker_jobs

DEEDS = ("fine", "loop", "hang", "eat", "exit", "raise", "late", "text", "nan", "flood", "print", "system_exit")


def do(deed: str) -> object:
    """Do it, in the middle of a call that blocks the worker."""
    if deed == "loop":
        while True:
            pass
    if deed == "sleep":
        time.sleep(60)
    if deed == "pow":
        return len(str(7**10**8))  # one instruction of C that holds the interpreter
    if deed == "eat":
        return len(bytearray(10 << 30))
    if deed == "children_eat":
        eat = "import time; data = bytearray(150 << 20); data[::4096] = b'x' * len(data[::4096]); time.sleep(60)"
        for _ in range(4):
            subprocess.Popen([sys.executable, "-c", eat])
        time.sleep(60)
    if deed == "exit":
        print("these are my last words", flush=True)
        os._exit(3)
    if deed == "segfault":
        os.abort()
    if deed == "raise":
        raise KeyError("no such thing")
    if deed == "raise_escapes":
        raise ValueError("no number: \x1b[2J\u202e\ud800")
    if deed == "raise_badly":
        raise Unshowable
    if deed == "system_exit":
        sys.exit("I have had enough")
    if deed == "nap":
        time.sleep(0.8)
    if deed == "late":
        time.sleep(1.3)
    if deed == "text":
        return "one"
    if deed == "none":
        return None
    if deed == "nan":
        return Outcome(1.0, rewards={"style": float("nan")})
    if deed == "inf":
        return float("inf")
    if deed == "bad_name":
        return Outcome(1.0, metrics={3: 1.0})  # type: ignore[dict-item]
    if deed == "bad_correct":
        return Outcome(1.0, correct="yes")  # type: ignore[arg-type]
    if deed == "flood":
        return Outcome(1.0, metrics={f"metric {i}": float(i) for i in range(20_000)})
    if deed == "print":
        while True:
            print("flood " * 1000)
    return 1.0


class Unshowable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not to be shown")


class Tasks:
    """Has eight training tasks, of which some cannot be had."""

    train_size = 8
    held_out_size = 2

    def train(self, index: int) -> Task:
        if index == 1:
            raise ValueError("the file is damaged")
        if index == 2:
            time.sleep(60)
        if index == 3:
            return Task(prompt="  ")
        if index == 4:
            return Task(prompt="a", metadata={"at": {1, 2}})
        if index == 5:
            return "a"  # type: ignore[return-value]
        if index == 6:
            return Task(prompt=[{"role": "user", "content": "b"}], answer=(1, 2), metadata={"x": [1]}, id="six")
        return Task(prompt="a", answer=str(index))

    def held_out(self, index: int) -> Task:
        return Task(prompt="h", answer=str(index))


class Scored(Tasks, SingleTurn):
    def score(self, task: Task, turn):  # type: ignore[no-untyped-def]
        print("an environment may print")
        return do(task.answer)


class AsyncScored(Tasks, SingleTurn):
    async def score(self, task: Task, turn) -> object:  # type: ignore[no-untyped-def]
        if task.answer == "wait":
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        return do(task.answer)


class Talking(Tasks, Environment):
    """Says something, does its deed, and earns the length of the policy's answer."""

    async def run(self, task: Task, policy) -> Outcome:  # type: ignore[no-untyped-def]
        deed, _, argument = str(task.answer).partition(" ")
        turn = await policy.say(task.prompt)
        if deed == "wait":
            await asyncio.Event().wait()
        elif deed == "stubborn":
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
        elif deed == "late_return":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return Outcome(1.0)
        elif deed == "child_loop":
            await asyncio.gather(asyncio.sleep(0.01), self.block())
        elif deed == "thread_loop":
            await asyncio.to_thread(do, "loop")
        elif deed == "callback_loop":
            asyncio.get_running_loop().call_soon(do, "loop")
            await asyncio.sleep(30)
        elif deed == "thread_exit":
            threading.Timer(0.2, os._exit, [4]).start()
            await asyncio.sleep(30)
        elif deed == "patient":
            for _ in range(10):
                await asyncio.sleep(0.05)
        elif deed == "twice":
            try:
                await asyncio.gather(policy.say("a"), policy.say("b"))
            except RuntimeError as error:
                return Outcome(0.5, metrics={"earlier": float("has not been answered yet" in str(error))})
        elif deed == "gives_up":
            try:
                await asyncio.wait_for(policy.say("slow"), 0.1)
            except asyncio.TimeoutError:  # noqa: UP041 (Python 3.10)
                try:
                    await policy.say("again")
                except RuntimeError as error:
                    return Outcome(0.25, metrics={"cancelled": float("was cancelled" in str(error))})
        elif deed == "impossible":
            try:
                await policy.say("impossible")
            except ValueError as error:
                return Outcome(0.125, metrics={"named": float("that cannot follow" in str(error))})
        elif deed == "says":
            for number in range(int(argument)):
                turn = await policy.say([{"role": "user", "content": f"{number}"}], stop=["x"], max_tokens=5)
        elif deed == "chatter":
            while True:
                await policy.say("x" * 1000)
        elif deed == "cheat":  # a bound that only the trainer keeps
            policy._worker.output_limit = 1 << 60
            return Outcome(1.0, metrics={f"metric {i}": float(i) for i in range(20_000)})
        elif deed == "number":
            return 1.0  # type: ignore[return-value]
        elif deed == "cancels":
            raise asyncio.CancelledError
        elif deed == "fine":
            pass
        else:
            do(deed)
        return Outcome(float(len(turn.text)))

    async def block(self) -> None:
        await asyncio.sleep(0.01)
        do("loop")


class Chance(Tasks, Environment):
    """Draws random numbers between steps that others take."""

    async def run(self, task: Task, policy) -> Outcome:  # type: ignore[no-untyped-def]
        drawn = [random.random()]
        for _ in range(3):
            await policy.say("go")
            await asyncio.sleep(0.001 * (policy.seed % 3))
            drawn.append(random.random())
        return Outcome(sum(drawn), metrics={f"draw {i}": x for i, x in enumerate(drawn)})


class ScoredChance(Tasks, SingleTurn):
    async def score(self, task: Task, turn) -> float:  # type: ignore[no-untyped-def]
        first = random.random()
        await asyncio.sleep(0.001)
        return first + random.random()


class Crashing(Tasks, Environment):
    """Ends its first process after the third answer; a file says whether that has happened."""

    def __init__(self, flag: str) -> None:
        self.flag = flag

    async def run(self, task: Task, policy) -> Outcome:  # type: ignore[no-untyped-def]
        texts = [(await policy.say("start")).text]
        for number in range(3):
            if number == 2 and task.answer == "crash" and not os.path.exists(self.flag):
                open(self.flag, "w").close()
                threading.Timer(0.05, os._exit, [5]).start()
                await asyncio.sleep(30)
            other = task.answer == "fickle" and os.path.exists(self.flag)
            texts.append((await policy.say(f"{number}{'!' if other else ''}")).text)
        return Outcome(1.0, metrics=dict.fromkeys(texts, 1.0))


class Replayed(Crashing):
    deterministic = True


class Grouped(Tasks, SingleTurn):
    def score_group(self, task: Task, trajectories):  # type: ignore[no-untyped-def]
        if task.answer == "few":
            return [Outcome(1.0)]
        best = max(len(one.turns[0].text) for one in trajectories)
        return [Outcome(float(len(one.turns[0].text) == best)) for one in trajectories]


class Leaving(Tasks, SingleTurn):
    """Leaves a process behind."""

    def score(self, task: Task, turn) -> float:  # type: ignore[no-untyped-def]
        return float(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)


class Seen(Tasks, SingleTurn):
    """Reports what a worker can see."""

    def score(self, task: Task, turn) -> Outcome:  # type: ignore[no-untyped-def]
        with open("/proc/self/status") as status:
            threads = next(int(line.split()[1]) for line in status if line.startswith("Threads:"))
        return Outcome(
            float(os.getppid()),
            metrics={
                "launcher": float("RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ),
                "gpus": float(os.environ.get("CUDA_VISIBLE_DEVICES", "all") != ""),
                "stdin": float(len(sys.stdin.read())),
                "python": sys.version_info[0] * 100.0 + sys.version_info[1],
                "torch": float("torch" in sys.modules or "pydantic" in sys.modules),
                "site_packages": float(any("site-packages" in path for path in sys.path)),
                "threads": float(threads),
                "own_folder": float(os.path.dirname(worker_jobs.__file__) in sys.path),
            },
        )
