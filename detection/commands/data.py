"""The data of a command: a folder that was named, or the embedded digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from detection.data import compose_digits
from detection.distributed import Distributed


@dataclass(frozen=True)
class Digits:
    """The embedded data set, used where no --data is given.

    Args:
        train_images: images to train on.
        val_images: images to evaluate on; their digits and photographs are others.
        size: side of the images in pixels.
        seed: of the composition.
    """

    train_images: int = 4000
    val_images: int = 500
    size: int = 128
    seed: int = 0

    def compose(self) -> Path:
        """The data set's folder below ``data/``, composed when it is first asked for."""
        name = f"digits-{self.train_images}-{self.val_images}-{self.size}px-seed{self.seed}"
        return compose_digits(
            Path("data") / name,
            train_images=self.train_images,
            val_images=self.val_images,
            size=self.size,
            seed=self.seed,
        )


def data_folder(
    data: Path | None, digits: Digits, distributed: Distributed, console: Console
) -> Path:
    """The folder of the data; the main process composes digits, the others find them composed."""
    if data is not None:
        return data
    if distributed.is_main:
        console.print("Composing the digits data set (or finding it composed).")
        digits.compose()
    distributed.barrier()
    return digits.compose()
