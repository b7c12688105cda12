"""Time of one refinement of DEQDet at full size: ours, the plain composition, compiled, bfloat16.

    python -m benchmarks.refinement

The features are those of an image of 800×1344, batch 1, inference mode, as many threads as torch
takes.  Refinements follow each other, as at inference, and all contestants take turns, so that a
machine that slows down slows down all; medians.  Ratios are over the plain composition
(`benchmarks.plain_layer`) in the same run.  What is done once for an image and not at each
refinement stands apart.  The floor is the time of the two large products alone, whose weights no
refinement can avoid to read.

On a GPU the same, and 25 refinements as one CUDA graph.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch.nn import functional as F

from benchmarks import plain_layer
from benchmarks.full_size import SIZES, Problem, full_size
from benchmarks.measure import (
    by_turns,
    machine,
    output_folder,
    p95,
    seconds,
    wide_console,
    write_results,
)
from detection.decoder.queries import Queries

CHAIN = 5
"""Refinements that are timed together."""
REPEATS = 11
GOALS = {"ours": 0.70, "ours, compiled": 0.60, "ours, bfloat16": 0.35}
"""Of the plain composition's time, at 100 queries and 32 points; the last needs AMX."""


@dataclass(frozen=True)
class Time:
    """Milliseconds of one refinement: median and 95th percentile, and over the plain median."""

    queries: int
    points: int
    contestant: str
    median: float
    p95: float
    ratio: float


Refine = Callable[[Queries], Queries]


def contestants(problem: Problem) -> dict[str, Refine]:
    """What is compared; the plain composition is first."""
    layer, maps, prepared = problem.layer, problem.features, problem.prepared
    compiled = torch.compile(layer)
    narrow, narrow_maps = copy.deepcopy(layer).bfloat16(), [m.bfloat16() for m in prepared]

    def in_bfloat16(queries: Queries) -> Queries:
        """Weights, content and maps; positions stay in float32."""
        refined: Queries = narrow(queries._replace(content=queries.content.bfloat16()), narrow_maps)
        return refined

    return {
        "plain": functools.partial(plain_layer.refine, layer, features=maps),
        "ours": lambda queries: layer(queries, prepared),
        "ours, maps as they come": lambda queries: layer(queries, maps),
        "ours, compiled": lambda queries: compiled(queries, prepared),
        "ours, bfloat16": in_bfloat16,
    }


@torch.inference_mode()
def times(problem: Problem, repeats: int = REPEATS) -> list[Time]:
    """All contestants at one size; their first turn is not counted."""

    def chain(refine: Refine) -> None:
        queries = problem.queries
        for _ in range(CHAIN):
            # Boxes stay where they are: random weights would drive them out of the image.
            queries = problem.queries._replace(content=refine(queries).content.float())

    runs = {name: functools.partial(chain, f) for name, f in contestants(problem).items()}
    taken = by_turns(list(runs.values()), repeats, uncounted=2)
    size = problem.queries.content.shape[1], problem.layer.sampling.points
    found: list[Time] = []
    for name, times_of_chain in zip(runs, taken, strict=True):
        own = [1e3 * t / CHAIN for t in times_of_chain]
        median = statistics.median(own)
        plain = found[0].median if found else median
        found.append(Time(*size, name, median, p95(own), median / plain))
    return found


@torch.inference_mode()
def once_per_image(problem: Problem, repeats: int = REPEATS) -> float:
    """Milliseconds to bring feature maps, as a neck gives them, into the layer's format."""
    taken = [seconds(lambda: problem.layer.prepare(problem.features)) for _ in range(repeats)]
    return 1e3 * statistics.median(taken)


@torch.inference_mode()
def floor(problem: Problem, repeats: int = REPEATS) -> float:
    """Milliseconds of the two large products of a refinement."""
    mixing, content = problem.layer.mixing, problem.queries.content[0]
    mixed = content.new_zeros(len(content), mixing.project_out.in_features)

    def run() -> None:
        F.linear(content, mixing.generator.weight)
        F.linear(mixed, mixing.project_out.weight)

    return 1e3 * statistics.median(seconds(run) for _ in range(repeats))


def main() -> None:
    """Print the table; write the results."""
    folder, console = output_folder(__doc__), wide_console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = Table("queries/points", "", "median, ms", "95 %, ms", "ratio", "goal")
    found, rest = [], {}
    for size in SIZES:
        problem = full_size(*size, device=device)
        own = times(problem)
        for row in own:
            goal = GOALS.get(row.contestant) if size == SIZES[0] else None
            table.add_row(
                "{}/{}".format(*size),
                row.contestant,
                f"{row.median:.1f}",
                f"{row.p95:.1f}",
                f"{row.ratio:.2f}",
                "" if goal is None else f"≤ {goal}",
            )
        found += own
        apart = {"floor": floor(problem), "once per image": once_per_image(problem)}
        for name, taken in apart.items():
            table.add_row("{}/{}".format(*size), name, f"{taken:.1f}", "", "", "")
        rest["{}/{}".format(*size)] = apart
        table.add_section()
    console.print(f"One refinement, 800×1344, batch 1, inference mode. {machine()}.")
    console.print(table)
    write_results(
        folder, "refinement", {"times": [asdict(row) for row in found], "apart": rest}, console
    )


if __name__ == "__main__":
    main()
