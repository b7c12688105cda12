"""Our solvers under `torchdeq.get_deq`, and torchdeq's solvers in `implicit.fixed_point`.

Z. Geng and J. Z. Kolter, *TorchDEQ: a library for deep equilibrium models*, 2023; release 0.1.0.
There a solver is a function that runs a whole loop and returns the answer, the states at the steps
that were asked for, and a dictionary of statistics: `register` makes one of any solver of ours.
Here a solver is a step: `TorchDEQ` is one of theirs, whose answer is judged like any other.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from implicit.arguments import check_count, check_positions
from implicit.fixed_point import fixed_point
from implicit.solution import Solution
from implicit.solvers import Best, Solver, WholeSolver
from implicit.stopping import Steps, Stop, Tolerance, relative_to
from implicit.transforms import is_in_backward

try:
    _peer: Any = import_module("torchdeq.solver")
except ImportError as error:
    raise ImportError(
        "implicit.interop.torchdeq needs torchdeq, which is not installed: pip install torchdeq."
    ) from error


def register(name: str, solver: Solver) -> None:
    """Let torchdeq find ``solver`` by ``name``, as ``f_solver`` and ``b_solver`` of ``get_deq``.

    Call it before ``get_deq``, which looks names up once.  A name of torchdeq's own replaces that
    solver, also in code that cannot be changed.  Options mean what they mean there, but for this:

    - ``max_iter`` (``f_max_iter``, ``b_max_iter``) is the most steps; one evaluation more tests
      the last of them, so every residual that is reported was measured.
    - ``tol`` is tested sample by sample, on ``f(y) − y`` whatever the damping, from the start on.
      The answer is the first state within it, or the best if there is none.
    - A sample whose answer is its start gets ``f`` of it.  So a backward solve, which starts from
      zeros, never gives less than the gradient of one step; with ``b_stop_mode="rel"`` gradients
      do not depend on the scale of the loss at all.
    - As many states come back as ``indexing`` asks for: state ``k`` is the one after ``k`` steps,
      or the answer for the samples that had ended by then.
    - Column ``k`` of the traces, of which there are ``max_iter + 1``, is the residual after ``k``
      steps, and that of the answer from the end on; ``nstep`` is the step of the answer.
    - ``solver_kwargs`` are fields of ``solver``, such as ``memory``; others are refused.

    Args:
        name: what torchdeq is to call it.
        solver: `Anderson`, `Broyden`, `Naive`, or any other that has steps.

    Raises:
        TypeError: if ``solver`` is no solver or shows no steps; in a solve, for an unknown setting,
            or a state that is a list (leave out ``no_stat``).
        ValueError: in a solve, if an option is out of range, or ``tol`` out of reach of the dtype.
        RuntimeError: in a backward pass with ``create_graph``, which would be silently wrong.

    Example:
        >>> import torch, torchdeq, implicit
        >>> register("ours", implicit.Anderson(memory=3))
        >>> deq = torchdeq.get_deq(f_solver="ours", b_solver="ours", b_stop_mode="rel", ift=True)
        >>> states, statistics = deq(torch.cos, torch.ones(2, 1))
        >>> bool((statistics["abs_lowest"] < 1e-3).all())
        True
    """
    _Recorder(solver)  # which refuses what is no solver, or shows no steps

    def solve(
        func: Callable[[Tensor], Tensor],
        x0: Tensor,
        max_iter: int = 50,
        tol: float = 1e-3,
        stop_mode: str = "abs",
        indexing: Sequence[int] | None = None,
        **settings: Any,
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        asked = list(indexing or ())
        path = sorted(set(asked))
        _check(name, x0, max_iter, stop_mode, path)
        recorder = _Recorder(_changed(name, solver, settings))
        # A tolerance of zero, torchdeq's way to ask for every step, ends at an exact solution.
        bound = tol or sys.float_info.min
        atol, rtol = (bound, 0.0) if stop_mode == "abs" else (0.0, bound)

        def rows(flags: Tensor) -> Tensor:
            return flags.reshape(-1, *[1] * (x0.dim() - 1))

        with torch.no_grad():
            stop = Tolerance(rtol, atol, max_iter)
            found = fixed_point(func, x0, solver=recorder, stop=stop, path=path)
            value = found.value
            unmoved = (value == x0).reshape(len(x0), -1).all(dim=1)
            if unmoved.any():
                value = torch.where(rows(unmoved), func(x0), value)
        after = dict(zip(path, found.path, strict=True))
        states = [torch.where(rows(found.steps > k), after[k], value) for k in asked]
        return value, states, recorder.statistics(found, max_iter)

    _peer.register_solver(name, solve)


class TorchDEQ(WholeSolver):
    """A solver of torchdeq by its name, for `fixed_point`, `root` and `Implicit`.

    It returns the state with the lowest residual that it met, by its own account; status and
    residual are those that are measured of that state here.  The whole batch runs until its
    slowest sample is done.  torchdeq tests an absolute or a relative tolerance: of a `Tolerance`
    with an ``rtol`` it is given that, which is the stricter.  `Steps` are its ``max_iter``.

    Args:
        name: ``"anderson"``, ``"broyden"``, ``"fixed_point_iter"``,
            ``"simple_fixed_point_iter"``, or what was registered in torchdeq.
        options: of that solver: ``m``, ``lam``, ``tau``, ``LBFGS_thres``, ``ls``,
            ``return_final``.

    Raises:
        ValueError: if torchdeq knows no such solver; in a solve, if the norm of the `Tolerance` is
            not l2, the only one that torchdeq has.
        TypeError: if the solver has no such option.
        RuntimeError: in a solve with `BPTT`: torchdeq keeps no graph of its path.

    Example:
        >>> import torch, implicit
        >>> s = implicit.fixed_point(torch.cos, torch.ones(2, 1), solver=TorchDEQ("anderson", m=3))
        >>> s.status.tolist()
        [0, 0]
    """

    def __init__(self, name: str, **options: Any) -> None:
        if name not in _peer._solvers:
            known = ", ".join(sorted(_peer._solvers))
            raise ValueError(f"TorchDEQ({name!r}): torchdeq has no such solver, but {known}.")
        named = inspect.signature(_peer.get_solver(name)).parameters.values()
        accepted = {p.name for p in named if p.kind is not p.VAR_KEYWORD}
        accepted -= {"func", "x0", "max_iter", "tol", "stop_mode", "indexing"}  # given by torchdeq
        _refuse_unknown(f"TorchDEQ({name!r})", options, accepted)
        self.name = name
        self.options = options

    def __repr__(self) -> str:
        options = "".join(f", {option}={value!r}" for option, value in self.options.items())
        return f"TorchDEQ({self.name!r}{options})"

    def run(self, f: Callable[[Tensor], Tensor], y0: Tensor, stop: Stop) -> Tensor:
        def step(y: Tensor, tau: float = 1.0) -> Tensor:  # simple_fixed_point_iter gives its tau
            fy = f(y)
            if fy.requires_grad:
                raise RuntimeError(
                    f"{self} keeps no graph of its path, so BPTT would have no gradient: use "
                    "another gradient, or a solver of this library."
                )
            return fy if tau == 1 else y.lerp(fy, tau)

        until: dict[str, Any]
        if isinstance(stop, Steps):
            until = {"max_iter": stop.n, "tol": 0.0}
        elif stop.norm != "l2":
            raise ValueError(f"{self} tests the l2 norm, not norm={stop.norm!r}: leave that out.")
        elif rtol := stop.rtol_for(0.0):
            until = {"max_iter": stop.max_steps, "tol": rtol, "stop_mode": "rel"}
        else:
            until = {"max_iter": stop.max_steps, "tol": stop.atol}
        found: Tensor = _peer.get_solver(self.name)(step, y0, **until, **self.options)[0]
        return found


@dataclass(frozen=True)
class _Recorder(Best):
    """`Best` that also writes down the residuals, absolute and relative, of every step."""

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def step(self, memory: Any, y: Tensor, fy: Tensor, r: Tensor) -> tuple[Tensor, Any]:
        residual, size = (torch.linalg.vector_norm(x, dim=1) for x in (r, fy))
        self.seen.append((residual, relative_to(size, residual)))
        return super().step(memory, y, fy, r)

    def statistics(self, found: Solution, max_iter: int) -> dict[str, Tensor]:
        """Torchdeq's dictionary of figures, of the solve that this was the solver of."""
        last = (found.residual, found.relative_residual)
        rows = [*self.seen, *[last] * (max_iter + 1 - len(self.seen))]
        absolute, relative = (torch.stack(column, dim=1) for column in zip(*rows, strict=True))
        best = absolute.nan_to_num(nan=torch.inf).argmin(dim=1)
        figures = {"abs_trace": absolute, "rel_trace": relative}
        figures |= {"abs_lowest": last[0], "rel_lowest": last[1]}
        figures["nstep"] = torch.where(found.converged, found.steps, best).to(absolute.dtype)
        return _peer.stat.SolverStat(figures)


