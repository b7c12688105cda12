"""Evaluations of ``f`` per row on batches of easy and hard samples, over those of each one alone.

    python -m benchmarks.mixed_batches

A batch that runs until its slowest sample evaluates ``f`` on rows that are done.  Counted are the
rows of every state that ``f`` is called with; the reference is the sum over samples that are
solved one by one with the same solver.  1 is what a batch costs whose samples leave it as they
converge: ours do, because the weights of each sample come as ``args``, batch first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torchdeq.solver
from rich.table import Table
from torch import Tensor

import implicit
from benchmarks.counts import Counted
from benchmarks.goals import Goal, goals_table
from benchmarks.measure import machine, output_folder, wide_console, write_results
from benchmarks.problems import linspace, normal

TOLERANCE = 1e-5
"""Of the residual over ``‖f(y)‖``."""
MOST = 500
"""Evaluations of a sample."""
GOAL = 1.15

Inputs = tuple[Tensor, ...]
Solve = Callable[[Callable[..., Tensor], Tensor, Inputs], object]


@dataclass(frozen=True)
class Batch:
    """Many samples of ``y = f(y, *inputs)``, of which each has its own row in every input."""

    name: str
    f: Callable[..., Tensor]
    inputs: Inputs

    @property
    def start(self) -> Tensor:
        """Zeros ``(B, D)``."""
        return torch.zeros_like(self.inputs[-1])


def affine(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``Ay + b`` row by row: ``y (B, D)``, ``a (B, D, D)``, ``b (B, D)``."""
    return torch.baddbmm(b.unsqueeze(2), a, y.unsqueeze(2)).squeeze(2)


def tanh(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``tanh(Ay + b)`` row by row."""
    return torch.tanh(affine(y, a, b))


def inputs(radii: Tensor, dim: int, seed: int) -> Inputs:
    """Gaussian matrices of these spectral radii, and a small ``b``, in float64."""
    a = normal(len(radii), dim, dim, seed=seed)
    a = a * (radii / torch.linalg.eigvals(a).abs().amax(dim=1))[:, None, None]
    return a, 0.1 * normal(len(radii), dim, seed=seed + 1)


def batches(size: int = 64, dim: int = 32) -> tuple[Batch, ...]:
    """Radii evenly from 0.1 to 0.95, and one sample of 0.95 among those of 0.2."""
    even = linspace(0.1, 0.95, size)
    one_hard = torch.full_like(even, 0.2)
    one_hard[size // 2] = 0.95
    return tuple(
        Batch(f"{name}, {f.__name__}", f, inputs(radii, dim, seed))
        for seed, f in enumerate((affine, tanh))
        for name, radii in (("ρ from 0.1 to 0.95", even), (f"one hard in {size}", one_hard))
    )


def ours(solver: implicit.Solver) -> Solve:
    """Inputs as ``args``."""
    stop = implicit.Tolerance(rtol=TOLERANCE, atol=0.0, max_steps=MOST - 1)
    return lambda f, y0, x: implicit.fixed_point(f, y0, solver=solver, stop=stop, args=x)


def torchdeq_solve(name: str) -> Solve:
    """Inputs in a closure, which is the only way there."""
    return lambda f, y0, x: torchdeq.solver.get_solver(name)(
        lambda y: f(y, *x), y0, max_iter=MOST, tol=TOLERANCE, stop_mode="rel"
    )


SOLVERS: dict[str, Solve] = {
    "Naive": ours(implicit.Naive()),
    "Anderson": ours(implicit.Anderson()),
    "Broyden": ours(implicit.Broyden()),
    "torchdeq fixed_point_iter": torchdeq_solve("fixed_point_iter"),
    "torchdeq anderson": torchdeq_solve("anderson"),
    "torchdeq broyden": torchdeq_solve("broyden"),
}


@dataclass(frozen=True)
class Rows:
    """Rows that ``f`` saw, solving together and one by one."""

    batch: str
    solver: str
    together: int
    alone: int

    @property
    def ratio(self) -> float:
        """1 where a sample costs in the batch what it costs alone."""
        return self.together / self.alone


@torch.no_grad()
def rows(batch: Batch, name: str, solve: Solve) -> Rows:
    """Count one solver on one batch."""
    together, alone = Counted(batch.f), Counted(batch.f)
    solve(together, batch.start, batch.inputs)
    for i in range(len(batch.start)):
        one = slice(i, i + 1)
        solve(alone, batch.start[one], tuple(x[one] for x in batch.inputs))
    return Rows(batch.name, name, together.rows, alone.rows)


def goals(results: list[dict[str, Any]]) -> list[Goal]:
    """Ours, on every batch."""
    return [
        Goal(
            f"{name}: rows over those of each sample alone, largest",
            max(row["ratio"] for row in results if row["solver"] == name),
            most=GOAL,
        )
        for name in SOLVERS
        if not name.startswith("torchdeq")
    ]


def main() -> None:
    """Print the table; write the results."""
    folder = output_folder(__doc__)
    table = Table("batch", "solver", "rows together", "rows alone", f"ratio (goal ≤ {GOAL})")
    found = []
    for batch in batches():
        for name, solve in SOLVERS.items():
            count = rows(batch, name, solve)
            found.append({**asdict(count), "ratio": count.ratio})
            table.add_row(
                batch.name, name, str(count.together), str(count.alone), f"{count.ratio:.2f}"
            )
        table.add_section()
    console = wide_console()
    console.print(f"Rows that f saw, to a relative residual of {TOLERANCE:g}. {machine()}.")
    console.print(table)
    write_results(folder, "mixed_batches", found, console)
    console.print(goals_table(goals(found)))


if __name__ == "__main__":
    main()
