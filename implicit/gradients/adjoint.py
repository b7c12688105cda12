"""Gradients from vector–Jacobian products over a single tracked application.

With ``J = ∂f/∂y`` at ``y*``, a loss gradient ``v`` must be turned into ``w = (I − Jᵀ)⁻¹ v`` before
it is sent through ``∂f/∂(·)`` (implicit function theorem, Eq. 8).  `Implicit` solves for ``w``;
`Neumann` sums the first terms of its series.  Neither keeps more than one application of ``f``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicit.arguments import check_count, check_kind
from implicit.gradients.base import Gradient, Map
from implicit.gradients.graph import Start, leaves_of
from implicit.problem import Problem
from implicit.solve import solve
from implicit.solvers import Anderson, Solver
from implicit.stopping import Steps, Stop, Tolerance


class ConvergenceWarning(UserWarning):
    """A gradient is less exact than what was asked for."""


@dataclass(frozen=True)
class Neumann(Gradient):
    """``Σ_{i<k} (Jᵀ)ⁱ v``: the gradient of `RAG` ``(k)`` at a fixed point, in JFB's memory.

    Example:
        >>> Neumann(3)
        Neumann(k=3)
    """

    k: int = 2

    def __post_init__(self) -> None:
        check_count("Neumann", "k", self.k)

    def attach(self, f: Map, value: Tensor) -> Tensor:
        def series(transposed: Map, v: Tensor) -> Tensor:
            term = total = v
            for _ in range(self.k - 1):
                term = transposed(term)
                total = total + term
            return total

        return _attach_adjoint(f, value, series)


@dataclass(frozen=True)
class Implicit(Gradient):
    """Implicit differentiation: solves ``w = v + Jᵀw`` with a solver of this library (Eq. 8).

    The tolerance is relative, so a loss and the same loss times 1e-8 get the same gradient but
    for that factor.  A `ConvergenceWarning` tells when the steps did not suffice.

    Args:
        solver: for the linear system.
        stop: its end; by default ``rtol`` 1e-9 in float64 and 1e-5 below, 200 steps at most.

    Example:
        >>> import torch, implicit
        >>> a = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
        >>> s = implicit.fixed_point(
        ...     lambda y: a * y + 1, torch.zeros(1, 1, dtype=torch.float64),
        ...     stop=implicit.Tolerance(rtol=1e-12, atol=0.0), gradient=implicit.Implicit(),
        ... )
        >>> round(torch.autograd.grad(s.value.sum(), a)[0].item(), 6)  # d/da 1/(1-a) = 4
        4.0
    """

    solver: Solver = field(default_factory=Anderson)
    stop: Stop | None = None

    def __post_init__(self) -> None:
        check_kind("solver", self.solver, Solver, "implicit.Anderson(memory=5)")
        if self.stop is not None:
            check_kind("stop", self.stop, (Tolerance, Steps), "implicit.Tolerance(rtol=1e-6)")

    def attach(self, f: Map, value: Tensor) -> Tensor:
        def inverse(transposed: Map, v: Tensor) -> Tensor:
            linear = Problem(lambda w: v + transposed(w), lambda w, u: transposed(u))
            outcome = solve(linear, v, self.solver, self._stop_for(v))
            self._warn(outcome.status, outcome.relative_residual)
            return outcome.value

        return _attach_adjoint(f, value, inverse)

    def _stop_for(self, v: Tensor) -> Stop:
        if self.stop is not None:
            return self.stop
        rtol = 1e-9 if v.dtype == torch.float64 else 1e-5
        return Tolerance(rtol=rtol, atol=0.0, max_steps=200)

    def _warn(self, status: Tensor, residual: Tensor) -> None:
        if not isinstance(self._stop_for(residual), Tolerance):
            return
        failed = int((status != 0).sum())
        if failed:
            warnings.warn(
                f"Implicit: the gradient of {failed} of {len(status)} samples is inexact; the "
                f"relative residual of w = v + Jᵀw is up to {float(residual.max()):.3g}. Allow "
                "more steps or a looser rtol (Implicit(stop=Tolerance(...))), or make f a "
                "contraction.",
                ConvergenceWarning,
                stacklevel=2,
            )


Adjoint = Callable[[Map, Tensor], Tensor]
"""Turns ``v`` into ``w``, given the map ``w ↦ Jᵀw``."""


def _attach_adjoint(f: Map, value: Tensor, adjoint: Adjoint) -> Tensor:
    """``f(value)`` with a graph in which incoming gradients pass through ``adjoint`` first."""
    start = Start.of(value)
    image = f(start)
    if next(leaves_of(image), None) is None:
        return image.detach()

    def transposed(w: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(image, start, w, retain_graph=True, allow_unused=True)
        return torch.zeros_like(w) if product is None else product

    result: Tensor = _Adjoint.apply(image, lambda v: adjoint(transposed, v))
    return result


class _Adjoint(torch.autograd.Function):
    """The identity, whose backward pass applies a given map to the gradient."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, adjoint: Map) -> Tensor:
        ctx.adjoint = adjoint
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Neumann and Implicit gradients cannot be differentiated again "
                "(create_graph=True): use RAG, Phantom or BPTT for higher derivatives."
            )
        return ctx.adjoint(v), None
