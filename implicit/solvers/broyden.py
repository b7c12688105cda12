"""Broyden's good method with a truly limited memory.

C. G. Broyden, *A class of methods for solving nonlinear simultaneous equations*, Math. Comp.
19(92), 1965; compact form of the product of updates after R. Byrd, J. Nocedal and R. Schnabel,
*Representations of quasi-Newton matrices and their use in limited memory methods*, Math. Prog.
63, 1994.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.arguments import check_count
from implicit.solvers.base import Solver
from implicit.solvers.history import SecantHistory, combine, dot, write


class _Memory:
    def __init__(self, y: Tensor, size: int) -> None:
        self.history = SecantHistory(y, size)
        self.dy_dy = y.new_zeros(y.shape[0], size, size)
        self.dy_dr = y.new_zeros(y.shape[0], size, size)


@dataclass(frozen=True)
class Broyden(Solver):
    """Quasi-Newton steps on ``F(y) = y − f(y)`` from ``B₀ = I``.

    With the last pairs ``S = ΔY`` and ``Y = −ΔR``, the matrix that Broyden's good update would
    have built from the identity is ``B = I + (Y − S) N⁻¹ Sᵀ`` with ``N`` the upper triangle of
    ``SᵀS`` in order of time.  Its inverse is applied by the Woodbury identity,
    ``B⁻¹r = r − (Y − S) (SᵀY − L)⁻¹ Sᵀr`` with ``L`` the strict lower triangle of ``SᵀS``.  When
    the memory is full the oldest pair is dropped from that *form*, so what remains is again a
    Broyden matrix; overwriting rank-one terms in a circle, as is often done, is not, and diverges.

    Args:
        memory: pairs kept, ``m ≥ 1``.
        restart: growth of the residual over its best value that makes a sample begin again.

    Example:
        >>> import torch, implicit
        >>> y0 = torch.full((1, 1), 2.0, dtype=torch.float64)
        >>> tight = implicit.Tolerance(rtol=0.0, atol=1e-10)
        >>> s = implicit.fixed_point(torch.cos, y0, solver=implicit.Broyden(), stop=tight)
        >>> round(s.value.item(), 6), int(s.evaluations) < 10
        (0.739085, True)
    """

    memory: int = 20
    restart: float = 1e3

    def __post_init__(self) -> None:
        check_count("Broyden", "memory", self.memory)
        if not self.restart > 1:
            raise ValueError(f"Broyden(restart={self.restart}): must be above 1.")

    def init(self, y: Tensor) -> _Memory:
        return _Memory(y, self.memory)

    def step(self, memory: _Memory, y: Tensor, fy: Tensor) -> tuple[Tensor, _Memory]:
        r = fy - y
        history = memory.history
        history.restart(r, self.restart)
        if not history.push(y, r):
            return fy, memory

        n, slot = history.pairs, history.slot
        dy, dr, alive = history.dy[:, :n], history.dr[:, :n], history.alive[:, :n]
        _store(memory, slot, dot(dy, dy[:, slot]), dot(dy, dr[:, slot]), dot(dr, dy[:, slot]))
        weights = self._weights(
            memory.dy_dy[:, :n, :n], memory.dy_dr[:, :n, :n], dot(dy, r), alive, history.later
        )
        return fy + combine(weights, dy) + combine(weights, dr), memory

    @staticmethod
    def _weights(
        dy_dy: Tensor, dy_dr: Tensor, target: Tensor, alive: Tensor, later: Tensor
    ) -> Tensor:
        """``(SᵀY − L)⁻¹ Sᵀr``, scaled to pairs of unit length; empty slots weigh nothing."""
        diagonal = dy_dy.diagonal(dim1=1, dim2=2)
        usable = alive & (diagonal > 0)
        scale = torch.where(usable, diagonal, 1).rsqrt() * usable
        system = -dy_dr - dy_dy * later
        system = system * scale.unsqueeze(1) * scale.unsqueeze(2)
        system = system + torch.diag_embed((~usable).to(system.dtype))
        solution, _ = torch.linalg.solve_ex(system, (scale * target).unsqueeze(2))
        weights = scale * solution.squeeze(2)
        return torch.where(torch.isfinite(weights).all(dim=1, keepdim=True), weights, 0)


def _store(memory: _Memory, slot: int, dy_dy: Tensor, dy_dr: Tensor, dr_dy: Tensor) -> None:
    """One new row and column in each of the matrices of inner products."""
    size = memory.dy_dy.shape[1]
    rows = [torch.nn.functional.pad(x, (0, size - x.shape[1])) for x in (dy_dy, dy_dr, dr_dy)]
    memory.dy_dy = write(write(memory.dy_dy, slot, rows[0]).mT, slot, rows[0])
    memory.dy_dr = write(write(memory.dy_dr, slot, rows[2]).mT, slot, rows[1]).mT
