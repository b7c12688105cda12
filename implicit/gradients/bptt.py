"""Backpropagation through time: the whole solver path is tracked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from implicit.gradients.base import Gradient, Map


@dataclass(frozen=True)
class BPTT(Gradient):
    """Differentiates every step that the solver took; memory grows with the number of steps.

    The only gradient that reaches ``y0``.

    Example:
        >>> BPTT()
        BPTT()
    """

    tracks_path: ClassVar[bool] = True

    def attach(self, f: Map, value: Tensor) -> Tensor:
        return value
