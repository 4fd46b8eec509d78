"""This module joins the segments of a response, each of which one request has sampled, to the response."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.types import Completion, WeightSpan


def join_segments(segments: Sequence[Completion]) -> Completion:
    """Return the response whose segments follow each other without a gap. A single one is returned as it is.

    Every token keeps the log-prob, the weights' version and the engine with which it was sampled, and the experts of
    the pass that sampled its successor: a later segment reads the earlier tokens as its prompt, perhaps under newer
    weights, and is not asked about them. The response ends as its last segment did.
    """
    if len(segments) == 1:
        return segments[0]
    spans: list[WeightSpan] = []
    begin = 0
    for segment in segments:
        for span in segment.weight_spans:
            moved = replace(span, start=begin + span.start, end=begin + span.end)
            if spans and spans[-1].version == moved.version:
                moved = replace(moved, start=spans.pop().start)
            spans.append(moved)
        begin += len(segment.token_ids)
    engines = [segment.engines for segment in segments]
    return Completion(
        tuple(token for segment in segments for token in segment.token_ids),
        np.concatenate([segment.log_probs for segment in segments]),
        segments[-1].finish_reason,
        tuple(span for span in spans if span.end > span.start),
        _segment_experts([segment for segment in segments if segment.token_ids]),
        engines=None if any(one is None for one in engines) else np.concatenate(engines),  # type: ignore[arg-type]
    )


def _segment_experts(segments: Sequence[Completion]) -> NDArray[Any] | None:
    """The experts of all positions; those of the prompt are in the first segment."""
    first = segments[0].routed_experts if segments else None
    sizes = [len(segment.token_ids) for segment in segments[1:]]
    return join_experts([one.routed_experts for one in segments], [0 if first is None else len(first), *sizes])


class RoutesMissing(RuntimeError):
    """A token of a trajectory has no route, or has two; the message names the first one."""


def join_experts(answers: Sequence[NDArray[Any] | None], new: Sequence[int]) -> NDArray[Any] | None:
    """Return the experts of a text's positions, [positions, layers, top_k], from those of the answers that made it.

    Each answer has the experts of the positions that no earlier one has, `new` of them: an engine has read all tokens
    of its answer but the last one, whose experts the next answer has. None when no answer has any. Raises RoutesMissing
    where an answer has more or fewer, so that the others would stand at the wrong tokens.
    """
    found = [experts for experts in answers if experts is not None]
    if not found:
        return None
    begin = 0
    for number, (experts, wanted) in enumerate(zip(answers, new, strict=True)):
        rows = 0 if experts is None else len(experts)
        if rows != wanted:
            raise RoutesMissing(
                f"answer {number} of {len(answers)} to a text has the experts of {rows} positions, not of the {wanted} "
                f"that are new, so that position {begin + min(rows, wanted)} has none or two; check that the engines "
                "serve the version of SGLang that is installed here, or set rollout.return_routing = false"
            )
        begin += rows
    return np.concatenate(found)
