"""This module makes scored groups of prompts: sampling, the environments' work, and what follows from failures."""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np

from fiberpo_megatron.engines.background import BackgroundLoop
from fiberpo_megatron.environments import Outcome, Turn
from fiberpo_megatron.environments import Trajectory as EnvironmentTrajectory
from fiberpo_megatron.environments.budget import StepBudget
from fiberpo_megatron.environments.host import EnvironmentFailed, Failure
from fiberpo_megatron.environments.jobs import Say
from fiberpo_megatron.interfaces import ConversationEncoder, Sampler, Scorer, Segments
from fiberpo_megatron.rollout.branches import BranchedConversation
from fiberpo_megatron.rollout.conversation import ParseTools, PolicyConversation, response_seeds
from fiberpo_megatron.rollout.environments import RunningEnvironment
from fiberpo_megatron.rollout.producer import Groups, Keep
from fiberpo_megatron.rollout.rewards import weighted_reward
from fiberpo_megatron.tracks import Timeline, Track
from fiberpo_megatron.types import Branch, Completion, Prompt, RolloutGroup, TokenSequence, Trajectory

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sampled:
    """It says how the trajectories of some prompts are sampled."""

    name: str
    """Sampling seeds depend on it: the training step, or the version of the weights of an evaluation."""
    versions: frozenset[str]
    """Versions of the weights that may sample tokens."""
    priority: int = 0
    """That of the first prompt's requests; each further prompt has the next number (`Sampler.sample`)."""
    step: int | None = None
    """The training step whose trajectories they are; None: no step trains on them (an evaluation)."""
    segments: Segments | None = None
    """Keeps what requests have sampled for a resumed run, and has what they sampled in an earlier start."""

    def of_prompt(self, index: int) -> "Sampled":
        """Return this for the prompt at `index`."""
        return replace(self, priority=self.priority + index)


@dataclass(frozen=True)
class _Sample:
    """One trajectory before its group is complete."""

    prompt: Prompt
    completion: Completion | None
    """None when the environment failed before the policy said anything."""
    text: str
    turns: tuple[Turn, ...]
    result: Outcome | Failure
    branches: tuple[Branch, ...] = ()
    """Further token sequences, of an agent that rewrote the past."""


