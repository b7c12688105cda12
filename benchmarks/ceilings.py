"""What the hardware can do at most, measured; and the least time that some work takes on it.

A product of matrices cannot be faster than the fastest one, nor can weights be read faster than
memory is copied.  So the larger of flops over measured flops per second and bytes over measured
bytes per second is a floor, which a program reaches that does nothing else and does both at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size import Problem
from benchmarks.measure import by_turns

SIDE = 4096
"""Of the matrices of the fastest product."""
COPIED = 2**28
"""Bytes that are copied, beyond all caches."""
REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """Most that a device does in a second: flops of products, and bytes read or written."""

    flops: float
    bytes: float

    @classmethod
    @torch.inference_mode()
    def measured(cls, device: str, dtype: torch.dtype, side: int = SIDE) -> Ceilings:
        """The best of some runs of one large product and of one large copy."""
        a = torch.ones(side, side, device=device, dtype=dtype)
        product = torch.empty_like(a)
        source = torch.ones(COPIED, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        multiplied, copied = by_turns(
            [lambda: torch.mm(a, a, out=product), lambda: target.copy_(source)], REPEATS
        )
        return cls(2 * side**3 / multiplied[0], 2 * COPIED / copied[0])

    def floor(self, flops: float, size: float) -> float:
        """Least seconds for so many flops and bytes."""
        return max(flops / self.flops, size / self.bytes)


@dataclass(frozen=True)
class Work:
    """Flops of the products of one refinement, and bytes of its weights, each read once."""

    flops: int
    bytes: int

    @classmethod
    @torch.no_grad()
    def of(cls, problem: Problem, dtype: torch.dtype) -> Work:
        """Counted where torch dispatches products; what samples and norms cost is left out."""
        counter = FlopCounterMode(display=False)
        with counter:
            problem.layer(problem.queries, problem.prepared)
        unread = sum(map(torch.numel, problem.layer.class_head.parameters()))
        weights = sum(map(torch.numel, problem.layer.parameters())) - unread
        return cls(counter.get_total_flops(), weights * dtype.itemsize)
