"""Means, intervals and verdicts.

Runs that are compared have the same seed, and so the same data order, and are compared pair by
pair: what a seed does to both is not counted as a difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from scipy import stats

CONFIDENCE = 0.95
LEAST_SEEDS = 3
"""Paired differences without which nothing is said of a claim: of two, t is 12.7."""
NOISE = 1e-9
"""Differences in AP that are those of adding up in another order, and no evidence."""

Verdict = Literal[
    "holds",
    "ahead, by how much is undecided",
    "does not hold",
    "undecided at this size",
    "too few seeds",
]


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval by Student's t; the interval is infinite for one value.

    Example:
        >>> estimate = Estimate.of([1.0, 2.0, 3.0])
        >>> estimate.mean, round(estimate.half, 3), str(estimate)
        (2.0, 2.484, '2.0 ± 2.5')
    """

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate of what some values are drawn from; NaN of none.

        What is not finite is not measured, and is left out of the count.
        """
        known = [value for value in values if math.isfinite(value)]
        count = len(known)
        if count < 2:
            return cls(fmean(known) if known else math.nan, math.inf, count)
        critical = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
        return cls(fmean(known), critical * stdev(known) / math.sqrt(count), count)

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half

    def __str__(self) -> str:
        if not self.count:
            return "–"
        return f"{self.mean:.1f} ± {self.half:.1f}" if self.count > 1 else f"{self.mean:.1f}"


def difference(better: Mapping[int, float], worse: Mapping[int, float]) -> Estimate:
    """The estimate of ``better - worse``, over the seeds that both have; `NOISE` is none.

    Example:
        >>> difference({0: 3.0, 1: 5.0}, {0: 2.0, 1: 4.0, 2: 9.0})
        Estimate(mean=1.0, half=0.0, count=2)
    """
    seeds = sorted(set(better) & set(worse))
    apart = [better[seed] - worse[seed] for seed in seeds]
    return Estimate.of([0.0 if abs(value) < NOISE else value for value in apart])


def verdict(found: Estimate, least: float) -> Verdict:
    """What a paired difference says of the statement that it is at least ``least``.

    It holds if the whole interval is at or above ``least``, and above 0 where no loss is allowed;
    it does not if the whole interval lies below ``least``.  If the interval lies above 0 but not
    wholly at or above ``least``, one arm is ahead, and by how much is open.

    Example:
        >>> verdict(Estimate(1.5, 0.4, 3), 1.0), verdict(Estimate(0.2, 0.4, 3), 1.0)
        ('holds', 'does not hold')
        >>> verdict(Estimate(1.2, 0.4, 3), 1.0), verdict(Estimate(1.2, 1.4, 3), 1.0)
        ('ahead, by how much is undecided', 'undecided at this size')
        >>> verdict(Estimate(1.5, 0.1, 2), 1.0)
        'too few seeds'
    """
    if found.count < LEAST_SEEDS:
        return "too few seeds"
    ahead = found.low > NOISE
    if found.low >= least - NOISE and (ahead or least < 0):
        return "holds"
    if found.high < least - NOISE:
        return "does not hold"
    return "ahead, by how much is undecided" if ahead else "undecided at this size"


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies, between neighbours by a straight line.

    NaN is beyond every number: what has no figure has run away.

    Example:
        >>> quantile([3.0, 1.0, 2.0], 0.5), quantile([1.0, math.nan, 2.0], 1.0)
        (2.0, inf)
    """
    if not values:
        return math.nan
    ordered = sorted(math.inf if math.isnan(value) else value for value in values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low if low == high else low + (high - low) * (place - math.floor(place))
