"""How many classical problems each solver finds the answer of, as it comes, and at what cost.

    python -m benchmarks.robustness

Every problem of `benchmarks.problems` from its usual start, in float64, with default settings:
solved is a state ``z`` with ``‖f(z) − z‖ ≤ 1e-6`` after at most 1000 evaluations of ``f``.  Both
are measured here and not asked of the solver: ``f`` is wrapped to count, and the residual is that
of the state that is handed back.  Peers get the same tolerance and budget and their own defaults
otherwise (torchdeq's Anderson hands back ``f`` of the state that it measured, whose residual is
another where ``f`` expands: that is its users' answer, and is judged as such).  Prints the
evaluations of every solver on every problem; writes them as JSON, with the performance profile of
E. Dolan and J. Moré, *Benchmarking optimization software with performance profiles*, Math. Prog.
91, 2002.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy.optimize
import torch
import torchdeq.solver
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

import implicit
from benchmarks.counts import Counted
from benchmarks.measure import machine, output_folder, wide_console, write_results
from benchmarks.problems import Map, Problem, problems

TOLERANCE = 1e-6
BUDGET = 1000
"""Evaluations of ``f``."""

Method = Callable[[Map, Tensor], Tensor]
"""From a map and a start to what is held to be the answer."""


def ours(solver: implicit.Solver) -> Method:
    """The call of a user who changes nothing but the tolerance."""
    stop = implicit.Tolerance(atol=TOLERANCE, rtol=0.0, max_steps=BUDGET)

    def solve(f: Map, y0: Tensor) -> Tensor:
        return implicit.fixed_point(f, y0, solver=solver, stop=stop).value

    return solve


def torchdeq_method(name: str, max_iter: int) -> Method:
    """A solver of torchdeq by its name; ``max_iter`` is what spends the budget."""
    return lambda f, y0: torchdeq.solver.get_solver(name)(
        f, y0, max_iter=max_iter, tol=TOLERANCE, stop_mode="abs"
    )[0]


def scipy_method(solver: Callable[..., np.ndarray]) -> Method:
    """A root finder of scipy on ``f(y) − y``; what it holds when it gives up does not count."""

    def solve(f: Map, y0: Tensor) -> Tensor:
        def residual(y: np.ndarray) -> np.ndarray:
            state = torch.from_numpy(y).view_as(y0)
            return (f(state) - state).numpy().ravel()

        start = y0.numpy().ravel()
        norm = partial(np.linalg.norm, ord=2)
        try:
            found = solver(residual, start, f_tol=TOLERANCE, tol_norm=norm, maxiter=BUDGET)
        except ValueError as error:  # "Jacobian inversion yielded zero vector", and overflow
            raise scipy.optimize.NoConvergence from error
        return torch.from_numpy(np.asarray(found)).view_as(y0)

    return solve


METHODS: dict[str, Method] = {
    "Naive": ours(implicit.Naive()),
    "Anderson": ours(implicit.Anderson()),
    "Broyden": ours(implicit.Broyden()),
    "torchdeq Anderson": torchdeq_method("anderson", BUDGET),
    "torchdeq Broyden": torchdeq_method("broyden", BUDGET - 1),
    "scipy anderson": scipy_method(scipy.optimize.anderson),
    "scipy newton_krylov": scipy_method(scipy.optimize.newton_krylov),
}


@dataclass(frozen=True)
class Run:
    """One method on one problem.

    Attributes:
        evaluations: calls of ``f``, at most one beyond the budget.
        residual: ``‖f(z) − z‖`` of the state returned; infinite where there is none.
        solved: whether both are within bounds.
    """

    problem: str
    family: str
    method: str
    evaluations: int
    residual: float
    solved: bool


class _OverBudgetError(RuntimeError):
    pass


def run(problem: Problem, name: str, method: Method) -> Run:
    """Apply a method; that it gives up is a result, too."""
    counted = Counted(problem.f)

    def f(y: Tensor) -> Tensor:
        if counted.calls > BUDGET:
            raise _OverBudgetError
        return counted(y)

    residual = float("inf")
    try:
        with torch.no_grad(), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            z = method(f, problem.y0)
            residual = (problem.f(z) - z).norm().item()
    except (_OverBudgetError, scipy.optimize.NoConvergence, torch.linalg.LinAlgError):
        pass  # scipy raises where it gives up, torchdeq where its linear system is singular
    solved = residual <= TOLERANCE and counted.calls <= BUDGET
    return Run(problem.name, problem.family, name, counted.calls, residual, solved)


def run_all(methods: dict[str, Method], on: Sequence[Problem]) -> list[Run]:
    """Every method on every problem."""
    return [run(problem, name, method) for problem in on for name, method in methods.items()]


def by_method(runs: Sequence[Run]) -> dict[str, dict[str, Run]]:
    """The runs as ``[method][problem]``."""
    table: dict[str, dict[str, Run]] = {}
    for one in runs:
        table.setdefault(one.method, {})[one.problem] = one
    return table


def solved_by_all(runs: Sequence[Run], methods: Sequence[str]) -> list[str]:
    """Names of the problems that every one of ``methods`` solves."""
    table = by_method(runs)
    return [p for p in table[methods[0]] if all(table[m][p].solved for m in methods)]


def profile(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Of each method, the sorted ratios of its evaluations to the least that any method needed.

    A problem that the method does not solve has no ratio, so a profile ends at the number of
    problems that are solved.
    """
    table = by_method(runs)
    least: dict[str, int] = {}
    for one in runs:
        if one.solved:
            least[one.problem] = min(one.evaluations, least.get(one.problem, one.evaluations))
    return {
        method: sorted(one.evaluations / least[p] for p, one in row.items() if one.solved)
        for method, row in table.items()
    }


