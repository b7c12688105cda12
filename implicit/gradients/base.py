"""The interface of a gradient: how a solution is tied to what ``f`` depends on.

How to differentiate is an object of its own.  It is given the map and the solution, never the
solver, so every gradient goes with every solver.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from implicit.solvers.base import Solver

Map = Callable[[Tensor], Tensor]


class Gradient(ABC):
    """Ties a detached solution of ``y = f(y)`` into autograd's graph."""

    tracks_path: ClassVar[bool] = False
    """Whether the solve itself must run with gradients on (true for `BPTT` alone)."""

    @abstractmethod
    def attach(self, f: Map, value: Tensor) -> Tensor:
        """``f`` applied to the detached ``value (B, D)`` with a graph behind it.

        The derivative of what is returned, with respect to anything that ``f`` closes over, is
        this gradient's answer for ``∂y*/∂(·)``.
        """


def check_differentiable(solver: Solver, gradient: Gradient) -> None:
    """Raise `ValueError` if the gradient goes back through steps that have no derivative."""
    if gradient.tracks_path and not solver.differentiable:
        raise ValueError(
            f"{solver} cannot be differentiated step by step: use another gradient than "
            f"{gradient}, such as implicit.Implicit(), or Naive, Anderson or Broyden."
        )
