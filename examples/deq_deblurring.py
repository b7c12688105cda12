"""Sharpen photographs by a learnt proximal fixed point, beside the same iteration unrolled.

A photograph ``x`` was blurred by motion and noise was added: ``b = A x + n``.  The estimate is the
fixed point of ``y ← R(y − η Aᵀ(A y − b))``, where a small convolutional network ``R`` stands in the
place of a proximal operator: it says what photographs look like (Gilton, Ongie and Willett, *Deep
equilibrium architectures for inverse problems in imaging*, IEEE Trans. Comput. Imaging 2021).
Training goes through two applications at the fixed point (RAG(2)), whatever it took to find it.
The explicit peer is the same iteration with as many parameters, unrolled for six steps and trained
by backpropagation through them (Gregor and LeCun, ICML 2010).  Wiener's filter, with its best
balance for the test photographs, has no parameters and is in the table as well.

Five photographs that scikit-image and scikit-learn ship are for training, two others for testing.
What to look at is the lower panel: the unrolled network is good after the steps it was trained for,
and falls off beyond them; the fixed point hardly changes however long one iterates.

    python examples/deq_deblurring.py
    python examples/deq_deblurring.py --updates 50
"""

from __future__ import annotations

import math
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
import tyro
from matplotlib.figure import Figure
from skimage.color import rgb2gray
from skimage.restoration import wiener
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F

import implicit

TRAIN = ("astronaut", "coffee", "rocket", "china", "flower")
TEST = ("camera", "chelsea")
CROP, PATCH, BATCH, RATE = 128, 40, 8, 2e-3
NOISE, ETA, CHANNELS = 0.01, 0.9, 24
UNROLLED = 6
TEST_STEPS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)

# --- Photographs and their blur --------------------------------------------------------------


def photograph(name: str) -> Tensor:
    """``(1, H, W)`` float32 grey values in [0, 1]."""
    if name in ("china", "flower"):
        pixels = load_sample_image(f"{name}.jpg")
    else:
        pixels = getattr(skimage.data, name)()
    grey = rgb2gray(pixels) if pixels.ndim == 3 else pixels / 255
    return torch.tensor(np.asarray(grey), dtype=torch.float32)[None]


