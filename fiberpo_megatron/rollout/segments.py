"""This module joins the segments of a response, each of which one request has sampled, to the response."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.types import Completion, WeightSpan


def join_segments(segments: Sequence[Completion]) -> Completion:
    """Return the response whose segments follow each other without a gap. A single one is returned as it is.

    Every token keeps the log-prob, the weights' version and the engine with which it was sampled, and the experts that
    its own segment named: a later segment reads the earlier tokens as its prompt, perhaps under newer weights, and what
    it says about them is not used. The response ends as its last segment did.
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
        join_experts([segment.routed_experts for segment in segments if segment.token_ids]),
        engines=None if any(one is None for one in engines) else np.concatenate(engines),  # type: ignore[arg-type]
    )


def join_experts(answers: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """Return the experts of the longest text, [positions, layers, top_k], from answers each of which has the text of
    the one before it as the begin of its prompt. Each position takes them from the first answer that has it, which is
    the one that sampled its successor. None when an answer has none."""
    joined = answers[-1] if answers else None
    if joined is None:
        return None
    joined = joined.copy()
    for experts in reversed(answers[:-1]):
        if experts is None:
            return None
        joined[: len(experts)] = experts
    return joined
