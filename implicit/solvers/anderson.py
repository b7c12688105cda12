"""Anderson mixing: the next iterate from the best combination of the last few.

D. G. Anderson, *Iterative procedures for nonlinear integral equations*, J. ACM 12(4), 1965, in
the difference form of type II of H. Walker and P. Ni, *Anderson acceleration for fixed-point
iterations*, SIAM J. Numer. Anal. 49(4), 2011; with plain steps in between (``every``): P. Pratapa,
P. Suryanarayana and J. Pask, *Anderson acceleration of the Jacobi iterative method*, J. Comput.
Phys. 306, 2016.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.arguments import check_count, check_number
from implicit.solvers.base import Solver, check_memory
from implicit.solvers.history import ImagePairs, SecantHistory, Views

AGING = 100.0
MOST_RIDGE = 1e-2
"""The ridge of a pair grows a hundredfold with each step of its age, up to this."""
SHORTER = 0.3
"""What a sample that begins again keeps of its ``β``."""


@dataclass
class _Memory:
    history: SecantHistory
    diagonals: tuple[Tensor, ...]  # (B, m): of the system, by the slots to the newest pair's right
    taken: int = 0
    share: Tensor | None = None  # (B, 1): β of each sample, once one has begun again


@dataclass(frozen=True)
class Anderson(Solver):
    """``γ = argmin ‖r − ΔR γ‖``, then ``y ← y + β r − (ΔY + β ΔR) γ``.

    The least-squares problem is solved for each sample through its normal equations, whose matrix
    is kept up to date step by step.  They are scaled to unit diagonal before a ridge is added, so
    the solver does the same whatever the units of the state and however far the differences have
    shrunk.  The ridge is larger for older pairs: where the pairs depend on each other, it is the
    new ones, taken nearest to the solution, that decide.  A sample whose residual grows far
    beyond the best it has seen forgets its history and begins again from there.

    Extrapolation can lead to where ``f`` overflows or is not defined.  A sample whose residual is
    not finite begins again from its start with 0.3 times its ``β``, up to ten times; only after
    that it has diverged.  This needs a look from the host, so it is for `Tolerance`, at the steps
    that ``check_every`` tells, and not under `torch.func.vmap`; nor is it where the path is
    differentiated (`BPTT`), which would lead through what is not finite.  Each time costs an
    evaluation of the start.

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
        check_number("Anderson", "mixing", self.mixing, above=0, most=1)
        check_number("Anderson", "ridge", self.ridge, least=0)
        check_number("Anderson", "restart", self.restart, above=1)

    def init(self, y: Tensor) -> _Memory:
        return self._begin(SecantHistory.empty(y, self.memory, self.restart))

    def resume(self, exported: ImagePairs, y: Tensor) -> _Memory:
        check_memory(self, exported, ImagePairs)
        history = SecantHistory.of(exported, y, self.memory, self.restart)
        unit = history.normalise(history.residuals)
        history.system = torch.bmm(unit, unit.mT)
        return self._begin(history)

    def export(self, memory: _Memory) -> ImagePairs:
        residuals, images = memory.history.export()
        if memory.share is not None:  # the next solve begins with β
            images = images + (self.mixing - memory.share).unsqueeze(2) * residuals
        return ImagePairs(residuals, images)

    def step(self, memory: _Memory, y: Tensor, fy: Tensor, r: Tensor) -> tuple[Tensor, _Memory]:
        history = memory.history
        plain = fy if self.mixing == 1 else y.lerp(fy, self.mixing)
        if memory.share is not None:
            shorter = memory.share < self.mixing
            plain = torch.where(shorter, y.lerp(fy, memory.share), plain)
        history.restart(torch.linalg.vector_norm(r, dim=1, keepdim=True))
        pushed = history.push(r, plain)
        following = plain
        memory.taken += 1
        if history.filled:
            views = history.look()
            target = self._update(history, views, pushed)
            if memory.taken % self.every == 0:
                self._regularise(memory, views)
                weights = history.weights(views, target)
                following = history.mix(plain, weights, views.others, into=r)
        history.hold(plain)
        return following, memory

    @property
    def retreats(self) -> bool:
        return True

    def retreat(self, memory: _Memory, lost: Tensor, y: Tensor, fy: Tensor, r: Tensor) -> None:
        history, share = memory.history, memory.share
        if share is None:
            share = torch.full_like(history.limit, self.mixing)
        memory.share = torch.where(lost, SHORTER * share, share)
        history.begin_again(lost, r, y.lerp(fy, memory.share))

    def _begin(self, history: SecantHistory) -> _Memory:
        like = history.scale
        newest = math.log(max(self.ridge, 10 * torch.finfo(like.dtype).eps), AGING)
        ridges = torch.logspace(
            newest + self.memory - 1,
            newest,
            self.memory,
            AGING,
            dtype=like.dtype,
            device=like.device,
        )
        around = ridges.clamp_(max=MOST_RIDGE).add_(1).repeat(len(like), 2)
        return _Memory(history, around.unfold(1, self.memory, 1).unbind(1))

    @staticmethod
    def _update(history: SecantHistory, views: Views, pushed: bool) -> Tensor:
        """Put the newest pair into the normal equations; their right-hand side ``(B, n, 1)``."""
        products = torch.bmm(views.residuals, views.targets)
        if pushed:
            own = history.measure(views.own, history.length_of(views.change))
        products = products * views.unit
        if pushed:
            column = products.select(2, 1)
            history.write(views, own, column, column)
        return products.narrow(2, 0, 1)

    def _regularise(self, memory: _Memory, views: Views) -> None:
        """Set the diagonal to one plus the ridge that belongs to the age of each pair."""
        history = memory.history
        diagonal = views.diagonal if history.in_place else history.system.diagonal(dim1=1, dim2=2)
        diagonal.copy_(memory.diagonals[self.memory - 1 - history.slot])
