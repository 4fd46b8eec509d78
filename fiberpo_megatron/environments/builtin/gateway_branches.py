"""This module finds out which branch of a trajectory a request goes on in, by comparing its messages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fiberpo_megatron.environments import Conversation, Turn
from fiberpo_megatron.environments.builtin.gateway_answers import message_of
from fiberpo_megatron.environments.builtin.gateway_messages import fingerprint, plain
from fiberpo_megatron.environments.builtin.gateway_requests import ChatRequest


@dataclass
class _Branch:
    """Holds what was said in one token sequence of the trajectory."""

    policy: Conversation
    tools: str
    """The tools that were described at its beginning, as JSON."""
    said: list[str] = field(default_factory=list)
    """Fingerprints of all messages, the policy's answers among them."""
    ends: list[int] = field(default_factory=list)
    """How many messages there were at the end of each of the policy's turns here."""
    busy: bool = False
    """Whether the policy is answering in it."""


class AgentConversation:
    """Answers the requests of one agent about one task, and keeps its token sequences as few and as long as possible.

    A request whose messages are those of an earlier one, the policy's answer and something new goes on behind the
    sampled tokens. One that leaves an earlier request at an earlier answer goes on behind that answer, as a branch of
    its own. One that rewrites what was said begins a branch with a prompt of its own, which the chat template writes.
    Requests may come at the same time: no two of them go on in the same branch.
    """

    def __init__(self, policy: Conversation) -> None:
        self._policy = policy
        self._branches: list[_Branch] = []
        self.counts: Counter[str] = Counter()
        """How many requests were `continued`, `forked` or `rewritten`; the first one is none of them."""
        self.last: Turn | None = None
        """The turn that was answered last."""

    async def answer(self, request: ChatRequest) -> tuple[Turn, dict[str, Any]]:
        """Return the policy's turn and its message. Raises ValueError for what cannot be said."""
        tools = json.dumps(request.tools, sort_keys=True)
        prints = [fingerprint(message) for message in request.messages]
        found = self._latest(request, tools, prints)
        if found is not None:
            branch, turn = found
            try:
                return await self._continue(branch, turn, request, tools, prints)
            except ValueError:  # for example, the answer ended the whole text: the template writes such a past again
                pass
        policy = self._policy.fork() if self._branches else self._policy
        branch = _Branch(policy, tools)
        self._branches.append(branch)
        answered = await self._say(branch, request, prints, len(prints))
        if branch is not self._branches[0]:
            self.counts["rewritten"] += 1
        return answered

    def _latest(self, request: ChatRequest, tools: str, prints: Sequence[str]) -> tuple[_Branch, int] | None:
        """Return the branch and the index of its turn behind which the request goes on; None when there is none.

        It is the longest past in common; of several the one that ends there, so that its tokens go on.
        """
        best: tuple[tuple[int, bool], _Branch, int] | None = None
        roles = [message["role"] for message in request.messages]
        for branch in self._branches:
            for turn, end in enumerate(branch.ends):
                new = roles[end:]
                if branch.tools != tools or not new or "assistant" in new or branch.said[:end] != prints[:end]:
                    continue
                rank = (end, turn == len(branch.ends) - 1 and not branch.busy)
                if best is None or rank > best[0]:
                    best = rank, branch, turn
        return best and best[1:]

    async def _continue(
        self, branch: _Branch, turn: int, request: ChatRequest, tools: str, prints: Sequence[str]
    ) -> tuple[Turn, dict[str, Any]]:
        end = branch.ends[turn]
        kind = "continued"
        if turn < len(branch.ends) - 1 or branch.busy:
            branch, kind = _Branch(branch.policy.fork(turn + 1), tools), "forked"
        answered = await self._say(branch, request, prints, len(prints) - end)
        if kind == "forked":
            self._branches.append(branch)
        self.counts[kind] += 1
        return answered

    async def _say(
        self, branch: _Branch, request: ChatRequest, prints: Sequence[str], new: int
    ) -> tuple[Turn, dict[str, Any]]:
        """Say the last `new` messages of a request in a branch."""
        messages: Sequence[Mapping[str, Any]] = request.messages[-new:]
        tools = request.tools if not branch.ends and new == len(prints) else None
        branch.busy = True
        try:
            turn = await branch.policy.say(messages, tools, request.max_tokens, request.stop or None)
        finally:
            branch.busy = False
        message = message_of(turn)
        branch.said = [*prints, fingerprint(plain(message, len(prints)))]
        branch.ends.append(len(branch.said))
        self.last = turn
        return turn, message
