"""Time of one refinement of DEQDet at full size: ours, the plain composition, compiled, bfloat16.

    python -m benchmarks.refinement

The features are those of an image of 800×1344, batch 1, inference mode, as many threads as torch
takes.  Refinements follow each other, as at inference, and all contestants take turns, so that a
machine that slows down slows down all; medians.  Ratios are over the plain composition
(`benchmarks.plain_layer`) in the same run, on the maps that a detector hands on at inference, with
their channels last, which is the faster of both layouts for it too; the other stands beside it.
The time of the two large products alone stands apart.  The floor is that of `benchmarks.ceilings`:
the flops of all products, or the bytes of all weights, over the most that this machine was seen to
do; in bfloat16 on a GPU.  The published layer is not timed here, for its code is not ours to keep.

On a GPU the same, with one refinement as a CUDA graph beside it, and the time of one of 25 that are
one graph, as they are in `detection.engine.Engine`.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch.nn import functional as F

import implicit
from benchmarks import plain_layer
from benchmarks.ceilings import Ceilings, Work, calls_within, repeated
from benchmarks.full_size import SIZES, Problem, full_size
from benchmarks.goals import NO_GPU, Goal, goals_table
from benchmarks.measure import (
    by_turns,
    device,
    machine,
    output_folder,
    p95,
    processor,
    three_digits,
    wide_console,
    write_results,
)
from detection.cuda_graphs import Recorded
from detection.decoder.queries import Queries
from detection.narrowing import narrowed

CHAIN = 5
"""Refinements that are timed together."""
TIMED = 0.05
"""Seconds that the two large products are timed at once."""
REPEATS = 7
GOALS = {"ours": 0.70, "ours, compiled": 0.60, "ours, bfloat16": 0.35}
"""Of the plain composition's time, at 100 queries and 32 points; the last was set for AMX."""
GOAL_ON_A_GPU = 0.1
"""Milliseconds of one refinement of 25 in a graph."""
STEPS = 25
KERNELS = (
    "A refinement is about 88 operators that are no views under CUDA's autocast, casts of its "
    "inputs (15) and layer norms in float32 (6) among them, and they follow each other: at a "
    "microsecond or more for each, 100 µs is doubtful."
)


@dataclass(frozen=True)
class RefinementTime:
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
    # Else each size after the first would be compiled for sizes that may change.
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    layer, maps, prepared = problem.layer, problem.features, problem.prepared
    compiled = torch.compile(layer)
    narrow, narrow_maps = copy.deepcopy(layer).bfloat16(), [m.bfloat16() for m in prepared]

    def in_bfloat16(queries: Queries) -> Queries:
        """Weights, content and maps; positions stay in float32."""
        refined: Queries = narrow(queries._replace(content=queries.content.bfloat16()), narrow_maps)
        return refined

    found: dict[str, Refine] = {
        "plain": functools.partial(plain_layer.refine, layer, features=prepared),
        "ours": lambda queries: layer(queries, prepared),
        "plain, channels second": functools.partial(plain_layer.refine, layer, features=maps),
        "ours, channels second": lambda queries: layer(queries, maps),
        "ours, compiled": lambda queries: compiled(queries, prepared),
        "ours, bfloat16": in_bfloat16,
    }
    if problem.queries.content.is_cuda:
        place = problem.queries.content.device
        found["ours, bfloat16, a graph"] = Recorded(in_bfloat16, (problem.queries,), place)
    return found


@torch.no_grad()
def in_one_graph(problem: Problem, repeats: int = REPEATS) -> float:
    """Milliseconds of one refinement of `STEPS` that are one CUDA graph, as an engine has them."""
    device, dtype = problem.queries.content.device, torch.bfloat16
    layer = narrowed(problem.layer, dtype)
    with torch.autocast(device.type, dtype):
        maps = layer.prepare(problem.features)  # in float32, as the neck's norm gives them there

    def path(queries: Queries) -> object:
        with torch.autocast(device.type, dtype):
            return implicit.fixed_point(
                layer,
                queries,
                solver=implicit.Naive(),
                stop=implicit.Steps(STEPS),
                gradient=implicit.JFB(),
                args=(maps,),
            ).value

    recorded = Recorded(path, (problem.queries,), device)
    (taken,) = by_turns([lambda: recorded(problem.queries)], repeats)
    return 1e3 * statistics.median(taken) / STEPS


@torch.inference_mode()
def times(problem: Problem, repeats: int = REPEATS) -> list[RefinementTime]:
    """All contestants at one size; their first turn is not counted."""

    def chain(refine: Refine) -> None:
        queries = problem.queries
        for _ in range(CHAIN):
            # Boxes stay where they are: random weights would drive them out of the image.
            queries = problem.queries._replace(content=refine(queries).content.float())

    runs = {name: functools.partial(chain, f) for name, f in contestants(problem).items()}
    taken = by_turns(list(runs.values()), repeats, uncounted=2)
    size = problem.queries.content.shape[1], problem.layer.sampling.points
    found: list[RefinementTime] = []
    for name, times_of_chain in zip(runs, taken, strict=True):
        own = [1e3 * t / CHAIN for t in times_of_chain]
        median = statistics.median(own)
        plain = found[0].median if found else median
        found.append(RefinementTime(*size, name, median, p95(own), median / plain))
    return found


