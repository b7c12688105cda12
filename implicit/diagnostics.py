"""How solves went: as a table, as a picture, and as figures for the log of a training run.

Residuals are relative, ``‖f(y) − y‖ / ‖f(y)‖``, so that samples and solves can be compared.
`report` needs rich and `plot_convergence` needs matplotlib; the logger needs neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit.arguments import check_kind
from implicit.solution import Solution, Status

_QUANTILES = {"median": 0.5, "90 %": 0.9, "max": 1.0}
_WORST = 5
_MOST_LINES = 16


def report(solution: Solution) -> Any:
    """A ``rich.table.Table`` of a solution: statuses, quantiles of its figures, worst samples.

    To be printed by rich: ``rich.print(report(solution))``.  The worst samples are those that
    diverged, then those with the largest relative residual.  Waits for the device.

    Raises:
        ImportError: if rich is not installed.

    Example:
        >>> import torch, implicit
        >>> s = implicit.fixed_point(torch.cos, torch.ones(2, 1), stop=implicit.Steps(3))
        >>> table = report(s)
        >>> table.title, table.row_count
        ('2 samples: 2 STOPPED', 5)
    """
    table_module = _needed("rich.table", "report")
    status = _on_host(solution.status).astype(int)
    names = ("steps", "evaluations", "residual", "relative residual")
    forms = (".0f", ".0f", ".3g", ".3g")
    figures = [_on_host(getattr(solution, name.replace(" ", "_"))) for name in names]

    def add(name: str, values: Iterable[float]) -> None:
        table.add_row(name, *(format(x, form) for x, form in zip(values, forms, strict=True)))

    counts = [(int((status == kind).sum()), kind.name) for kind in Status]
    shown = ", ".join(f"{count} {name}" for count, name in counts if count)
    table = table_module.Table(title=f"{len(status)} samples: {shown}")
    table.add_column()
    for name in names:
        table.add_column(name, justify="right")
    for name, quantile in _QUANTILES.items():
        add(name, (_quantile(x, quantile) for x in figures))
    table.add_section()
    size = np.nan_to_num(figures[-1], nan=np.inf, posinf=np.inf)
    order = np.lexsort((-size, status != Status.DIVERGED))
    for i in order[:_WORST]:
        add(f"sample {i}, {Status(status[i]).name}", (x[i] for x in figures))
    return table


def plot_convergence(solutions: Solution | Mapping[str, Solution], ax: Any = None) -> Any:
    """Relative residual over evaluations of ``f``, on a logarithmic scale.

    One line per sample for up to 16 samples, which ends where the sample stopped; the median and a
    band from the 10 % to the 90 % quantile for more, in which a sample that stopped keeps its last
    residual.

    Args:
        solutions: one solution or, to compare solvers, several by name; all of
            ``fixed_point(..., trace=True)``.
        ax: matplotlib axes to draw into; new ones by default.

    Returns:
        The axes.

    Raises:
        ValueError: if a solution has no trace, or there is none.
        ImportError: if ``ax`` is not given and matplotlib is not installed.

    Example:
        >>> import torch, implicit
        >>> from matplotlib.figure import Figure
        >>> y0 = torch.rand(4, 3)
        >>> solutions = {
        ...     str(solver): implicit.fixed_point(torch.cos, y0, solver=solver, trace=True)
        ...     for solver in (implicit.Naive(), implicit.Anderson())
        ... }
        >>> ax = plot_convergence(solutions, ax=Figure().subplots())
        >>> ax.get_yscale(), len(ax.get_legend().get_texts())
        ('log', 2)
    """
    named = solutions if isinstance(solutions, Mapping) else {"": solutions}
    if not named:
        raise ValueError("plot_convergence: there is no solution to draw.")
    for name, solution in named.items():
        check_kind(
            "solution", solution, Solution, "fixed_point(..., trace=True), or a dict of them"
        )
        if solution.trace is None:
            whose = f"the solution {name!r}" if name else "the solution"
            raise ValueError(
                f"plot_convergence: {whose} has no trace. Solve with fixed_point(..., trace=True)."
            )
    if ax is None:
        ax = _needed("matplotlib.pyplot", "plot_convergence").subplots()[1]
    for number, (name, solution) in enumerate(named.items()):
        _draw(ax, _on_host(solution.trace), name, f"C{number % 10}")
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("evaluations of f")
    ax.set_ylabel("relative residual ‖f(y) − y‖ / ‖f(y)‖")
    if any(named):
        ax.legend()
    return ax


class ConvergenceLogger:
    """Collects how solves went, for the log of a training loop.

    `add` only keeps copies of ``(B,)`` tensors where they are and never waits for the device;
    `summary` waits once, where the loop would print anyway.

    Example:
        >>> import torch, implicit
        >>> logger = ConvergenceLogger()
        >>> for _ in range(3):
        ...     logger.add(implicit.fixed_point(torch.cos, torch.ones(2, 1)))
        >>> figures = logger.summary()
        >>> figures["samples"], figures["converged"]
        (6.0, 1.0)
        >>> logger.summary()
        {}
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, ...]] = []

    def add(self, solution: Solution) -> None:
        """Remember the figures of ``solution``, not its value."""
        check_kind("solution", solution, Solution, "what fixed_point(...) returns")
        figures = (
            solution.status,
            solution.steps,
            solution.evaluations,
            solution.relative_residual,
        )
        # Copies: a CUDA graph writes the next solution over this one.
        self._kept.append(tuple(x.detach().clone() for x in figures))

    def summary(self) -> dict[str, float]:
        """Figures over all samples since the last summary, and begin anew; empty if there are none.

        ``samples``; ``steps_mean``, ``steps_max``, ``evaluations_mean``, ``evaluations_max``;
        ``relative_residual_mean``, ``relative_residual_max`` (over the samples where it is finite,
        NaN if it is nowhere); ``converged``, ``diverged``: shares in [0, 1].  A solve with `Steps`
        tests nothing, so none of its samples counts as converged.
        """
        if not self._kept:
            return {}
        columns = [_on_host(torch.cat(column)) for column in zip(*self._kept, strict=True)]
        self._kept.clear()
        status, steps, evaluations, residual = columns
        finite = residual[np.isfinite(residual)]
        return {
            "samples": float(len(status)),
            "steps_mean": float(steps.mean()),
            "steps_max": float(steps.max()),
            "evaluations_mean": float(evaluations.mean()),
            "evaluations_max": float(evaluations.max()),
            "relative_residual_mean": float(finite.mean()) if finite.size else np.nan,
            "relative_residual_max": float(finite.max()) if finite.size else np.nan,
            "converged": float((status == Status.CONVERGED).mean()),
            "diverged": float((status == Status.DIVERGED).mean()),
        }


