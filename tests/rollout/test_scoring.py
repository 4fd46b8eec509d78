"""Trajectories scored by servers of another model: requests, retries, the check of the vocabulary, what is kept."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from fiberpo_megatron.config import ConfigError, load_config
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.settings import ScoringServers
from fiberpo_megatron.mcore.parallel.exchange import decode, encode
from fiberpo_megatron.rollout import scoring
from fiberpo_megatron.rollout.dump import Origin, RolloutDump
from fiberpo_megatron.rollout.finished import FinishedGroups
from fiberpo_megatron.rollout.scoring import ScoringFailed, ServedScores, check_vocabulary, probed_tokens
from fiberpo_megatron.types import Completion, WeightSpan, flatten, join_batches
from tests.data.characters import CharacterTokenizer
from tests.engines.fake_server import FakeServers
from tests.rollout.test_generator import PROMPTS, Seeded, UntilRight, never
from tests.trainer.toy import FirstToken, Words, generator, one_prompt

SECTION = "algorithm.distillation.teacher"
URLS = ["http://10.0.0.1:1", "http://10.0.0.2:1"]


def scored(host: str, body: Any) -> dict[str, Any]:
    """Token t has the log-prob -t."""
    tokens, start = body["input_ids"], body["logprob_start_len"]
    entries: list[list[Any]] = [[-float(token), token, None] for token in tokens[start:]]
    entries[0][0] = None
    return {"output_ids": [], "meta_info": {"input_token_logprobs": entries, "finish_reason": {"type": "length"}}}


def ask(
    servers: httpx.AsyncBaseTransport, work: Callable[[ServedScores], Any], timeout_s: float = 5.0, **settings: Any
) -> Any:
    config = ScoringServers(urls=URLS, **settings)
    addresses = [EngineAddress(url, section=SECTION) for url in config.urls]
    with EnginePool(addresses, timeout_s=timeout_s, transport=servers) as pool:
        return pool.run(work(ServedScores(pool, config, SECTION)))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "FIRST_PAUSE_S", 0.0)


def test_a_response_is_scored_behind_its_prompt() -> None:
    servers = FakeServers({"/generate": scored})
    found = ask(servers, lambda s: s.log_probs([7, 8, 9], [3, 4]))
    np.testing.assert_array_equal(found, np.float32([-3, -4]))
    ((_, _, body),) = servers.calls
    assert body["input_ids"] == [7, 8, 9, 3, 4] and body["logprob_start_len"] == 2 and body["return_logprob"]
    assert body["sampling_params"]["temperature"] == 1.0 and body["sampling_params"]["max_new_tokens"] == 0


class Down(FakeServers):
    """The first `failures` requests are lost."""

    def __init__(self, failures: int) -> None:
        super().__init__({"/generate": scored})
        self.failures = failures

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if len(self.calls) < self.failures:
            self.calls.append((str(request.url.host), "", None))
            raise httpx.ConnectError("connection refused")
        return await super().handle_async_request(request)


def test_a_lost_request_is_sent_to_the_next_server() -> None:
    servers = Down(failures=1)

    async def work(scores: ServedScores) -> Any:
        return await scores.log_probs([7], [3]), scores.take_counts(), scores.take_counts()

    found, counts, afterwards = ask(servers, work)
    assert found.tolist() == [-3.0] and set(afterwards.values()) == {0.0}
    assert (counts["trajectories"], counts["retries"]) == (1, 1) and counts["seconds"] > 0
    assert [host for host, _, _ in servers.calls] == ["10.0.0.1", "10.0.0.2:1"]


def test_a_server_that_stays_away_is_one_clear_error() -> None:
    servers = Down(failures=10)
    seen = rf"could not be scored by the servers of {SECTION} in 3 attempts: engine .*no connection.*--resume"
    with pytest.raises(ScoringFailed, match=seen):
        ask(servers, lambda s: s.log_probs([7], [3]), retries=2)
    assert len(servers.calls) == 3


def test_a_slow_server_has_a_deadline() -> None:
    servers = FakeServers({"/generate": scored}, delay_s=30.0)
    began = time.monotonic()
    with pytest.raises(ScoringFailed, match=r"no answer to POST /generate within 0\.05 s"):
        ask(servers, lambda s: s.log_probs([7], [3]), timeout_s=0.05, retries=1)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3.0, "-1"], ids=str)
def test_numbers_that_are_no_log_probs_are_refused_at_once(value: Any) -> None:
    def answer(host: str, body: Any) -> Any:
        found = scored(host, body)
        found["meta_info"]["input_token_logprobs"][-1][0] = value
        return httpx.Response(200, text=json.dumps(found))  # httpx itself refuses nan

    servers = FakeServers({"/generate": answer})
    with pytest.raises(ScoringFailed, match=rf"servers of {SECTION} in 1 attempt: .*bad answer to /generate"):
        ask(servers, lambda s: s.log_probs([7], [3]))


def test_requests_in_flight_are_bounded_and_spread() -> None:
    class Counting(FakeServers):
        most = now = 0

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.005)
            answer = await super().handle_async_request(request)
            self.now -= 1
            return answer

    servers = Counting({"/generate": scored})

    async def many(scores: ServedScores) -> list[Any]:
        return await asyncio.gather(*(scores.log_probs([7], [token]) for token in range(1, 13)))

    found = ask(servers, many, max_concurrent_requests=4)
    assert [values.tolist() for values in found] == [[-float(token)] for token in range(1, 13)]
    assert servers.most == 4
    hosts = [host for host, _, _ in servers.calls]
    assert min(hosts.count("10.0.0.1:1"), hosts.count("10.0.0.2:1")) >= 3  # how many depends on who is quicker


# Vocabulary


class WithTokenizer(FakeServers):
    """Serves a model with `size` tokens and a tokenizer, or none."""

    def __init__(self, size: int = 200, tokenizer: Any = None) -> None:
        super().__init__({"/generate": self.generate, "/v1/detokenize": self.texts})
        self.size, self.tokenizer = size, tokenizer

    def generate(self, host: str, body: Any) -> Any:
        (token,) = body["token_ids_logprob"]
        if token >= self.size:
            message = f"token_ids_logprob contains out-of-vocabulary token id {token}; valid range is [0, {self.size})."
            return httpx.Response(400, json={"error": {"message": message}})
        return {"output_ids": [], "meta_info": {}}

    def texts(self, host: str, body: Any) -> Any:
        if self.tokenizer is None:
            return httpx.Response(500, json={"message": "Internal server error during detokenization"})
        return {"text": [self.tokenizer.decode(row, skip_special_tokens=False) for row in body["tokens"]]}


def check(servers: FakeServers, trust: bool = False, vocabulary: int = 200) -> None:
    ids = probed_tokens(vocabulary, [1])
    tokenizer = CharacterTokenizer()

    async def one(scores: ServedScores) -> None:
        client = scores.pool.clients[0]
        await check_vocabulary(client, tokenizer, ids, vocabulary=vocabulary, section=SECTION, trust=trust)

    ask(servers, one)


class Shifted(CharacterTokenizer):
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return super().decode([token + (token >= 150) for token in token_ids], skip_special_tokens=skip_special_tokens)


def test_the_same_vocabulary_is_accepted_and_a_larger_one_too() -> None:
    check(WithTokenizer(200, CharacterTokenizer()))
    check(WithTokenizer(300, CharacterTokenizer()))
    check(WithTokenizer(200, None), trust=True)


@pytest.mark.parametrize(
    ("servers", "trust", "message"),
    [
        (WithTokenizer(199, CharacterTokenizer()), False, r"does not have token 199, .*valid range is \[0, 199\)"),
        (WithTokenizer(199), True, "does not have token 199"),
        (WithTokenizer(200, Shifted()), False, r"is not this run's: 50 of 200 compared .* such as token 150, which is"),
        (WithTokenizer(200), False, r"did not say what its tokens mean .*teacher\.trust_vocabulary = true"),
    ],
    ids=["smaller", "smaller and trusted", "shifted", "no tokenizer"],
)
def test_another_vocabulary_is_one_clear_error(servers: FakeServers, trust: bool, message: str) -> None:
    with pytest.raises(ScoringFailed, match=rf"^{SECTION}: .*{message}"):
        check(servers, trust)


def test_compared_tokens_are_spread_over_the_vocabulary() -> None:
    ids = probed_tokens(150_000, [149_999, 7])
    assert ids[0] == 0 and ids[-1] == 149_999 and 7 in ids and ids == sorted(set(ids))
    assert max(np.diff(ids)) < 300 and probed_tokens(3) == [0, 1, 2]


# Settings

TOML = """
[model]
path = "m"
[algorithm.distillation]
teacher = {value}
"""


def loaded(tmp_path: Path, value: str) -> Any:
    path = tmp_path / "run.toml"
    path.write_text(TOML.replace("{value}", value))
    return load_config(path).algorithm.distillation.teacher


def test_an_address_stands_for_a_table(tmp_path: Path) -> None:
    assert loaded(tmp_path, '"http://a:1"') == ScoringServers(urls=["http://a:1"])
    assert loaded(tmp_path, '["http://a:1", "http://b:2"]').urls == ["http://a:1", "http://b:2"]
    assert loaded(tmp_path, '{urls = ["http://a:1"], retries = 0}').retries == 0


@pytest.mark.parametrize("form", ['"{}"', '["{}"]', '{{urls = ["{}"]}}', '{{urls = "{}"}}'])
def test_a_password_in_an_address_is_not_shown(tmp_path: Path, form: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, form.format("http://user:hunter2@host:1"))
    assert "hunter2" not in str(caught.value) and "name or password; name the servers' key" in str(caught.value)


@pytest.mark.parametrize("urls", [[], ["http://a:1", "http://a:1/"], ["a:1"]], ids=str)
def test_addresses_that_cannot_be_are_refused(urls: list[str]) -> None:
    with pytest.raises(ValidationError):
        ScoringServers(urls=urls)


# Groups


class Minus:
    """The log-prob of token t is -t / scale; it remembers what it scored."""

    def __init__(self, scale: float = 1.0, error: Exception | None = None) -> None:
        self.scale, self.error = scale, error
        self.asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    async def log_probs(self, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
        self.asked.append((tuple(prompt), tuple(response)))
        if self.error is not None and len(self.asked) > 6:
            raise self.error
        return np.float32([-token / self.scale for token in response])


def test_groups_have_the_scores_of_all_their_tokens() -> None:
    scorers = {"teacher_log_probs": Minus(), "reference_log_probs": Minus(2.0)}
    found = replace(generator(Seeded(), FirstToken()), scorers=scorers)
    groups = [group for _, group in sorted(found.groups(PROMPTS, 3, "0", never), key=lambda pair: pair[0])]
    batch = flatten(groups)
    wanted = np.where(batch.response_mask, -batch.tokens.astype(np.float32), np.nan)
    np.testing.assert_array_equal(batch.teacher_log_probs, wanted)
    np.testing.assert_array_equal(batch.reference_log_probs, wanted / 2)
    assert sorted(scorers["teacher_log_probs"].asked) == sorted(
        (t.prompt.token_ids, t.completion.token_ids) for group in groups for t in group.trajectories
    )


def test_held_out_trajectories_are_not_scored() -> None:
    scorer = Minus()
    found = replace(generator(Seeded(), FirstToken()), scorers={"teacher_log_probs": scorer})
    groups = [group for _, group in found.groups([one_prompt(1, split="held_out")], 2, "0", never)]
    assert not scorer.asked and flatten(groups).teacher_log_probs.shape == (0,)


def test_what_an_environment_said_between_turns_is_context_and_has_no_score() -> None:
    scorer = Minus()
    found = replace(
        generator(Seeded(lambda prompt, seed: (11, 5)), UntilRight(), encoder=Words((7, 7))),
        scorers={"teacher_log_probs": scorer},
    )
    ((_, group),) = found.groups(PROMPTS[:1], 1, "0", never)
    (completion,) = [t.completion for t in group.trajectories]
    assert scorer.asked == [((0,), (11, 5, 7, 7, 11, 5, 7, 7, 11, 5))]
    np.testing.assert_array_equal(
        completion.teacher_log_probs, np.float32([-11, -5, *[np.nan] * 2, -11, -5, *[np.nan] * 2, -11, -5])
    )


def test_groups_that_were_finished_before_a_failure_are_kept() -> None:
    class Late(Minus):
        async def log_probs(self, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
            if len(self.asked) >= 6:
                await asyncio.sleep(0.05)
            return await super().log_probs(prompt, response)

    found = replace(
        generator(Seeded(), FirstToken()),
        scorers={"teacher_log_probs": Late(error=ScoringFailed("the teacher is gone"))},
    )
    came = []
    with pytest.raises(ScoringFailed, match="the teacher is gone"):
        for index, group in found.groups(PROMPTS[:4], 3, "0", never):
            came.append((index, group))
    assert len(came) == 2
    assert all(t.completion.teacher_log_probs is not None for _, group in came for t in group.trajectories)


# What keeps and carries them


def scored_group(index: int, teacher: bool = True) -> Any:
    completion = Completion(
        (4, 5, 6),
        np.float32([-1, -2, -3]),
        "stop",
        (WeightSpan("0", 0, 3),),
        teacher_log_probs=np.float32([-0.5, np.nan, -1.5]) if teacher else None,
    )
    ((_, group),) = generator(Seeded(), FirstToken()).groups([one_prompt(index)], 1, "0", never)
    (trajectory,) = group.trajectories
    return replace(group, trajectories=(replace(trajectory, completion=completion),))


def test_scores_outlive_exchange_finished_groups_and_dump(tmp_path: Path) -> None:
    group = scored_group(3)
    batch = join_batches([flatten([group]), flatten([scored_group(4)])])
    wanted = np.float32([np.nan, -0.5, np.nan, -1.5] * 2)
    np.testing.assert_array_equal(batch.teacher_log_probs, wanted)
    np.testing.assert_array_equal(decode(encode(batch)).teacher_log_probs, wanted)
    np.testing.assert_array_equal(batch.part(1, 2).teacher_log_probs, wanted[4:])
    origin = Origin(0, "0", "p", {}, "r")
    RolloutDump(tmp_path).write(batch, origin)
    np.testing.assert_array_equal(RolloutDump(tmp_path).read(0).teacher_log_probs, wanted)
    assert RolloutDump(tmp_path).read(0).reference_log_probs.shape == (0,)

    prompts = [one_prompt(index) for index in range(5)]
    for expected in ([], [3]):
        with FinishedGroups(tmp_path / "f", origin, 0, prompts, range(5), lambda found: True) as finished:
            assert sorted(finished) == expected
            if expected:
                (trajectory,) = finished[3].trajectories
                np.testing.assert_array_equal(trajectory.completion.teacher_log_probs, wanted[1:4])
                assert trajectory.completion.reference_log_probs is None
            else:
                finished[3] = group


def test_what_was_not_asked_for_costs_nothing() -> None:
    batch = flatten([scored_group(3, teacher=False)])
    assert batch.teacher_log_probs.nbytes == batch.reference_log_probs.nbytes == 0


def test_selected_trajectories_keep_their_facts() -> None:
    batch = join_batches([flatten([scored_group(i, teacher=True)]) for i in range(3)])
    found = batch.select(np.array([True, False, True]))
    np.testing.assert_array_equal(found.tokens, [0, 4, 5, 6, 2, 4, 5, 6])
    assert found.groups.tolist() == [0, 1] and found.lengths.tolist() == [4, 4]
    np.testing.assert_array_equal(found.teacher_log_probs, np.float32([np.nan, -0.5, np.nan, -1.5] * 2))
    assert found.routed_experts.shape == (0, 0, 0)
