"""The last ``m`` secant pairs of a solve, in one ring buffer.

Anderson mixing and Broyden's method learn the Jacobian from the same data: how a point changed and
how its image changed from one step to the next.  Each step they take inner products with the one
kind of difference (the ``basis``), solve a small ``m × m`` system, and subtract a combination of
the other kind (the ``moves``).  Only one pair, and one row and column of the system, change per
step; computing them all anew would cost ``m`` times as much.

What a step needs beside the pairs lies in the buffer too, because it is then multiplied with them
in one pass: the residual in row 0, and the last point and image in the slot that is overwritten
next, where subtracting the new ones from them makes a pair.  Pairs are thus differences *old less
new*; every formula has them twice, so their sign does not show.
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
        basis, moves: ``(B, m, D)``; zero where there is no pair.
    """

    basis: Tensor
    moves: Tensor


@dataclass
class SecantHistory:
    """A ring of pairs, oldest overwritten first, and the system that weighs them.

    Attributes:
        rows: ``(B, 2m + 1, D)``: the residual, then basis and moves of each slot in turn.
        scale: ``(B, m)``: one over the length of each basis vector; 0 where a sample has forgotten
            its pair (`restart`).
        system: ``(B, m, m)``, written by the solver, for basis vectors of unit length.
        growth: ``(B,)``: how far a residual may exceed the least since the last restart.
        limit: ``(B,)``: that least residual times ``growth``.
        size: ``m``, the number of slots.
        filled: slots that have ever held a pair.
        slot: that of the newest pair.
        holds: whether a point and an image wait in the next slot for their successors.
    """

    rows: Tensor
    scale: Tensor
    system: Tensor
    growth: Tensor
    limit: Tensor
    size: int
    filled: int = 0
    slot: int = -1
    holds: bool = False

    @classmethod
    def empty(cls, y: Tensor, memory: int, growth: float) -> SecantHistory:
        """A history of no pairs for a solve from ``y (B, D)``."""
        batch, dim = y.shape
        return cls(
            rows=y.new_empty(batch, 2 * memory + 1, dim),
            scale=y.new_zeros(batch, memory),
            system=y.new_zeros(batch, memory, memory),
            growth=y.new_full((batch,), growth),
            limit=y.new_full((batch,), torch.inf),
            size=memory,
        )

    @classmethod
    def of(cls, pairs: Pairs, y: Tensor, memory: int, growth: float) -> SecantHistory:
        """A history that begins with the pairs of another solve, but not with their system."""
        shape = (y.shape[0], memory, y.shape[1])
        if not isinstance(pairs, Pairs) or pairs.basis.shape != shape:
            given = tuple(pairs.basis.shape) if isinstance(pairs, Pairs) else type(pairs).__name__
            raise ValueError(
                f"memory: the solve that it comes from kept {given} and this one keeps pairs of "
                f"shape {shape} (samples, memory, elements). Use the same solver and batch, or "
                "memory=None."
            )
        history = cls.empty(y, memory, growth)
        history.filled, history.slot = memory, memory - 1
        history.basis.copy_(pairs.basis)
        history.moves.copy_(pairs.moves)
        lengths = torch.linalg.vector_norm(history.basis, dim=2)
        history.scale = torch.where(lengths > 0, 1 / lengths, 0)
        return history

    def export(self) -> Pairs:
        """The pairs in order of time; the oldest is gone if its slot has been taken already."""
        order = torch.arange(self.size, device=self.rows.device).roll(-1 - self.slot)
        alive = self.scale[:, order].unsqueeze(2) > 0
        if self.holds:
            alive[:, 0] = False
        # Selected, not multiplied: a forgotten pair may hold infinities.
        basis, moves = (
            torch.where(alive, self.rows[:, 1 + kind :: 2][:, order], 0).detach() for kind in (0, 1)
        )
        return Pairs(basis, moves)

    @property
    def basis(self) -> Tensor:
        """``(B, n, D)``: of the slots that have ever held a pair."""
        return self.rows[:, 1 : 2 * self.filled : 2]

    @property
    def moves(self) -> Tensor:
        """``(B, n, D)``: likewise."""
        return self.rows[:, 2 : 2 * self.filled + 1 : 2]

    @property
    def unit(self) -> Tensor:
        """``(B, n)``: `scale` of those slots."""
        return self.scale if self.filled == self.size else self.scale[:, : self.filled]

    @property
    def equations(self) -> Tensor:
        """``(B, n, n)``: `system` of those slots."""
        n = self.filled
        return self.system if n == self.size else self.system[:, :n, :n]

    def restart(self, r: Tensor) -> Tensor:
        """Empty the history of each sample whose residual exceeds its limit; who keeps it, (B,)."""
        length = torch.linalg.vector_norm(r, dim=1)
        kept, allowed = length <= self.limit, length * self.growth
        self.limit = torch.where(kept, torch.minimum(self.limit, allowed), allowed)
        self.scale = self.scale * kept.unsqueeze(1)
        return kept

    def push(self, r: Tensor, image: Tensor, point: Tensor | None = None) -> bool:
        """Write the residual, and make a pair of what was held and its successors.

        The basis is the change of the point or, where none is given, of the residual.  False if
        nothing was held.
        """
        residual = self.rows.select(1, 0)
        if self.holds:
            self.slot = (self.slot + 1) % self.size
            self.filled = min(self.filled + 1, self.size)
            basis = self.rows.select(1, 1 + 2 * self.slot)
            if point is None:
                basis.copy_(residual).sub_(r)
            else:
                basis.sub_(point)
            self.rows.select(1, 2 + 2 * self.slot).sub_(image)
        residual.copy_(r)
        return self.holds

    def hold(self, image: Tensor, point: Tensor | None = None) -> None:
        """Keep an image (and a point) for the next pair, in place of the oldest one."""
        if torch.is_grad_enabled():  # autograd needs the old contents
            self.rows, self.system = self.rows.clone(), self.system.clone()
        following = (self.slot + 1) % self.size
        if point is not None:
            self.rows.select(1, 1 + 2 * following).copy_(point)
        self.rows.select(1, 2 + 2 * following).copy_(image)
        self.holds = True

    def residual_and(self, row: int) -> Tensor:
        """``(B, 2, D)``: row 0 and another one, without a copy."""
        return self.rows[:, : row + 1 : row]

    def measure(self, square: Tensor) -> Tensor:
        """The scale of the newest pair from its ``‖basis‖² (B, 1)``, kept from zero in place."""
        own = self.scale.narrow(1, self.slot, 1)
        return own.copy_(square.clamp_min_(torch.finfo(square.dtype).tiny).rsqrt())

    def weights(self, target: Tensor) -> Tensor:
        """Solve the system for ``target (B, n)``, both for unit vectors; weights of the pairs."""
        solution = torch.linalg.solve_ex(self.equations, target.unsqueeze(2)).result
        # A sample whose numbers overflowed takes the plain step; its neighbours are untouched.
        return (solution.squeeze(2) * self.unit).nan_to_num_(0, 0, 0)

    def mix(self, image: Tensor, weights: Tensor, into: Tensor) -> Tensor:
        """``image − Σᵢ wᵢ movesᵢ (B, D)`` for ``weights (B, n)``, written to a tensor of no use."""
        if torch.is_grad_enabled() or is_wrapped(into):  # where in place is wrong, or slow
            mixed = torch.bmm(weights.unsqueeze(1), self.moves).squeeze(1)
            return image - mixed
        into.copy_(image).unsqueeze(1).baddbmm_(weights.unsqueeze(1), self.moves, alpha=-1)
        return into
