"""The last ``m`` secant pairs of a solve, in one ring buffer.

Anderson mixing and Broyden's method learn the Jacobian from how the residual changed from one step
to the next, and with it one thing more: the image of `Anderson`, the point of `Broyden`.  Each step
they take inner products with one kind of difference, solve a small ``m × m`` system, and subtract a
combination of differences.  Only one pair, and one row and column of the system, change per step;
computing them all anew would cost ``m`` times as much.

What a step needs beside the pairs lies in the buffer too: the residual in row 0, where it is
multiplied with the pairs in one pass with the newest of them, and the last point or image in the
slot that is overwritten next, where subtracting the new one makes it a difference.  All differences
are thus *old less new*; every formula has them twice, so their sign does not show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.transforms import is_wrapped


@dataclass
class Pairs:
    """Secant pairs in order of time, oldest first: what one solve can hand to the next.

    Attributes:
        residuals, others: ``(B, m, D)``: how the residual changed, and the point or the image;
            zero where there is no pair.
    """

    residuals: Tensor
    others: Tensor


class PointPairs(Pairs):
    """Of residuals and points."""


class ImagePairs(Pairs):
    """Of residuals and images."""


@dataclass
class SecantHistory:
    """A ring of pairs, oldest overwritten first, and the system that weighs them.

    Attributes:
        rows: ``(B, 2m + 1, D)``: the residual, then two differences for each slot in turn: of
            residuals, and of points or images.
        scale: ``(B, m)``: one over the length of what each pair is measured by; 0 where a sample
            has forgotten its pair (`restart`).
        system: ``(B, m, m)``, written by the solver, for pairs of unit length.
        limit: ``(B, 1)``: the least residual since the last restart times ``growth``.
        growth: how far a residual may exceed that least one.
        size: ``m``, the number of slots.
        filled: slots that have ever held a pair.
        slot: that of the newest pair.
        holds: whether a point or an image waits in the next slot for its successor.
    """

    rows: Tensor
    scale: Tensor
    system: Tensor
    limit: Tensor
    growth: float
    size: int
    filled: int = 0
    slot: int = -1
    holds: bool = False

    def __post_init__(self) -> None:
        self._views: tuple[Tensor | None, tuple[Tensor, ...]] = None, ()

    @classmethod
    def empty(cls, y: Tensor, memory: int, growth: float) -> SecantHistory:
        """A history of no pairs for a solve from ``y (B, D)``."""
        batch, dim = y.shape
        return cls(
            rows=y.new_empty(batch, 2 * memory + 1, dim),
            scale=y.new_zeros(batch, memory),
            system=y.new_zeros(batch, memory, memory),
            limit=y.new_full((batch, 1), torch.inf),
            growth=growth,
            size=memory,
        )

    @classmethod
    def of(cls, pairs: Pairs, y: Tensor, memory: int, growth: float) -> SecantHistory:
        """A history that begins with the pairs of another solve, but not with their system."""
        shape = (y.shape[0], memory, y.shape[1])
        if pairs.residuals.shape != shape:
            raise ValueError(
                f"memory: the solve that it comes from kept {tuple(pairs.residuals.shape)} and "
                f"this one keeps pairs of shape {shape} (samples, memory, elements). Use the same "
                "solver and batch, or memory=None."
            )
        history = cls.empty(y, memory, growth)
        history.filled, history.slot = memory, memory - 1
        history.residuals.copy_(pairs.residuals)
        history.others.copy_(pairs.others)
        return history

    def normalise(self, measured: Tensor) -> Tensor:
        """Set `scale` from the differences ``(B, m, D)`` that pairs are measured by; unit ones."""
        lengths = torch.linalg.vector_norm(measured, dim=2)
        self.scale = torch.where(lengths > 0, 1 / lengths, 0)
        return measured * self.unit

    def export(self) -> tuple[Tensor, Tensor]:
        """Both differences in order of time; the oldest is gone if its slot has been taken."""
        order = torch.arange(self.size, device=self.rows.device).roll(-1 - self.slot)
        alive = self.scale[:, order].unsqueeze(2) > 0
        if self.holds:
            alive[:, 0] = False
        # Selected, not multiplied: a forgotten pair may hold infinities.
        residuals, others = (
            torch.where(alive, self.rows[:, 1 + kind :: 2][:, order], 0).detach() for kind in (0, 1)
        )
        return residuals, others

    @property
    def residuals(self) -> Tensor:
        """``(B, n, D)``: changes of the residual, of the slots that have ever held a pair."""
        return self.rows[:, 1 : 2 * self.filled : 2]

    @property
    def others(self) -> Tensor:
        """``(B, n, D)``: changes of the point or the image, likewise."""
        return self.rows[:, 2 : 2 * self.filled + 1 : 2]

    @property
    def unit(self) -> Tensor:
        """``(B, n, 1)``: `scale` of those slots."""
        scale = self.scale if self.filled == self.size else self.scale[:, : self.filled]
        return scale.unsqueeze(2)

    @property
    def equations(self) -> Tensor:
        """``(B, n, n)``: `system` of those slots."""
        n = self.filled
        return self.system if n == self.size else self.system[:, :n, :n]

    def forget(self, which: Tensor) -> None:
        """Empty the history of the samples ``which (B, 1)``."""
        self.scale = self.scale.masked_fill(which, 0)

    def row(self, index: int) -> Tensor:
        """``(B, D)``: a row of the buffer."""
        if torch.is_grad_enabled():  # which forbids to write to views that were made together
            return self.rows.select(1, index)
        of, views = self._views
        if of is not self.rows:
            self._views = of, views = self.rows, self.rows.unbind(1)
        return views[index]

    def restart(self, length: Tensor) -> Tensor:
        """Empty the history of samples whose residual ``(B, 1)`` exceeds its limit; who keep it."""
        kept, allowed = length <= self.limit, length * self.growth
        self.limit = torch.where(kept, torch.minimum(self.limit, allowed), allowed)
        self.scale = self.scale * kept
        return kept

    def push(self, r: Tensor, other: Tensor) -> bool:
        """Write the residual, and make a pair of what was held; False if nothing was."""
        residual = self.row(0)
        if self.holds:
            self.slot = (self.slot + 1) % self.size
            self.filled = min(self.filled + 1, self.size)
            self.row(1 + 2 * self.slot).copy_(residual).sub_(r)
            self.row(2 + 2 * self.slot).sub_(other)
        residual.copy_(r)
        return self.holds

    def hold(self, other: Tensor) -> None:
        """Keep a point or an image for the next pair, in place of the oldest one."""
        if torch.is_grad_enabled():  # autograd needs the old contents
            self.rows, self.system = self.rows.clone(), self.system.clone()
        self.held.copy_(other)
        self.holds = True

    @property
    def held(self) -> Tensor:
        """``(B, D)``: the row of the point or image that waits."""
        return self.row(2 + 2 * ((self.slot + 1) % self.size))

    @property
    def residual_and_newest(self) -> Tensor:
        """``(B, 2, D)``: row 0 and the newest change of the residual, without a copy."""
        row = 1 + 2 * self.slot
        return self.rows[:, : row + 1 : row]

    def measure(self, square: Tensor) -> Tensor:
        """The scale of the newest pair from its squared length ``(B, 1)``, kept from zero."""
        own = self.scale.narrow(1, self.slot, 1)
        return own.copy_(square.clamp_min_(torch.finfo(square.dtype).tiny).rsqrt())

    def weights(self, target: Tensor) -> Tensor:
        """Weights ``(B, 1, n)`` of the pairs for a right-hand side ``(B, n, 1)``.

        It is already multiplied by `unit`, as the system is.
        """
        solution = torch.linalg.solve_ex(self.equations, target).result
        # A sample whose numbers overflowed takes the plain step; its neighbours are untouched.
        return (solution * self.unit).nan_to_num_(0, 0, 0).mT

    def mix(self, image: Tensor, weights: Tensor, rows: Tensor, into: Tensor) -> Tensor:
        """``image − Σᵢ wᵢ rowsᵢ (B, D)`` for ``weights (B, 1, n)``, written to a tensor of no use.

        That may be ``image`` itself.
        """
        if torch.is_grad_enabled() or is_wrapped(into):  # where in place is wrong, or slow
            return image - torch.bmm(weights, rows).squeeze(1)
        into.copy_(image).unsqueeze(1).baddbmm_(weights, rows, alpha=-1)
        return into