def _check(name: str, x0: Any, max_iter: Any, stop_mode: str, path: list[int]) -> None:
    if not isinstance(x0, Tensor):
        raise TypeError(
            f"{name}: the state is a {type(x0).__name__}, not a tensor. torchdeq joins several "
            "tensors into one if no_stat is left out."
        )
    if torch.is_grad_enabled() and is_in_backward():
        raise RuntimeError(
            f"{name}: torchdeq's gradient would be wrong if differentiated again "
            "(create_graph=True). Use implicit.fixed_point(..., gradient=implicit.Implicit())."
        )
    if stop_mode not in ("abs", "rel"):
        raise ValueError(f"{name}(stop_mode={stop_mode!r}): use 'abs' or 'rel'.")
    check_count(name, "max_iter", max_iter)
    check_positions("indexing", path, max_iter, f"max_iter={max_iter}")


def _changed(name: str, solver: Any, settings: dict[str, Any]) -> Solver:
    if settings:
        _refuse_unknown(name, settings, {setting.name for setting in fields(solver)})
        solver = replace(solver, **settings)
    return solver


def _refuse_unknown(owner: str, options: dict[str, Any], known: set[str]) -> None:
    for option in options:
        if option not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise TypeError(f"{owner} has no option {option!r}, but {listed}.")
