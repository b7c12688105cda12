"""``deqdet evaluate``: COCO's metrics of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from detection.commands.base import Command
from detection.commands.data import Digits, data_folder
from detection.configuration import to_json
from detection.data import eval_transform, load_split
from detection.distributed import Distributed
from detection.files import replacing
from detection.predictor import load


@dataclass(frozen=True)
class Evaluate(Command):
    """Score a checkpoint on a validation set, with COCO's metrics of boxes.

    Under torchrun every image is scored once, whatever the number of processes.

    Args:
        checkpoint: a .safetensors file, the folder of a run, or a model on the Hugging Face hub.
        data: folder of the data set; by default the embedded digits are composed.
        batch_size: images at a time; by default as in the recipe.  The scores do not depend on it.
        workers: processes that load images; by default as in the recipe.
        steps: refinements of each image, or auto; by default as in the recipe.
        tolerance: pixels that a box may still move, times its score, when an image is done, after
            the recipe's settled.least_steps at the soonest.
        json: write the scores to this file too.
        device: cuda, cuda:1 or cpu; by default CUDA if there is one.
        digits: the embedded data set.
    """

    checkpoint: tyro.conf.Positional[Path]
    data: Path | None = None
    batch_size: int | None = None
    workers: int | None = None
    steps: int | Literal["auto"] | None = None
    tolerance: float | None = None
    json: Path | None = None
    device: str | None = None
    digits: Digits = field(default_factory=Digits)

    def check(self) -> None:
        if self.data is not None and self.digits != Digits():
            raise ValueError("--data and --digits exclude each other: the digits are not used.")

    def run(self, distributed: Distributed, console: Console) -> None:
        model = load(self.checkpoint, device=distributed.device)
        root = data_folder(self.data, self.digits, distributed, console)
        transform = eval_transform(model.recipe.augmentation)
        dataset = load_split(root, "val", transform, categories=model.categories)
        scores = model.evaluate(
            dataset,
            batch_size=self.batch_size,
            workers=self.workers,
            steps=self.steps,
            tolerance=self.tolerance,
            distributed=distributed,
        )
        if not distributed.is_main:
            return
        console.print(scores.table())
        console.print(scores.class_table())
        if self.json is not None:
            with replacing(self.json) as temporary:
                temporary.write_text(json.dumps(to_json(scores), indent=2) + "\n")
