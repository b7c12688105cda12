"""How wrong the gradient of each mode is, over the contraction of the layer.

    python -m benchmarks.gradient_error

The layer is ``y = tanh(Wy + x)`` with a symmetric ``W``, whose eigenvalues lie evenly in ``±‖W‖``,
with ``‖W‖`` from 0.1 to 0.99; the loss is a random linear one; all in float64.  The reference
solves ``(I − Jᵀ) w = v`` densely at the fixed point, sample by sample; the error is that of the
gradient of ``W``, relative to the reference.  The second table scales the loss, of which a
relative error knows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

import implicit
from benchmarks.goals import Goal, goals_table
from benchmarks.measure import machine, output_folder, wide_console, write_results
from benchmarks.problems import linspace, normal

CONTRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
LOSS_SCALES = (1.0, 1e-4, 1e-8)
GOAL = 1e-6
"""Of `implicit.Implicit`, whatever the scale of the loss."""

GRADIENTS: dict[str, implicit.Gradient] = {
    "JFB": implicit.JFB(),
    **{f"RAG({k})": implicit.RAG(k) for k in (2, 5, 20)},
    **{f"Neumann({k})": implicit.Neumann(k) for k in (2, 5, 20)},
    "Phantom(5, 0.5)": implicit.Phantom(5, damping=0.5),
    "BPTT": implicit.BPTT(),
    "Implicit": implicit.Implicit(),
    "Auto(1e-3)": implicit.Auto(1e-3),
}
TIGHT = implicit.Tolerance(rtol=1e-13, atol=0.0, max_steps=500)
PATH = implicit.Steps(30)
"""What BPTT goes back through, in naive steps."""


@dataclass(frozen=True)
class Layer:
    """``tanh(Wy + x)`` and the weights of the loss ``⟨v, y*⟩``; ``x`` and ``v`` are ``(B, D)``."""

    w: Tensor
    x: Tensor
    v: Tensor

    def __call__(self, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.w.T + self.x)


@dataclass(frozen=True)
class Error:
    """``‖g − g*‖ / ‖g*‖`` of the gradient of ``W``."""

    gradient: str
    contraction: float
    loss_scale: float
    error: float


def make_layer(contraction: float, batch: int = 8, dim: int = 32) -> Layer:
    """Random, with an ``x`` so small that tanh stays near linear and ``‖J‖`` near ``‖W‖``."""
    q, _ = torch.linalg.qr(normal(dim, dim, seed=0))
    w = q * linspace(-contraction, contraction, dim) @ q.T
    return Layer(w.requires_grad_(), 0.02 * normal(batch, dim, seed=1), normal(batch, dim, seed=2))


def exact_gradient(layer: Layer) -> Tensor:
    """``∂⟨v, y*⟩/∂W`` from a dense solve with the transposed Jacobian of each sample."""
    with torch.no_grad():
        y = implicit.fixed_point(layer, torch.zeros_like(layer.x), stop=TIGHT).raise_for_status()
        slope = 1 - layer(y.value) ** 2
        identity = torch.eye(len(layer.w), dtype=layer.w.dtype)
        jacobian = slope[:, :, None] * layer.w
        adjoint = torch.linalg.solve(identity - jacobian.mT, layer.v)
        return (slope * adjoint).T @ y.value


def gradient_of(layer: Layer, mode: implicit.Gradient, loss_scale: float = 1.0) -> Tensor:
    """``∂(s⟨v, y*⟩)/∂W`` as the mode has it, from the path that it is meant for."""
    through_path = isinstance(mode, implicit.BPTT)
    y = implicit.fixed_point(
        layer,
        torch.zeros_like(layer.x),
        solver=implicit.Naive() if through_path else implicit.Anderson(),
        stop=PATH if through_path else TIGHT,
        gradient=mode,
    ).value
    (gradient,) = torch.autograd.grad(loss_scale * (layer.v * y).sum(), layer.w)
    return gradient


def error_of(name: str, contraction: float, loss_scale: float = 1.0) -> Error:
    """Compare the mode of that name with the exact gradient."""
    layer = make_layer(contraction)
    exact = exact_gradient(layer)
    wrong = gradient_of(layer, GRADIENTS[name], loss_scale) / loss_scale - exact
    return Error(name, contraction, loss_scale, (wrong.norm() / exact.norm()).item())


def draw(errors: Sequence[Error], path: Path) -> None:
    """Error over ``‖W‖``, one line per mode."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(e.gradient for e in errors):
        own = [e for e in errors if e.gradient == name]
        style = "--" if name.startswith("Neumann") else "-"
        axes.plot(
            [1 - e.contraction for e in own], [e.error for e in own], style, marker=".", label=name
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="1 − ‖W‖",
        ylabel="relative error of the gradient",
        title="y = tanh(Wy + x): each gradient against the exact one",
    )
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def goals(results: dict[str, Any]) -> list[Goal]:
    """`Implicit`, whatever the contraction and the scale of the loss."""
    return [
        Goal(
            "relative error of Implicit, largest",
            max(row["error"] for row in results["scaled"]),
            most=GOAL,
        )
    ]


def main() -> None:
    """Print the two tables; write the results and the plot."""
    folder = output_folder(__doc__)
    console = wide_console()
    console.print(f"Relative error of the gradient of W in y = tanh(Wy + x). {machine()}.")
    errors = [error_of(name, c) for name in GRADIENTS for c in CONTRACTIONS]
    table = Table("gradient", *(f"‖W‖ = {c}" for c in CONTRACTIONS))
    for name in GRADIENTS:
        table.add_row(name, *(f"{e.error:.1e}" for e in errors if e.gradient == name))
    console.print(table)

    scaled = [error_of("Implicit", c, scale) for c in CONTRACTIONS for scale in LOSS_SCALES]
    table = Table(f"Implicit (goal ≤ {GOAL:g}), loss", *(f"‖W‖ = {c}" for c in CONTRACTIONS))
    for scale in LOSS_SCALES:
        row = [e for e in scaled if e.loss_scale == scale]
        table.add_row(f"times {scale:g}", *(f"{e.error:.1e}" for e in row))
    console.print(table)

    draw(errors, folder / "gradient_error.png")
    found = {"modes": [asdict(e) for e in errors], "scaled": [asdict(e) for e in scaled]}
    path = write_results(folder, "gradient_error", found, console)
    console.print(goals_table(goals(found)))
    console.print(f"Wrote {path.name} and gradient_error.png.")


if __name__ == "__main__":
    main()
