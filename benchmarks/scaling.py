"""How time and memory of DEQDet's refinement grow with the work.

    python -m benchmarks.scaling

From 100 queries, 32 points, an image of 800×1344, batch 1 and T = 25 one of these is changed at a
time.  Time is that of the whole path in inference mode (median, the device's work included);
memory is the most that is alive at once in forward and backward pass of one supervised position
with RAG(2) at the end of it, counted as by `benchmarks.training_memory`, gradients of the weights
and of the feature maps included.  It is the refinement alone, without backbone and neck: of the
image only the maps grow.  The exponent ``p`` of ``cost ∝ size^p`` is the slope of a least-squares
line through the logarithms.  Feature maps have the layout in which the detector hands them to its
decoder, at inference and in training.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table

import implicit
from benchmarks.full_size import Problem, full_size
from benchmarks.measure import (
    by_turns,
    device,
    machine,
    output_folder,
    stem,
    three_digits,
    wide_console,
    write_results,
)
from benchmarks.training_memory import measured, peak_of, subject_of, supervise


@dataclass(frozen=True)
class Setting:
    """What is refined and how often; the image's area is in pixels."""

    queries: int = 100
    points: int = 32
    area: int = 800 * 1344
    batch: int = 1
    steps: int = 25


SWEEPS: dict[str, Sequence[int]] = {
    "queries": (100, 200, 300, 600, 900),
    "points": (16, 32, 64, 128),
    "area": (400 * 672, 800 * 1344, 1600 * 2688),
    "batch": (1, 2, 4),
    "steps": (5, 10, 25, 50),
}
REPEATS = 3


@dataclass(frozen=True)
class Cost:
    """Milliseconds of inference and bytes of training for some work."""

    swept: str
    size: int
    milliseconds: float
    bytes: int


def cost_of(swept: str, setting: Setting, repeats: int = REPEATS) -> Cost:
    """Measure one setting."""
    size: int = getattr(setting, swept)
    return Cost(swept, size, *_measured(setting, repeats))


@functools.cache  # the setting that every sweep goes through is measured once, for all
def _measured(setting: Setting, repeats: int) -> tuple[float, int]:
    width = round((setting.area * 1344 / 800) ** 0.5)
    problem = full_size(
        setting.queries,
        setting.points,
        image=(setting.area // width, width),
        batch=setting.batch,
        device=device(),
    )
    solve = torch.inference_mode()(_solver(problem, setting.steps))
    (taken,) = by_turns([solve], repeats)
    with measured(subject_of(problem)) as subject:
        peak = peak_of(functools.partial(supervise, subject, (setting.steps,)))
    return 1e3 * statistics.median(taken), peak


def _solver(problem: Problem, steps: int) -> Callable[[], object]:
    return lambda: implicit.fixed_point(
        problem.layer,
        problem.queries,
        solver=implicit.Naive(),
        stop=implicit.Steps(steps),
        gradient=implicit.JFB(),
        args=(problem.prepared,),
    )


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms.

    Example:
        >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def draw(costs: Sequence[Cost], path: Path) -> None:
    """Time and memory over each size, both axes logarithmic."""
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    rows = figure.subplots(2, len(SWEEPS), sharey="row")
    for column, swept in enumerate(SWEEPS):
        own = [cost for cost in costs if cost.swept == swept]
        sizes = [cost.size for cost in own]
        kinds = {
            "time, ms": [cost.milliseconds for cost in own],
            "memory, MiB": [cost.bytes / 2**20 for cost in own],
        }
        for axes, (label, values) in zip(rows[:, column], kinds.items(), strict=True):
            axes.loglog(sizes, values, marker=".")
            axes.set_title(f"{swept}: p = {exponent(sizes, values):.2f}", fontsize="small")
            axes.grid(alpha=0.3, which="both")
            if column == 0:
                axes.set_ylabel(label)
    figure.savefig(path, dpi=120)


def tables(results: Sequence[dict[str, Any]]) -> tuple[str, Table]:
    """What is shown of the results that were written."""
    table = Table("changed", "to", "time, ms", "exponent", "memory, MiB", "exponent")
    found = [Cost(**row) for row in results]
    for swept in dict.fromkeys(cost.swept for cost in found):
        own = [cost for cost in found if cost.swept == swept]
        sizes = [cost.size for cost in own]
        in_time = exponent(sizes, [cost.milliseconds for cost in own])
        in_bytes = exponent(sizes, [cost.bytes for cost in own])
        for i, cost in enumerate(own):
            first = i == 0
            table.add_row(
                swept if first else "",
                str(cost.size),
                three_digits(cost.milliseconds),
                f"{in_time:.2f}" if first else "",
                three_digits(cost.bytes / 2**20),
                f"{in_bytes:.2f}" if first else "",
            )
        table.add_section()
    return f"One change at a time from {Setting()}.", table


def main() -> None:
    """Print the table; write the results and the plot."""
    folder, console = output_folder(__doc__), wide_console()
    cost_of("steps", replace(Setting(), steps=1))  # the first solves of a process are slower
    found: list[Cost] = []
    for swept, sizes in SWEEPS.items():
        found += [cost_of(swept, replace(Setting(), **{swept: size})) for size in sizes]
    results = [asdict(cost) for cost in found]
    console.print(f"{machine()}.", *tables(results), sep="\n")
    name = stem("scaling", device())
    draw(found, folder / f"{name}.png")
    write_results(folder, "scaling", results, console, place=device())
    console.print(f"Wrote {name}.json and {name}.png.")


if __name__ == "__main__":
    main()
