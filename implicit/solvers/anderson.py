"""Anderson mixing: the next iterate from the best combination of the last few.

D. G. Anderson, *Iterative procedures for nonlinear integral equations*, J. ACM 12(4), 1965, in
the difference form of type II of H. Walker and P. Ni, *Anderson acceleration for fixed-point
iterations*, SIAM J. Numer. Anal. 49(4), 2011; with plain steps in between (``every``): P. Pratapa,
P. Suryanarayana and J. Pask, *Anderson acceleration of the Jacobi iterative method*, J. Comput.
Phys. 306, 2016.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.arguments import check_count
from implicit.solvers.base import Solver
from implicit.solvers.history import Pairs, SecantHistory, dot, subtract, write

AGING = 100.0
MOST_RIDGE = 1e-2
"""The ridge of a pair grows a hundredfold with each step of its age, up to this."""


@dataclass
class _Memory:
    history: SecantHistory
    gram: Tensor
    ridges: Tensor  # (B, m), for the oldest pair first
    taken: int = 0


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
        every: extrapolate at every so many steps, with ``y ← y + β r`` between them.

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
    every: int = 1

    def __post_init__(self) -> None:
        check_count("Anderson", "memory", self.memory)
        check_count("Anderson", "every", self.every)
        if not 0 < self.mixing <= 1:
            raise ValueError(f"Anderson(mixing={self.mixing}): must lie in (0, 1].")
        if not self.ridge >= 0:
            raise ValueError(f"Anderson(ridge={self.ridge}): must not be negative.")
        if not self.restart > 1:
            raise ValueError(f"Anderson(restart={self.restart}): must be above 1.")

    def init(self, y: Tensor) -> _Memory:
        return self._begin(SecantHistory.empty(y, self.memory))

    def resume(self, exported: Pairs, y: Tensor) -> _Memory:
        memory = self._begin(SecantHistory.of(exported, y, self.memory))
        memory.gram = torch.bmm(memory.history.basis, memory.history.basis.mT)
        return memory

    def export(self, memory: _Memory) -> Pairs:
        return memory.history.export()

    def step(self, memory: _Memory, y: Tensor, fy: Tensor) -> tuple[Tensor, _Memory]:
        r = fy - y
        plain = fy if self.mixing == 1 else y + self.mixing * r
        history = memory.history
        history.restart(torch.linalg.vector_norm(r.detach(), dim=1), self.restart)
        if history.push(r, plain):
            basis = history.filled_basis
            products, target = dot(basis, basis[:, history.slot], r)
            memory.gram = write(memory.gram, history.slot, products)
            memory.gram = write(memory.gram.mT, history.slot, products).mT
        elif history.filled:  # pairs of an earlier solve
            (target,) = dot(history.filled_basis, r)
        memory.taken += 1
        if not history.filled or memory.taken % self.every:
            return plain, memory
        return subtract(plain, self._mix(memory, target), history.filled_moves), memory

    def _begin(self, history: SecantHistory) -> _Memory:
        newest = max(self.ridge, 10 * torch.finfo(history.basis.dtype).eps)
        batch, device = history.best.shape[0], history.best.device
        ages = torch.arange(self.memory - 1, -1, -1, dtype=history.best.dtype, device=device)
        ridges = (newest * AGING**ages).clamp(max=MOST_RIDGE).repeat(batch, 1)
        gram = history.basis.new_zeros(batch, self.memory, self.memory)
        return _Memory(history, gram, ridges)

    def _mix(self, memory: _Memory, target: Tensor) -> Tensor:
        """The weights ``γ (B, n)`` of the pairs; forgotten and empty ones weigh nothing."""
        history = memory.history
        gram = memory.gram[:, : history.filled, : history.filled]
        lengths = gram.diagonal(dim1=1, dim2=2) * history.filled_alive
        scale = torch.where(lengths > 0, lengths, torch.inf).rsqrt()
        system = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
        ridges = memory.ridges.roll(history.slot + 1, dims=1)[:, : history.filled]
        system.diagonal(dim1=1, dim2=2).copy_(1 + ridges)
        solution, _ = torch.linalg.solve_ex(system, (scale * target).unsqueeze(2))
        gamma = scale * solution.squeeze(2)
        # A sample whose numbers overflowed takes the plain step; its neighbours are untouched.
        return torch.where(torch.isfinite(gamma).all(dim=1, keepdim=True), gamma, 0)
