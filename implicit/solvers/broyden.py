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
from implicit.solvers.history import PointPairs, SecantHistory, Views
from implicit.solvers.line_search import LineSearch

WATCHED = 5
"""The first evaluations, in which a step that is far too long is taken back."""
FAR_TOO_LONG = 4.0
"""Growth of the residual in one step that tells so."""
SHORTEST = 0.01
"""Least ratio of two steps from one point; it may have been the map that was wrong, for once."""
SHORTER = 0.3
"""What a sample that begins again keeps of its ``λ``."""


@dataclass
class _Memory:
    history: SecantHistory
    blank: Tensor  # (B, m, m): the identity, which is the system of no pairs
    length: Tensor  # (B, 1): of the last residual
    damping: Tensor  # (B, 1): λ
    change: Tensor  # (B, 1): length of the newest change of the residual, while watched
    search: LineSearch | None
    taken: int = 0
    back: Tensor | None = None  # (B, 1): samples that begin again with the next step

    @property
    def watched(self) -> bool:
        """Whether a step that is far too long would be taken back."""
        return self.search is None and 1 < self.taken <= WATCHED


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
    that ``B₀`` is of the size of the Jacobian.  A sample whose residual is not finite begins again
    from its start with 0.3 times its ``λ``, where and as often as with `Anderson`; not with a line
    search.

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
        changes = history.residuals * history.scale.unsqueeze(2)
        # Slots are in order of time here, so that is what the triangle is of.
        history.system = torch.bmm(unit, changes.mT) + torch.bmm(unit, unit.mT).tril(-1)
        history.system.diagonal(dim1=1, dim2=2).add_((history.scale == 0).to(y.dtype))
        history.residuals.add_(history.others)
        return self._begin(history, y)

    def export(self, memory: _Memory) -> PointPairs:
        sums, points = memory.history.export()
        # The next solve begins with λ = 1.
        return PointPairs((sums - points) / memory.damping.unsqueeze(2), points)

    def step(self, memory: _Memory, y: Tensor, fy: Tensor, r: Tensor) -> tuple[Tensor, _Memory]:
        history, search = memory.history, memory.search
        memory.taken += 1
        undifferentiated = r.detach() if r.requires_grad else r
        length = torch.linalg.vector_norm(undifferentiated, dim=1, keepdim=True)
        memory.length, last = length, memory.length
        kept = history.restart(length)
        self._clear(memory, kept)
        following = self._quasi_newton(memory, y, r)
        if memory.back is not None:  # no pair, and equations that can be solved
            history.forget(memory.back)
            self._clear(memory, ~memory.back)
            memory.back = None
        if search is not None:
            accepted = search.accepts(length.squeeze(1))
            following = search.next(accepted, y, length.squeeze(1), following - y)
        elif memory.watched:
            following = self._take_back(memory, following, last)
        return following, memory

    @property
    def retreats(self) -> bool:
        return not self.line_search

    def retreat(self, memory: _Memory, lost: Tensor, y: Tensor, fy: Tensor, r: Tensor) -> None:
        memory.back = lost
        memory.damping = torch.where(lost, SHORTER * memory.damping, memory.damping)
        memory.length = memory.length.masked_fill(lost, torch.inf)
        memory.history.begin_again(lost, memory.damping * r, y)

    def _begin(self, history: SecantHistory, y: Tensor) -> _Memory:
        blank = torch.eye(self.memory, dtype=y.dtype, device=y.device).expand(y.shape[0], -1, -1)
        one = torch.ones_like(history.limit)
        search = LineSearch.at(y) if self.line_search else None
        return _Memory(history, blank, one, one, one, search)

    def _quasi_newton(self, memory: _Memory, y: Tensor, r: Tensor) -> Tensor:
        history = memory.history
        r = r.mul_(memory.damping)
        pushed = history.push(r, y)
        following = r.add_(y)
        if history.filled:
            views = history.look()
            products = torch.bmm(views.others, views.targets)
            if pushed:
                if memory.watched:
                    change = views.change.detach()
                    memory.change = torch.linalg.vector_norm(change, dim=1, keepdim=True)
                views = history.renewed(views)
                products = self._update(history, views, products)
            else:
                products = products * views.unit
            weights = history.weights(views, products.narrow(2, 0, 1))
            following = history.mix(following, weights, views.residuals, into=following)
        history.hold(y)
        return following

    @staticmethod
    def _update(history: SecantHistory, views: Views, products: Tensor) -> Tensor:
        """Put the newest pair into ``SᵀR + L``; ``products``, for pairs of unit length.

        These are ``Sᵀ`` times the residual and its newest change, ``(B, n, 2)``.

        No pair is younger than the newest, so only its line has a part of ``L``.  It is the line
        of ``Sᵀ(R + S)``, but for its last element, which the column then corrects.
        """
        views.change.add_(views.other)
        own = history.measure(views.own, history.length_of(views.other))
        products = products * views.unit
        line = torch.bmm(views.residuals, views.other.unsqueeze(2)) * views.unit
        history.write(views, own, line.squeeze(2), products.select(2, 1))
        if torch.is_grad_enabled():
            # A sample that has stopped makes pairs of length zero, whose equations are singular.
            # Its weights are not used; but in the derivative, zero times what is not finite is.
            gone = (views.other == 0).all(dim=1)
            history.system[:, history.slot, history.slot] += gone
        return products

    @staticmethod
    def _clear(memory: _Memory, kept: Tensor) -> None:
        """Forget the system of samples but those ``kept (B, 1)``; it could still be singular."""
        history, kept = memory.history, kept.unsqueeze(2)
        if history.in_place:
            torch.where(kept, history.system, memory.blank, out=history.system)
        else:
            history.system = torch.where(kept, history.system, memory.blank)

    @staticmethod
    def _take_back(memory: _Memory, following: Tensor, last: Tensor) -> Tensor:
        """Another step from where the last one began, for samples where that was far too long."""
        history = memory.history
        failed = memory.length > FAR_TOO_LONG * last
        rows, residual = failed.to(following.dtype), history.row(0)
        both, gone = history.row(1 + 2 * history.slot), history.row(2 + 2 * history.slot)
        distance = torch.linalg.vector_norm(gone.detach(), dim=1, keepdim=True)
        shorter = torch.where(failed, (distance / memory.change).clamp(SHORTEST, 1), 1)
        history.held.addcmul_(rows, gone)
        residual.addcmul_(rows, both).addcmul_(rows, gone, value=-1).mul_(shorter)
        memory.damping = memory.damping * shorter
        memory.length = torch.where(failed, last, memory.length)
        history.limit = torch.where(failed, last * history.growth, history.limit)
        history.forget(failed)
        Broyden._clear(memory, ~failed)
        # Cleared, not multiplied by zero: the step that is taken back may have overflowed.
        following.masked_fill_(failed, 0)
        return following.addcmul_(rows, history.held).addcmul_(rows, residual)
