"""Memory of training through an implicit layer: JFB against RAG, Neumann, Phantom, Implicit, BPTT.

    python -m benchmarks.gradient_memory

Two figures for each, in one run: what autograd keeps for the backward pass (`SavedBytes`), and the
peak of all that forward and backward pass allocate (`peak_bytes`), the gradients of the weights
included.  Both are bytes and not times, and, on a CPU, the same on every machine.  The layers are a
generic one, ``tanh(Wy + x)``, and DEQDet's refinement layer at full size, on the features of an
image of 800×1344.  These want no gradient here; those of a neck do, and its gradients come on top.
On a GPU, if there is one, the second figure is the GPU's.

Every mode is measured at every k after 5 steps, and JFB, BPTT and `supervise` over the length of
the path; all of it at 100 queries and 32 points alone, and of the three other sizes one call.  The
reason is time: on two cores this command takes two minutes of the quarter of an hour that all
benchmarks have together, and each larger size would add about as much or more.

What is kept is hidden from the first figure where it is computed again in the backward pass.  The
refinement layer itself does that with the insides of its sampling and mixing
(`detection.decoder.recomputation`); without, it would keep about what the plain layer does.  For
``RAG(k, recompute=True)`` compare the second figure, and that with the weights frozen: what remains
is activations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

import implicit
from benchmarks import plain_layer
from benchmarks.full_size import SIZES, full_size
from benchmarks.measure import (
    Goal,
    device,
    goals_table,
    machine,
    output_folder,
    peak_bytes,
    saved_bytes,
    stem,
    wide_console,
    write_results,
)

K = range(1, 9)
T = (5, 10, 20, 50)
PUBLISHED = {(100, 32): 63, (100, 64): 92, (300, 32): 191, (300, 64): 279}
"""MiB that one call of the published layer keeps; told to us, and not measured here."""
GOAL_PER_CALL = 25
"""MiB kept by one call of ours at 100 queries and 32 points."""
GOAL_LENGTH, GOAL_POSITIONS = 1.01, 1.05
"""Peak of `supervise`: 50 steps over 5, and 8 positions over 1."""
GOAL_NEUMANN, GOAL_RECOMPUTED = 1.03, 1.05
"""Over JFB: Neumann(k), kept and peak, and the peak of RAG(2) with recomputation."""


@dataclass(frozen=True)
class Subject:
    """A layer with what it is called on: ``layer(start, *args)``; ``read`` makes a loss of it."""

    name: str
    layer: nn.Module
    start: Any
    args: tuple[Any, ...]
    read: Callable[[Any], Tensor]
    outside: list[Tensor]


@dataclass(frozen=True)
class Memory:
    """What one way to train takes, in bytes."""

    layer: str
    gradient: str
    k: int
    steps: int
    kept: int
    peak: int


class Generic(nn.Module):
    """``tanh(Wy + x)`` with ``‖W‖`` about 0.9."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.orthogonal_(self.linear.weight, gain=0.9)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(y) + x)


def generic(batch: int = 2048, dim: int = 256) -> Subject:
    """The generic layer."""
    torch.manual_seed(0)
    layer, x = Generic(dim).to(device()), torch.randn(batch, dim, device=device())
    start = torch.zeros_like(x)
    outside = [*layer.parameters(), x, start]
    return Subject("tanh", layer, start, (x,), lambda y: y.square().mean(), outside)


def refinement(queries: int, points: int) -> Subject:
    """The refinement layer of DEQDet."""
    problem = full_size(queries, points, device=device())
    return Subject(
        f"refinement {queries}/{points}",
        problem.layer,
        problem.queries,
        (problem.trained_on,),
        lambda y: y.content.square().mean() + y.boxes.mean(),
        problem.outside,
    )


def train(subject: Subject, gradient: implicit.Gradient, steps: int) -> None:
    """Forward and backward pass of one solve."""
    solution = implicit.fixed_point(
        subject.layer,
        subject.start,
        solver=implicit.Naive(),
        stop=implicit.Steps(steps),
        gradient=gradient,
        args=subject.args,
    )
    subject.read(solution.value).backward()
    subject.layer.zero_grad()


def supervise(subject: Subject, at: Sequence[int]) -> None:
    """Forward and backward pass with supervised positions, RAG(2) at each."""
    supervision = implicit.supervise(
        subject.layer,
        subject.start,
        lambda y, _: subject.read(y),
        at=at,
        gradient=implicit.RAG(2),
        args=subject.args,
        parameters=subject.layer.parameters(),
    )
    supervision.loss.backward()
    subject.layer.zero_grad()


