"""Read handwritten digits with a multiscale equilibrium network, beside the same cell unrolled.

The state is a pair of feature maps, at 8×8 and at 4×4 pixels, that one cell refines together: each
map hears its neighbourhood, the other map and the image.  The network is the fixed point of that
cell (Bai, Koltun and Kolter, *Multiscale deep equilibrium models*, NeurIPS 2020), found by Anderson
mixing for each image by itself and differentiated by the implicit function theorem.  Spectral
normalisation makes the cell a contraction, so it has exactly one fixed point.  The explicit peers
apply the same cell, with as many parameters and the same initial weights and batches, once or four
times, with ordinary backpropagation.

Five hundred of scikit-learn's digits are for training, the rest for testing.  What to expect: the
fixed point and four applications read the same share of the digits, one application hardly fewer.
The task needs little depth, and the fixed point does not lose by finding its own: about five
evaluations for an image, in the memory of one for training, and an answer that stays as it is
however many steps are taken.

    python examples/deq_digits.py
    python examples/deq_digits.py --seeds 0 --epochs 5
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import implicit

TRAIN, BATCH, RATE = 500, 50, 1e-2
FINE, COARSE = 12, 24  # channels of the map at 8×8 and at 4×4
STEPS: dict[str, int | None] = {"fixed point": None, "4 steps": 4, "1 step": 1}
"""How often each network applies the cell; None for until it settles."""
TEST_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

Maps = tuple[Tensor, Tensor]

# --- Data ------------------------------------------------------------------------------------


@dataclass
class Digits:
    """Images ``(N, 1, 8, 8)`` float32 of mean 0 and deviation 1, and their classes ``(N,)``."""

    images: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def part(self, rows: Tensor | slice) -> Digits:
        """Some of them."""
        return Digits(self.images[rows], self.classes[rows])


def load(seed: int) -> tuple[Digits, Digits]:
    """All digits, shuffled; 500 for training and 1297 for testing."""
    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(pixels))
    images = torch.tensor(pixels[order], dtype=torch.float32).reshape(-1, 1, 8, 8)
    training = images[:TRAIN]
    digits = Digits(
        (images - training.mean()) / training.std(), torch.tensor(classes[order]).long()
    )
    return digits.part(slice(TRAIN)), digits.part(slice(TRAIN, None))


# --- Network ---------------------------------------------------------------------------------


class Cell(nn.Module):
    """One refinement of both maps: ``tanh`` of what each hears of itself, the other and the image.

    The four convolutions between the maps have a norm of at most 0.45 each, so the cell is a
    contraction with a constant of at most 0.9: the fixed point exists and is the only one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fine_to_fine = nn.Conv2d(FINE, FINE, 3, padding=1)
        self.coarse_to_coarse = nn.Conv2d(COARSE, COARSE, 3, padding=1)
        self.fine_to_coarse = nn.Conv2d(FINE, COARSE, 3, stride=2, padding=1)
        self.coarse_to_fine = nn.ConvTranspose2d(COARSE, FINE, 2, stride=2)
        for convolution in self.children():
            implicit.contract(convolution, bound=0.45)
        self.image_to_fine = nn.Conv2d(1, FINE, 3, padding=1)
        self.image_to_coarse = nn.Conv2d(1, COARSE, 3, stride=2, padding=1)

    def forward(self, y: Maps, image: Tensor) -> Maps:
        fine, coarse = y
        return (
            (
                self.fine_to_fine(fine) + self.coarse_to_fine(coarse) + self.image_to_fine(image)
            ).tanh(),
            (
                self.coarse_to_coarse(coarse)
                + self.fine_to_coarse(fine)
                + self.image_to_coarse(image)
            ).tanh(),
        )


class Network(nn.Module):
    """The cell, applied ``steps`` times or until it settles, and a linear classifier."""

    def __init__(self, steps: int | None) -> None:
        super().__init__()
        self.steps = steps
        self.cell = Cell()
        self.head = nn.Linear(COARSE * 4 * 4, 10)

    def solve(self, images: Tensor, **choices: Any) -> implicit.Solution:
        """The maps for ``images (B, 1, 8, 8)``."""
        if self.steps is None:
            usual: dict[str, Any] = {
                "solver": implicit.Anderson(memory=6),
                "stop": implicit.Tolerance(rtol=1e-3, atol=0.0, max_steps=60),
                "gradient": implicit.Implicit(stop=implicit.Tolerance(rtol=1e-2, max_steps=60)),
            }
        else:
            usual = {
                "solver": implicit.Naive(),
                "stop": implicit.Steps(self.steps),
                "gradient": implicit.BPTT(),
            }
        batch = len(images)
        start = images.new_zeros(batch, FINE, 8, 8), images.new_zeros(batch, COARSE, 4, 4)
        return implicit.fixed_point(self.cell, start, args=(images,), **{**usual, **choices})

    def read(self, maps: Maps) -> Tensor:
        """Logits ``(B, 10)``, from the coarse map alone: the fine one must pass its news on."""
        return self.head(maps[1].flatten(1))

    def loss(self, digits: Digits) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.read(self.solve(digits.images).value), digits.classes)


