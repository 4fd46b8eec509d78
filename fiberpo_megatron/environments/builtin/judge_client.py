"""This module asks a model behind an OpenAI-compatible address, with retries, bounds and a record of replies."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from fiberpo_megatron.environments.builtin.http_json import Address, Answer, HttpError, request_json
from fiberpo_megatron.environments.builtin.judge_records import JudgeRecords, request_key
from fiberpo_megatron.environments.builtin.problems import short

REPLY_BYTES = 1 << 24
RETRIED = frozenset({408, 409, 425, 429})
"""Status codes below 500 that a server may answer for a while."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""The pause before the second attempt, which doubles with each further one, and its bound."""
CHECK_S = 20.0
"""How long the server may take to list its models."""
MILLION = 1_000_000
T = TypeVar("T")


class JudgeError(RuntimeError):
    """The judge gave no usable reply, or may not be asked; the message says why and what to do."""


@dataclass(frozen=True)
class Prices:
    """Says what tokens cost, and how much may be spent. The unit is yours."""

    input: float = 0.0
    """Price of a million tokens of requests."""
    output: float = 0.0
    """Price of a million tokens of replies."""
    limit: float | None = None
    """What all requests that the records hold may cost together."""


@dataclass(frozen=True)
class Reply:
    """Holds what the judge said about one request, after it was read."""

    value: Any
    """What the caller's `read` made of it."""
    requests: int
    """How many requests were sent; 0 for a reply from the records."""
    seconds: float
    price: float


