"""Label 1797 handwritten digits from two to ten examples of each class, by an implicit graph layer.

Each image of scikit-learn's digits is a node, joined to its nearest neighbours; a few carry a label
and all others are the test.  The state of the layer solves ``Z = γ S(θ) Z + B``: evidence for the
ten classes enters at the labelled nodes (B) and flows through the whole graph (Gu et al.,
*Implicit graph neural networks*, NeurIPS 2020; the linear form of Liu et al., *EIGNN*, NeurIPS
2021).  What is learnt is how much passes over each edge: ``S(θ)`` is symmetric and normalised,
with weights ``exp(−‖E (xᵢ − xⱼ)‖²)``, so ‖γ S‖₂ ≤ γ < 1 and the fixed point exists and is unique
for every θ.  The gradient is that of the implicit function theorem.

Two explicit peers see the same pixels, labels and graph and have exactly as many parameters: the
same map applied ten times instead of solved, through which one differentiates as usual, and a
graph convolutional network of two layers (Kipf and Welling, ICLR 2017).  The layer with all edges
alike is label spreading (Zhou et al., NeurIPS 2003), which learns nothing and is hard to beat.

    python examples/deq_graph.py
    python examples/deq_graph.py --seeds 0 --updates 20
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn
from torch.nn import functional as F

import implicit

CLASSES, NEIGHBOURS = 10, 8
LABELS_PER_CLASS = (2, 5, 10)
DECAY = 0.95  # γ: how much evidence is left after one hop

# --- The graph -------------------------------------------------------------------------------


@dataclass
class Graph:
    """The digits and their neighbours.

    Attributes:
        pixels: ``(N, P)`` centred grey values, without the pixels that are the same in all images.
        classes: ``(N,)`` int64, 0 to 9.
        edges: ``(2, E)`` int64, every edge in both directions.
    """

    pixels: Tensor
    classes: Tensor
    edges: Tensor


def load_graph(images: int) -> Graph:
    """The first ``images`` digits, each joined to its eight nearest neighbours."""
    pixels, classes = load_digits(return_X_y=True)
    pixels, classes = pixels[:images] / 16, classes[:images]
    pixels = pixels[:, pixels.std(axis=0) > 0]
    nearest = kneighbors_graph(pixels, NEIGHBOURS)
    return Graph(
        pixels=torch.tensor(pixels - pixels.mean(axis=0), dtype=torch.float32),
        classes=torch.from_numpy(classes).long(),
        edges=torch.from_numpy(np.stack(nearest.maximum(nearest.T).nonzero())).long(),
    )


def choose_labelled(graph: Graph, per_class: int, seed: int) -> Tensor:
    """Indices of random nodes whose labels are known, ``per_class`` of each class."""
    rng = np.random.default_rng(seed)
    classes = graph.classes.numpy()
    chosen = [rng.choice(np.flatnonzero(classes == c), per_class, False) for c in range(CLASSES)]
    return torch.from_numpy(np.concatenate(chosen))


def normalised(weights: Tensor, edges: Tensor, nodes: int) -> Tensor:
    """The entries of ``D^(-1/2) W D^(-1/2)``, whose norm is at most 1, from those of W ≥ 0."""
    a, b = edges
    scale = torch.zeros(nodes).index_add(0, a, weights).add(1e-6).rsqrt()
    return weights * scale[a] * scale[b]


def propagate(y: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
    """The product of the sparse matrix with entries ``weights (E,)`` at ``edges`` and ``y``."""
    a, b = edges
    return torch.zeros_like(y).index_add(0, a, weights[:, None] * y.index_select(0, b))


# --- Models ----------------------------------------------------------------------------------


class Diffusion(nn.Module):
    """Class evidence ``Z = γ S(θ) Z + B``; ``choices`` are those of `implicit.fixed_point`.

    One graph is one problem, whose nodes depend on one another, so the state is a batch of one:
    ``(1, N, 10)``.
    """

    optimization: ClassVar[dict[str, Any]] = {"lr": 3e-3}

    def __init__(self, graph: Graph, choices: dict[str, Any], learnt: bool = True) -> None:
        super().__init__()
        self.graph, self.choices = graph, choices
        width = graph.pixels.shape[1]
        self.embed = nn.Linear(width, width + CLASSES, bias=False).requires_grad_(learnt)
        # Small weights: all edges pass nearly the same at first.
        nn.init.normal_(self.embed.weight, std=0.1 if learnt else 0.0)

    def solve(self, nodes: Tensor, **choices: Any) -> implicit.Solution:
        """The state, given the classes at ``nodes``."""
        edges, embedded = self.graph.edges, self.embed(self.graph.pixels)
        distance = (embedded[edges[0]] - embedded[edges[1]]).square().sum(dim=1)
        weights = DECAY * normalised(torch.exp(-distance), edges, len(embedded))
        evidence = torch.zeros(1, len(embedded), CLASSES)
        evidence[0, nodes, self.graph.classes[nodes]] = 1
        return implicit.fixed_point(
            lambda z: propagate(z[0], edges, weights)[None] + evidence,
            evidence,
            **{**self.choices, **choices},
        )

    def forward(self, nodes: Tensor) -> Tensor:
        """Logarithms of the class probabilities ``(N, 10)``, given the classes at ``nodes``."""
        # Exactly solved, no evidence is negative; the constant is for nodes that none reaches.
        state = self.solve(nodes).value[0].clamp_min(0) + 1e-5
        return (state / state.sum(dim=1, keepdim=True)).log()

    def loss(self, labelled: Tensor) -> Tensor:
        """How badly a random half of the labels tells the other half."""
        given, asked = labelled[torch.randperm(len(labelled))].tensor_split(2)
        return F.nll_loss(self(given)[asked], self.graph.classes[asked])


class Convolutional(nn.Module):
    """Kipf and Welling's network of two layers, ``S ReLU(S X U) V`` with loops at every node."""

    # The best of a grid, on other seeds.
    optimization: ClassVar[dict[str, Any]] = {"lr": 3e-2, "weight_decay": 5e-3}
    dropout = 0.2

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        nodes, width = graph.pixels.shape
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, CLASSES, bias=False)
        self.edges = torch.cat([graph.edges, torch.arange(nodes).expand(2, -1)], dim=1)
        self.weights = normalised(torch.ones(self.edges.shape[1]), self.edges, nodes)

    def forward(self, nodes: Tensor) -> Tensor:
        """Logarithms of the class probabilities ``(N, 10)``; labels enter by the loss alone."""
        pixels = F.dropout(self.graph.pixels, self.dropout, self.training)
        hidden = F.relu(propagate(self.first(pixels), self.edges, self.weights))
        hidden = F.dropout(hidden, self.dropout, self.training)
        return propagate(self.second(hidden), self.edges, self.weights).log_softmax(dim=1)

    def loss(self, labelled: Tensor) -> Tensor:
        """Cross-entropy at the labelled nodes."""
        return F.nll_loss(self(labelled)[labelled], self.graph.classes[labelled])


