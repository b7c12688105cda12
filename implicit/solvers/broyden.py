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
from implicit.solvers.history import Pairs, SecantHistory, dot, subtract, write
from implicit.solvers.line_search import LineSearch


@dataclass
class _Memory:
    history: SecantHistory
    products: Tensor  # (B, m, m): inner products of the basis with itself
    moved: Tensor  # (B, m, m): and with the moves
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
        return self._begin(SecantHistory.empty(y, self.memory), y)

    def resume(self, exported: Pairs, y: Tensor) -> _Memory:
        memory = self._begin(SecantHistory.of(exported, y, self.memory), y)
        basis = memory.history.basis
        memory.products = torch.bmm(basis, basis.mT)
        memory.moved = torch.bmm(basis, memory.history.moves.mT)
        return memory

    def export(self, memory: _Memory) -> Pairs:
        return memory.history.export()

    def step(self, memory: _Memory, y: Tensor, fy: Tensor) -> tuple[Tensor, _Memory]:
        r = fy - y
        length = torch.linalg.vector_norm(r.detach(), dim=1)
        memory.history.restart(length, self.restart)
        following = self._quasi_newton(memory, y, fy, r)
        if memory.search is not None:
            accepted = memory.search.accepts(length)
            following = memory.search.next(accepted, y, length, following - y)
        return following, memory

    def _begin(self, history: SecantHistory, y: Tensor) -> _Memory:
        nothing = y.new_zeros(y.shape[0], self.memory, self.memory)
        search = LineSearch.at(y) if self.line_search else None
        return _Memory(history, nothing, nothing.clone(), search)

    def _quasi_newton(self, memory: _Memory, y: Tensor, fy: Tensor, r: Tensor) -> Tensor:
        history = memory.history
        if history.push(y, fy):
            slot, basis, moves = history.slot, history.filled_basis, history.filled_moves
            products, moved, target = dot(basis, basis[:, slot], moves[:, slot], r)
            memory.products = write(memory.products, slot, products)
            memory.products = write(memory.products.mT, slot, products).mT
            memory.moved = write(memory.moved, slot, *dot(moves, basis[:, slot]))
            memory.moved = write(memory.moved.mT, slot, moved).mT
        elif history.filled:  # pairs of an earlier solve
            (target,) = dot(history.filled_basis, r)
        else:
            return fy
        return subtract(fy, self._weights(memory, target), history.filled_moves)

    @staticmethod
    def _weights(memory: _Memory, target: Tensor) -> Tensor:
        """``−(SᵀY − L)⁻¹ Sᵀr``, scaled to pairs of unit length; empty slots weigh nothing."""
        history, n = memory.history, memory.history.filled
        products = memory.products[:, :n, :n]
        lengths = products.diagonal(dim1=1, dim2=2) * history.filled_alive
        scale = torch.where(lengths > 0, lengths, torch.inf).rsqrt()
        # SᵀY − L = SᵀS − SᵀΔF − L: the upper triangle of SᵀS in order of time, less SᵀΔF.
        system = products * history.not_later - memory.moved[:, :n, :n]
        system = system * scale.unsqueeze(1) * scale.unsqueeze(2)
        system.diagonal(dim1=1, dim2=2).add_((scale == 0).to(system.dtype))
        solution, _ = torch.linalg.solve_ex(system, (scale * target).unsqueeze(2))
        weights = scale * solution.squeeze(2)
        return torch.where(torch.isfinite(weights).all(dim=1, keepdim=True), -weights, 0)
