"""Backtracking, sample by sample, for solvers that propose a direction.

A trial point whose residual is not smaller than an average of those before is taken back, and half
the step is tried instead: one evaluation of ``f`` per trial, like any other step.  The average
rather than the last one, since quasi-Newton steps that lead far often begin with a residual that
grows: H. Zhang and W. Hager, *A nonmonotone line search technique and its application to
unconstrained optimization*, SIAM J. Optim. 14(4), 2004.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_HALVINGS = 8
DECREASE = 1e-4
"""Share of the decrease that a linear model promises which a step must deliver (Armijo)."""
REMEMBERED = 0.85
"""What a residual counts for in the average after one more step; 0 is a monotone search."""


@dataclass
class LineSearch:
    """Where each sample came from, which way it goes and how far; all batch first."""

    base: Tensor
    direction: Tensor
    length: Tensor
    average: Tensor
    count: Tensor
    fraction: Tensor
    halvings: Tensor

    @classmethod
    def at(cls, y: Tensor) -> LineSearch:
        """Before the first step from ``y (B, D)``; any point is accepted."""
        far = y.new_full((y.shape[0],), torch.inf)
        none, whole = torch.zeros_like(far), torch.ones_like(far)
        return cls(y, torch.zeros_like(y), far, far, none, whole, none)

    def accepts(self, length: Tensor) -> Tensor:
        """``(B,)`` bool: whether residual norms ``(B,)`` at the trial points are good enough."""
        good = length <= (1 - DECREASE * self.fraction) * self.average
        return good | (self.halvings >= MOST_HALVINGS)

    def next(self, accepted: Tensor, y: Tensor, length: Tensor, direction: Tensor) -> Tensor:
        """The next trial point: a new direction where accepted, half the step elsewhere."""
        rows = accepted.unsqueeze(1)
        count = REMEMBERED * self.count + 1
        average = torch.lerp(torch.where(self.count > 0, self.average, length), length, 1 / count)
        self.base = torch.where(rows, y, self.base)
        self.direction = torch.where(rows, direction, self.direction)
        self.length = torch.where(accepted, length, self.length)
        self.average = torch.where(accepted, average, self.average)
        self.count = torch.where(accepted, count, self.count)
        self.fraction = torch.where(accepted, 1.0, self.fraction / 2)
        self.halvings = torch.where(accepted, 0.0, self.halvings + 1)
        return self.base + self.fraction.unsqueeze(1) * self.direction