@dataclass(frozen=True)
class Generator:
    """It has prompts sampled by the engines and worked on by their environments.

    All of it runs on `loop`, where the clients of the engines and the pools of the environments live.
    """

    sampler: Sampler
    environments: Sequence[RunningEnvironment]
    encoder: ConversationEncoder
    loop: BackgroundLoop
    seed: int
    """Sampling depends on it, on the step (of an evaluation: on the weights' version) and on the prompt, not on which
    rank asks."""
    random_reward: bool = False
    """`data.random_reward`."""
    parse_tools: ParseTools | None = None
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    """What scores the tokens of training trajectories, by the field of `Completion` that it fills."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """What `environments.Conversation.sampling` says: `temperature`, `top_p` and `max_tokens`."""
    longest: int | None = None
    """Tokens of the longest sequence that a conversation may grow to; None: any number."""
    timeline: Timeline = field(default_factory=Timeline)
    """What every trajectory does, and when."""

    def groups(
        self, prompts: Sequence[Prompt], count: int, version: str, stop: Callable[[], bool], priority: int = 0
    ) -> Iterator[tuple[int, RolloutGroup]]:
        """Yield pairs (index of a prompt, its scored trajectories), each prompt once, as they are finished.

        All are sampled with weights `version`. There are fewer prompts where `stop` says so before the last has ended.
        Raises what `begin` says.
        """
        sampling = Sampled(version, frozenset([version]), priority)
        groups = self.begin(dict(enumerate(prompts)), count, sampling)
        try:
            yield from groups.finished(stop)
        finally:
            groups.cancel()

    def begin(self, prompts: Mapping[int, Prompt], count: int, sampled: Sampled, keep: Keep | None = None) -> Groups:
        """Begin to make the groups of all prompts at the same time; `prompts` and the groups have the same keys.

        A group has `count` trajectories, or fewer where its environment failed and drops them. A trajectory is scored
        by `scorers` as soon as it has ended, while others are still sampled, and its group is finished when the scores
        are there. `keep` is called with each finished group at once.

        What comes of it raises EnvironmentFailed for a failure with `on_failure = "error"`, ScoringFailed when a
        scorer's servers failed, and RuntimeError when an engine answered with other weights than `sampled` allows,
        which would mean that a publication was lost.
        """
        asked = Counter(prompt.domain for prompt in prompts.values())
        budgets = {domain: self.environments[domain].step_budget(asked[domain], count) for domain in asked}

        async def make(index: int, prompt: Prompt) -> RolloutGroup:
            return await self.group(prompt, count, sampled.of_prompt(index), budgets[prompt.domain])

        return Groups(self.loop, make, prompts, keep)

    async def group(
        self, prompt: Prompt, count: int, sampled: Sampled, budget: StepBudget | None = None
    ) -> RolloutGroup:
        """Return the `count` scored trajectories of one prompt. `budget` bounds the time of its environment."""
        environment = self.environments[prompt.domain]
        name = f"{environment.config.name}/{prompt.task.id or prompt.index}"
        tracks = [self.timeline.begin(sampled.step, name, i) for i in range(count)]
        if environment.description.single_turn:
            seeds = response_seeds(self._seed(prompt, sampled.name), count)
            samples = await _together(
                self._single_turn(environment, prompt, i, seeds[i], sampled, budget, track)
                for i, track in enumerate(tracks)
            )
        else:
            samples = await _together(
                self._conversation(environment, prompt, i, sampled, budget, track) for i, track in enumerate(tracks)
            )
        if environment.description.scores_groups:
            with ExitStack() as scored:
                for track in tracks:
                    scored.enter_context(track.phase("environment"))
                samples = await self._score_group(environment, prompt, samples, budget)
            for track in tracks:
                track.end()
        trajectories = [self._trajectory(environment, sample, i) for i, sample in enumerate(samples)]
        return RolloutGroup(prompt, tuple(t for t in trajectories if t is not None))

    async def _single_turn(
        self,
        environment: RunningEnvironment,
        prompt: Prompt,
        sample: int,
        seed: int,
        sampled: Sampled,
        budget: StepBudget | None,
        track: Track,
    ) -> _Sample:
        """Return one answer, which is scored as soon as it is there, whatever the other answers to the prompt do."""
        completions = await self.sampler.sample(
            prompt.token_ids, [seed], priority=sampled.priority, track=track, segments=sampled.segments
        )
        if len(completions) != 1:
            raise ValueError(f"the engine gave {len(completions)} answers to prompt {prompt.text!r}, not 1")
        completion = completions[0]
        self._check(sampled.versions, prompt, completion)
        turn = Turn(self.encoder.text(completion.token_ids), completion.finish_reason, completion.token_ids)
        result: Outcome | Failure = Outcome(0.0)
        if environment.description.scores:
            with track.phase("environment"):
                result = await environment.pool.score(
                    prompt.task, turn, seed=self._environment_seed(prompt, sample), sample=sample, budget=budget
                )
        return await self._ended(_Sample(prompt, completion, turn.text, (turn,), result), environment, track)

    async def _conversation(
        self,
        environment: RunningEnvironment,
        prompt: Prompt,
        sample: int,
        sampled: Sampled,
        budget: StepBudget | None,
        track: Track,
    ) -> _Sample:
        seed = self._seed(prompt, sampled.name)
        attempts: list[BranchedConversation] = []
        waiting = ExitStack()

        def begin() -> Say:
            """A conversation from the start; an environment whose worker died gets another one."""
            waiting.close()
            branch = partial(
                PolicyConversation,
                prompt,
                sample,
                seed,
                self.encoder,
                self.sampler,
                partial(self._check, sampled.versions),
                self.parse_tools,
                longest=self.longest,
                priority=sampled.priority,
                track=track,
                segments=sampled.segments,
            )
            attempts.append(BranchedConversation(branch))
            return attempts[-1].say

        with track.phase("environment"), waiting:
            waiting.enter_context(track.phase("queued"))  # for a worker, until it begins
            result = await environment.pool.run(
                prompt.task,
                begin,
                seed=self._environment_seed(prompt, sample),
                sample=sample,
                budget=budget,
                sampling=self.sampling,
            )
        first = attempts[-1].first if attempts else None
        if first is None:
            if isinstance(result, Outcome):
                result = Failure("invalid", "run() returned an outcome before it let the policy say anything")
            return await self._ended(_Sample(prompt, None, "", (), result), environment, track)
        found = attempts[-1]
        asked = prompt if first.prompt_ids == prompt.token_ids else replace(prompt, token_ids=first.prompt_ids)
        found_sample = _Sample(asked, first.completion, found.text, tuple(found.turns), result, found.branches)
        return await self._ended(found_sample, environment, track)

    async def _ended(self, sample: _Sample, environment: RunningEnvironment, track: Track) -> _Sample:
        """The sample with its scores; it has ended then, unless its group is scored once all are there."""
        with track.phase("scoring"):
            scored = await self._with_scores(sample)
        if not environment.description.scores_groups:
            track.end()
        return scored

    async def _with_scores(self, sample: _Sample) -> _Sample:
        """The sample with what other models say about its tokens. Held-out ones are not trained on, and not scored."""
        completion = sample.completion
        if not self.scorers or completion is None or sample.prompt.split != "train":
            return sample
        own, *others = await _together(
            self._scored(sequence)
            for sequence in (TokenSequence(sample.prompt.token_ids, completion), *sample.branches)
        )
        branches = tuple(replace(branch, completion=scored) for branch, scored in zip(sample.branches, others))
        return replace(sample, completion=own, branches=branches)

    async def _scored(self, sequence: TokenSequence) -> Completion:
        """The completion of a sequence with the scores of its sampled tokens."""
        completion = sequence.completion
        found = await _together(
            scorer.log_probs(sequence.prompt_ids, completion.token_ids) for scorer in self.scorers.values()
        )
        if completion.loss_mask is not None:
            found = [np.where(completion.loss_mask, log_probs, np.float32(np.nan)) for log_probs in found]
        scores: dict[str, Any] = dict(zip(self.scorers, found))
        return replace(completion, **scores)

    async def _score_group(
        self,
        environment: RunningEnvironment,
        prompt: Prompt,
        samples: Sequence[_Sample],
        budget: StepBudget | None,
    ) -> list[_Sample]:
        """The samples with the outcomes that their group gave them."""
        whole = [i for i, sample in enumerate(samples) if isinstance(sample.result, Outcome)]
        if not whole:
            return list(samples)
        seen = [EnvironmentTrajectory(samples[i].turns, samples[i].result) for i in whole]  # type: ignore[arg-type]
        seed = self._environment_seed(prompt, -1)
        found = await environment.pool.score_group(prompt.task, seen, seed=seed, budget=budget)
        results: Sequence[Outcome | Failure] = [found] * len(whole) if isinstance(found, Failure) else found
        scored: dict[int, Outcome | Failure] = dict(zip(whole, results, strict=True))
        return [replace(sample, result=scored.get(i, sample.result)) for i, sample in enumerate(samples)]

    def _trajectory(self, environment: RunningEnvironment, sample: _Sample, number: int) -> Trajectory | None:
        """The sample as a trajectory; None when it is dropped."""
        failure = sample.result if isinstance(sample.result, Failure) else None
        if failure is not None and environment.config.on_failure == "error":
            raise EnvironmentFailed(
                f"environment {environment.config.name!r} failed on task {sample.prompt.task.id} ({failure.kind}: "
                f'{failure.message}); correct it, or set its on_failure to "zero" or "drop"'
            )
        if sample.completion is None or (failure is not None and environment.config.on_failure == "drop"):
            return None
        outcome = sample.result if isinstance(sample.result, Outcome) else Outcome(0.0, correct=False)
        correct = outcome.reward > 0 if outcome.correct is None else outcome.correct
        reward = outcome.reward if failure else weighted_reward(environment.config, sample.prompt.task.id, outcome)
        if self.random_reward:
            reward = self._coin(sample.prompt, number)
        return Trajectory(
            sample.prompt,
            sample.completion,
            sample.text,
            float(reward),
            correct,
            outcome.rewards,
            outcome.metrics,
            None if failure is None else f"{failure.kind}: {failure.message}",
            sample.branches,
            outcome.answer,
        )

    def _check(self, versions: Collection[str], prompt: Prompt, completion: Completion) -> None:
        """RuntimeError for a response of other weights, or one without tokens."""
        seen = {span.version for span in completion.weight_spans}
        if not seen <= set(versions):
            raise RuntimeError(
                f"a rollout of prompt {prompt.text!r} was sampled with weights {sorted(seen)}, but only "
                f"{sorted(versions)} may be in it; check that no other run publishes to these engines"
            )
        if not completion.token_ids:
            raise RuntimeError(
                f"the engine returned an empty response to prompt {prompt.text!r} "
                f"(finish reason {completion.finish_reason!r}); raise rollout.max_response_tokens"
            )

    def _seed(self, prompt: Prompt, name: str) -> int:
        text = f"{self.seed} {name} {prompt.domain} {prompt.number}".encode(errors="surrogatepass")
        return int.from_bytes(blake2b(text, digest_size=4).digest(), "big") >> 1  # engines take 31 bits

    def _environment_seed(self, prompt: Prompt, sample: int) -> int:
        name = f"environment {self.seed} {prompt.domain} {prompt.split} {prompt.number} {sample}"
        digest = blake2b(name.encode(errors="surrogatepass"), digest_size=4)
        return int.from_bytes(digest.digest(), "big") >> 1

    def _coin(self, prompt: Prompt, sample: int) -> float:
        """A fair coin that ignores the response, for the control experiment. `correct` stays true, so that accuracy
        shows what such a run really learns: nothing."""
        message = repr((self.seed, prompt.domain, prompt.number, sample)).encode()
        return float(blake2b(message, digest_size=1).digest()[0] & 1)


def share(items: Sequence[Item], data_rank: int, data_size: int) -> Sequence[Item]:
    """Return the contiguous share of a data-parallel rank. Joined in rank order the shares are the step's prompts
    again, so that the batch does not depend on the layout."""
    return items[len(items) * data_rank // data_size : len(items) * (data_rank + 1) // data_size]


async def _together(work: Iterable[Coroutine[Any, Any, Item]]) -> list[Item]:
    """Return all results, in order; after the first error the others are cancelled, so that nothing more is sent."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one) for one in work]
    return [one.result() for one in running]
