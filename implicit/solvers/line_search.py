"""Backtracking, sample by sample, for solvers that propose a direction.

A trial point whose residual is not smaller than that of the point it came from is taken back, and
half the step is tried instead: one evaluation of ``f`` per trial, like any other step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_HALVINGS = 8
DECREASE = 1e-4
"""Share of the decrease that a linear model promises which a step must deliver (Armijo)."""


@dataclass
class LineSearch:
    """Where each sample came from, which way it goes and how far; all batch first."""

    base: Tensor
    direction: Tensor
    length: Tensor
    fraction: Tensor
    halvings: Tensor

    @classmethod
    def at(cls, y: Tensor) -> LineSearch:
        """Before the first step from ``y (B, D)``; any point is accepted."""
        row = y.new_full((y.shape[0],), torch.inf)
        return cls(y, torch.zeros_like(y), row, torch.ones_like(row), torch.zeros_like(row))

    def accepts(self, length: Tensor) -> Tensor:
        """``(B,)`` bool: whether residual norms ``(B,)`` at the trial points are good enough."""
        good = length <= (1 - DECREASE * self.fraction) * self.length
        return good | (self.halvings >= MOST_HALVINGS)

    def next(self, accepted: Tensor, y: Tensor, length: Tensor, direction: Tensor) -> Tensor:
        """The next trial point: a new direction where accepted, half the step elsewhere."""
        rows = accepted.unsqueeze(1)
        self.base = torch.where(rows, y, self.base)
        self.direction = torch.where(rows, direction, self.direction)
        self.length = torch.where(accepted, length, self.length)
        self.fraction = torch.where(accepted, 1.0, self.fraction / 2)
        self.halvings = torch.where(accepted, 0.0, self.halvings + 1)
        return self.base + self.fraction.unsqueeze(1) * self.direction