def crops_for_testing() -> Tensor:
    """``(8, 1, 128, 128)``: four places of each photograph for testing."""
    crops = []
    for name in TEST:
        picture = photograph(name)
        _, height, width = picture.shape
        for row in (height // 3 - CROP // 2, 2 * height // 3 - CROP // 2):
            for column in (width // 3 - CROP // 2, 2 * width // 3 - CROP // 2):
                crops.append(picture[:, row : row + CROP, column : column + CROP])
    return torch.stack(crops)


def training_patches(count: int, generator: torch.Generator) -> Tensor:
    """``(count, 1, 40, 40)``: anywhere in the photographs for training, some of them mirrored."""
    pictures = [photograph(name) for name in TRAIN]
    patches = []
    for _ in range(count):
        picture = pictures[int(torch.randint(len(pictures), (), generator=generator))]
        rows, columns = (int(n) - PATCH for n in picture.shape[1:])
        row = int(torch.randint(rows, (), generator=generator))
        column = int(torch.randint(columns, (), generator=generator))
        patch = picture[:, row : row + PATCH, column : column + PATCH]
        patches.append(patch.flip(2) if torch.rand((), generator=generator) < 0.5 else patch)
    return torch.stack(patches)


@cache  # it is asked for at every iteration
def motion() -> Tensor:
    """``(1, 1, 7, 7)``: a camera that moved along a slope of 1 : 2 while the shutter was open."""
    kernel = torch.zeros(7, 7)
    for t in torch.linspace(-3, 3, 61):
        kernel[round(3 + t.item() / 2), round(3 + t.item())] += 1
    return (kernel / kernel.sum())[None, None]


def blur(x: Tensor) -> Tensor:
    """``A x``, dark beyond the border; ``(B, 1, H, W)``."""
    return F.conv2d(x, motion(), padding=3)


def blur_transposed(x: Tensor) -> Tensor:
    """``Aᵀ x``."""
    return F.conv_transpose2d(x, motion(), padding=3)


def observe(x: Tensor, generator: torch.Generator) -> Tensor:
    """``A x`` with noise of deviation 0.01."""
    return blur(x) + NOISE * torch.randn(x.shape, generator=generator)


def psnr(found: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, ``(B,)``, without the border that the blur darkens."""
    error = (found - truth)[..., 4:-4, 4:-4].square().mean(dim=(1, 2, 3))
    return -10 * error.log10()


# --- The iteration ---------------------------------------------------------------------------


class Step(nn.Module):
    """``y ↦ R(y − η Aᵀ(A y − b))`` with ``R(v) = v − ½ CNN(v)``.

    Every convolution of the network has a norm of at most 1, so ``R`` cannot tear far apart what
    lies close together; training does the rest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, 1, 3, padding=1),
        )
        implicit.contract(self.network, bound=1.0)

    def forward(self, y: Tensor, b: Tensor) -> Tensor:
        v = y - ETA * blur_transposed(blur(y) - b)
        noise: Tensor = self.network(v)
        return v - 0.5 * noise


class Deblurring(nn.Module):
    """The step until it settles (``steps`` None), or so many times."""

    def __init__(self, steps: int | None) -> None:
        super().__init__()
        self.step = Step()
        self.steps = steps

    def solve(self, b: Tensor, **choices: Any) -> implicit.Solution:
        """Estimates ``(B, 1, H, W)`` from observations of the same shape."""
        if self.steps is None:
            usual: dict[str, Any] = {
                "solver": implicit.Anderson(memory=5),
                "stop": implicit.Tolerance(rtol=1e-3, atol=0.0, max_steps=40),
                "gradient": implicit.RAG(2),
            }
        else:
            usual = {
                "solver": implicit.Naive(),
                "stop": implicit.Steps(self.steps),
                "gradient": implicit.BPTT(),
            }
        return implicit.fixed_point(self.step, b, args=(b,), **{**usual, **choices})


MODELS: dict[str, int | None] = {"fixed point": None, f"{UNROLLED} steps": UNROLLED}


def train(model: Deblurring, updates: int, seed: int) -> None:
    """Train in place on patches that are the same for every model of a seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    model.train()
    for truth in training_patches(updates * BATCH, generator).split(BATCH):
        found = model.solve(observe(truth, generator)).value
        loss = (found - truth)[..., 4:-4, 4:-4].square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
    model.eval()


def filtered(b: Tensor, truth: Tensor) -> Tensor:
    """Wiener's filter, with the balance that is best for the truth."""
    kernel = motion()[0, 0].numpy()
    best = torch.full((), -math.inf)
    found = b
    for balance in np.geomspace(1e-3, 10, 17):
        one = [wiener(picture[0].numpy(), kernel, balance, clip=False) for picture in b]
        candidate = torch.tensor(np.stack(one), dtype=torch.float32)[:, None]
        if psnr(candidate, truth).mean() > best:
            best, found = psnr(candidate, truth).mean(), candidate
    return found


# --- The run ---------------------------------------------------------------------------------


def draw(pictures: dict[str, Tensor], curves: dict[str, Tensor], file: Path) -> None:
    """One photograph as each method has it, and the quality over the iterations at test time."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 1.1))
    row = 5  # the face of a cat
    truth = pictures["truth"]
    shown = grid[0].subgridspec(1, len(pictures)).subplots(squeeze=False)[0]
    for axis, (name, picture) in zip(shown, pictures.items(), strict=True):
        axis.imshow(picture[row, 0].clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
        quality = "" if name == "truth" else f"\n{psnr(picture, truth)[row]:.1f} dB"
        axis.set(title=name + quality, xticks=[], yticks=[])
    axis = grid[1].subgridspec(1, 1).subplots(squeeze=False)[0, 0]
    for name, curve in curves.items():
        axis.plot(TEST_STEPS, curve.numpy(), marker="o", label=name)
    axis.axvline(UNROLLED, color="0.7", linewidth=0.8)
    lowest = min(float(psnr(pictures["blurred"], truth).mean()), 15.0)
    axis.set(
        xlabel=f"plain iterations at test time (line: {UNROLLED})",
        ylabel="PSNR [dB], mean of the test crops",
        xscale="log",
    )
    axis.set_ylim(bottom=max(lowest, axis.get_ylim()[0]))
    axis.legend()
    figure.savefig(file, dpi=90)


def main(
    updates: int = 250, seed: int = 0, output: Path = Path("runs/deq_deblurring.png")
) -> dict[str, float]:
    """Train both models, print how well each sharpens the test photographs, and draw.

    Args:
        updates: of each model, eight patches each.
        seed: of the weights, the patches and the noise.
        output: the picture, a .png file.
    """
    if updates < 1 or output.suffix != ".png":
        raise ValueError(
            f"updates={updates}, output={output}: at least one update and a name that ends in "
            ".png are needed."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.open("ab").close()  # a file that cannot be written is told now, not after the training
    truth = crops_for_testing()
    b = observe(truth, torch.Generator().manual_seed(seed + 1))
    pictures = {"blurred": b, "Wiener": filtered(b, truth)}
    curves: dict[str, Tensor] = {}
    for name, steps in MODELS.items():
        torch.manual_seed(seed)
        model = Deblurring(steps)
        began = time.perf_counter()
        train(model, updates, seed)
        seconds = time.perf_counter() - began
        walk = {"solver": implicit.Naive(), "stop": implicit.Steps(TEST_STEPS[-1])}
        with torch.no_grad():
            solution = model.solve(b)
            path = model.solve(b, path=TEST_STEPS, **walk).path
        pictures[name] = solution.value
        curves[name] = torch.stack([psnr(state, truth).mean() for state in path])
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{name}: {parameters} parameters, trained in {seconds:.0f} s; relative residual "
            f"{solution.relative_residual.max():.1e} after "
            f"{solution.evaluations.float().mean():.1f} evaluations per crop"
        )
    found = {name: float(psnr(picture, truth).mean()) for name, picture in pictures.items()}
    print(f"PSNR on {len(truth)} crops of photographs that were never trained on")
    for name, quality in found.items():
        later = f", {curves[name][-1]:.1f} after {TEST_STEPS[-1]} steps" if name in curves else ""
        print(f"  {name:12} {quality:.1f} dB{later}")
    draw({**pictures, "truth": truth}, curves, output)
    print(f"drawn: {output}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        tyro.cli(main)
    except (OSError, ValueError) as problem:
        sys.exit(f"error: {problem}")
