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

from implicit.arguments import check_count, check_flag, check_number
from implicit.solvers.base import Solver, check_memory
from implicit.solvers.history import PointPairs, SecantHistory
from implicit.solvers.line_search import LineSearch

WATCHED = 5
"""The first evaluations, in which a step that is far too long is taken back."""
FAR_TOO_LONG = 4.0
"""Growth of the residual in one step that tells so."""
SHORTEST = 0.01
"""Least ratio of two steps from one point; it may have been the map that was wrong, for once."""


@dataclass
class _Memory:
    history: SecantHistory
    blank: Tensor  # (B, m, m): the identity, which is the system of no pairs
    length: Tensor  # (B, 1): of the last residual
    damping: Tensor  # (B, 1): λ
    search: LineSearch | None
    taken: int = 0


@dataclass(frozen=True)
class Broyden(Solver):
    """Quasi-Newton steps on ``F(y) = λ (y − f(y))`` from ``B₀ = I``.

    With the last pairs, of points ``S`` and of residuals ``R = −ΔF``, the matrix that Broyden's
    good update would have built from the identity is ``B = I − (R + S) N⁻¹ Sᵀ`` with ``N`` the
    upper triangle of ``SᵀS`` in order of time.  By the Woodbury identity the step is
    ``−B⁻¹F = r − (R + S) (SᵀR + L)⁻¹ Sᵀr`` with ``r = −F`` and ``L`` the strict lower triangle of
    ``SᵀS``.  When the memory is full the oldest pair is dropped from that *form*, so what remains
    is again a Broyden matrix; overwriting rank-one terms in a circle, as is often done, is not,
    and diverges.

    ``λ`` is 1 unless one of the first steps of a sample multiplies its residual.  That step is
    taken back, and ``λ`` becomes the distance that was gone over the change of the residual, so
    that ``B₀`` is of the size of the Jacobian.

    Args:
        memory: pairs kept, ``m ≥ 1``.
        restart: growth of the residual over its best value that makes a sample begin again.
        line_search: halve the step of a sample, up to eight times, while its residual is not
            below an average of those before.  Each trial is a solver step and one evaluation of
            ``f``.

    Example:
        >>> import torch, implicit
        >>> y0 = torch.full((1, 1), 2.0, dtype=torch.float64)
        >>> tight = implicit.Tolerance(rtol=0.0, atol=1e-10)
        >>> s = implicit.fixed_point(torch.cos, y0, solver=implicit.Broyden(), stop=tight)
        >>> round(s.value.item(), 6), int(s.evaluations) < 10
        (0.739085, True)
    """

    memory: int = 20
    restart: float = 100.0
    line_search: bool = False

    def __post_init__(self) -> None:
        check_count("Broyden", "memory", self.memory)
        check_number("Broyden", "restart", self.restart, above=1)
        check_flag("Broyden", "line_search", self.line_search)

    def init(self, y: Tensor) -> _Memory:
        return self._begin(SecantHistory.empty(y, self.memory, self.restart), y)

    def resume(self, exported: PointPairs, y: Tensor) -> _Memory:
        check_memory(self, exported, PointPairs)
        history = SecantHistory.of(exported, y, self.memory, self.restart)
        unit = history.normalise(history.others)
        changes = history.residuals * history.unit
        # Slots are in order of time here, so that is what the triangle is of.
        history.system = torch.bmm(unit, changes.mT) + torch.bmm(unit, unit.mT).tril(-1)
        history.system.diagonal(dim1=1, dim2=2).add_((history.scale == 0).to(y.dtype))
        return self._begin(history, y)

    def export(self, memory: _Memory) -> PointPairs:
        residuals, points = memory.history.export()
        # The next solve begins with λ = 1.
        return PointPairs(residuals / memory.damping.unsqueeze(2), points)

    def step(self, memory: _Memory, y: Tensor, fy: Tensor, r: Tensor) -> tuple[Tensor, _Memory]:
        history, search = memory.history, memory.search
        memory.taken += 1
        length = torch.linalg.vector_norm(r.detach(), dim=1, keepdim=True)
        memory.length, last = length, memory.length
        kept = history.restart(length)
        # What is left of a system that has failed could still be singular.
        history.system = torch.where(kept.unsqueeze(2), history.system, memory.blank)
        following = self._quasi_newton(memory, y, r)
        if search is not None:
            accepted = search.accepts(length.squeeze(1))
            following = search.next(accepted, y, length.squeeze(1), following - y)
        elif 1 < memory.taken <= WATCHED:
            following = self._take_back(memory, following, last)
        return following, memory

    def _begin(self, history: SecantHistory, y: Tensor) -> _Memory:
        blank = torch.eye(self.memory, dtype=y.dtype, device=y.device).expand(y.shape[0], -1, -1)
        one = torch.ones_like(history.limit)
        return _Memory(history, blank, one, one, LineSearch.at(y) if self.line_search else None)

    def _quasi_newton(self, memory: _Memory, y: Tensor, r: Tensor) -> Tensor:
        history = memory.history
        r = r.mul_(memory.damping)
        pushed = history.push(r, y)
        following = r.add_(y)
        if history.filled:
            weights = history.weights(self._update(history, pushed))
            rows = history.rows[:, 1 : 2 * history.filled + 1]
            both = torch.stack((weights, weights), dim=3).flatten(2)
            following = history.mix(following, both, rows, into=following)
        history.hold(y)
        return following

    @staticmethod
    def _update(history: SecantHistory, pushed: bool) -> Tensor:
        """Put the newest pair into ``SᵀΔR + L``; ``Sᵀr (B, n, 1)``, for pairs of unit length.

        No pair is younger than the newest, so only its row has a part of ``L``.
        """
        products = torch.bmm(history.others, history.residual_and_newest.mT)
        if not pushed:
            return products.narrow(2, 0, 1) * history.unit
        slot, n = history.slot, history.filled
        newest = history.row(2 + 2 * slot).unsqueeze(1)
        with_all = torch.bmm(newest, history.rows[:, 1 : 2 * n + 1].mT).view(-1, n, 2)
        square = with_all.select(1, slot).narrow(1, 1, 1)
        still = square == 0 if torch.is_grad_enabled() else None
        own = history.measure(square)
        unit, equations = history.unit, history.equations
        products = products * unit
        equations.select(1, slot).copy_(with_all.sum(dim=2) * unit.squeeze(2) * own)
        equations.select(2, slot).copy_(products.select(2, 1) * own)
        if still is not None:
            # A sample that has stopped makes pairs of length zero, whose equations are singular.
            # Its weights are not used; but in the derivative, zero times what is not finite is.
            equations.select(1, slot).narrow(1, slot, 1).add_(still)
        return products.narrow(2, 0, 1)

    @staticmethod
    def _take_back(memory: _Memory, following: Tensor, last: Tensor) -> Tensor:
        """Another step from where the last one began, for samples where that was far too long."""
        history = memory.history
        failed = memory.length > FAR_TOO_LONG * last
        rows, slot = failed.to(following.dtype), history.slot
        change, gone = history.row(1 + 2 * slot), history.row(2 + 2 * slot)
        norms = [torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True) for x in (gone, change)]
        shorter = torch.where(failed, (norms[0] / norms[1]).clamp(SHORTEST, 1), 1)
        residual = history.row(0)
        history.held.addcmul_(rows, gone)
        residual.addcmul_(rows, change).mul_(shorter)
        memory.damping = memory.damping * shorter
        memory.length = torch.where(failed, last, memory.length)
        history.limit = torch.where(failed, last * history.growth, history.limit)
        history.forget(failed)
        history.system = torch.where(failed.unsqueeze(2), memory.blank, history.system)
        # Cleared, not multiplied by zero: the step that is taken back may have overflowed.
        following.masked_fill_(failed, 0)
        return following.addcmul_(rows, history.held).addcmul_(rows, residual)