def memory_of(subject: Subject, name: str, k: int, steps: int, run: Callable[[], None]) -> Memory:
    """Both figures of ``run``."""
    kept = saved_bytes(run, subject.outside)
    return Memory(subject.name, name, k, steps, kept, peak_bytes(run))


def frozen_peak(subject: Subject, gradient: implicit.Gradient, steps: int) -> int:
    """Peak with all weights frozen but the first, whose gradient takes the whole way back."""
    weights = list(subject.layer.parameters())
    first = weights[0]
    for weight in weights:
        weight.requires_grad_(weight is first)
    try:
        return peak_bytes(functools.partial(train, subject, gradient, steps))
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def gradients(k: int) -> dict[str, implicit.Gradient]:
    """What is compared at ``k``."""
    return {
        "RAG(k)": implicit.RAG(k),
        "RAG(k, recompute)": implicit.RAG(k, recompute=True),
        "Neumann(k)": implicit.Neumann(k),
        "Phantom(k, 0.5)": implicit.Phantom(k, damping=0.5),
    }


def by_gradient(subject: Subject, ks: Sequence[int], steps: int) -> list[Memory]:
    """JFB, every gradient at every ``k``, Implicit; after ``steps`` naive steps."""
    named = [("JFB", 1, implicit.JFB())]
    named += [(name, k, gradient) for k in ks for name, gradient in gradients(k).items()]
    named += [("Implicit", 1, implicit.Implicit(stop=implicit.Steps(10)))]
    return [
        memory_of(subject, name, k, steps, functools.partial(train, subject, gradient, steps))
        for name, k, gradient in named
    ]


def by_steps(subject: Subject, steps: Sequence[int]) -> list[Memory]:
    """JFB, BPTT and supervision at one position, over the length of the path."""
    found = []
    for t in steps:
        for name, gradient in (("JFB", implicit.JFB()), ("BPTT", implicit.BPTT())):
            run = functools.partial(train, subject, gradient, t)
            found.append(memory_of(subject, name, 1, t, run))
        run = functools.partial(supervise, subject, (t,))
        found.append(memory_of(subject, "supervise at 1", 2, t, run))
    return found


def by_positions(subject: Subject, numbers: Sequence[int], steps: int) -> list[Memory]:
    """Supervision at more and more positions of one path."""
    return [
        memory_of(
            subject,
            f"supervise at {m}",
            2,
            steps,
            functools.partial(supervise, subject, range(steps - m + 1, steps + 1)),
        )
        for m in numbers
    ]


def one_call(queries: int, points: int) -> dict[str, int]:
    """What one call of the refinement layer keeps: ours, and the plain composition."""
    problem = full_size(queries, points, device=device())
    queries_there = problem.queries._replace(content=problem.queries.content.requires_grad_())

    def kept(call: Callable[[], Any]) -> int:
        return saved_bytes(lambda: call().content.sum().backward(), problem.outside)

    layer = problem.layer
    return {
        "queries": queries,
        "points": points,
        "ours": kept(lambda: layer(queries_there, problem.trained_on)),
        "ours, channels last": kept(lambda: layer(queries_there, problem.prepared)),
        "plain": kept(lambda: plain_layer.refine(layer, queries_there, problem.features)),
    }


