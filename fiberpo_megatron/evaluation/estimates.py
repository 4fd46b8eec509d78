"""This module estimates accuracies of several samples per prompt: avg@n, pass@k, maj@n, and their intervals.

Everything here is a pure function of numbers and texts; nothing is drawn at random. Samples of one prompt are not
independent of each other, so that intervals take each prompt as one observation (a cluster).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, pi, sqrt, tan
from statistics import NormalDist

CONFIDENCE = 0.95
"""Probability with which an interval shall cover the true value."""


@dataclass(frozen=True)
class Estimate:
    """Holds a share with its interval."""

    value: float
    low: float | None
    """Lower end of the 95 % interval; None if there is one prompt alone, which says nothing about others."""
    high: float | None


def pass_at(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of the probability that at least one of k samples is right.

    It is 1 - C(n - c, k) / C(n, k) with c right ones among n samples (Chen et al., arXiv:2107.03374, equation 1).
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(
            f"pass@{k} of {correct} right ones among {n} samples: need 0 <= right <= samples and k <= samples"
        )
    return 1.0 - comb(n - correct, k) / comb(n, k)


def majority(answers: Sequence[str], correct: Sequence[bool]) -> float:
    """Return the probability that the most frequent answer is right, when ties are broken by a fair draw.

    answers, correct: one entry for each sample. An empty answer abstains; where all abstain the result is 0. Where
    samples with the same answer differ in `correct`, their mean counts.
    """
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    right = Counter(answer for answer, is_right in zip(answers, correct, strict=True) if is_right)
    return sum(right[answer] / most for answer in winners) / len(winners)


def clustered(values: Sequence[float]) -> Estimate:
    """Return the mean of one share per prompt with a 95 % interval for the mean over all prompts of that kind.

    The interval is Wilson's with an effective number of samples (Korn and Graubard, 1998): the number of independent
    0/1 samples whose mean would vary as much as the mean of these prompts does, reduced by Student's quantile for few
    prompts. Where all prompts agree on 0 or on 1, each counts as one sample. Hence the interval never has width 0 and
    stays inside of [0, 1].

    Raises ValueError without values.
    """
    count = len(values)
    if not count:
        raise ValueError("no prompt has a value; an estimate needs at least one")
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean, None, None)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1) / count
    spread = mean * (1 - mean)
    samples = spread / variance if variance > 1e-12 and spread > 1e-12 else float(count)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    samples *= (z / _student(z, count - 1)) ** 2
    centre = (mean + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * sqrt(spread / samples + z * z / (4 * samples * samples))
    return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half))


def _student(z: float, freedom: int) -> float:
    """Return Student's quantile with the tail of the normal quantile `z`.

    One and two degrees of freedom have closed forms; the others use the expansion of Cornish and Fisher (Abramowitz and
    Stegun, 26.7.5), whose error is below 1 % from three on.
    """
    p = NormalDist().cdf(z)
    if freedom == 1:
        return tan(pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * sqrt(2 / (4 * p * (1 - p)))
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**order for order, term in enumerate(terms))
