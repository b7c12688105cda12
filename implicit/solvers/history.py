"""The last ``m`` secant pairs of a solve, in ring buffers.

Anderson mixing and Broyden's method learn the Jacobian from the same data: how the residual
changed when the iterate changed.  Each step they take inner products with one kind of difference
(the ``basis``), solve a small ``m × m`` system, and add a combination of another kind (the
``moves``).  Only one row of each buffer, and one row and column of the matrix of inner products,
change per step; computing them all anew would cost ``m`` times as much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """Ring buffers ``(B, m, D)``, oldest pair overwritten first.

    Each sample may forget its pairs by itself (`restart`): ``alive (B, m)`` says which slots count.
    """

    basis: Tensor
    moves: Tensor
    alive: Tensor
    best: Tensor
    last_point: Tensor | None = None
    last_image: Tensor | None = None
    filled: int = 0
    slot: int = -1

    @classmethod
    def empty(cls, y: Tensor, memory: int) -> SecantHistory:
        """A history of no pairs for a solve from ``y (B, D)``."""
        return cls(
            basis=y.new_zeros(y.shape[0], memory, y.shape[1]),
            moves=y.new_zeros(y.shape[0], memory, y.shape[1]),
            alive=y.new_zeros(y.shape[0], memory),
            best=y.new_full((y.shape[0],), float("inf")),
        )

    @classmethod
    def of(cls, pairs: Pairs, y: Tensor, memory: int) -> SecantHistory:
        """A history that begins with the pairs of another solve."""
        shape = (y.shape[0], memory, y.shape[1])
        if not isinstance(pairs, Pairs) or pairs.basis.shape != shape:
            given = tuple(pairs.basis.shape) if isinstance(pairs, Pairs) else type(pairs).__name__
            raise ValueError(
                f"memory: the solve that it comes from kept {given} and this one keeps pairs of "
                f"shape {shape} (samples, memory, elements). Use the same solver and batch, or "
                "memory=None."
            )
        history = cls.empty(y, memory)
        history.basis, history.moves = pairs.basis.to(y).clone(), pairs.moves.to(y).clone()
        history.alive = (history.basis != 0).any(dim=2).to(y.dtype)
        history.filled, history.slot = memory, memory - 1
        return history

    def export(self) -> Pairs:
        """The pairs in order of time."""
        order = (torch.arange(self.size, device=self.basis.device) + self.slot + 1) % self.size
        alive = self.alive[:, order].unsqueeze(2)
        # Selected, not multiplied: a forgotten pair may hold infinities.
        basis, moves = (
            torch.where(alive > 0, x[:, order], 0).detach() for x in (self.basis, self.moves)
        )
        return Pairs(basis, moves)

    @property
    def size(self) -> int:
        """``m``, the number of slots."""
        return self.basis.shape[1]

    def push(self, point: Tensor, image: Tensor) -> bool:
        """Record the change since the last call; False if that was the first."""
        last_point, self.last_point = self.last_point, point
        last_image, self.last_image = self.last_image, image
        if last_point is None or last_image is None:
            return False
        self.slot = (self.slot + 1) % self.size
        self.filled = min(self.filled + 1, self.size)
        self.basis = write_difference(self.basis, self.slot, point, last_point)
        self.moves = write_difference(self.moves, self.slot, image, last_image)
        self.alive[:, self.slot] = 1
        return True

    def restart(self, length: Tensor, growth: float) -> None:
        """Empty the history of each sample whose residual exceeds ``growth`` times its best."""
        kept = length <= growth * self.best
        self.alive = self.alive * kept.unsqueeze(1)
        self.best = torch.where(kept, torch.minimum(self.best, length), length)

    @property
    def filled_basis(self) -> Tensor:
        """``(B, n, D)``: the slots that have ever held a pair."""
        return self.basis if self.filled == self.size else self.basis[:, : self.filled]

    @property
    def filled_moves(self) -> Tensor:
        """``(B, n, D)``: likewise."""
        return self.moves if self.filled == self.size else self.moves[:, : self.filled]

    @property
    def filled_alive(self) -> Tensor:
        """``(B, n)``: 1 where a slot counts, 0 where it is forgotten."""
        return self.alive if self.filled == self.size else self.alive[:, : self.filled]

    @property
    def not_later(self) -> Tensor:
        """``(n, n)``: 1 where the pair in slot ``i`` is no younger than the one in slot ``j``."""
        slots = torch.arange(self.filled, device=self.basis.device)
        age = (self.slot - slots) % self.size
        return (age.unsqueeze(1) >= age.unsqueeze(0)).to(self.basis.dtype)


def write(buffer: Tensor, slot: int, value: Tensor) -> Tensor:
    """``buffer[:, slot, :n] = value (B, n)``, in place unless autograd needs the old contents."""
    if torch.is_grad_enabled():
        buffer = buffer.clone()
    buffer[:, slot, : value.shape[1]] = value
    return buffer


def write_difference(buffer: Tensor, slot: int, a: Tensor, b: Tensor) -> Tensor:
    """``buffer[:, slot] = a − b`` without a temporary, as `write` otherwise."""
    if torch.is_grad_enabled():
        buffer = buffer.clone()
        buffer[:, slot] = a - b
    else:
        buffer[:, slot].copy_(a).sub_(b)
    return buffer


def dot(rows: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    """Inner products ``(B, m)`` of ``rows (B, m, D)`` with each of the vectors ``(B, D)``."""
    if len(vectors) == 1:
        return (torch.bmm(rows, vectors[0].unsqueeze(2)).squeeze(2),)
    return torch.bmm(rows, torch.stack(vectors, dim=2)).unbind(2)


def subtract(y: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """``y − Σᵢ wᵢ rowsᵢ`` for ``y (B, D)``, ``weights (B, m)`` and ``rows (B, m, D)``."""
    return torch.baddbmm(y.unsqueeze(1), weights.unsqueeze(1), rows, alpha=-1).squeeze(1)
