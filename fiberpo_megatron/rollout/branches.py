"""This module keeps the conversations of one trajectory: its first token sequence and the branches beside it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fiberpo_megatron.environments import Message, Turn
from fiberpo_megatron.environments.jobs import FIRST, BranchPoint
from fiberpo_megatron.rollout.conversation import PolicyConversation
from fiberpo_megatron.types import Branch


class Begin(Protocol):
    """Makes the conversation of a branch."""

    def __call__(
        self, *, branch: int = 0, history: tuple[int, ...] = (), tools: Sequence[Mapping[str, Any]] | None = None
    ) -> PolicyConversation: ...


class BranchedConversation:
    """This is the policy's side of one trajectory. Its branches may speak at the same time.

    begin: makes the conversation of a branch; the arguments are those fields of PolicyConversation.
    """

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._by_number: dict[int, PolicyConversation] = {0: begin()}
        self.turns: list[Turn] = []
        """Turns of all branches, in the order in which the policy ended them."""

    async def say(
        self,
        new: str | Message | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        branch: BranchPoint = FIRST,
    ) -> Turn:
        """Return the policy's answer in a branch, which is made when the environment says something in it first.

        Raises ValueError for what cannot be said, as `environments.Conversation.say` does.
        """
        if branch.number not in self._by_number:
            self._by_number[branch.number] = self._forked(branch)
        turn = await self._by_number[branch.number].say(new, tools, max_tokens, stop)
        self.turns.append(turn)
        return turn

    def _forked(self, branch: BranchPoint) -> PolicyConversation:
        parent = self._by_number[branch.parent]
        if branch.turns > len(parent.turns):
            raise ValueError(
                f"fork: branch {branch.parent} has {len(parent.turns)} turns, not {branch.turns}; fork behind a turn "
                "that the policy has ended"
            )
        if not branch.turns:
            return self._begin(branch=branch.number)
        history = parent.token_ids(branch.turns)
        return self._begin(branch=branch.number, history=history, tools=parent.tools)

    @property
    def _spoken(self) -> list[PolicyConversation]:
        """The conversations in which the policy has said something, in the order in which they began."""
        conversations = (self._by_number[number] for number in sorted(self._by_number))
        return [conversation for conversation in conversations if conversation.turns]

    @property
    def first(self) -> PolicyConversation | None:
        """This is the first conversation in which the policy said something; None when it said nothing."""
        return next(iter(self._spoken), None)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """These are the token sequences beside that of `first`."""
        return tuple(Branch(spoken.prompt_ids, spoken.completion) for spoken in self._spoken[1:])

    @property
    def text(self) -> str:
        """This is the text of all branches, for people."""
        texts = [spoken.text for spoken in self._spoken]
        return "\n".join([*texts[:1], *(f"[branch {i}]\n{text}" for i, text in enumerate(texts[1:], 1))])
