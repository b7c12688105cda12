"""Solve a fixed-point problem, then tie its solution to a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from implicit.arguments import check_args, check_kind, check_positions
from implicit.autocast import forget_casts
from implicit.gradients import AdjointGradient, Gradient, Implicit
from implicit.gradients.base import check_differentiable
from implicit.per_solve import renew
from implicit.problem import Problem
from implicit.samples import Outcome
from implicit.solution import Adjoint, Solution, Status
from implicit.solve import solve
from implicit.solvers import Anderson, Solver, WholeSolver
from implicit.state import FlatMap, Layout, Select, State, StateError
from implicit.stopping import Distance, Steps, Stop, Tolerance
from implicit.transforms import is_pushing_forward, no_forward_mode, on_host

_DEFAULT_SOLVER = Anderson()
_DEFAULT_STOP = Tolerance()
_DEFAULT_GRADIENT = Implicit()


def fixed_point(
    f: Callable[..., Any],
    y0: State,
    *,
    solver: Solver = _DEFAULT_SOLVER,
    stop: Stop = _DEFAULT_STOP,
    gradient: Gradient = _DEFAULT_GRADIENT,
    args: tuple[Any, ...] = (),
    has_aux: bool = False,
    path: Sequence[int] = (),
    trace: bool = False,
    select: Select | None = None,
    memory: Any = None,
    keep_memory: bool = False,
) -> Solution:
    """Find ``y* = f(y*)`` for every sample of a batch.

    Args:
        f: ``f(y, *args) -> y``, or ``-> (y, aux)`` with ``has_aux``; treats samples apart.
        y0: where to start: a tensor or a pytree of tensors, real floating point, batch first.
        solver: `Naive`, `Anderson`, `Broyden` or `NewtonKrylov`, and `Best` around any of them.
        stop: `Tolerance` (per sample) or `Steps`.
        gradient: `JFB`, `RAG`, `Neumann`, `Phantom`, `Implicit`, `Auto` or `BPTT`.  It decides the
            derivative of the value and never the value.  Whatever ``f`` closes over (parameters,
            inputs) receives gradient without being listed.
        args: further arguments of ``f``.  Samples that have converged leave the batch if all that
            belongs to samples is here: tensors whose first dimension is the batch, at any depth,
            that are not parameters.  A few samples are evaluated by themselves first; where their
            images are not the same, all stay (and those that are done do not move).
        has_aux: whether ``f`` also returns something to look at.  It comes from the evaluation
            that the gradient tracks, if there is one.
        path: positions (step numbers from 1, rising) whose states are returned.
        trace: record the relative residual of every evaluation.
        select: ``select(args, rows)`` returns the arguments for the samples ``rows (k,)``, where
            the rule above is not right.
        memory: what ``solution.memory`` of an earlier solve of the same shape holds: Anderson and
            Broyden then begin with its secant pairs (the next frame of a film, the next step of
            training).
        keep_memory: return the solver's memory for such a solve.

    Returns:
        A `Solution`: the value with its status, counts and residuals per sample.

    Raises:
        StateError: if ``y0`` is no state, if no sample of it is finite (with `Tolerance`; a
            single bad sample is `Status.DIVERGED` and its neighbours are solved), or if ``f(y0)``
            differs from it in structure, shape, dtype or device.
        TypeError: if solver, stop or gradient is not one.
        ValueError: if ``path`` is not rising or goes beyond the steps that ``stop`` allows.

    Example:
        >>> import torch, implicit
        >>> W = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
        >>> y0 = torch.zeros(1, 1, dtype=torch.float64)
        >>> s = implicit.fixed_point(lambda y: torch.tanh(y @ W + 1), y0)
        >>> bool(s.converged)
        True
        >>> s.value.sum().backward()
        >>> W.grad.shape
        torch.Size([1, 1])
    """
    _check_choices(f, solver, stop, gradient)
    check_args(args)
    if select is not None and not callable(select):
        raise TypeError(f"select must be callable, not {select!r}.")
    if isinstance(solver, WholeSolver) and (path or trace or memory or keep_memory):
        raise ValueError(f"{solver} shows only its answer: no path, no trace and no memory.")
    renew(f)
    if not isinstance(path, tuple) or path:  # whose message is not made for nothing
        most = stop.n if isinstance(stop, Steps) else stop.max_steps
        check_positions("path", path, most, f"what {stop} allows")
    layout = Layout(y0)
    flat = FlatMap(f, layout, args, has_aux, select)
    start = layout.pack(y0)
    if isinstance(stop, Tolerance):  # which waits for the device anyway
        _check_finite(start)
        norm = stop.norm
        stop = replace(
            stop,
            rtol=stop.rtol_for(flat.eps),
            norm=_on_flat(norm, layout) if callable(norm) else norm,
        )
    # The auxiliary output is that of the whole batch, so nobody may leave; nor has anybody to
    # whose inputs are all closed over.
    parts = flat.part if (args or select) and not has_aux else None
    with solving(gradient.tracks_path, layout.device):
        outcome = solve(
            Problem(flat, part=parts, agreement=layout.eps ** (2 / 3)),
            start,
            solver,
            stop,
            path=path,
            trace=trace,
            memory=memory,
            keep_memory=keep_memory,
            finest=layout.eps if layout.narrows else 0.0,
        )
    flat.hold()
    value = outcome.value
    adjoints: list[Adjoint] = []
    if gradient.tracks_path or not (torch.is_grad_enabled() or is_pushing_forward()):
        value = value.clone()  # who writes to the answer leaves y0, and what f returned, alone
    else:
        value = value.detach()
        recorded = (adjoints,) if isinstance(gradient, AdjointGradient) else ()
        attached = gradient.attach(flat, value, *recorded)
        if torch.compiler.is_compiling():  # which knows no forward mode of our own
            value = value + (attached - attached.detach())
        else:
            value = _WithGradientOf.apply(attached, value)
    if layout.narrows:  # what float32 can hold may overflow in the dtype of the state
        finite = torch.isfinite(layout.pack(layout.unpack(value.detach()))).all(dim=1)
        outcome.status = torch.where(finite, outcome.status, Status.DIVERGED)
    states = [layout.unpack(state) for state in outcome.path]
    return _solution(layout.unpack(value), flat.aux, tuple(states), outcome, adjoints)


def _on_flat(distance: Distance, layout: Layout) -> Distance:
    """A distance between structured states as one between rows of ``(B, D)``."""

    def checked(y: Tensor, fy: Tensor) -> Tensor:
        rows = layout.part(len(y))
        found = distance(rows.unpack(y), rows.unpack(fy))
        if not isinstance(found, Tensor) or found.shape != y.shape[:1]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"Tolerance(norm=...): the distance has shape {shape}: it must be one number for "
                f"each sample, {tuple(y.shape[:1])}."
            )
        return found.to(y.dtype)

    return checked


def root(
    g: Callable[..., Any],
    y0: State,
    *,
    solver: Solver = _DEFAULT_SOLVER,
    stop: Stop = _DEFAULT_STOP,
    gradient: Gradient = _DEFAULT_GRADIENT,
    args: tuple[Any, ...] = (),
    has_aux: bool = False,
    path: Sequence[int] = (),
    trace: bool = False,
    select: Select | None = None,
    memory: Any = None,
    keep_memory: bool = False,
) -> Solution:
    """Find ``g(y*) = 0`` for every sample of a batch, as the fixed point of ``y − g(y)``.

    The residual that is tested and reported is ``‖g(y)‖``; a relative tolerance is relative to
    ``‖y − g(y)‖``.  The Jacobian of ``g`` need not be near the identity, but `Anderson` and
    `Broyden` begin as if it were: scale ``g`` so that its derivative is positive and of order
    one, or use `NewtonKrylov`.  All arguments but the first are those of `fixed_point`.

    Args:
        g: ``g(y, *args)``, of the same structure and shape as ``y``; or a pair of it and an
            auxiliary output with ``has_aux``.

    Raises:
        StateError, TypeError, ValueError: as `fixed_point` does.

    Example:
        >>> import torch, implicit
        >>> a = torch.tensor([[2.0], [3.0]], dtype=torch.float64, requires_grad=True)
        >>> tight = implicit.Tolerance(rtol=1e-12, atol=0.0)
        >>> s = implicit.root(
        ...     lambda y: (y * y - a) / 4, torch.ones(2, 1, dtype=torch.float64), stop=tight
        ... )
        >>> torch.allclose(s.value, a.sqrt())
        True
        >>> (slope,) = torch.autograd.grad(s.value.sum(), a)  # 1 / (2 √a)
        >>> torch.allclose(slope, 0.5 / a.sqrt())
        True
    """
    if not callable(g):
        raise TypeError(f"g must be callable, not {g!r}.")
    renew(g)
    layout = Layout(y0)

    def f(y: State, *args: Any) -> Any:
        result = g(y, *args)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise StateError("has_aux=True: g must return a pair (g(y), aux).")
        gy, aux = result if has_aux else (result, None)
        layout.part(len(pytree.tree_leaves(y)[0])).check(gy, name="g")
        moved = pytree.tree_map(torch.sub, y, gy)
        return (moved, aux) if has_aux else moved

    return fixed_point(
        f,
        y0,
        solver=solver,
        stop=stop,
        gradient=gradient,
        args=args,
        has_aux=has_aux,
        path=path,
        trace=trace,
        select=select,
        memory=memory,
        keep_memory=keep_memory,
    )


class FixedPoint(nn.Module):
    """The module form of `fixed_point`: ``f`` with the choices of how to solve it.

    ``f`` is registered if it is a module, so its parameters belong to this one.  In evaluation
    mode ``eval_solver`` and ``eval_stop`` are used, if given (the paper trains with 20 steps and
    infers with 25).

    Args:
        f: module or function ``f(y, *args) -> y``.
        solver: as in `fixed_point`.
        stop: as in `fixed_point`.
        gradient: as in `fixed_point`.
        eval_solver: used instead of ``solver`` after ``.eval()``.
        eval_stop: used instead of ``stop`` after ``.eval()``.
        has_aux: as in `fixed_point`.

    Example:
        >>> import torch, implicit
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(4, 4)
        ...     def forward(self, y, x):
        ...         return torch.tanh(0.3 * self.linear(y) + x)
        >>> layer = implicit.FixedPoint(Cell(), gradient=implicit.RAG(2))
        >>> solution = layer(torch.zeros(2, 4), torch.randn(2, 4))
        >>> solution.value.shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        f: Callable[..., Any],
        *,
        solver: Solver = _DEFAULT_SOLVER,
        stop: Stop = _DEFAULT_STOP,
        gradient: Gradient = _DEFAULT_GRADIENT,
        eval_solver: Solver | None = None,
        eval_stop: Stop | None = None,
        has_aux: bool = False,
    ) -> None:
        super().__init__()
        _check_choices(f, solver, stop, gradient)
        eval_solver = solver if eval_solver is None else eval_solver
        eval_stop = stop if eval_stop is None else eval_stop
        _check_choices(f, eval_solver, eval_stop, gradient)
        self.f = f
        self.solver, self.stop, self.gradient = solver, stop, gradient
        self.eval_solver, self.eval_stop = eval_solver, eval_stop
        self.has_aux = has_aux

    def forward(self, y0: State, *args: Any) -> Solution:
        """Solve ``y = f(y, *args)`` from ``y0``."""
        return fixed_point(
            self.f,
            y0,
            solver=self.solver if self.training else self.eval_solver,
            stop=self.stop if self.training else self.eval_stop,
            gradient=self.gradient,
            args=args,
            has_aux=self.has_aux,
        )

    def extra_repr(self) -> str:
        return f"solver={self.solver}, stop={self.stop}, gradient={self.gradient}"