def _draw(ax: Any, trace: np.ndarray, name: str, colour: str) -> None:
    """Lines or a band of ``trace (evaluations, B)``, NaN where a sample had stopped."""
    at = np.arange(1, len(trace) + 1)
    if trace.shape[1] <= _MOST_LINES:
        lines = ax.plot(at, _drawable(trace), color=colour, linewidth=1)
        lines[0].set_label(name)
        return
    for n in range(1, len(trace)):
        trace[n] = np.where(np.isnan(trace[n]), trace[n - 1], trace[n])
    trace = np.nan_to_num(trace, nan=np.inf)  # no residual that could be drawn, but a bad one
    low, median, high = _drawable(
        np.quantile(trace, (0.1, 0.5, 0.9), axis=1, method="inverted_cdf")
    )
    ax.plot(at, median, color=colour, label=name)
    ax.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)


def _drawable(residual: np.ndarray) -> np.ndarray:
    """NaN, a gap, for what has no place on a logarithmic scale."""
    return np.where(np.isfinite(residual) & (residual > 0), residual, np.nan)


def _quantile(x: np.ndarray, quantile: float) -> float:
    """An element of ``x``, NaN counting as the largest."""
    return float(np.sort(x)[int(np.ceil(quantile * len(x))) - 1])


def _on_host(x: Tensor | None) -> np.ndarray:
    assert x is not None
    return x.detach().cpu().double().numpy()


def _needed(module: str, by: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"implicit.{by} needs {module.split('.')[0]}, which is not installed. In a clone of "
            'the repository: pip install ".[plots]".'
        ) from error
