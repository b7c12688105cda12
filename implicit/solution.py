"""The answer of a solve, which never travels alone: its status and its figures, per sample."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class SolveError(RuntimeError):
    """Raised by `Solution.raise_for_status` when a sample did not converge."""


class Status(enum.IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 0
    """The residual is within tolerance."""
    STOPPED = 1
    """The steps ran out first (always so with `Steps`, which tests nothing)."""
    DIVERGED = 2
    """The residual is not finite, or more than ten times what it was at the start."""

    @classmethod
    def _missing_(cls, value: object) -> Status | None:
        """``Status(solution.status[0])`` is what one would write."""
        return cls(int(value)) if isinstance(value, Tensor) and value.numel() == 1 else None


_REMEDIES = {
    Status.STOPPED: (
        "(a) allow more steps, (b) loosen rtol or atol, (c) use Anderson or Broyden, "
        "(d) start nearer to the solution"
    ),
    Status.DIVERGED: (
        "(a) damp the step (Naive(damping=0.5), Anderson(mixing=0.5)), (b) use Anderson or "
        "Broyden, (c) make f a contraction (weight normalisation, Jacobian regularisation), "
        "(d) look for overflow in f"
    ),
}


@dataclass
class Adjoint:
    """Figures of one solve of ``w = v + Jᵀw`` in a backward pass (or of its forward-mode twin).

    Attributes:
        products: ``(B,)`` int64, vector–Jacobian products that each sample needed (of `Implicit`:
            evaluations of that map, one of which is at the start).
        error: ``(B,)``: of `Implicit` the relative residual, of `Auto` the estimated relative
            error; NaN of `Neumann`, which tests nothing.
    """

    products: Tensor
    error: Tensor


@dataclass
class Solution:
    """What a solve found.

    Attributes:
        value: the state ``y*``, in the structure of ``y0``; differentiable as the gradient says.
        aux: the auxiliary output of the last evaluation of ``f`` (``None`` without ``has_aux``).
            Its gradient goes back through what the gradient tracks, so of `JFB`, `Neumann`,
            `Implicit` and `Auto` it takes the state that ``f`` was given for a constant: for the
            whole derivative take a function of ``value``.
        status: ``(B,)`` int64, values of `Status`.
        steps: ``(B,)`` int64, solver steps that moved each sample.
        evaluations: ``(B,)`` int64, evaluations of ``f`` each sample needed (gradient excluded).
        residual: ``(B,)``, ``‖f(y) − y‖`` in the norm of the stop.
        relative_residual: ``(B,)``, the residual over ``‖f(y)‖``.
        path: the states at the positions asked for, detached (with `BPTT`: in the graph); as many
            as were asked for, and the last is the answer where the solve ended early.
        trace: ``(evaluations, B)`` relative residual at every evaluation, if it was asked for;
            NaN where a sample had already stopped.
        memory: what the solver learnt, for the next solve, if it was asked for.
        adjoints: figures of the backward solves, in the order in which they ran; empty before
            ``backward()`` and for gradients that solve nothing.
    """

    value: Any
    aux: Any
    status: Tensor
    steps: Tensor
    evaluations: Tensor
    residual: Tensor
    relative_residual: Tensor
    path: tuple[Any, ...] = ()
    trace: Tensor | None = None
    memory: Any = None
    adjoints: list[Adjoint] = field(default_factory=list)

    @property
    def converged(self) -> Tensor:
        """``(B,)`` bool: which samples are within tolerance."""
        return self.status == Status.CONVERGED

    def report(self) -> Any:
        """A ``rich.table.Table`` of how the solve went, see `implicit.report`; rich prints it."""
        from implicit.diagnostics import report

        return report(self)

    def raise_for_status(self) -> Solution:
        """Return the solution itself, or raise `SolveError` if a sample did not converge.

        Example:
            >>> import torch, implicit
            >>> s = implicit.fixed_point(torch.cos, torch.ones(2, 1, dtype=torch.float64))
            >>> s.raise_for_status().status.tolist()
            [0, 0]
        """
        failed = (~self.converged).nonzero().flatten().tolist()
        if not failed:
            return self
        status = Status(int(self.status[failed].max()))
        shown = ", ".join(map(str, failed[:8])) + (", …" if len(failed) > 8 else "")
        worst = self.residual[failed].max()
        raise SolveError(
            f"{len(failed)} of {len(self.status)} samples ({shown}) did not converge: "
            f"{status.name}, residual up to {float(worst):.3g} after up to "
            f"{int(self.steps.max())} steps. What helps: {_REMEDIES[status]}."
        )


def classify(converged: Tensor, residual: Tensor, first: Tensor) -> Tensor:
    """Status of each sample from its last residual and its first, all ``(B,)``."""
    kept = residual <= (10 * first).clamp(max=torch.finfo(first.dtype).max)  # False for NaN too
    failed = torch.where(kept, int(Status.STOPPED), int(Status.DIVERGED))
    return failed.masked_fill(converged, int(Status.CONVERGED))
