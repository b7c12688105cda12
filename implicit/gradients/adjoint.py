"""Gradients from vector–Jacobian products over a single tracked application.

With ``J = ∂f/∂y`` at ``y*``, a loss gradient ``v`` must be turned into ``w = (I − Jᵀ)⁻¹ v`` before
it is sent through ``∂f/∂(·)`` (implicit function theorem, Eq. 8).  `Implicit` solves for ``w``;
`Neumann` sums the first terms of its series; `Auto` sums until the estimated error is small enough
and solves if it does not become so.  None keeps more than one application of ``f``.

Forward mode is the same with ``J`` in the place of ``Jᵀ``: the tangent ``t = ∂f/∂(·) · dθ`` of one
application becomes ``(I − J)⁻¹ t``.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from implicit.arguments import check_count, check_kind, check_number
from implicit.autocast import full_precision
from implicit.gradients.attach import attach
from implicit.gradients.base import Gradient, Map
from implicit.krylov import gmres
from implicit.problem import Problem
from implicit.solution import Adjoint
from implicit.solve import solve
from implicit.solvers import Anderson, Solver
from implicit.state import FlatMap
from implicit.stopping import Steps, Stop, Tolerance
from implicit.transforms import is_batched_by_autograd, is_mapped, is_wrapped


class ConvergenceWarning(UserWarning):
    """A gradient is less exact than what was asked for."""


@dataclass(frozen=True)
class AdjointGradient(Gradient):
    """What gradients over one tracked application share: they turn ``v`` into ``w``."""

    twice: ClassVar[bool] = False
    """Whether the gradient is the derivative of a function, and so can be differentiated."""

    @property
    def waits(self) -> bool:
        """Whether `inverse` waits for the device, to know when to end."""
        return True

    @abstractmethod
    def inverse(self, product: Map, v: Tensor, eps: float) -> tuple[Tensor, Adjoint]:
        """``(I − A)⁻¹ v (B, D)``, or what stands for it, given ``product(w) = A w``.

        ``eps`` is the machine epsilon that products are computed with.
        """

    def attach(self, f: Map, value: Tensor, record: list[Adjoint] | None = None) -> Tensor:
        eps = f.eps if isinstance(f, FlatMap) else 0.0
        # A graph cannot hold a list that grows as it runs.
        figures_of = None if torch.compiler.is_compiling() else record

        def solved(product: Map, v: Tensor) -> Tensor:
            with full_precision(v.device):
                w, figures = self.inverse(product, v, eps)
            if figures_of is not None:
                figures_of.append(figures)
            return w

        return attach(f, value, solved, twice=self.twice, waits=self.waits)


@dataclass(frozen=True)
class Neumann(AdjointGradient):
    """``Σ_{i<k} (Jᵀ)ⁱ v``: the gradient of `RAG` ``(k)`` at a fixed point, in JFB's memory.

    Example:
        >>> Neumann(3)
        Neumann(k=3)
    """

    k: int = 2

    def __post_init__(self) -> None:
        check_count("Neumann", "k", self.k)

    @property
    def waits(self) -> bool:
        return False

    def inverse(self, product: Map, v: Tensor, eps: float) -> tuple[Tensor, Adjoint]:
        total = v
        for _ in range(self.k - 1):  # Horner's rule: the terms themselves need not be held
            total = product(total)
            total = v + total
        products = torch.full((len(v),), self.k - 1, device=v.device)
        return total, Adjoint(products, torch.full_like(products, torch.nan, dtype=v.dtype))


@dataclass(frozen=True)
class Implicit(AdjointGradient):
    """Implicit differentiation: solves ``w = v + Jᵀw`` with a solver of this library (Eq. 8).

    The tolerance, the absolute one as well, is in units of the incoming gradient, so a loss and
    the same loss times 1e-8 get the same gradient but for that factor.  A `ConvergenceWarning`
    tells when the steps did not suffice, and ``solution.adjoints`` holds the figures of each
    backward solve.  It can be differentiated again (``create_graph=True``), in forward mode, and
    under the transforms of `torch.func`.

    Args:
        solver: for the linear system.
        stop: its end; by default ``rtol`` 1e-9 in float64 and 1e-5 below, but never less than
            twice the machine epsilon of what ``f`` computes in (autocast, too); 200 steps at most.

    Example:
        >>> import torch, implicit
        >>> a = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
        >>> s = implicit.fixed_point(
        ...     lambda y: a * y + 1, torch.zeros(1, 1, dtype=torch.float64),
        ...     stop=implicit.Tolerance(rtol=1e-12, atol=0.0), gradient=implicit.Implicit(),
        ... )
        >>> round(torch.autograd.grad(s.value.sum(), a)[0].item(), 6)  # d/da 1/(1-a) = 4
        4.0
        >>> s.adjoints[0].products.tolist()
        [3]
    """

    solver: Solver = field(default_factory=Anderson)
    stop: Stop | None = None
    twice: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_kind("solver", self.solver, Solver, "implicit.Anderson(memory=5)")
        if self.stop is not None:
            check_kind("stop", self.stop, (Tolerance, Steps), "implicit.Tolerance(rtol=1e-6)")
            if callable(getattr(self.stop, "norm", None)):
                raise ValueError(
                    "Implicit(stop=Tolerance(norm=...)): the backward solve is for a gradient, "
                    "which a distance between states does not measure. Use 'l2', 'rms' or 'max'."
                )

    @property
    def waits(self) -> bool:
        return not isinstance(self.stop, Steps)

    def inverse(self, product: Map, v: Tensor, eps: float) -> tuple[Tensor, Adjoint]:
        _check_single(self, v)
        stop = self.stop
        if stop is None:
            rtol = max(1e-9 if v.dtype == torch.float64 else 1e-5, 2 * eps)
            stop = Tolerance(rtol=rtol, atol=0.0, max_steps=200)
        # In units of the incoming gradient, so that an absolute tolerance is relative to it too.
        # The largest element and not the length, whose square may be out of range.
        size = v.abs().amax(dim=1, keepdim=True) if v.shape[1] else v.new_ones(len(v), 1)
        size = torch.where((size > 0) & torch.isfinite(size), size, 1)
        unit = v / size
        linear = Problem(lambda w: unit + product(w), product=lambda w, u: product(u))
        outcome = solve(linear, unit, self.solver, stop)
        if isinstance(stop, Tolerance):
            _warn("Implicit", outcome.status != 0, outcome.relative_residual)
        return outcome.value * size, Adjoint(outcome.evaluations, outcome.relative_residual)


@dataclass(frozen=True)
class Auto(AdjointGradient):
    """Neumann terms until the estimated gradient error is below ``rtol``, then GMRES if need be.

    After ``i`` terms the rest of the series is about ``‖tᵢ‖ q / (1 − q)`` with ``q`` the ratio of
    the last terms (the larger of the last two).  Samples whose error is not below ``rtol`` of what
    has been summed after ``terms`` terms go on with GMRES, from the sum unless it has grown away;
    its error is estimated as the residual over the smallest singular value that the Krylov space
    shows of ``I − Jᵀ``.  A `ConvergenceWarning` tells when that does not suffice.  So an easy layer
    pays for a few products and a hard one for what it needs.

    Both are estimates and no bounds: a slow direction of which the incoming gradient has little
    shows in neither until late, and the error can be far larger than what is reported, without a
    warning.  A smaller ``rtol`` narrows the gap, and `Implicit` asks for ``1e-9`` of the residual.

    Args:
        rtol: estimated error of ``w``, relative.
        terms: most Neumann terms.
        krylov: most products of GMRES.

    Example:
        >>> import torch, implicit
        >>> a = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
        >>> s = implicit.fixed_point(
        ...     lambda y: a * y + 1, torch.zeros(1, 1, dtype=torch.float64),
        ...     stop=implicit.Tolerance(rtol=1e-12, atol=0.0), gradient=implicit.Auto(1e-6),
        ... )
        >>> round(torch.autograd.grad(s.value.sum(), a)[0].item(), 4)
        4.0
    """

    rtol: float = 1e-3
    terms: int = 8
    krylov: int = 50

    def __post_init__(self) -> None:
        check_number("Auto", "rtol", self.rtol, above=0)
        check_count("Auto", "terms", self.terms)
        check_count("Auto", "krylov", self.krylov)

    def inverse(self, product: Map, v: Tensor, eps: float) -> tuple[Tensor, Adjoint]:
        _check_single(self, v)
        if is_mapped(v):
            raise RuntimeError(
                "Auto looks at its error to know when to end, which it cannot under "
                "torch.func.vmap: use Implicit, Neumann or RAG there."
            )
        term = total = v
        length = torch.linalg.vector_norm(v, dim=1)
        ratio = torch.full_like(length, torch.inf)
        error = torch.full_like(length, torch.inf)
        products = torch.zeros_like(length, dtype=torch.int64)
        for _ in range(self.terms):
            going = error > self.rtol
            if not bool(going.any()):
                break
            term = product(term)
            shorter = torch.linalg.vector_norm(term, dim=1)
            now = torch.where(length > 0, shorter / length, 0)
            # The first ratio says nothing of the second, so at least two are looked at.
            slowest = torch.where(torch.isinf(ratio), torch.where(now > 0, 1.0, now), ratio)
            slowest = torch.maximum(slowest, now)
            total = torch.where(going.unsqueeze(1), total + term, total)
            rest = torch.where(slowest < 1, shorter * slowest / (1 - slowest), torch.inf)
            rest = torch.where(shorter == 0, 0, rest)
            size = torch.linalg.vector_norm(total, dim=1)
            estimate = torch.where(size > 0, rest / size, rest)
            # Where the length of a term overflows, nothing is known of the rest.
            estimate = torch.where(torch.isnan(estimate), torch.inf, estimate)
            error = torch.where(going, estimate, error)
            products += going
            length, ratio = shorter, now
        hard = error > self.rtol
        if bool(hard.any()):
            total, error, products = self._escalate(product, v, total, hard, error, products)
        _warn("Auto", ~(error <= self.rtol), error)  # NaN is no small error
        return total, Adjoint(products, error)

    def _escalate(
        self,
        product: Map,
        v: Tensor,
        summed: Tensor,
        hard: Tensor,
        error: Tensor,
        products: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The hard samples by GMRES on ``(I − A) d = v − (I − A) w``, then ``w + d``."""
        size = torch.linalg.vector_norm(v, dim=1)
        # From nothing where the sum has grown beyond v: what rounding left of it would stay.
        total = torch.where(hard.unsqueeze(1), summed, 0)
        residual = v - total + product(total)
        length = torch.linalg.vector_norm(residual, dim=1)
        nearer = (length < size).unsqueeze(1)
        start = torch.where(nearer, total, 0)
        residual = torch.where(hard.unsqueeze(1), torch.where(nearer, residual, v), 0)
        # Half the tolerance on the residual, and less than it is now: without a product nothing
        # would be known of the singular values.  What it means for the error is judged below.
        now = torch.where(nearer.squeeze(1), length, size)
        allowed = torch.where(hard, 0.5 * torch.minimum(self.rtol * size, now), torch.inf)
        # One product was for the residual of the sum.
        dimensions, used = self.krylov, hard.to(products.dtype)
        while True:
            found = gmres(lambda d: d - product(d), residual, allowed, dimensions)
            used = used + found.products
            solved = torch.where(hard.unsqueeze(1), start + found.x, summed)
            length = torch.linalg.vector_norm(solved, dim=1)
            estimate = torch.where(length > 0, found.error / length, found.error)
            error = torch.where(hard, estimate, error)
            tighter = hard & (error > self.rtol) & (found.products < dimensions)
            # The residual was small and the error is not: ask for as much less as it is too large.
            if not bool((tighter & (found.residual > 0)).any()):
                return solved, error, products + used
            factor = (0.5 * self.rtol / error).clamp(max=0.5)
            smaller = torch.where(tighter, allowed * factor, allowed)
            floor = torch.finfo(v.dtype).eps * size
            if bool((smaller < floor).logical_and(tighter).any()):
                return solved, error, products + used
            allowed = smaller


def _check_single(gradient: AdjointGradient, v: Tensor) -> None:
    if is_batched_by_autograd(v):
        raise RuntimeError(
            f"{type(gradient).__name__} cannot solve for several gradients in one backward pass "
            "(is_grads_batched=True, jacobian(vectorize=True)): take them one by one, or use "
            "torch.func.vjp with torch.func.vmap, or another gradient."
        )


def _warn(name: str, failed: Tensor, error: Tensor) -> None:
    if is_wrapped(failed):
        return
    count = int(failed.sum())
    if count:
        warnings.warn(
            f"{name}: the gradient of {count} of {len(failed)} samples is inexact; the relative "
            f"error of w = v + Jᵀw is up to {float(error[failed].max()):.3g}. Allow more steps "
            "or a looser tolerance, or make f a contraction.",
            ConvergenceWarning,
            stacklevel=2,
        )
