"""Memory of the gradients of an implicit layer: JFB, RAG, Neumann, Phantom, Implicit and BPTT.

    python -m benchmarks.gradient_memory

Counts the bytes that autograd keeps for the backward pass (`benchmarks.measure.SavedBytes`) on
DEQDet's refinement layer at full size (100 queries, 256 channels, 32 points, an image of
800×1344), relative to JFB.  What is counted is exact and the same on every machine.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

import implicit
from benchmarks.measure import machine, saved_bytes
from detection.decoder.layer import LayerConfig, RefinementLayer
from detection.decoder.queries import Queries
from detection.models.queries import LearnedQueries

STEPS = 20
GRADIENTS: tuple[implicit.Gradient, ...] = (
    implicit.JFB(),
    *(implicit.RAG(k) for k in (2, 3, 4)),
    *(implicit.Neumann(k) for k in (2, 3, 4)),
    implicit.Phantom(2, damping=0.5),
    implicit.Implicit(stop=implicit.Steps(5)),
    implicit.BPTT(),
)


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    layer = RefinementLayer(LayerConfig())
    start = LearnedQueries(100, 256)(torch.tensor([[800, 1344]]))
    start = Queries(*(leaf.detach() for leaf in start))
    features = [torch.randn(1, 256, 800 // s, 1344 // s) for s in (4, 8, 16, 32)]
    outside = [*layer.parameters(), *layer.buffers(), *features, *start]

    def solve(gradient: implicit.Gradient, steps: int) -> None:
        solution = implicit.fixed_point(
            layer,
            start,
            solver=implicit.Naive(),
            stop=implicit.Steps(steps),
            gradient=gradient,
            args=(features,),
        )
        solution.value.content.square().mean().backward()
        layer.zero_grad()

    table = Table("gradient", "kept for backward, MiB", "relative to JFB")
    reference = saved_bytes(lambda: solve(implicit.JFB(), STEPS), outside)
    for gradient in GRADIENTS:
        kept = saved_bytes(lambda gradient=gradient: solve(gradient, STEPS), outside)
        table.add_row(str(gradient), f"{kept / 2**20:.1f}", f"{kept / reference:.2f}")

    def supervise(at: tuple[int, ...]) -> int:
        def run() -> None:
            supervision = implicit.supervise(
                layer,
                start,
                lambda y, _: y.content.square().mean(),
                at=at,
                gradient=implicit.RAG(2),
                args=(features,),
                parameters=layer.parameters(),
            )
            supervision.loss.backward()
            layer.zero_grad()

        return saved_bytes(run, outside)

    for at in ((5,), (20,), implicit.positions(m=4, C=3, T=20)):
        kept = supervise(at)
        name = f"supervise, RAG(2), at {', '.join(map(str, at))}"
        table.add_row(name, f"{kept / 2**20:.1f}", f"{kept / reference:.2f}")
    console = Console()
    console.print(f"{STEPS} naive steps. {machine()}.", highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
