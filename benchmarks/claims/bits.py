"""What short runs end with, to the bit: whether two versions of the code train alike.

    python -m benchmarks.claims.bits

Each arm of the preset ``cpu`` is trained for two epochs on 64 images, and evaluated.  Where two
checkouts print the same on one machine, results of one may count as the other's: that is written
down in `benchmarks.claims.former`.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from benchmarks.claims.jobs import load
from benchmarks.claims.presets import PRESETS
from benchmarks.claims.versions import fingerprint
from detection.data import compose_scenes
from detection.training.loop import train
from detection.training.recipe import Recipe

PRESET = PRESETS["cpu"]


def digest(root: Path, recipe: Recipe) -> str:
    """Of all weights after training on the images in ``root``, in twelve hexadecimal digits."""
    train_set, val_set = load(root, recipe)
    recipe = recipe.for_classes(len(train_set.categories))
    with TemporaryDirectory() as folder:
        model = train(recipe, train_set, val_set, Path(folder), console=Console(quiet=True)).model
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        total.update(name.encode() + value.contiguous().numpy().tobytes())
    return total.hexdigest()[:12]


def main() -> None:
    """Print a line for each arm."""
    torch.set_num_threads(1)
    print(f"code {fingerprint()}, torch {torch.__version__}")
    with TemporaryDirectory() as folder:
        root = compose_scenes(Path(folder) / "scenes", train_images=64, val_images=8)
        recipes = PRESET.recipes()
        for arm in PRESET.arms:
            made = recipes[arm]
            optimization = replace(made.optimization, epochs=2)
            short = replace(made, optimization=optimization, evaluate_every=2, workers=0)
            print(f"{arm}: {digest(root, short)}", flush=True)


if __name__ == "__main__":
    main()
