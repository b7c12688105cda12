"""Anderson mixing: the next iterate from the best combination of the last few.

D. G. Anderson, *Iterative procedures for nonlinear integral equations*, J. ACM 12(4), 1965, in
the difference form of type II of H. Walker and P. Ni, *Anderson acceleration for fixed-point
iterations*, SIAM J. Numer. Anal. 49(4), 2011.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.arguments import check_count
from implicit.solvers.base import Solver
from implicit.solvers.history import SecantHistory, combine, dot, write

AGING = 100.0
MOST_RIDGE = 1e-2
"""The ridge of a pair grows a hundredfold with each step of its age, up to this."""


class _Memory:
    def __init__(self, y: Tensor, size: int) -> None:
        self.history = SecantHistory(y, size)
        self.gram = y.new_zeros(y.shape[0], size, size)


@dataclass(frozen=True)
class Anderson(Solver):
    """``γ = argmin ‖r − ΔR γ‖``, then ``y ← y + β r − (ΔY + β ΔR) γ``.

    The least-squares problem is solved for each sample through its normal equations, whose matrix
    is kept up to date step by step.  They are scaled to unit diagonal before a ridge is added, so
    the solver does the same whatever the units of the state and however far the differences have
    shrunk.  The ridge is larger for older pairs: where the pairs depend on each other, it is the
    new ones, taken nearest to the solution, that decide.  A sample whose residual grows far
    beyond the best it has seen forgets its history and begins again from there.

    Args:
        memory: pairs of differences kept, ``m ≥ 1``.
        mixing: ``β`` in (0, 1]; how much of the residual is taken beside the extrapolation.
        ridge: regularisation of the newest pair, relative to the scaled normal equations; never
            less than the rounding error of the working dtype.
        restart: growth of the residual over its best value that makes a sample begin again.

    Example:
        >>> import torch, implicit
        >>> A = torch.tensor([[0.9, 0.3], [-0.3, 0.9]], dtype=torch.float64)
        >>> y0 = torch.ones(1, 2, dtype=torch.float64)
        >>> s = implicit.fixed_point(lambda y: y @ A + 1, y0, solver=implicit.Anderson(memory=2))
        >>> bool(s.converged) and int(s.evaluations) < 8
        True
    """

    memory: int = 20
    mixing: float = 1.0
    ridge: float = 1e-10
    restart: float = 1e3

    def __post_init__(self) -> None:
        check_count("Anderson", "memory", self.memory)
        if not 0 < self.mixing <= 1:
            raise ValueError(f"Anderson(mixing={self.mixing}): must lie in (0, 1].")
        if not self.ridge >= 0:
            raise ValueError(f"Anderson(ridge={self.ridge}): must not be negative.")
        if not self.restart > 1:
            raise ValueError(f"Anderson(restart={self.restart}): must be above 1.")

    def init(self, y: Tensor) -> _Memory:
        return _Memory(y, self.memory)

    def step(self, memory: _Memory, y: Tensor, fy: Tensor) -> tuple[Tensor, _Memory]:
        r = fy - y
        plain = y + self.mixing * r
        history = memory.history
        history.restart(r, self.restart)
        if not history.push(y, r):
            return plain, memory

        n, slot = history.pairs, history.slot
        dy, dr = history.dy[:, :n], history.dr[:, :n]
        products = dot(dr, dr[:, slot])
        memory.gram = write(memory.gram, slot, _padded(products, self.memory))
        memory.gram = write(memory.gram.mT, slot, _padded(products, self.memory)).mT
        gamma = self._mix(memory.gram[:, :n, :n], dot(dr, r), history)
        return plain - combine(gamma, dy) - self.mixing * combine(gamma, dr), memory

    def _mix(self, gram: Tensor, target: Tensor, history: SecantHistory) -> Tensor:
        diagonal = gram.diagonal(dim1=1, dim2=2)
        usable = history.alive[:, : history.pairs] & (diagonal > 0)
        scale = torch.where(usable, diagonal, 1).rsqrt() * usable
        newest = max(self.ridge, 10 * torch.finfo(gram.dtype).eps)
        ridge = (newest * AGING ** history.age.to(gram.dtype)).clamp(max=MOST_RIDGE)
        unit = torch.diag_embed(torch.where(usable, ridge, 1.0))
        system = gram * scale.unsqueeze(1) * scale.unsqueeze(2) + unit
        solution, _ = torch.linalg.solve_ex(system, (scale * target).unsqueeze(2))
        gamma = scale * solution.squeeze(2)
        # A sample whose numbers overflowed takes the plain step; its neighbours are untouched.
        return torch.where(torch.isfinite(gamma).all(dim=1, keepdim=True), gamma, 0)


def _padded(row: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, size - row.shape[1]))