class JudgeClient:
    """Asks one model. `attempts` requests of at most `timeout_s` seconds each are made before an answer is given up."""

    def __init__(
        self,
        address: Address,
        key: str | None,
        records: JudgeRecords,
        prices: Prices,
        *,
        attempts: int,
        timeout_s: float,
        concurrent: int,
    ) -> None:
        self.address = address
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._records = records
        self._prices = prices
        self._attempts = attempts
        self._timeout_s = timeout_s
        self._concurrent = concurrent
        self._slots: asyncio.Semaphore | None = None

    def check(self, model: str) -> None:
        """Ask the server for its models. Raises ValueError when it is down, refuses the key, or lacks the model."""
        request = request_json(
            self.address, "/models", headers=self._headers, timeout_s=CHECK_S, limit_bytes=REPLY_BYTES
        )
        try:
            with ThreadPoolExecutor(1) as thread:  # the caller may run on an event loop
                answer = thread.submit(asyncio.run, request).result()
        except HttpError as error:
            raise ValueError(
                f"the judge at {self.address} cannot be asked: {error}; start it, correct `address`, or set "
                "check_at_start = false"
            ) from None
        if answer.status in (401, 403):
            raise ValueError(self._refused(answer))
        try:
            models = [one["id"] for one in json.loads(answer.body)["data"]]
        except (ValueError, KeyError, TypeError):
            return  # a server without a list of models; the first request will say what is wrong
        if models and model not in models:
            shown = ", ".join(map(short, models[:10]))
            raise ValueError(f"model = {model!r} is none of the judge at {self.address}; it has {shown}")

    async def ask(self, body: Mapping[str, Any], read: Callable[[str], T]) -> Reply:
        """Send a request for a chat completion and return what `read` makes of its text.

        read: raises ValueError for a text that is of no use; such a reply is not kept, and the request is repeated.

        Raises JudgeError when every attempt fails, when the server refuses the request, or when no money is left.
        """
        began = monotonic()
        key = request_key(str(self.address), body)
        known = self._records.reply(key)
        if known is not None:
            return Reply(read(known), 0, 0.0, 0.0)
        if self._slots is None:
            self._slots = asyncio.Semaphore(self._concurrent)
        price, reason = 0.0, ""
        for attempt in range(1, self._attempts + 1):
            async with self._slots:
                self._refuse_spending()
                text, cost, reason, pause_s = await self._attempt(body)
            price += cost
            if text is not None:
                try:
                    value = read(text)
                except ValueError as error:
                    reason, pause_s = str(error), 0.0
                else:
                    self._records.keep(key, text)
                    return Reply(value, attempt, monotonic() - began, price)
            if attempt < self._attempts:
                await asyncio.sleep(self._pause(attempt) if pause_s is None else pause_s)
        raise JudgeError(
            f"the judge at {self.address} gave no usable reply in {self._attempts} attempts and "
            f"{monotonic() - began:.0f} s; the last time {reason}. Start or repair it, or raise `attempts`"
        )

    async def _attempt(self, body: Mapping[str, Any]) -> tuple[str | None, float, str, float | None]:
        """Return (text or None, its price, why there is no text, pause before the next attempt or None)."""
        try:
            answer = await request_json(
                self.address,
                "/chat/completions",
                body,
                headers=self._headers,
                timeout_s=self._timeout_s,
                limit_bytes=REPLY_BYTES,
            )
        except HttpError as error:
            return None, 0.0, str(error), None
        if answer.status != 200:
            if answer.status < 500 and answer.status not in RETRIED:
                raise JudgeError(self._refused(answer))
            return None, 0.0, f"it answered with status {answer.status}: {answer.text()}", _retry_after(answer)
        try:
            fields = json.loads(answer.body)
            text = fields["choices"][0]["message"]["content"]
            usage = fields.get("usage") or {}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None, 0.0, f"it answered with no chat completion: {answer.text()}", None
        cost = self._note(usage)
        if not isinstance(text, str):
            return None, cost, "its message had no content", None
        return text, cost, "", None

    def _note(self, usage: Mapping[str, Any]) -> float:
        """Write down what a reply has cost, and return it. Raises JudgeError when the server does not say."""
        prices = self._prices
        tokens_in, tokens_out = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
        if not isinstance(tokens_in, int) or not isinstance(tokens_out, int):
            if prices.input or prices.output:
                raise JudgeError(
                    f"the judge at {self.address} does not say how many tokens it used, so that its price cannot be "
                    "counted; leave the prices out, or use a server that reports `usage`"
                )
            return 0.0
        price = (tokens_in * prices.input + tokens_out * prices.output) / MILLION
        self._records.spend(tokens_in, tokens_out, price)
        return price

    def _refuse_spending(self) -> None:
        limit = self._prices.limit
        if limit is not None and (spent := self._records.spent) >= limit:
            raise JudgeError(f"the judge has cost {spent:g} of max_price = {limit:g}; raise max_price to go on")

    def _refused(self, answer: Answer) -> str:
        what = f"the judge at {self.address} refuses the request with status {answer.status}: {answer.text()}"
        if answer.status in (401, 403):
            return f"{what}; name the right key by `api_key_env` or `api_key_file`"
        return f"{what}; correct `address`, `model` or `parameters`"

    @staticmethod
    def _pause(attempt: int) -> float:
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def _retry_after(answer: Answer) -> float | None:
    """Return the seconds that a server asks to wait, or None if it does not say."""
    text = answer.headers.get("retry-after", "")
    return min(LONGEST_PAUSE_S, float(text)) if text.isascii() and text.isdigit() else None


def judge_key(variable: str | None, file: str | None) -> str | None:
    """Return the API key of an environment variable or a file; None when none is named.

    Raises ValueError that names the option and the fix, never the key.
    """
    if variable is not None and file is not None:
        raise ValueError("api_key_env and api_key_file are both given; leave one out")
    if variable is None and file is None:
        return None
    where = f"the environment variable {variable} (api_key_env)" if file is None else f"the file {file} (api_key_file)"
    try:
        if file is None:
            key = os.environ.get(variable or "", "")
        else:
            mode = Path(file).stat().st_mode
            if mode & 0o077:
                raise ValueError(f"{where} has mode {mode & 0o777:o}: others can read it; run chmod 600 {file}")
            key = Path(file).read_text()
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{where} must hold one line of printable ASCII without blanks; set it before the run starts")
    return key