ACCURATE = implicit.Tolerance(rtol=1e-4, atol=0.0, max_steps=200)
EXACT = implicit.Implicit(stop=ACCURATE)
SOLVED = {"solver": implicit.Anderson(memory=5), "stop": ACCURATE, "gradient": EXACT}
UNROLLED = {"solver": implicit.Naive(), "stop": implicit.Steps(10), "gradient": implicit.BPTT()}
Model = Diffusion | Convolutional
MODELS: dict[str, Callable[[Graph], Model]] = {
    "fixed point": lambda graph: Diffusion(graph, SOLVED),
    "same map, 10 steps": lambda graph: Diffusion(graph, UNROLLED),
    "GCN, 2 layers": Convolutional,
    "label spreading": lambda graph: Diffusion(graph, SOLVED, learnt=False),
}

# --- Training, testing, report ---------------------------------------------------------------


def run(name: str, graph: Graph, per_class: int, updates: int, seed: int) -> tuple[Model, float]:
    """Train a model on one choice of labels; how many of all other nodes it gets right, in %."""
    torch.manual_seed(seed)
    labelled = choose_labelled(graph, per_class, seed)
    model = MODELS[name](graph)
    if any(p.requires_grad for p in model.parameters()):
        optimizer = torch.optim.Adam(model.parameters(), **model.optimization)
        for _ in range(updates):
            optimizer.zero_grad()
            model.loss(labelled).backward()
            optimizer.step()
    test = torch.ones(len(graph.classes), dtype=torch.bool)
    test[labelled] = False
    with torch.no_grad():
        right = model.eval()(labelled).argmax(dim=1) == graph.classes
    return model, 100 * right[test].float().mean().item()


Rates = dict[tuple[str, int], list[float]]
"""By model and number of labels per class: digits right, in %, for each seed."""


