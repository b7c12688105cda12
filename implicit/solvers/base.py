"""The interface of a solver: two methods and no memory of its own.

A solver is a frozen dataclass that holds hyperparameters only.  What changes during a solve lives
in the object that `Solver.init` returns, so one solver can serve any number of solves at once.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from implicit.problem import Problem
    from implicit.stopping import Stop


class Solver(ABC):
    """Proposes the next iterate of ``y = f(y)`` from the current one and its image.

    Rows are samples and are treated apart: nothing is reduced over the batch.
    """

    keeps_best: ClassVar[bool] = False
    """Whether a sample that does not converge ends at its best iterate (see `Best`)."""

    @property
    def differentiable(self) -> bool:
        """Whether `BPTT` can go back through its steps."""
        return True

    @property
    def retreats(self) -> bool:
        """Whether samples can begin again on the way (`retreat`)."""
        return False

    @abstractmethod
    def init(self, y: Tensor) -> Any:
        """The memory at the start of a solve from ``y (B, D)``.

        Every tensor in it has the batch as its first dimension, so that samples can leave.
        """

    @abstractmethod
    def step(self, memory: Any, y: Tensor, fy: Tensor, r: Tensor) -> tuple[Tensor, Any]:
        """Next iterate ``(B, D)`` and memory, from ``y``, ``fy = f(y)`` and ``r = fy − y``.

        ``r`` is not needed any more by the caller and may be overwritten.

        ``y`` need not be what the last step proposed: a perturbation may have moved it, or the
        sample may have stopped.
        """

    def retreat(self, memory: Any, lost: Tensor, y: Tensor, fy: Tensor, r: Tensor) -> None:
        """Begin again with samples ``lost (B, 1)``, and with shorter steps.

        Called before a step by a driver that sees `retreats`, where their residual was not finite:
        ``y``, ``fy`` and ``r``, which the step is given then, are those of the start again.
        Changes the memory; of the other samples nothing may change.
        """
        raise NotImplementedError(f"{self} cannot begin again.")

    def export(self, memory: Any) -> Any:
        """What of the memory another solve can begin with; None if nothing."""
        return None

    def resume(self, exported: Any, y: Tensor) -> Any:
        """The memory at the start of a solve that begins with what another one exported.

        Raises:
            ValueError: if that is not what this solver exports.
        """
        check_memory(self, exported, type(None))
        return self.init(y)

    def begin(self, y: Tensor, f: Problem, exported: Any = None) -> Any:
        """`init` or `resume`; a place for solvers that need more of ``f`` than its images."""
        return self.init(y) if exported is None else self.resume(exported, y)


class WholeSolver(Solver):
    """A solver from elsewhere that runs its own loop and shows only its answer."""

    @abstractmethod
    def run(self, f: Callable[[Tensor], Tensor], y0: Tensor, stop: Stop) -> Tensor:
        """The solution ``(B, D)`` of ``y = f(y)`` from ``y0 (B, D)``."""

    def init(self, y: Tensor) -> Any:
        raise TypeError(f"{self} runs as a whole and cannot be stepped.")

    def step(self, memory: Any, y: Tensor, fy: Tensor, r: Tensor) -> tuple[Tensor, Any]:
        raise TypeError(f"{self} runs as a whole and cannot be stepped.")


def check_memory(solver: Solver, exported: Any, kind: type) -> None:
    """Raise unless ``exported`` is what ``solver`` hands from one solve to the next."""
    if not isinstance(exported, kind):
        keeps = "no memory" if kind is type(None) else kind.__name__
        raise ValueError(
            f"memory: {solver} hands on {keeps} and was given {type(exported).__name__}. Pass the "
            "solution.memory of a solve with the same solver, or memory=None."
        )


def take(memory: Any, rows: Tensor) -> Any:
    """The memory of some samples: ``rows (k,)`` of every tensor in it, at any depth."""
    if isinstance(memory, Tensor):
        return memory.index_select(0, rows)
    if dataclasses.is_dataclass(memory) and not isinstance(memory, type):
        fewer = copy.copy(memory)
        for field in dataclasses.fields(memory):
            setattr(fewer, field.name, take(getattr(memory, field.name), rows))
        return fewer
    return pytree.tree_map(
        lambda leaf: take(leaf, rows) if _holds_rows(leaf) else leaf, memory, is_leaf=_holds_rows
    )


def _holds_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) or dataclasses.is_dataclass(leaf)
