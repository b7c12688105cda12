"""The interface of a solver: two methods and no memory of its own.

A solver is a frozen dataclass that holds hyperparameters only.  What changes during a solve lives
in the object that `Solver.init` returns, so one solver can serve any number of solves at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor


class Solver(ABC):
    """Proposes the next iterate of ``y = f(y)`` from the current one and its image.

    Rows are samples and are treated apart: nothing is reduced over the batch.
    """

    @abstractmethod
    def init(self, y: Tensor) -> Any:
        """The memory at the start of a solve from ``y (B, D)``."""

    @abstractmethod
    def step(self, memory: Any, y: Tensor, fy: Tensor) -> tuple[Tensor, Any]:
        """Next iterate ``(B, D)`` and memory, from ``y`` and ``fy = f(y)``.

        ``y`` need not be what the last step proposed: a perturbation may have moved it, or the
        sample may have stopped.
        """
