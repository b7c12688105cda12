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
from implicit.solvers.history import Pairs, SecantHistory
from implicit.solvers.line_search import LineSearch


@dataclass
class _Memory:
    history: SecantHistory
    blank: Tensor  # (B, m, m): the identity, which is the system of no pairs
    search: LineSearch | None


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
        line_search: halve the step of a sample, up to eight times, while its residual does not
            fall.  Each trial is a solver step and one evaluation of ``f``.

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
    line_search: bool = False

    def __post_init__(self) -> None:
        check_count("Broyden", "memory", self.memory)
        if not self.restart > 1:
            raise ValueError(f"Broyden(restart={self.restart}): must be above 1.")

    def init(self, y: Tensor) -> _Memory:
        return self._begin(SecantHistory.empty(y, self.memory, self.restart), y)

    def resume(self, exported: Pairs, y: Tensor) -> _Memory:
        history = SecantHistory.of(exported, y, self.memory, self.restart)
        unit, moves = (x * history.scale.unsqueeze(2) for x in (history.basis, history.moves))
        # Slots are in order of time here, so that is what the triangle is of.
        history.system = torch.bmm(unit, moves.mT) - torch.bmm(unit, unit.mT).triu()
        history.system.diagonal(dim1=1, dim2=2).add_((history.scale == 0).to(y.dtype))
        return self._begin(history, y)

    def export(self, memory: _Memory) -> Pairs:
        return memory.history.export()

    def step(self, memory: _Memory, y: Tensor, fy: Tensor, r: Tensor) -> tuple[Tensor, _Memory]:
        history = memory.history
        kept = history.restart(r).view(-1, 1, 1)
        # What is left of a system that has failed could still be singular.
        history.system = torch.where(kept, history.system, memory.blank)
        length = torch.linalg.vector_norm(r.detach(), dim=1) if memory.search else None
        following = self._quasi_newton(history, y, fy, r)
        if memory.search is not None and length is not None:
            accepted = memory.search.accepts(length)
            following = memory.search.next(accepted, y, length, following - y)
        return following, memory

    def _begin(self, history: SecantHistory, y: Tensor) -> _Memory:
        blank = torch.eye(self.memory, dtype=y.dtype, device=y.device).expand(y.shape[0], -1, -1)
        return _Memory(history, blank, LineSearch.at(y) if self.line_search else None)

    def _quasi_newton(self, history: SecantHistory, y: Tensor, fy: Tensor, r: Tensor) -> Tensor:
        pushed = history.push(r, fy, y)
        following = fy
        if history.filled:
            target = self._update(history, pushed)
            following = history.mix(fy, history.weights(target), into=r)
        history.hold(fy, y)
        return following

    @staticmethod
    def _update(history: SecantHistory, pushed: bool) -> Tensor:
        """Put the newest pair into ``L − SᵀY``; ``Sᵀr (B, n)``, for pairs of unit length.

        With ``ΔF = S − Y`` the matrix is ``SᵀΔF`` less the upper triangle of ``SᵀS`` in order of
        time.  No pair is younger than the newest, so only its column has a part of ``SᵀS``.
        """
        n, slot = history.filled, history.slot
        rows = history.residual_and(2 + 2 * slot)
        residual_and_move = torch.bmm(rows, history.basis.mT)
        if not pushed:
            return residual_and_move.select(1, 0) * history.scale
        newest = history.rows.select(1, 1 + 2 * slot).unsqueeze(1)
        with_all = torch.bmm(newest, history.rows[:, 1 : 2 * n + 1].mT).squeeze(1)
        squares, moved = with_all[:, ::2], with_all[:, 1::2]
        own = history.measure(squares.narrow(1, slot, 1))
        scale, equations = history.unit, history.equations
        target, column = (residual_and_move * scale.unsqueeze(1)).unbind(1)
        scale = scale * own
        equations.select(1, slot).copy_(moved * scale)
        equations.select(2, slot).copy_(torch.addcmul(column * own, squares, scale, value=-1))
        return target