def draw(rates: Rates, graph: Graph, layer: Diffusion, labelled: Tensor, file: Path) -> None:
    """How evidence spreads over the digits; accuracy over the labels; convergence of solvers."""
    figure = Figure(figsize=(12, 6.8), layout="constrained")
    figure.suptitle(f"Spread of the evidence from {LABELS_PER_CLASS[0]} images (circles) per digit")
    grid = figure.add_gridspec(2, 1, height_ratios=(1.1, 1))
    maps = grid[0].subgridspec(1, 4).subplots(squeeze=False)[0]
    accuracy, residuals = grid[1].subgridspec(1, 2).subplots(squeeze=False)[0]

    steps = {1: "1 step", 3: "3 steps", 10: "10 steps", 200: "fixed point"}
    walk = {"solver": implicit.Naive(), "stop": implicit.Steps(200), "path": tuple(steps)}
    with torch.no_grad():
        path = layer.solve(labelled, **walk).path
    x, y = TSNE(random_state=0).fit_transform(graph.pixels.numpy()).T
    for axis, title, state in zip(maps, steps.values(), path, strict=True):
        strongest, guess = state[0].max(dim=1)
        colour = colormaps["tab10"](guess.numpy())
        colour[strongest.numpy() == 0] = 0.85, 0.85, 0.85, 1  # none has come here yet
        axis.scatter(x, y, s=3, color=colour)
        axis.scatter(x[labelled], y[labelled], s=28, color="none", edgecolor="black")
        axis.set(title=title, xticks=[], yticks=[])

    for name in MODELS:
        values = [rates[name, n] for n in LABELS_PER_CLASS]
        mean, spread = np.mean(values, axis=1), np.std(values, axis=1)
        accuracy.errorbar(LABELS_PER_CLASS, mean, spread, marker="o", capsize=3, label=name)
    accuracy.set(xlabel="labels per class", ylabel="unlabelled digits right [%]")
    accuracy.set_xticks(LABELS_PER_CLASS)
    accuracy.legend()

    stop = implicit.Tolerance(rtol=1e-5, atol=0.0, max_steps=250)
    traces = {}
    for solver in (implicit.Naive(), implicit.Anderson(memory=5), implicit.Broyden(memory=20)):
        with torch.no_grad():
            solution = layer.solve(labelled, solver=solver, stop=stop, trace=True)
        traces[type(solver).__name__] = solution
    implicit.plot_convergence(traces, residuals)
    figure.savefig(file, dpi=90)


def main(
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    updates: int = 60,
    images: int = 1797,
    output: Path = Path("runs/deq_graph.png"),
) -> Rates:
    """Train each model on each number of labels, print how many digits it gets right, and draw.

    Args:
        seeds: each chooses its own labels and weights; the figures are averaged.
        updates: of each model.
        images: use the first so many digits only.
        output: the picture, a .png file.
    """
    if not seeds or updates < 1 or not 200 <= images <= 1797 or output.suffix != ".png":
        raise ValueError(
            f"seeds={seeds}, updates={updates}, images={images}, output={output}: one seed and one "
            "update at least, 200 to 1797 images and a name that ends in .png are needed."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.open("ab").close()  # a file that cannot be written is told now, not after the training
    graph = load_graph(images)
    rates: Rates = {}
    models: dict[tuple[str, int], Model] = {}
    print(f"Right among the unlabelled digits: mean ± standard deviation over {len(seeds)} seed(s)")
    for per_class, name in product(LABELS_PER_CLASS, MODELS):
        began = time.perf_counter()
        runs = [run(name, graph, per_class, updates, seed) for seed in seeds]
        seconds = (time.perf_counter() - began) / len(seeds)
        models[name, per_class] = model = runs[0][0]
        rates[name, per_class] = right = [rate for _, rate in runs]
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(
            f"{per_class:2} labels per class  {name:18}  {np.mean(right):5.1f} ± "
            f"{np.std(right):3.1f} %  {parameters:4} parameters  {seconds:4.1f} s each"
        )
    fewest = LABELS_PER_CLASS[0]
    layer = models["fixed point", fewest]
    assert isinstance(layer, Diffusion)
    draw(rates, graph, layer, choose_labelled(graph, fewest, seeds[0]), output)
    print(f"drawn: {output}")
    return rates


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    try:
        tyro.cli(main)
    except (OSError, ValueError) as problem:
        sys.exit(f"error: {problem}")
