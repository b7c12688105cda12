"""``deqdet convert``: published checkpoints in this library's format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from detection.checkpoints import load_weights
from detection.commands.base import Command
from detection.distributed import Distributed
from detection.pretrained import convert_published


@dataclass(frozen=True)
class Convert(Command):
    """Write a published checkpoint in this library's format, recipe and classes inside.

    Args:
        published: file as mmdetection saves it (.pth).
        out: file to write (.safetensors); must not exist.
        classes: class names, where the checkpoint has none and its classes are not COCO's.
    """

    published: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    classes: tuple[str, ...] = ()

    def run(self, distributed: Distributed, console: Console) -> None:
        path = convert_published(self.published, self.out, self.classes or None)
        weights, metadata = load_weights(path)
        size = sum(weight.numel() for weight in weights.values())
        console.print(
            f"{path}: {metadata['config']['name']}, {len(weights)} tensors, {size / 1e6:.1f} M "
            f"numbers, {len(metadata['class_names'])} classes"
        )
