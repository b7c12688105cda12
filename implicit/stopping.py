"""When a solve ends: within a tolerance, or after a fixed number of steps.

The quantity that is tested is always the true residual ``f(y) - y``, whatever the solver or its
damping, and always sample by sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from implicit.arguments import check_count, check_number

Norm = Literal["l2", "rms", "max"]
Distance = Callable[[Any, Any], Tensor]
"""``distance(y, fy)``: how far the image of each sample is from its state, ``(B,)``."""


def batch_norm_of(x: Tensor, norm: Norm) -> Tensor:
    """Norm of each row of ``x (B, D)``; a row of no elements has norm 0."""
    if norm == "max":
        empty = x.shape[1] == 0
        return x.new_zeros(len(x)) if empty else torch.linalg.vector_norm(x, torch.inf, dim=1)
    length = torch.linalg.vector_norm(x, dim=1)
    return length if norm == "l2" else length / math.sqrt(max(x.shape[1], 1))


def least_of(x: Tensor, norm: Norm) -> Tensor:
    """What the norm of each row of ``x (B, D)`` is at least, by its largest element."""
    least = batch_norm_of(x, "max")
    return least / math.sqrt(max(x.shape[1], 1)) if norm == "rms" else least


def residual_in(norm: Norm | Distance, y: Tensor, fy: Tensor, r: Tensor) -> Tensor:
    """``(B,)`` residuals of states ``y (B, D)`` with images ``fy`` and ``r = fy − y``."""
    return norm(y, fy) if callable(norm) else batch_norm_of(r, norm)


def relative_to(size: Tensor, residual: Tensor) -> Tensor:
    """The residual over ``size = ‖f(y)‖``; 0 where both vanish, NaN where the size overflows."""
    ratio = (residual / size).masked_fill(residual == 0, 0)
    return ratio.masked_fill(size == torch.inf, torch.nan)


@dataclass(frozen=True)
class Tolerance:
    """Stop a sample when ``‖f(y) − y‖ ≤ atol + rtol·‖f(y)‖``, or after ``max_steps`` steps.

    Each sample stops by itself and does not move any more.  The value that is returned is one at
    which ``f`` was evaluated: its residual is known, not hoped for.  That costs one evaluation
    more than there are steps.

    Args:
        rtol: relative tolerance; by default 1e-3, or twice the machine epsilon of the dtype of
            the state, or of autocast, where that is more (1.6e-2 in bfloat16).
        atol: absolute tolerance, in the units of the state.
        max_steps: most solver steps.
        check_every: steps between two looks from the host at whether all samples are done; the
            test itself runs at every step, on the device.  Larger values save synchronisations
            on a GPU and cost up to ``check_every − 1`` superfluous evaluations.  A sample whose
            residual is not finite at a step without a look has diverged (see `Anderson`).
        norm: ``"l2"``, ``"rms"`` or ``"max"`` over all elements of a sample; or a distance of
            your own, ``distance(y, fy)`` of a state and its image, ``(B,)``, in whatever units
            ``atol`` then has.  Such a distance has no size to be relative to: it takes ``rtol=0``.
        min_steps: steps before a sample may be done: for a path that begins slowly, or a distance
            that may be small by chance.  No iterate before counts, for `Best` neither; and none
            but the start is tested, unless for a trace or by a solver that begins again where it
            is not finite (`Solver.retreats`), so the host does not wait and ``norm`` is not
            evaluated.

    Example:
        >>> Tolerance(rtol=1e-4).max_steps
        50
    """

    rtol: float | None = None
    atol: float = 1e-6
    max_steps: int = 50
    check_every: int = 1
    norm: Norm | Distance = "l2"
    min_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None:
                check_number("Tolerance", name, value, least=0)
        if self.rtol == 0 and self.atol == 0:
            raise ValueError(
                "Tolerance(rtol=0, atol=0) can never be met: give one of them, or use Steps(n)."
            )
        check_count("Tolerance", "max_steps", self.max_steps)
        check_count("Tolerance", "check_every", self.check_every)
        check_count("Tolerance", "min_steps", self.min_steps, least=0)
        if self.min_steps > self.max_steps:
            raise ValueError(
                f"Tolerance(min_steps={self.min_steps}, max_steps={self.max_steps}): no sample "
                "could stop. Give at least as many steps at most."
            )
        if callable(self.norm):
            if self.rtol != 0:
                raise ValueError(
                    f"Tolerance(rtol={self.rtol}): a distance of your own is held against atol "
                    "alone. Give rtol=0."
                )
        elif self.norm not in ("l2", "rms", "max"):
            raise ValueError(
                f"Tolerance(norm={self.norm!r}): use 'l2', 'rms' or 'max', or a function (y, fy)."
            )

    def rtol_for(self, finest: float) -> float:
        """The relative tolerance for a dtype whose machine epsilon is ``finest``."""
        return max(1e-3, 2 * finest) if self.rtol is None else self.rtol


@dataclass(frozen=True)
class Steps:
    """Take exactly ``n`` steps, with ``n`` evaluations and no host synchronisation.

    Nothing is tested, so no sample is ever reported as converged; the residual reported is that
    of the last iterate at which ``f`` was evaluated, one step before the value returned.

    Example:
        >>> Steps(20).n
        20
    """

    n: int

    def __post_init__(self) -> None:
        check_count("Steps", "n", self.n)


Stop = Tolerance | Steps
