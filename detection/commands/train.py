"""``deqdet train``: from a folder of labelled images to a detector, its scores and its pictures."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from detection.commands.base import Command
from detection.commands.data import Digits, data_folder
from detection.commands.folders import new_folder, require_unused
from detection.configuration import to_json
from detection.data import (
    CocoDataset,
    DataError,
    check_folder,
    eval_transform,
    load_folder,
    train_transform,
)
from detection.distributed import Distributed
from detection.evaluation import CocoScores
from detection.models.detector import Detector
from detection.pictures import draw_run, draw_validation
from detection.recipes import recipe
from detection.training.loop import OnEvaluation, train
from detection.training.recipe import Recipe
from detection.training.tracking import TensorBoard, Tracker, WeightsAndBiases


@dataclass(frozen=True)
class Train(Command):
    """Train a detector on a folder of labelled images (COCO, YOLO or Pascal VOC).

    The run lies in one folder: checkpoints, log, pictures.  Killed at any moment, it goes on with
    --resume.  Every setting of the recipe is an option too; they are listed last.

    Args:
        data: folder of the data set; by default the embedded digits are composed.
        recipe: the settings to begin from; `deqdet recipes` lists them.
        output: folder of the run; by default a new one below runs/.
        resume: go on from the last checkpoint of --output.
        begin_from: begin from the weights of this checkpoint, those of classes by their names.
        threshold: lowest score that is drawn.
        device: cuda, cuda:1 or cpu; by default CUDA if there is one.
        tensorboard: write event files for TensorBoard into the run's folder.
        wandb: send the records to this project of Weights & Biases.
        digits: the embedded data set.
        settings: the recipe.
    """

    data: Path | None = None
    recipe: str = "deqdet_digits"
    output: Path | None = None
    resume: bool = False
    begin_from: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    threshold: float = 0.3
    device: str | None = None
    tensorboard: bool = False
    wandb: str | None = None
    digits: Digits = field(default_factory=Digits)
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(
        default_factory=lambda: recipe("deqdet_digits")
    )

    interrupted = (
        "Interrupted. The run goes on from its last checkpoint with --resume and the same --output."
    )

    @classmethod
    def of_recipe(cls, name: str | None) -> Train:
        """The options to begin from where a recipe is named, which decides its settings.

        Raises:
            ValueError: if there is none, with the nearest name.
        """
        name = cls.recipe if name is None else name
        return cls(recipe=name, settings=recipe(name))

    def check(self) -> None:
        if self.resume and self.output is None:
            raise ValueError("--resume needs --output: the folder of the run to go on with.")
        if self.resume and self.begin_from is not None:
            raise ValueError("--resume and --from exclude each other: a resumed run has weights.")
        if self.data is not None and self.digits != Digits():
            raise ValueError("--data and --digits exclude each other: the digits are not used.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold}: must lie in [0, 1].")
        if self.output is not None and not self.resume:
            require_unused(self.output)

    def run(self, distributed: Distributed, console: Console) -> None:
        started, settings = time.monotonic(), self.settings
        root = data_folder(self.data, self.digits, distributed, console)
        distributed.on_main(lambda: _check_data(root, settings.model.num_queries, console))
        train_set, val_set = load_folder(
            root,
            train_transform(settings.augmentation),
            eval_transform(settings.augmentation),
            skip_empty=settings.skip_empty,
        )
        folder = self.output or new_folder(self.recipe, distributed)
        settings = settings.for_classes(len(train_set.categories))
        trained = train(
            settings,
            train_set,
            val_set,
            folder,
            distributed=distributed,
            resume=self.resume,
            console=console,
            begin_from=self.begin_from,
            trackers=self._trackers(folder, settings) if distributed.is_main else (),
            about={"data": str(root.resolve())},
            on_evaluation=self._pictures(folder, val_set),
        )
        if not distributed.is_main:
            return
        console.print(trained.scores.table())
        console.print(trained.scores.class_table())
        draw_run(trained.model, val_set, folder, self.threshold)
        minutes = (time.monotonic() - started) / 60
        console.print(f"{minutes:.1f} minutes in all. Written to {folder}:")
        for path in sorted(folder.iterdir()):
            console.print(f"  {path.name}")

    def _trackers(self, folder: Path, settings: Recipe) -> list[Tracker]:
        trackers: list[Tracker] = []
        if self.tensorboard:
            trackers.append(TensorBoard(folder / "tensorboard"))
        if self.wandb is not None:
            trackers.append(WeightsAndBiases(self.wandb, folder, to_json(settings)))
        return trackers

    def _pictures(self, folder: Path, val_set: CocoDataset) -> OnEvaluation:
        """Pictures of the validation set after every evaluation."""

        def draw(model: Detector, scores: CocoScores, epoch: int) -> None:
            path = folder / "validation" / f"epoch_{epoch:03d}.png"
            draw_validation(model, val_set, path, self.threshold)

        return draw


def _check_data(root: Path, queries: int, console: Console) -> None:
    """Show the report on the data; `DataError` if it cannot be trained on."""
    report = check_folder(root, num_queries=queries, console=console)
    if len(report.problems) == 1 and not report.ok:
        raise DataError(str(report.problems[0]))
    console.print(report.table())
    if not report.ok:
        raise DataError(
            f"{root}: {report.number_of_errors} errors keep the data from being trained on, see "
            "above. `deqdet check-data` tells all of them."
        )
