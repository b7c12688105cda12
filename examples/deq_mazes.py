"""Learn to solve mazes with a tiny recursive network: JFB, RAG(k) and backpropagation compared.

A maze is a picture with a start and a goal; the answer marks the only path between them.  The
network is one 3×3 convolution whose fixed point is the answer, and it is trained with losses at
positions Ω of the solver path (`implicit.supervise`; Wang, Teng and Wang, *Deep Equilibrium Object
Detection*, ICCV 2023, Eq. 12).  The gradient at each position goes through one tracked
application of the convolution (JFB), through two or through four (RAG).  The explicit baseline is
the same network as a recurrent one: the same parameters, initial weights, batches and losses, with
backpropagation through all twenty applications, which are then in memory at once.

A convolution hears its neighbours only.  With JFB, what a cell says to its neighbours gets no
gradient: that takes one application more.  All networks are then asked to solve larger mazes, with
more steps, than they were trained on (Bansal et al., *End-to-end algorithm synthesis with recurrent
networks*, NeurIPS 2022; Anil et al., *Path independent equilibrium models*, NeurIPS 2022).  What to
expect after as many updates: JFB fails, and RAG(4) solves more mazes of the size trained on than
backpropagation through all steps does; on the largest, the seeds differ more than these two.

    python examples/deq_mazes.py
    python examples/deq_mazes.py --seeds 0 --updates 300
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from sklearn.feature_extraction.image import grid_to_graph
from torch import Tensor, nn
from torch.nn import functional as F

import implicit

TRAIN_SIZE, TEST_SIZES = 9, (9, 13, 17)
CHANNELS, BATCH, RATE = 32, 16, 5e-3
OMEGA = (5, 10, 15, 20)  # not 1, as in the paper: no maze is solved after one step
TEST_STEPS = (1, 2, 5, 10, 15, 20, 30, 40, 60, 80)

METHODS: dict[str, implicit.Gradient | None] = {
    "JFB": implicit.JFB(),
    "RAG(2)": implicit.RAG(2),
    "RAG(4)": implicit.RAG(4),
    "recurrent": None,  # backpropagation through all steps
}

# --- Mazes -----------------------------------------------------------------------------------


@dataclass
class Mazes:
    """Mazes of one size.

    Attributes:
        picture: ``(M, 3, S, S)`` float32 in {0, 1}: where one can walk, the start, the goal.
        path: ``(M, S, S)`` float32 in {0, 1}: the cells between start and goal, both included.
    """

    picture: Tensor
    path: Tensor


def make_maze(size: int, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """A maze ``(3, size, size)`` and its path ``(size, size)``; ``size`` is odd.

    Every second cell is a room.  The corridors are a minimum spanning tree of the grid of rooms
    under random weights, so exactly one path joins any two rooms.
    """
    side = (size + 1) // 2
    grid = grid_to_graph(side, side).astype(float)
    grid.data = rng.uniform(1, 2, grid.nnz)
    tree = minimum_spanning_tree(grid)
    cell = 2 * np.stack(np.divmod(np.arange(side**2), side))  # (2, rooms): row, column

    picture, path = np.zeros((3, size, size), np.float32), np.zeros((size, size), np.float32)
    rooms, others = tree.nonzero()
    picture[0][tuple(cell)] = 1
    picture[0][tuple((cell[:, rooms] + cell[:, others]) // 2)] = 1
    start, goal = rng.choice(side**2, 2, replace=False)
    picture[1][tuple(cell[:, start])] = picture[2][tuple(cell[:, goal])] = 1

    _, before = breadth_first_order(tree, start, directed=False)
    path[tuple(cell[:, start])] = 1
    room = goal
    while room != start:
        path[tuple(cell[:, room])] = path[tuple((cell[:, room] + cell[:, before[room]]) // 2)] = 1
        room = before[room]
    return picture, path


def make_mazes(
    size: int, count: int, rng: np.random.Generator, avoid: Collection[bytes] = ()
) -> Mazes:
    """``count`` mazes, no two with the same walls and none with walls in ``avoid``."""
    found: dict[bytes, tuple[NDArray, NDArray]] = {}
    while len(found) < count:
        maze = make_maze(size, rng)
        if (walls := maze[0][0].tobytes()) not in avoid:
            found[walls] = maze
    pictures, paths = zip(*found.values(), strict=True)
    return Mazes(torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(paths)))


def make_data(seed: int, train: int, test: int) -> tuple[Mazes, dict[int, Mazes]]:
    """Training mazes, and test mazes by size, whose walls occur in no training maze."""
    rng = np.random.default_rng(seed)
    tests = {size: make_mazes(size, test, rng) for size in TEST_SIZES}
    avoid = {picture[0].tobytes() for picture in tests[TRAIN_SIZE].picture.numpy()}
    return make_mazes(TRAIN_SIZE, train, rng, avoid), tests


# --- The network -----------------------------------------------------------------------------


class Network(nn.Module):
    """``y* = scale(relu(W * y* + V * picture))``, read out cell by cell."""

    def __init__(self) -> None:
        super().__init__()
        self.inject = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.mix = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.readout = nn.Conv2d(CHANNELS, 1, 1)

    def refine(self, y: Tensor, injected: Tensor) -> Tensor:
        """One application; each cell's channels are divided by their root mean square."""
        y = F.relu(self.mix(y) + injected)
        return y * (y.square().mean(dim=1, keepdim=True) + 1e-3).rsqrt()

    def loss(self, mazes: Mazes, gradient: implicit.Gradient | None) -> Tensor:
        """Mean of the losses at Ω, to be differentiated as ``gradient`` says (None: exactly)."""
        injected = self.inject(mazes.picture)
        start = torch.zeros_like(injected)
        walk = mazes.picture[:, 0]

        def loss_at(y: Tensor, position: int) -> Tensor:
            # A wall is never on the path: only the cells that one can walk on count.
            logits = self.readout(y)[:, 0]
            return F.binary_cross_entropy_with_logits(logits, mazes.path, walk, reduction="sum")

        if gradient is None:
            y, total = start, torch.zeros(())
            for n in range(1, OMEGA[-1] + 1):
                y = self.refine(y, injected)
                if n in OMEGA:
                    total = total + loss_at(y, n)
        else:
            total = implicit.supervise(
                self.refine,
                start,
                loss_at,
                at=OMEGA,
                gradient=gradient,
                args=(injected,),
                parameters=self.parameters(),
            ).loss
        return total / (len(OMEGA) * walk.sum())

    @torch.no_grad()
    def solve(self, picture: Tensor, steps: Sequence[int]) -> list[Tensor]:
        """Logits ``(M, S, S)`` at each of ``steps``."""
        injected = self.inject(picture)
        solution = implicit.fixed_point(
            self.refine,
            torch.zeros_like(injected),
            solver=implicit.Naive(),
            stop=implicit.Steps(steps[-1]),
            args=(injected,),
            path=steps,
        )
        return [self.readout(y)[:, 0] for y in solution.path]


