"""What a solve knows of its samples: where each is, its best iterate, and how it ended.

Everything is batch first, so that samples can leave and come back into their order at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class BestSoFar:
    """The iterate of each sample with the smallest residual so far."""

    y: Tensor
    residual: Tensor
    relative: Tensor

    @classmethod
    def of(cls, old: BestSoFar | None, y: Tensor, residual: Tensor, relative: Tensor) -> BestSoFar:
        if old is None:
            return cls(y, residual, relative)
        # Selected, never mixed by multiplication: a NaN now must not poison what was good.
        better = (residual < old.residual) | torch.isnan(old.residual)
        return cls(
            torch.where(better.unsqueeze(1), y, old.y),
            torch.where(better, residual, old.residual),
            torch.where(better, relative, old.relative),
        )

    def forgotten(self, rows: Tensor) -> BestSoFar:
        """The same, where whatever comes next is better in some rows ``(B,)``."""
        return replace(self, residual=self.residual.masked_fill(rows, torch.nan))


@dataclass
class Samples:
    """The samples still in the batch: where they are, and what was written down of them."""

    y: Tensor
    row: Tensor
    active: Tensor
    converged: Tensor
    steps: Tensor
    evaluations: Tensor
    residual: Tensor
    relative: Tensor
    first: Tensor
    best: BestSoFar | None
    memory: Any

    @classmethod
    def all(cls, y: Tensor, memory: Any) -> Samples:
        """Every sample, before the first test."""
        like = y.detach().sum(dim=1)  # of the batch, and of its transforms under torch.func
        none, count = torch.zeros_like(like, dtype=torch.bool), torch.zeros_like(like)
        count, nan = count.to(torch.int64), torch.full_like(like, torch.nan)
        row = torch.arange(len(y), device=y.device)
        return cls(y, row, ~none, none, count, count, nan, nan, nan, None, memory)

    def stop(self, which: Tensor, n: int, converged: Tensor, now: Tensor, relative: Tensor) -> None:
        """Write down that the samples ``which (B,)`` end after ``n`` steps."""
        self.converged = self.converged | converged
        self.steps = self.steps.masked_fill(which, n)
        self.evaluations = self.evaluations.masked_fill(which, n + 1)
        self.residual = torch.where(which, now, self.residual)
        self.relative = torch.where(which, relative, self.relative)
        self.active = self.active ^ which  # who stops was active


def in_order(parts: Sequence[Samples], values: Sequence[Tensor]) -> Tensor:
    """What the parts of a batch have, in the order in which their samples came."""
    if len(parts) == 1:
        return values[0]
    rows = torch.cat([samples.row for samples in parts])
    return torch.cat(list(values)).index_select(0, rows.argsort())


@dataclass
class Outcome:
    """A solve in the flat view; see `implicit.Solution` for the meaning of the fields."""

    value: Tensor
    status: Tensor
    steps: Tensor
    evaluations: Tensor
    residual: Tensor
    relative_residual: Tensor
    trace: list[Tensor] = field(default_factory=list)
    path: list[Tensor] = field(default_factory=list)
    memory: Any = None
