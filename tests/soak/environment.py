"""The environments of the toy run. Workers import this file, so it needs the standard library and the package alone."""

from fiberpo_megatron.environments import Conversation, Environment, Outcome, SingleTurn, Task, Turn

SIZE = 1000
FAILING = 97
"""Every task of this multiple raises in its environment, so that failures are part of a long run."""


def _task(index: int) -> Task:
    digit = index % 10
    return Task(f"{digit}=", str((digit + 1) % 10), metadata={"index": index})


class NextDigit(SingleTurn):
    """Asks for the digit after a digit; prints a line now and then, as the programs of users do."""

    train_size = held_out_size = SIZE

    def train(self, index: int) -> Task:
        return _task(index)

    def held_out(self, index: int) -> Task:
        return _task(index)

    def score(self, task: Task, turn: Turn) -> Outcome:
        index = task.metadata["index"]
        if index and index % FAILING == 0:
            raise ArithmeticError(f"task {index} always fails")
        if index % 10 == 3:
            print("scoring", task.prompt, flush=True)
        right = turn.text[:1] == task.answer
        return Outcome(float(right), rewards={"digit": float(right)}, correct=right)


class TwoTurns(Environment):
    """Asks twice; the second turn is joined to the first token by token."""

    train_size, held_out_size = SIZE, 0

    def train(self, index: int) -> Task:
        return _task(index)

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        first = await policy.say(task.prompt)
        second = await policy.say("!")
        right = [turn.text[:1] == task.answer for turn in (first, second)]
        return Outcome(sum(right) / 2, correct=all(right), metrics={"first": float(right[0])})
