"""Keeping the best iterate, whatever the solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from implicit.arguments import check_kind
from implicit.solvers.base import Solver, WholeSolver


@dataclass(frozen=True)
class Best(Solver):
    """Another solver; a sample that it does not bring within tolerance ends where it was nearest.

    Nearest is the smallest residual ``‖f(y) − y‖`` among the iterates at which ``f`` was
    evaluated, the first included, in the norm of the stop.  Without it a sample ends at the last
    iterate, which may be far worse for a method whose residual does not fall steadily.  The
    status still tells how the solve ended, the residual is that of the value.  Costs one copy of
    the state.

    Example:
        >>> import torch, implicit
        >>> y0 = torch.full((1, 1), 0.1, dtype=torch.float64)
        >>> s = implicit.fixed_point(lambda y: 3 * y, y0, solver=implicit.Best(implicit.Naive()))
        >>> s.value.item(), implicit.Status(s.status.item()).name
        (0.1, 'DIVERGED')
    """

    solver: Solver
    keeps_best: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_kind("solver", self.solver, Solver, "implicit.Anderson(memory=5)")
        if isinstance(self.solver, WholeSolver):
            raise TypeError(f"Best: {self.solver} does not show its iterates.")

    @property
    def differentiable(self) -> bool:
        return self.solver.differentiable

    def init(self, y: Tensor) -> Any:
        return self.solver.init(y)

    def begin(self, y: Tensor, f: Any, exported: Any = None) -> Any:
        return self.solver.begin(y, f, exported)

    def step(self, memory: Any, y: Tensor, fy: Tensor, r: Tensor) -> tuple[Tensor, Any]:
        return self.solver.step(memory, y, fy, r)

    @property
    def retreats(self) -> bool:
        return self.solver.retreats

    def retreat(self, memory: Any, lost: Tensor, y: Tensor, fy: Tensor, r: Tensor) -> None:
        self.solver.retreat(memory, lost, y, fy, r)

    def export(self, memory: Any) -> Any:
        return self.solver.export(memory)
