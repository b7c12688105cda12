"""What the host knows of the samples of a solve to a tolerance, from the margins that it reads.

The margin of a sample is its residual less what is allowed: it goes on while that is positive.  To
read margins is to wait for the device, so they are read once for each look, and all that follows
from them is decided here.
"""

from __future__ import annotations

import math

from torch import Tensor

MOST_RETREATS = 10
"""How often one sample begins again where its residual is not finite."""


class RollCall:
    """Which samples were going on at the last look, and how often each has begun again.

    Args:
        number: of samples in the batch.
        may_retreat: whether those begin again whose residual is not finite.
        may_be_infinite: whether a residual is infinite where its margin is.  Not so where the
            tolerance is relative to the image, since what is allowed overflows with it.
    """

    def __init__(self, number: int, may_retreat: bool, may_be_infinite: bool) -> None:
        self.may_retreat, self.may_be_infinite = may_retreat, may_be_infinite
        self.going = [True] * number
        self.still = number
        self.retreats = [0] * number

    def all_go_on(self, margin: Tensor) -> bool:
        """Whether that is plain from ``margin (B,)`` at a glance."""
        return not self.may_be_infinite and float(margin.min()) > 0  # False for NaN too

    def look(self, margin: Tensor, first: bool) -> list[int]:
        """Learn from ``margin (B,)`` who goes on; those that begin again for it.

        Args:
            first: whether this is the start, from which there is nowhere to go back to.
        """
        margins = margin.tolist()
        if self.may_be_infinite and float(margin.min()) > 0 and max(margins) < math.inf:
            return []
        lost = [
            i
            for i, m in enumerate(margins)
            if not math.isfinite(m) and (m != math.inf or self.may_be_infinite)
        ]
        if first:
            for i in lost:
                self.retreats[i] = MOST_RETREATS
        lost = [i for i in lost if self.may_retreat and self.retreats[i] < MOST_RETREATS]
        self.going = [was and m > 0 for was, m in zip(self.going, margins, strict=True)]
        for i in lost:
            self.going[i] = True
            self.retreats[i] += 1
        self.still = sum(self.going)
        return lost

    def rows(self, going: bool) -> list[int]:
        """The samples that go on, or those that do not."""
        return [i for i, goes in enumerate(self.going) if goes is going]

    def narrow(self) -> None:
        """Those that do not go on have left the batch."""
        self.retreats = [self.retreats[i] for i in self.rows(going=True)]
        self.going = [True] * self.still
