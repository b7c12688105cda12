"""The command line, ``deqdet`` or ``python -m detection``.

deqdet recipes
deqdet convert deqdet_r50.pth deqdet_r50.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from detection.checkpoints import CheckpointError, load_weights
from detection.models.config import EquilibriumConfig, RecurrentConfig, StackedConfig
from detection.models.detector import Detector
from detection.pretrained import convert_published
from detection.recipes import Entry, entries
from detection.training.optimization import parameter_groups
from detection.training.recipe import Recipe


@dataclass(frozen=True)
class Recipes:
    """List the recipes: sizes, schedules, optimiser groups, and the AP published for each."""

    def run(self, console: Console) -> None:
        """Print the table."""
        console.print(recipe_table(entries()))


@dataclass(frozen=True)
class Convert:
    """Write a published checkpoint in this library's format, recipe and classes inside.

    Args:
        published: file as mmdetection saves it (.pth).
        out: file to write (.safetensors); must not exist.
        classes: class names, where the checkpoint has none and its classes are not COCO's.
    """

    published: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    classes: tuple[str, ...] = ()

    def run(self, console: Console) -> None:
        """Convert, and say what was found."""
        path = convert_published(self.published, self.out, self.classes or None)
        weights, metadata = load_weights(path)
        size = sum(weight.numel() for weight in weights.values())
        console.print(
            f"{path}: {metadata['config']['name']}, {len(weights)} tensors, {size / 1e6:.1f} M "
            f"numbers, {len(metadata['class_names'])} classes"
        )


Command = (
    Annotated[Recipes, tyro.conf.subcommand("recipes")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    command: Recipes | Convert = tyro.cli(
        Command,
        prog="deqdet",
        description=__doc__,
        args=sys.argv[1:] if arguments is None else arguments,
    )
    console = Console(highlight=False)
    try:
        command.run(console if console.is_terminal else Console(highlight=False, width=200))
    except (CheckpointError, OSError, ValueError) as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2
    return 0


def recipe_table(rows: Sequence[Entry]) -> Table:
    """Everything that distinguishes the recipes."""
    table = Table(box=SIMPLE_HEAD)
    for heading in (
        "recipe",
        "backbone",
        "neck",
        "decoder",
        "queries",
        "parameters",
        "epochs",
        "images",
        "groups: learning rate, decay",
    ):
        table.add_column(heading)
    table.add_column("AP", justify="right")
    table.add_column("source")
    for row in rows:
        model, settings = row.recipe.model, row.recipe.optimization
        with torch.device("meta"):
            detector = Detector(row.recipe.without_pretraining().model)
        neck = f"{model.neck.kernel_size}×{model.neck.kernel_size}"
        groups = [
            f"{group['name']} {group['lr']:g}, {group['weight_decay']:g}"
            for group in parameter_groups(detector, settings)
        ]
        table.add_row(
            row.recipe.name,
            model.backbone.name,
            f"{neck}, ReLU" if model.neck.activation else neck,
            _decoder(row.recipe),
            str(model.num_queries),
            f"{sum(p.numel() for p in detector.parameters()) / 1e6:.1f} M",
            str(settings.epochs),
            _images(row.recipe),
            "; ".join(groups),
            "" if row.ap is None else f"{row.ap:.1f}",
            row.source,
        )
    return table


def _decoder(recipe: Recipe) -> str:
    decoder, layer = recipe.model.decoder, recipe.model.layer
    points = getattr(layer, "points", None)
    sampling = "RoIAlign" if points is None else f"{points} points"
    if isinstance(decoder, StackedConfig):
        return f"AdaMixer, {decoder.layers} layers, {sampling}"
    first = decoder.initial_points or points
    sampling = sampling if first == points else f"{first} and {sampling}"
    if isinstance(decoder, RecurrentConfig):
        return f"RNNDet, T = {decoder.steps}, {sampling}"
    assert isinstance(decoder, EquilibriumConfig)
    return f"DEQDet, T = {decoder.train_steps} and {decoder.steps}, {sampling}"


def _images(recipe: Recipe) -> str:
    sides = recipe.augmentation.short_sides
    scale = str(sides[0]) if len(sides) == 1 else f"{sides[0]}–{sides[-1]}"
    parts = [scale, "flip" if recipe.augmentation.horizontal_flip else ""]
    parts.append("crop" if recipe.augmentation.crop else "")
    return ", ".join(part for part in parts if part)
