"""What an iteration of a solver costs beyond ``f``: time, operations and copies of the state.

    python -m benchmarks.overhead

``f`` is a single operation, ``b + s ⊙ y`` with factors ``s`` in ±0.99, which no solver of memory 6
finishes in the 40 evaluations that are timed; its own time is measured alike and subtracted.  The
runs of all contestants are interleaved, and the median is taken, so that a machine that slows down
slows down all of them.  Both sides run without autograd, as the solve inside a layer does.
Operations and live bytes (`benchmarks.counts.Operations`) are exact and the same on every
machine; operations are the increase per evaluation once the memory is full.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torchdeq.solver
from rich.table import Table
from torch import Tensor

import implicit
from benchmarks.counts import Counted, live_bytes, operations_of
from benchmarks.goals import Goal, goals_table
from benchmarks.measure import by_turns, machine, output_folder, wide_console, write_results

SIZES = ((2, 256), (16, 1024), (8, 19200))
"""``(B, D)``."""
MEMORY = 6
EVALUATIONS = 40
REPEATS = 40
GOALS = {"Naive": 0.25, "Anderson": 0.6, "Broyden": 0.5}
"""Time over that of torchdeq, at most."""

GOAL_COPIES = 2 * MEMORY + 5

Map = Callable[[Tensor], Tensor]
Contestant = Callable[[Map, Tensor, int], object]
"""Solves with exactly so many evaluations of the map."""


def ours(solver: implicit.Solver, fixed: bool) -> Contestant:
    """With `Steps`, or with a `Tolerance` that is never met and one evaluation more than steps."""

    def solve(f: Map, y0: Tensor, evaluations: int) -> object:
        stop = (
            implicit.Steps(evaluations)
            if fixed
            else implicit.Tolerance(rtol=1e-30, atol=0.0, max_steps=evaluations - 1)
        )
        return implicit.fixed_point(f, y0, solver=solver, stop=stop)

    return solve


def torchdeq_naive(f: Map, y0: Tensor, evaluations: int) -> object:
    """As many steps as evaluations."""
    return torchdeq.solver.get_solver("fixed_point_iter")(f, y0, max_iter=evaluations, tol=0.0)


def torchdeq_anderson(f: Map, y0: Tensor, evaluations: int) -> object:
    """Two evaluations, then a step for each further one."""
    return torchdeq.solver.get_solver("anderson")(f, y0, max_iter=evaluations, tol=0.0, m=MEMORY)


def torchdeq_broyden(f: Map, y0: Tensor, evaluations: int) -> object:
    """One evaluation, then a step for each further one."""
    return torchdeq.solver.get_solver("broyden")(
        f, y0, max_iter=evaluations - 1, tol=0.0, LBFGS_thres=MEMORY
    )


SOLVERS: dict[str, tuple[implicit.Solver, Contestant]] = {
    "Naive": (implicit.Naive(), torchdeq_naive),
    "Anderson": (implicit.Anderson(memory=MEMORY), torchdeq_anderson),
    "Broyden": (implicit.Broyden(memory=MEMORY), torchdeq_broyden),
}


@dataclass(frozen=True)
class Cost:
    """One solver at one size.

    Attributes:
        microseconds: per evaluation, beyond ``f``, and relative to torchdeq's.
        operations: tensor operations per evaluation, beyond ``f``.
        copies: peak of the bytes alive, over those of one state.
    """

    solver: str
    stop: str
    batch: int
    dim: int
    microseconds: float
    ratio: float
    operations: float
    copies: float


def cheap_map(batch: int, dim: int) -> tuple[Map, Tensor]:
    """``b + s ⊙ y`` and its start, in float32."""
    factors, b = torch.linspace(-0.99, 0.99, dim), torch.ones(batch, dim)
    return (lambda y: torch.addcmul(b, factors, y)), torch.zeros(batch, dim)


@torch.no_grad()
def costs(name: str, batch: int, dim: int, *, evaluations: int, repeats: int) -> list[Cost]:
    """Torchdeq's solver of that name, then ours with `Tolerance` and with `Steps`.

    Raises:
        RuntimeError: if a contestant did not evaluate ``f`` as often as it was told to.
    """
    f, y0 = cheap_map(batch, dim)
    solver, peer = SOLVERS[name]
    contestants = {
        "torchdeq": peer,
        "Tolerance": ours(solver, fixed=False),
        "Steps": ours(solver, fixed=True),
    }
    for stop, solve in contestants.items():
        solve(counted := Counted(f), y0, evaluations)
        if counted.calls != evaluations:
            raise RuntimeError(
                f"{name} ({stop}) evaluated f {counted.calls} times, not {evaluations}: its time "
                "per evaluation cannot be compared."
            )

    def bare() -> None:
        y = y0
        for _ in range(evaluations):
            y = f(y)

    solves = {stop: partial(solve, f, y0, evaluations) for stop, solve in contestants.items()}
    f_time, *times = map(statistics.median, by_turns([bare, *solves.values()], repeats))
    overheads = [1e6 * (t - f_time) / evaluations for t in times]
    return [
        Cost(
            solver=name,
            stop=stop,
            batch=batch,
            dim=dim,
            microseconds=overhead,
            ratio=overhead / overheads[0],
            operations=operations_per_evaluation(contestants[stop], f, y0),
            copies=live_bytes(solve) / y0.nbytes,
        )
        for (stop, solve), overhead in zip(solves.items(), overheads, strict=True)
    ]


def operations_per_evaluation(solve: Contestant, f: Map, y0: Tensor) -> float:
    """The increase from 20 to 30 evaluations, less the one operation of ``f``."""
    few, many = (operations_of(partial(solve, f, y0, n)) for n in (20, 30))
    return (many - few) / 10 - 1


def goals(results: list[dict[str, Any]]) -> list[Goal]:
    """Time over torchdeq's at each size with a tolerance, and copies at most."""
    costs = [Cost(**row) for row in results]
    floors = {(c.solver, c.dim): c.ratio for c in costs if c.stop == "Steps"}
    made = [
        Goal(
            f"{cost.solver}, ({cost.batch}, {cost.dim}), Tolerance: time over torchdeq's",
            cost.ratio,
            most=GOALS[cost.solver],
            floor=floors[cost.solver, cost.dim],
            reason=(
                "The test of every sample at every step is six or seven small operations, which "
                "cost the host some microseconds each; runs differ by about 3 %. The floor is that "
                "of `Steps`, which tests nothing."
            ),
        )
        for cost in costs
        if cost.stop == "Tolerance"
    ]
    for name in ("Anderson", "Broyden"):
        most = max(c.copies for c in costs if c.solver == name and c.stop != "torchdeq")
        made.append(Goal(f"{name}: copies of the state at the peak", most, most=GOAL_COPIES))
    return made


def main() -> None:
    """Print the table; write the results."""
    folder = output_folder(__doc__)
    table = Table("solver", "(B, D)", "", "µs", "ratio", "goal", "operations", "copies", "goal")
    found = []
    for name, goal in GOALS.items():
        for batch, dim in SIZES:
            for cost in costs(name, batch, dim, evaluations=EVALUATIONS, repeats=REPEATS):
                ours_is = cost.stop != "torchdeq"
                few_copies = f"≤ {GOAL_COPIES}" if name != "Naive" and ours_is else ""
                table.add_row(
                    name,
                    f"({batch}, {dim})",
                    cost.stop,
                    f"{cost.microseconds:.1f}",
                    f"{cost.ratio:.2f}",
                    f"≤ {goal}" if ours_is else "",
                    f"{cost.operations:.1f}",
                    f"{cost.copies:.1f}",
                    few_copies,
                )
                found.append(asdict(cost))
        table.add_section()
    console = wide_console()
    console.print(
        f"Per evaluation, beyond f; memory {MEMORY}; ours with Tolerance and with Steps. "
        f"{machine()}."
    )
    console.print(table)
    write_results(folder, "overhead", found, console)
    console.print(goals_table(goals(found)))


if __name__ == "__main__":
    main()