# --- Training and testing --------------------------------------------------------------------


def train(network: Network, method: str, mazes: Mazes, updates: int, seed: int) -> None:
    """Train in place; the seed fixes the batches."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=updates)
    for _ in range(updates):
        rows = torch.randint(len(mazes.path), (BATCH,), generator=generator)
        loss = network.loss(Mazes(mazes.picture[rows], mazes.path[rows]), METHODS[method])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def solved(logits: Tensor, mazes: Mazes) -> Tensor:
    """``(M,)`` bool: which mazes have every cell right."""
    wrong = ((logits > 0) != (mazes.path > 0)) & (mazes.picture[:, 0] > 0)
    return ~wrong.flatten(1).any(dim=1)


# --- Report ----------------------------------------------------------------------------------

Curves = dict[tuple[str, int], list[list[float]]]
"""By method and size, for each seed: mazes solved, in %, after each of ``TEST_STEPS``."""


def draw(curves: Curves, network: Network, mazes: Mazes, file: Path) -> None:
    """A maze being solved by ``network``, and the accuracy of all over the solver steps."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 1.8))
    film = grid[0].subgridspec(1, 7).subplots(squeeze=False)[0]
    below = grid[1].subgridspec(1, len(TEST_SIZES)).subplots(squeeze=False, sharey=True)[0]

    steps = (2, 5, 10, 20, 40, TEST_STEPS[-1])
    states = network.solve(mazes.picture, steps)
    row = int((mazes.path.sum(dim=(1, 2)) * solved(states[-1], mazes)).argmax())
    picture = mazes.picture[row].numpy()
    titles = (*(f"{n} steps" for n in steps), "truth")
    shown = (*(state[row].sigmoid() for state in states), mazes.path[row])
    for axis, title, marked in zip(film, titles, shown, strict=True):
        colour = 1 - marked[..., None].numpy() * (0.16, 0.85, 0.84)  # from white to red
        axis.imshow(np.pad(colour * picture[0, ..., None], ((1, 1), (1, 1), (0, 0))))
        for channel, marker in ((1, "o"), (2, "*")):
            y, x = np.argwhere(picture[channel])[0] + 1
            axis.plot(x, y, marker, color="C0", markersize=7)
        axis.set_title(title, fontsize=10)
        axis.axis("off")

    for size, axis in zip(TEST_SIZES, below, strict=True):
        for method in METHODS:
            mean, spread = np.mean(curves[method, size], 0), np.std(curves[method, size], 0)
            axis.plot(TEST_STEPS, mean, label=method)
            axis.fill_between(TEST_STEPS, mean - spread, mean + spread, alpha=0.2)
        axis.axvline(OMEGA[-1], color="0.7", linewidth=0.8)
        seen = "as in training" if size == TRAIN_SIZE else "never seen in training"
        axis.set(title=f"{size}×{size}, {seen}", xscale="log", ylim=(0, 100))
        axis.set_xlabel("steps (line: as many as in training)")
    below[0].set_ylabel("mazes solved [%]")
    below[0].legend()
    figure.savefig(file, dpi=90)


