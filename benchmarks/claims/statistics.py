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

Verdict = Literal["holds", "does not hold", "undecided at this size", "not measured"]


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
        """The estimate of what some values are drawn from; NaN of none."""
        count = len(values)
        if count < 2:
            return cls(fmean(values) if values else math.nan, math.inf, count)
        critical = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
        return cls(fmean(values), critical * stdev(values) / math.sqrt(count), count)

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
    """The estimate of ``better - worse``, over the seeds that both have.

    Example:
        >>> difference({0: 3.0, 1: 5.0}, {0: 2.0, 1: 4.0, 2: 9.0})
        Estimate(mean=1.0, half=0.0, count=2)
    """
    seeds = sorted(set(better) & set(worse))
    return Estimate.of([better[seed] - worse[seed] for seed in seeds])


def verdict(found: Estimate, least: float) -> Verdict:
    """What a paired difference says of the statement that it is at least ``least``.

    It holds if the mean is that large and the interval lies above 0 (or above ``least`` where that
    is negative); it does not if the interval lies below ``least``.

    Example:
        >>> verdict(Estimate(1.2, 0.4, 3), 1.0), verdict(Estimate(0.2, 0.4, 3), 1.0)
        ('holds', 'does not hold')
        >>> verdict(Estimate(0.8, 0.4, 3), 1.0), verdict(Estimate(1.2, 1.4, 3), 1.0)
        ('undecided at this size', 'undecided at this size')
    """
    if not found.count:
        return "not measured"
    if found.mean >= least and found.low > min(0.0, least):
        return "holds"
    return "does not hold" if found.high < least else "undecided at this size"