def train(network: Network, digits: Digits, epochs: int, seed: int) -> None:
    """Train in place; the order of the batches is that of the seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(digits), generator=generator).split(BATCH):
            optimizer.zero_grad()
            network.loss(digits.part(rows)).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        schedule.step()


@torch.no_grad()
def right(network: Network, digits: Digits, steps: int | None = None) -> float:
    """Digits read rightly, in %; after ``steps`` plain applications, if given."""
    choices: dict[str, Any] = {}
    if steps is not None:
        choices = {"solver": implicit.Naive(), "stop": implicit.Steps(steps)}
    guess = network.read(network.solve(digits.images, **choices).value).argmax(dim=1)
    return 100 * (guess == digits.classes).float().mean().item()


# --- The run ---------------------------------------------------------------------------------

Rates = dict[str, list[float]]
"""By network: digits read rightly, in %, for each seed."""


def draw(
    curves: dict[str, list[list[float]]], network: Network, digits: Digits, file: Path
) -> None:
    """Accuracy over the steps at test time, how the fixed point is solved, and its maps."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 1)
    accuracy, residuals = grid[0].subgridspec(1, 2).subplots(squeeze=False)[0]
    for name, values in curves.items():
        accuracy.errorbar(
            TEST_STEPS, np.mean(values, axis=0), np.std(values, axis=0), capsize=3, label=name
        )
    accuracy.set(
        xlabel="applications of the cell at test time", ylabel="test digits right [%]", xscale="log"
    )
    accuracy.set_ylim(bottom=max(0, accuracy.get_ylim()[0]))
    accuracy.legend()
    few = digits.part(slice(64))
    stop = implicit.Tolerance(rtol=1e-5, atol=0.0, max_steps=40)
    traces = {}
    with torch.no_grad():
        for solver in (implicit.Naive(), implicit.Anderson(memory=6), implicit.Broyden(memory=6)):
            traces[type(solver).__name__] = network.solve(
                few.images, solver=solver, stop=stop, trace=True
            )
        fine, coarse = network.solve(few.images[:1]).value
    implicit.plot_convergence(traces, residuals)
    shown = [few.images[0], *fine[0, :5], *coarse[0, :5]]
    titles = ["image", *["8×8"] * 5, *["4×4"] * 5]
    axes = grid[1].subgridspec(1, len(shown)).subplots(squeeze=False)[0]
    for axis, title, plane in zip(axes, titles, shown, strict=True):
        axis.imshow(plane.reshape(plane.shape[-2:]).numpy(), cmap="gray")
        axis.set(title=title, xticks=[], yticks=[])
    figure.savefig(file, dpi=90)


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: int = 20,
    output: Path = Path("runs/deq_digits.png"),
) -> Rates:
    """Train each network, print how many digits it reads rightly, and draw.

    Args:
        seeds: each shuffles the digits and draws weights; the figures are averaged.
        epochs: of training.
        output: the picture, a .png file.
    """
    if not seeds or epochs < 1 or output.suffix != ".png":
        raise ValueError(
            f"seeds={seeds}, epochs={epochs}, output={output}: one seed and one epoch at least, "
            "and a name that ends in .png are needed."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.open("ab").close()  # a file that cannot be written is told now, not after the training
    rates: Rates = {}
    curves: dict[str, list[list[float]]] = {}
    networks: dict[str, Network] = {}
    print(f"Test digits read rightly: mean ± standard deviation over {len(seeds)} seed(s)")
    for name, steps in STEPS.items():
        rates[name], curves[name] = [], []
        began = time.perf_counter()
        for seed in seeds:
            torch.manual_seed(seed)
            network = Network(steps)
            training, test = load(seed)
            train(network, training, epochs, seed)
            networks.setdefault(name, network.eval())
            rates[name].append(right(network.eval(), test))
            curves[name].append([right(network, test, n) for n in TEST_STEPS])
        seconds = (time.perf_counter() - began) / len(seeds)
        parameters = sum(p.numel() for p in networks[name].parameters())
        print(
            f"{name:11}  {np.mean(rates[name]):5.1f} ± {np.std(rates[name]):3.1f} %; after "
            f"{TEST_STEPS[-1]} steps {np.mean(curves[name], axis=0)[-1]:5.1f} %  "
            f"{parameters} parameters  {seconds:4.1f} s each"
        )
    _, test = load(seeds[0])
    with torch.no_grad():
        solution = networks["fixed point"].solve(test.images)
    print(
        f"fixed point: {int(solution.converged.sum())} of {len(test)} converged, "
        f"{solution.evaluations.float().mean():.1f} evaluations per image"
    )
    draw(curves, networks["fixed point"], test, output)
    print(f"drawn: {output}")
    return rates


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    try:
        tyro.cli(main)
    except (OSError, ValueError) as problem:
        sys.exit(f"error: {problem}")