def main(
    seeds: tuple[int, ...] = (0, 1),
    updates: int = 700,
    train_mazes: int = 6000,
    test_mazes: int = 200,
    output: Path = Path("runs/deq_mazes.png"),
) -> Curves:
    """Train one network with each gradient, print which mazes they solve, and draw.

    Args:
        seeds: each makes its own mazes, initial weights and batches; the figures are averaged.
        updates: of each network, with 16 mazes each.
        train_mazes: of 9×9 cells.
        test_mazes: of each size.
        output: the picture, a .png file.
    """
    if not seeds or min(updates, train_mazes, test_mazes) < 1 or output.suffix != ".png":
        raise ValueError(
            f"seeds={seeds}, updates={updates}, train_mazes={train_mazes}, test_mazes={test_mazes}"
            f", output={output}: at least one of each and a name that ends in .png are needed."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.open("ab").close()  # a file that cannot be written is told now, not after the training
    networks: dict[str, Network] = {}
    curves: Curves = {(method, size): [] for method in METHODS for size in TEST_SIZES}
    for seed in seeds:
        mazes, tests = make_data(seed, train_mazes, test_mazes)
        for method in METHODS:
            torch.manual_seed(seed)
            networks[method] = network = Network()
            began = time.perf_counter()
            train(network, method, mazes, updates, seed)
            print(f"seed {seed}, {method}: trained in {time.perf_counter() - began:.0f} s")
            for size, test in tests.items():
                states = network.solve(test.picture, TEST_STEPS)
                rates = [100 * solved(state, test).float().mean().item() for state in states]
                curves[method, size].append(rates)

    parameters = sum(p.numel() for p in network.parameters())
    print("Mazes without a wrong cell, in %, at the number of steps that suits each network best:")
    print(f"mean ± standard deviation over {len(seeds)} seed(s); {parameters} parameters each")
    print(f"{'':10}" + "".join(f"{size:>8}×{size:<6}" for size in TEST_SIZES))
    for method in METHODS:
        best = [np.max(curves[method, size], axis=1) for size in TEST_SIZES]
        print(f"{method:10}" + "".join(f"{x.mean():8.1f} ± {x.std():<4.1f}" for x in best))
    draw(curves, networks["RAG(4)"], tests[TEST_SIZES[1]], output)
    print(f"drawn: {output}")
    return curves


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    try:
        tyro.cli(main)
    except (OSError, ValueError) as problem:
        sys.exit(f"error: {problem}")
