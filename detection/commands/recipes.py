"""``deqdet recipes``: everything that distinguishes the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from detection.commands.base import Command
from detection.distributed import Distributed
from detection.models.config import EquilibriumConfig, RecurrentConfig, StackedConfig
from detection.models.detector import Detector
from detection.recipes import Entry, entries
from detection.training.optimization import parameter_groups
from detection.training.recipe import Recipe


@dataclass(frozen=True)
class Recipes(Command):
    """List the recipes: sizes, schedules, optimiser groups, and the AP published for each."""

    def run(self, distributed: Distributed, console: Console) -> None:
        console.print(recipe_table(entries()))


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