def draw_profile(runs: Sequence[Run], path: Path) -> None:
    """Share of problems solved within τ times the least evaluations, over τ."""
    count = len({one.problem for one in runs})
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    furthest = max((ratios[-1] for ratios in profile(runs).values() if ratios), default=1.0)
    for method, ratios in profile(runs).items():
        shares = np.arange(1, len(ratios) + 1) / count
        peer = method.startswith(("torchdeq", "scipy"))
        axes.step(
            [1, *ratios, furthest],
            [0, *shares, len(ratios) / count],
            where="post",
            linestyle="--" if peer else "-",
            label=f"{method} ({len(ratios)})",
        )
    axes.set(
        xscale="log",
        xlim=(1, 1.05 * furthest),
        ylim=(0, 1.01),
        xlabel="τ: evaluations of f over the least of any solver",
        ylabel="share of problems solved within τ",
        title=f"{count} fixed-point problems, ‖f(z) − z‖ ≤ 1e-6, at most {BUDGET} evaluations",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print the table; write the results and the profile."""
    folder = output_folder(__doc__)
    torch.set_num_threads(1)
    runs = run_all(METHODS, problems())
    table = by_method(runs)
    common = solved_by_all(runs, [name for name in METHODS if name != "Naive"])

    view = Table("family", "problem", *METHODS)
    for first in table["Anderson"].values():
        row = [table[name][first.problem] for name in METHODS]
        view.add_row(
            first.family, first.problem, *(str(x.evaluations) if x.solved else "–" for x in row)
        )
    view.add_section()
    solved = {name: sum(x.solved for x in table[name].values()) for name in METHODS}
    totals = {name: sum(table[name][p].evaluations for p in common) for name in METHODS}
    view.add_row("", f"solved, of {len(problems())}", *map(str, solved.values()))
    view.add_row(
        "",
        f"evaluations on {len(common)} that all but Naive solve",
        *("–" if name == "Naive" else str(total) for name, total in totals.items()),
    )
    console = wide_console()
    console.print(f"Evaluations of f until ‖f(z) − z‖ ≤ 1e-6. {machine()}.")
    console.print(view)

    draw_profile(runs, folder / "robustness.png")
    summary = {"solved": solved, "common": common, "evaluations_on_common": totals}
    path = write_results(
        folder, "robustness", {**summary, "runs": [asdict(x) for x in runs]}, console
    )
    console.print(f"Wrote {path.name} and robustness.png.")


if __name__ == "__main__":
    main()