@torch.inference_mode()
def large_products(problem: Problem, dtype: torch.dtype, repeats: int = REPEATS) -> float:
    """Milliseconds of the two large products of a refinement."""
    mixing, content = problem.layer.mixing, problem.queries.content[0].to(dtype)
    into, out_of = mixing.generator.weight.to(dtype), mixing.project_out.weight.to(dtype)
    mixed = content.new_zeros(len(content), mixing.project_out.in_features)

    def run() -> None:
        F.linear(content, into)
        F.linear(mixed, out_of)

    calls = calls_within(run, TIMED)
    return 1e3 * by_turns([repeated(run, calls)], repeats)[0][repeats // 2] / calls


def apart_of(problem: Problem, ceilings: Ceilings, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of what stands beside the contestants."""
    work = Work.of(problem, dtype)
    found = {
        "floor": 1e3 * ceilings.floor(work.flops, work.bytes),
        "two large products": large_products(problem, dtype),
    }
    if problem.queries.content.is_cuda:
        found["in a graph of 25"] = in_one_graph(problem)
    return found


def goals(results: dict[str, Any]) -> list[Goal]:
    """Over the plain composition, and on a GPU in milliseconds; at 100 queries and 32 points."""
    size = SIZES[0]
    own = [RefinementTime(**row) for row in results["times"]]
    first = {row.contestant: row for row in own if (row.queries, row.points) == size}
    apart = results["apart"]["{}/{}".format(*size)]
    in_bfloat16 = (
        "The goal was set for AMX. Instructions for bfloat16 in AVX-512 are enough for it on a "
        "processor that has them, and one that has neither multiplies faster in float32. Here: "
        f"{results['processor']}."
    )
    graph = apart.get("in a graph of 25")
    elsewhere = "" if graph is None else "The goal was set for a processor, not for a GPU."
    # The floor of a GPU is of bfloat16, and contestants but one of float32.
    floor = None if graph is not None else apart["floor"] / first["plain"].median
    made = [
        Goal(
            f"time over the plain composition: {name}",
            first[name].ratio,
            most=most,
            floor=None if "bfloat16" in name else floor,
            reason=elsewhere or (in_bfloat16 if "bfloat16" in name else ""),
        )
        for name, most in GOALS.items()
    ]
    on_a_gpu = Goal(
        "ms of one refinement on a GPU, of 25 in a graph",
        graph,
        most=GOAL_ON_A_GPU,
        floor=None if graph is None else apart["floor"],
        reason=f"{NO_GPU} {KERNELS}" if graph is None else KERNELS,
    )
    return [*made, on_a_gpu]


def tables(results: dict[str, Any]) -> tuple[str | Table, ...]:
    """What is shown of the results that were written."""
    table = Table("queries/points", "", "median, ms", "95 %, ms", "ratio", "goal")
    rows = [RefinementTime(**row) for row in results["times"]]
    for size in dict.fromkeys((row.queries, row.points) for row in rows):
        name = "{}/{}".format(*size)
        for row in rows:
            if (row.queries, row.points) == size:
                goal = GOALS.get(row.contestant) if size == SIZES[0] else None
                table.add_row(
                    name,
                    row.contestant,
                    three_digits(row.median),
                    three_digits(row.p95),
                    three_digits(row.ratio),
                    "" if goal is None else f"≤ {goal}",
                )
        for what, taken in results["apart"][name].items():
            table.add_row(name, what, three_digits(taken), "", "", "")
        table.add_section()
    ceilings = Ceilings(**results["ceilings"])
    return (
        "One refinement, 800×1344, batch 1, inference mode.",
        table,
        f"Ceilings: {ceilings.flops / 1e9:.0f} GFLOP/s, {ceilings.bytes / 1e9:.0f} GB/s, "
        f"{results['dtype']}.",
    )


def main() -> None:
    """Print the table; write the results."""
    folder, console = output_folder(__doc__), wide_console()
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    ceilings = Ceilings.measured(device(), dtype)
    found, rest = [], {}
    for size in SIZES:
        problem = full_size(*size, device=device())
        found += times(problem)
        rest["{}/{}".format(*size)] = apart_of(problem, ceilings, dtype)
    results = {
        "times": [asdict(row) for row in found],
        "apart": rest,
        "ceilings": asdict(ceilings),
        "dtype": str(dtype),
        "processor": processor(),
    }
    console.print(f"{machine()}.", *tables(results), sep="\n")
    write_results(folder, "refinement", results, console, place=device())
    console.print(goals_table(goals(results)))


if __name__ == "__main__":
    main()