def draw(found: Sequence[Memory], path: Path) -> None:
    """What is kept over k, and over T."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    over_k, over_t = figure.subplots(1, 2)
    layer = "refinement 100/32"
    own = [m for m in found if m.layer == layer]
    for name in gradients(1):
        rows = [m for m in own if m.gradient == name]
        over_k.plot([m.k for m in rows], [m.kept / 2**20 for m in rows], marker=".", label=name)
    over_k.set(xlabel="k", ylabel="kept for the backward pass, MiB", title="Applications")
    for name in ("JFB", "BPTT", "supervise at 1"):
        rows = [m for m in own if m.gradient == name and m.steps in T]
        label = name.replace("supervise at 1", "supervise, RAG(2)")
        over_t.plot(
            [m.steps for m in rows], [m.kept / 2**20 for m in rows], marker=".", label=label
        )
    over_t.set(xlabel="T", title="Length of the path", yscale="log")
    for axes in (over_k, over_t):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("DEQDet's refinement layer, 100 queries, 32 points, 800×1344")
    figure.savefig(path, dpi=150)


def table_of(rows: Sequence[Memory], reference: Memory) -> Table:
    """A line for each, relative to ``reference``."""
    table = Table("layer", "gradient", "k", "T", "kept, MiB", "", "peak, MiB", "")
    for row in rows:
        table.add_row(
            row.layer,
            row.gradient,
            str(row.k),
            str(row.steps),
            f"{row.kept / 2**20:.1f}",
            f"{row.kept / reference.kept:.2f}×",
            f"{row.peak / 2**20:.1f}",
            f"{row.peak / reference.peak:.2f}×",
        )
    return table


def goals(results: dict[str, Any]) -> list[Goal]:
    """What was promised of the memory of training."""
    found = [Memory(**row) for row in results["rows"]]
    made: list[Goal] = []
    for layer in dict.fromkeys(m.layer for m in found):
        own = {(m.gradient, m.k, m.steps): m for m in found if m.layer == layer}
        jfb = own["JFB", 1, 5]
        length = own["supervise at 1", 2, 50].peak / own["supervise at 1", 2, 5].peak
        number = own["supervise at 8", 2, 20].peak / own["supervise at 1", 2, 20].peak
        series = [own["Neumann(k)", k, 5] for k in K]
        made += [
            Goal(f"{layer}: peak of supervise, T = 50 over 5", length, most=GOAL_LENGTH),
            Goal(f"{layer}: peak of supervise, 8 positions over 1", number, most=GOAL_POSITIONS),
            Goal(
                f"{layer}: kept by Neumann(k) over JFB, largest",
                max(m.kept for m in series) / jfb.kept,
                most=GOAL_NEUMANN,
            ),
            Goal(
                f"{layer}: peak of Neumann(k) over JFB, largest",
                max(m.peak for m in series) / jfb.peak,
                most=GOAL_NEUMANN,
            ),
        ]
    jfb, recomputed = (own[name, k, 5].peak for name, k in (("JFB", 1), ("RAG(k, recompute)", 2)))
    frozen = results["frozen"]
    activations = frozen[str(implicit.RAG(2, recompute=True))] / frozen[str(implicit.JFB())]
    per_call = results["one_call"][0]["ours"] / 2**20
    return [
        *made,
        Goal(
            f"{layer}: peak of RAG(2, recompute) over JFB, frozen",
            activations,
            most=GOAL_RECOMPUTED,
        ),
        Goal(
            f"{layer}: peak of RAG(2, recompute) over JFB, trained",
            recomputed / jfb,
            most=GOAL_RECOMPUTED,
            floor=activations,
            reason=(
                "Both applications have the same weights, and the gradients that the second gives "
                "them are held while those of the first are made and added. Recomputation saves "
                "activations, of which the goal speaks: with the weights frozen they are all that "
                "remains."
            ),
        ),
        Goal(
            "kept by one call at 100/32, insides computed again, MiB", per_call, most=GOAL_PER_CALL
        ),
    ]


def main() -> None:
    """Print the tables; write the results and the plot."""
    folder, console = output_folder(__doc__), wide_console()
    console.print(f"{machine()}.")
    found: list[Memory] = []
    for subject in (generic(), refinement(100, 32)):
        rows = [
            *by_gradient(subject, K, steps=5),
            *by_steps(subject, T),
            *by_positions(subject, (2, 4, 8), steps=20),
        ]
        console.print(table_of(rows, rows[0]))
        found += rows

    table = Table("one call, queries/points", "ours", "channels last", "plain", "published")
    calls = [one_call(*size) for size in SIZES]
    for call in calls:
        size = call["queries"], call["points"]
        names = ("ours", "ours, channels last", "plain")
        table.add_row(
            "{}/{}".format(*size),
            *(f"{call[name] / 2**20:.1f} MiB" for name in names),
            f"{PUBLISHED[size]} MiB",
        )
    console.print(table)

    subject = refinement(100, 32)
    frozen = {
        str(gradient): frozen_peak(subject, gradient, 5)
        for gradient in (implicit.JFB(), *gradients(2).values(), *gradients(8).values())
    }
    table = Table("weights frozen", "peak, MiB", "over JFB")
    for name, peak in frozen.items():
        table.add_row(name, f"{peak / 2**20:.1f}", f"{peak / frozen['JFB()']:.3f}×")
    console.print(table)

    name = stem("gradient_memory", device())
    draw(found, folder / f"{name}.png")
    results = {"rows": [asdict(m) for m in found], "one_call": calls, "frozen": frozen}
    write_results(folder, "gradient_memory", results, console, place=device())
    console.print(goals_table(goals(results)))
    console.print(f"Wrote {name}.json and {name}.png.")


if __name__ == "__main__":
    main()
