"""A policy of one table and an engine that samples from what was published: the loop's collaborators without
Megatron and SGLang. The real ones are in tests/distributed and tests/end_to_end."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from fiberpo_megatron.data.prompts import Domain, Place, PromptSets
from fiberpo_megatron.engines.background import BackgroundLoop
from fiberpo_megatron.environments import (
    Conversation,
    Environment,
    Message,
    Outcome,
    SingleTurn,
    Split,
    Task,
    Turn,
)
from fiberpo_megatron.environments import Trajectory as EnvironmentTrajectory
from fiberpo_megatron.environments.budget import StepBudget
from fiberpo_megatron.environments.host import Description, Failure
from fiberpo_megatron.environments.jobs import FIRST, BranchPoint, Say
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.interfaces import (
    ConversationEncoder,
    Layout,
    LocalShard,
    NamedShape,
    Policy,
    Publisher,
    Routing,
    Sampler,
    SamplingChange,
    Segments,
    WeightSource,
)
from fiberpo_megatron.rollout.environments import RunningEnvironment, Workers
from fiberpo_megatron.rollout.filter import Filtered
from fiberpo_megatron.rollout.generator import Generator
from fiberpo_megatron.sources.device_sharing import EngineMemory
from fiberpo_megatron.sources.stored import Store
from fiberpo_megatron.tracks import Track
from fiberpo_megatron.types import (
    Coefficients,
    Completion,
    Gate,
    MicroBatch,
    OptimizerStep,
    Prompt,
    RolloutBatch,
    RolloutGroup,
    RoutingMode,
    TokenScores,
    WeightSpan,
    concatenated_response_tokens,
    response_slices,
)

VOCABULARY = 12


class SingleLayout:
    rank = data_rank = context_rank = 0
    world_size = data_size = context_size = expert_size = 1
    is_leader = is_last_stage = is_logger = True
    sequence_multiple = micro_batch_multiple = 1

    def sum_over_tokens(self, x: Tensor) -> Tensor:
        return x

    def max_over_tokens(self, x: Tensor) -> Tensor:
        return x

    def gather_rollouts(self, share: RolloutBatch | None) -> RolloutBatch:
        assert share is not None
        return share

    def routes(self, rollouts: RolloutBatch, tokens: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        known = np.isin(tokens.numpy(), rollouts.held_rows)
        at = np.searchsorted(rollouts.held_rows, tokens.numpy()[known])
        return torch.from_numpy(known), torch.from_numpy(rollouts.routed_experts[at][:, list(layers)])

    def gather_json(self, value: Any, root_only: bool = False) -> list[Any]:
        return [json.loads(json.dumps(value))]

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        return [list(numbers)]

    def share_text(self, text: str | None) -> str:
        assert text is not None
        return text

    def wait_for_all(self, where: str, deadline_s: float) -> None:
        pass

    def agree(self, error: str | None, where: str, reraise: bool = True) -> None:
        if error is not None and reraise:
            raise RuntimeError(f"rank 0 failed while {where}: {error}")

    def any_rank(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        pass


class TablePolicy:
    """p(next | previous) = softmax of a row; plain gradient ascent."""

    def __init__(self, learning_rate: float) -> None:
        self.layout = SingleLayout()
        self.routing = TokenRouting()
        self.table = torch.zeros(VOCABULARY, VOCABULARY, requires_grad=True)
        self.learning_rate = learning_rate
        self.forwards = 0
        self.released = False
        self.reference_table = torch.zeros(VOCABULARY, VOCABULARY)

    @contextmanager
    def reference(self) -> Iterator[None]:
        table = self.table
        self.table = self.reference_table
        yield
        self.table = table

    def _scores(self, micro_batch: MicroBatch, temperature: float) -> Tensor:
        positions = micro_batch.response_positions
        return torch.log_softmax(self.table[micro_batch.tokens[positions]] / temperature, -1)

    def _log_probs(self, micro_batch: MicroBatch, temperature: float) -> Tensor:
        labels = micro_batch.labels[micro_batch.response_positions]
        return self._scores(micro_batch, temperature).gather(1, labels[:, None])[:, 0]

    def log_probs(
        self,
        micro_batches: Sequence[MicroBatch],
        temperature: float,
        *,
        routing: RoutingMode = "off",
        keep: bool = False,
    ) -> TokenScores:
        self.forwards += 1
        if routing == "record":
            self.routing.record(micro_batches)
        with torch.no_grad():
            rows = torch.cat([self._scores(m, temperature) for m in micro_batches])
            log_probs = torch.cat([self._log_probs(m, temperature) for m in micro_batches])
        return TokenScores(log_probs, -(rows.exp() * rows).sum(-1))

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        gate: Gate,
        temperature: float,
        *,
        log_probs: Tensor | None = None,
        single_pass: bool = False,
    ) -> OptimizerStep:
        assert not self.released
        extra = log_probs is None and not single_pass
        parts = response_slices(micro_batches)
        outcomes: list[Coefficients] = []
        current = [self._log_probs(m, temperature) for m in micro_batches]
        if single_pass:
            outcomes = [gate(x.detach(), part) for x, part in zip(current, parts)]
        else:
            seen = torch.cat(current).detach() if log_probs is None else log_probs
            outcomes = [gate(seen, slice(0, len(seen)))]
        coefficients = torch.cat([o.gradient for o in outcomes]).float()
        value = (coefficients * torch.cat(current)).sum()
        if outcomes[0].entropy is not None:
            rows = torch.cat([self._scores(m, temperature) for m in micro_batches])
            bonus = torch.cat([o.entropy for o in outcomes if o.entropy is not None]).float()
            value = value - (bonus * (rows.exp() * rows).sum(-1)).sum()
        (gradient,) = torch.autograd.grad(value, self.table)
        with torch.no_grad():
            self.table += self.learning_rate * gradient
        return OptimizerStep(gradient.norm().item(), self.learning_rate, tuple(outcomes), extra)

    @property
    def weights(self) -> "TableWeights":
        return TableWeights(self.table)

    def release_memory(self) -> None:
        self.released = True

    def restore_memory(self) -> None:
        self.released = False

    def save(self, folder: str, state: Mapping[str, object]) -> None:
        assert not self.released
        torch.save({"table": self.table.detach(), "state": dict(state)}, folder)

    def begin_save(self, folder: str, state: Mapping[str, object]) -> "Written":
        self.save(folder, state)
        return Written()

    def load(self, folder: str) -> dict[str, object]:
        saved = torch.load(folder)
        with torch.no_grad():
            self.table.copy_(saved["table"])
        return dict(saved["state"])


class Written:
    """A checkpoint that was written at once."""

    def written(self) -> bool:
        return True

    def finish(self) -> None:
        pass


class TokenRouting:
    """Routing by the input token alone: one MoE layer in which token t goes to the experts t and t + 1 (mod 4)."""

    num_experts = 4
    layers = (0,)

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.recorded: dict[int, list[int]] = {}
        """The two experts of each flat token that a pass has seen."""
        self.engine: dict[int, list[int]] = {}

    def record(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Note the experts of all tokens of the rows, as a forward pass does."""
        for batch in micro_batches:
            for source, token in zip(batch.source_tokens.tolist(), batch.tokens.tolist(), strict=True):
                if source >= 0:
                    self.recorded[source] = [token % self.num_experts, (token + 1) % self.num_experts]

    def tokens(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        sources = torch.cat([batch.source_tokens for batch in micro_batches])
        return sources[sources >= 0]

    def fill(self, tokens: Tensor, experts: Tensor, *, replay: bool) -> None:
        self.engine = dict(zip(tokens.tolist(), experts[:, 0].tolist(), strict=True))
        if replay:
            self.recorded = self.engine

    def chosen(self, tokens: Tensor, *, engine: bool = False) -> dict[int, Tensor]:
        known = self.engine if engine else self.recorded
        return {0: torch.tensor([known.get(token, [-1, -1]) for token in tokens.tolist()])} if known else {}

    def expert_counts(self, micro_batches: Sequence[MicroBatch], *, engine: bool = False) -> Tensor:
        chosen = self._chosen(micro_batches, engine)
        counts = torch.zeros(len(chosen), self.num_experts)
        return counts.scatter_add_(1, chosen, torch.ones(chosen.shape))

    def agreement(self, micro_batches: Sequence[MicroBatch], bins: Tensor, count: int) -> Tensor:
        ours, theirs = (self._chosen(micro_batches, engine).sort(-1).values for engine in (False, True))
        equal = (ours == theirs).all(-1).double()
        of = bins[concatenated_response_tokens(micro_batches).long() - 1]
        found = torch.zeros(count, 2, dtype=torch.float64)
        return found.index_add_(0, of, torch.stack([equal, torch.ones_like(equal)], -1))[None]

    def _chosen(self, micro_batches: Sequence[MicroBatch], engine: bool) -> Tensor:
        """[n, 2] experts at the position that predicts each response token."""
        known = self.engine if engine else self.recorded
        assert known, "no pass has recorded its routing"
        return torch.tensor([known[token - 1] for token in concatenated_response_tokens(micro_batches).tolist()])


class TableWeights:
    def __init__(self, table: Tensor) -> None:
        self.table = table.detach().clone()

    def full(self) -> Iterator[tuple[str, Tensor]]:
        yield "table", self.table

    def local(self) -> Iterator[LocalShard]:
        yield LocalShard("table", self.table, tuple(self.table.shape), (0, 0))

    def rounds(self, limit: int) -> list[list[list[NamedShape]]]:
        return [[[NamedShape("table", tuple(self.table.shape), self.table.dtype)]]]

    def share(self, limit: int) -> Iterator[list[tuple[str, Tensor]]]:
        yield list(self.full())


class FakeEngine:
    """Sampler and publisher in one: samples from the table that was published last."""

    def __init__(self, seed: int, length: int = 3) -> None:
        self.table = torch.zeros(VOCABULARY, VOCABULARY)
        self.version = "none"
        self.length = length
        self.random = torch.Generator().manual_seed(seed)
        self.corrupt = 0.0
        self.missing: set[str] = set()
        """What of its memory it has given up, or holds without contents."""
        self.released: list[tuple[str, ...]] = []

    def release_memory(self, tags: Sequence[str]) -> None:
        self.released.append(tuple(tags))
        self.missing |= {f"{tag} memory" for tag in tags} | ({"weights"} & set(tags))

    def resume_memory(self, tags: Sequence[str]) -> None:
        self.missing -= {f"{tag} memory" for tag in tags}

    def publish(self, source: WeightSource, version: str) -> None:
        assert self.missing <= {"weights"}
        self.missing = set()
        for _, tensor in source.full():
            self.table = tensor + self.corrupt * torch.eye(VOCABULARY)
        self.version = version

    async def sample(
        self,
        prompt: Sequence[int],
        seeds: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop_token_ids: Sequence[int] = (),
        change: SamplingChange | None = None,
        priority: int = 0,
        track: Track | None = None,
        known_routes: int = 0,
        segments: Segments | None = None,
    ) -> list[Completion]:
        assert not self.missing
        return [self._one(prompt[-1], change or SamplingChange()) for _ in seeds]

    def _one(self, token: int, change: SamplingChange) -> Completion:
        tokens, log_probs = [], []
        length = change.max_response_tokens or self.length
        for _ in range(length):
            scores = self.table[token]
            if change.temperature == 0:
                scores = torch.full_like(scores, -1e4).index_fill(0, scores.argmax(), 0.0)
            row = torch.log_softmax(scores / (change.temperature or 1.0), -1)
            token = int(torch.multinomial(row.exp(), 1, generator=self.random))
            tokens.append(token)
            log_probs.append(row[token].item())
        spans = (WeightSpan(self.version, 0, length),)
        return Completion(tuple(tokens), np.array(log_probs, np.float32), "stop", spans)

    def score(self, token_ids: Sequence[int]) -> dict[int, list[float]]:
        assert not self.missing
        rows = torch.log_softmax(self.table[list(token_ids[:-1])], -1)
        return {0: rows.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()}


class NothingStored:
    """No rollouts on disk."""

    def load(self, step: int, prompts: Sequence[Prompt], weights: str) -> RolloutBatch | None:
        return None

    def filtered(self, step: int) -> Filtered | None:
        return None

    def save(
        self,
        step: int,
        prompts: Sequence[Prompt],
        weights: str,
        batch: RolloutBatch,
        filtered: Filtered | None = None,
    ) -> None:
        pass

    def unfinished(
        self,
        step: int,
        prompts: Sequence[Prompt],
        weights: str,
        mine: Sequence[int],
        refills: Sequence[Prompt] | None = None,
    ) -> AbstractContextManager[MutableMapping[int, RolloutGroup]]:
        return nullcontext({})

    def saved(self, done: int) -> None:
        pass


class CountingPrompts(PromptSets):
    """Places of prompts that count up from the seed; two domains, in turn."""

    def __init__(self) -> None:
        super().__init__([Domain("counting", 1.0, 10**6, 10**6), Domain("other", 1.0, 10**6, 10**6)])

    def prompts_at(self, seed: int, step: int, count: int) -> list[Place]:
        return [Place(i % 2, "train", i) for i in range(seed + step * count, seed + (step + 1) * count)]

    def held_out(self, count: int) -> list[Place]:
        return [Place(i % 2, "held_out", i) for i in range(count)]


def read(places: Sequence[Place]) -> list[Prompt]:
    """Prompt p wants a response full of token p + 1 (mod the vocabulary)."""
    return [one_prompt(place.index, place.domain, place.split) for place in places]


def one_prompt(index: int, domain: int = 0, split: Split = "train") -> Prompt:
    token = index % VOCABULARY
    task = Task(f"<{token}>", str((token + 1) % VOCABULARY))
    return Prompt(index, domain, (token,), f"<{token}>", task, split)


class Words:
    """Encodes no text; what the policy says is read as its token ids."""

    def __init__(self, between: tuple[int, ...] = ()) -> None:
        self.between = between

    def first(
        self, prompt: Prompt, new: str | Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[int, ...]:
        return prompt.token_ids

    def following(
        self,
        prompt: Prompt,
        response_ids: Sequence[int],
        new: str | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[int, ...]:
        return self.between

    def text(self, token_ids: Sequence[int], stop: Sequence[str] = (), special: bool = False) -> str:
        return " ".join(map(str, token_ids))

    def tokens_with(self, characters: Sequence[str]) -> tuple[int, ...]:
        return ()


class InProcess:
    """The work of an environment's object in this process, for what does not depend on workers."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.counts: Counter[str] = Counter()

    async def tasks(self, split: Split, indices: Sequence[int]) -> list[Task]:
        get = self.environment.train if split == "train" else self.environment.held_out
        return [get(index) for index in indices]

    async def score(
        self, task: Task, turn: Turn, *, seed: int, sample: int | None = None, budget: StepBudget | None = None
    ) -> Outcome | Failure:
        assert isinstance(self.environment, SingleTurn)
        try:
            result = self.environment.score(task, turn)
        except Exception as error:
            self.counts["failures"] += 1
            return Failure("exception", str(error))
        return result if isinstance(result, Outcome) else Outcome(result)

    async def run(
        self,
        task: Task,
        converse: Callable[[], Say],
        *,
        seed: int,
        sample: int | None = None,
        budget: StepBudget | None = None,
        sampling: Mapping[str, float] | None = None,
    ) -> Outcome | Failure:
        try:
            return await self.environment.run(task, Speaker(converse(), seed))
        except ArithmeticError as error:
            self.counts["failures"] += 1
            return Failure("exception", str(error))

    async def score_group(
        self, task: Task, trajectories: Sequence[EnvironmentTrajectory], *, seed: int, budget: StepBudget | None = None
    ) -> list[Outcome] | Failure:
        return list(self.environment.score_group(task, trajectories))  # type: ignore[attr-defined]

    def take_counts(self) -> Mapping[str, int]:
        counts, self.counts = self.counts, Counter()
        return counts

    async def close(self) -> None:
        pass


class Speaker:
    """A conversation around a Say."""

    sampling: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 8}

    def __init__(self, say: Say, seed: int, branch: BranchPoint = FIRST) -> None:
        self._say, self.seed, self._branch, self._branches = say, seed, branch, count(1)

    def fork(self, turns: int = 0) -> "Speaker":
        forked = Speaker(self._say, self.seed, BranchPoint(next(self._branches), self._branch.number, turns))
        forked._branches = self._branches
        return forked

    async def say(
        self,
        new: str | Message | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
    ) -> Turn:
        words = new if isinstance(new, str) else [new] if isinstance(new, Mapping) else list(new)
        return await self._say(words, tools, max_tokens, stop, *([self._branch] if self._branch.number else []))


class FirstToken(SingleTurn):
    """Right when the first response token is the wanted one."""

    train_size = held_out_size = 10**6

    def score(self, task: Task, turn: Turn) -> Outcome:
        right = turn.text.split()[0] == task.answer
        return Outcome(float(right), correct=right)


def running(environment: Environment, **settings: Any) -> RunningEnvironment:
    """The environment as the trainer sees it, with its work done in this process."""
    description = Description(
        path="tests:toy",
        version=None,
        train_size=environment.train_size,
        held_out_size=environment.held_out_size,
        single_turn=isinstance(environment, SingleTurn),
        scores=True,
        scores_groups=hasattr(environment, "score_group"),
        deterministic=environment.deterministic,
        check_all_tasks=False,
        chat_template_kwargs={},
    )
    config = EnvironmentConfig(name="toy", use="tests:toy", **settings)
    return RunningEnvironment(config, description, InProcess(environment))


LOOP = BackgroundLoop("toy")
"""One for all tests of a process."""


def generator(
    sampler: Sampler, environment: Environment, *, encoder: Words | None = None, **settings: Any
) -> Generator:
    """A generator whose two domains are the same environment."""
    one = running(environment, **settings)
    return Generator(sampler, [one, one], encoder or Words(), LOOP, seed=0)


if TYPE_CHECKING:  # mypy compares the fakes with what they stand for
    _layout: Layout = SingleLayout()
    _policy: Policy = TablePolicy(1.0)
    _routing: Routing = TokenRouting()
    _sampler: Sampler = FakeEngine(0)
    _publisher: Publisher = FakeEngine(0)
    _memory: EngineMemory = FakeEngine(0)
    _store: Store = NothingStored()
    _words: ConversationEncoder = Words()
    _workers: Workers = InProcess(FirstToken())
    _speaker: Conversation = Speaker(cast(Say, None), 0)