class _WithGradientOf(torch.autograd.Function):
    """The second tensor, with the gradient of the first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(attached: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return tangent.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def solving(tracked: bool, device: torch.device) -> AbstractContextManager[object]:
    """No derivatives of the solver's own path, backward or forward, unless they are asked for."""
    if tracked:
        return nullcontext()
    if torch.compiler.is_compiling():  # which knows no forward mode to switch off
        return torch.no_grad()
    return _untracked(device)


@contextmanager
def _untracked(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), no_forward_mode():
        yield
    forget_casts(device)


def _solution(
    value: Any, aux: Any, path: tuple[Any, ...], outcome: Outcome, adjoints: list[Adjoint]
) -> Solution:
    return Solution(
        value=value,
        aux=aux,
        status=outcome.status,
        steps=outcome.steps,
        evaluations=outcome.evaluations,
        residual=outcome.residual,
        relative_residual=outcome.relative_residual,
        path=path,
        trace=torch.stack(outcome.trace) if outcome.trace else None,
        memory=outcome.memory,
        adjoints=adjoints,
    )


def _check_choices(f: Any, solver: Any, stop: Any, gradient: Any) -> None:
    if not callable(f):
        raise TypeError(f"f must be callable, not {f!r}.")
    check_kind("solver", solver, Solver, "implicit.Anderson(memory=5)")
    check_kind(
        "stop", stop, (Tolerance, Steps), "implicit.Tolerance(rtol=1e-3) or implicit.Steps(20)"
    )
    check_kind("gradient", gradient, Gradient, "implicit.RAG(2)")
    check_differentiable(solver, gradient)


def _check_finite(start: Tensor) -> None:
    total = on_host(start.detach().sum())
    if total is None or math.isfinite(total):  # which a sum need not be, but most are
        return
    finite = on_host(torch.isfinite(start.detach()).all(dim=1))
    if finite is not None and not finite.any():
        raise StateError(
            "y0 is not finite in any sample: it holds NaN or infinity. Look at what made it, or "
            "start from zeros."
        )
