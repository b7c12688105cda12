"""What the hardware can do at most, measured; and the least time that some work takes on it.

A product of matrices cannot be faster than the fastest one, nor can weights be read from memory
faster than memory is copied.  So the larger of flops over measured flops per second and bytes over
measured bytes per second is a floor, which a program reaches that does nothing else and does both
at once.  Weights that stay in a cache between their uses can be read faster: on a GPU whose cache
holds those of a refinement (37 MB in bfloat16) the part of the bytes is an estimate, and no floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size import Problem
from benchmarks.measure import by_turns, seconds

SIDE = 4096
"""Of the matrices of the fastest product."""
COPIED = 2**28
"""Bytes that are copied, beyond all caches."""
REPEATS = 5
LEAST = 0.2
"""Seconds that are timed at once.  A GPU needs less than a millisecond for a product: that would be
timed with the launch and the waiting around it, and before the clock is up."""


@dataclass(frozen=True)
class Ceilings:
    """Most that a device does in a second: flops of products, and bytes read or written."""

    flops: float
    bytes: float

    @classmethod
    @torch.inference_mode()
    def measured(cls, device: str, dtype: torch.dtype, side: int = SIDE) -> Ceilings:
        """The best of some times of a large product and of a large copy, each for `LEAST`."""
        a = torch.ones(side, side, device=device, dtype=dtype)
        product = torch.empty_like(a)
        source = torch.ones(COPIED, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        runs = [lambda: torch.mm(a, a, out=product), lambda: target.copy_(source)]
        calls = [calls_within(run, LEAST) for run in runs]
        taken = by_turns([repeated(*each) for each in zip(runs, calls, strict=True)], REPEATS)
        multiplied, copied = (own[0] / n for own, n in zip(taken, calls, strict=True))
        return cls(2 * side**3 / multiplied, 2 * COPIED / copied)

    def floor(self, flops: float, size: float) -> float:
        """Least seconds for so many flops and bytes."""
        return max(flops / self.flops, size / self.bytes)


def repeated(run: Callable[[], object], calls: int) -> Callable[[], None]:
    """So many calls of ``run``, with no waiting in between."""

    def all_of_them() -> None:
        for _ in range(calls):
            run()

    return all_of_them


def calls_within(run: Callable[[], object], least: float) -> int:
    """A power of two of calls that take ``least`` seconds or more when ``run`` is warm."""
    run()
    calls = 1
    while seconds(repeated(run, calls)) < least:
        calls *= 2
    return calls


@dataclass(frozen=True)
class Work:
    """Flops of products, and bytes of weights, each read once."""

    flops: int
    bytes: int

    @classmethod
    def of(cls, problem: Problem, dtype: torch.dtype) -> Work:
        """Of one refinement."""
        read = [p for n, p in problem.layer.named_parameters() if not n.startswith("class_head")]
        return cls.counted(lambda: problem.layer(problem.queries, problem.prepared), read, dtype)

    @classmethod
    @torch.no_grad()
    def counted(
        cls, run: Callable[[], object], weights: Iterable[Tensor], dtype: torch.dtype
    ) -> Work:
        """Of ``run``, with ``weights`` in ``dtype``.

        Counted where torch dispatches products and convolutions, also of tensors on ``meta``; what
        samples and norms cost is left out.
        """
        counter = FlopCounterMode(display=False)
        with counter:
            run()
        return cls(counter.get_total_flops(), sum(map(torch.numel, weights)) * dtype.itemsize)
