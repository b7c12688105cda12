"""``deqdet train``: from a folder of labelled images to a detector, its scores and its pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from detection.commands.base import Command
from detection.commands.data import Digits, data_folder
from detection.commands.folders import new_folder, require_unused
from detection.commands.options import check_threshold, value_of
from detection.configuration import from_json, to_json
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
from detection.training.provenance import read_provenance, recorded_data
from detection.training.recipe import Recipe
from detection.training.tracking import TensorBoard, Tracker, WeightsAndBiases

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Train(Command):
    """Train a detector on a folder of labelled images (COCO, YOLO or Pascal VOC).

    The run lies in one folder: checkpoints, log, pictures.  Killed at any moment, it goes on with
    --resume --output FOLDER.  Every setting of the recipe is an option too; they are listed last.

    Args:
        data: folder of the data set; by default that of a resumed run, or the embedded digits.
        recipe: the settings to begin from; `deqdet recipes` lists them.  A resumed run has its own.
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

    @classmethod
    def begun(cls, arguments: Sequence[str]) -> Self:
        """The options to begin from, before the others are read.

        Settings are those of the recipe that is named, or of the run that is to go on.

        Raises:
            ValueError: if there is no such recipe, with the nearest name, or the run's
                configuration is damaged.
        """
        name, output = value_of("--recipe", arguments), value_of("--output", arguments)
        if "--resume" in arguments and name is None and output is not None:
            settings = _settings_of(Path(output))
            if settings is not None:
                return cls(recipe=settings.name, settings=settings)
        name = cls.recipe if name is None else name
        return cls(recipe=name, settings=recipe(name))

    @property
    def interrupted(self) -> str:
        """What is said after Ctrl-C."""
        folder = self.output or "the run's folder"
        return f"Interrupted. The run goes on from its last checkpoint: --resume --output {folder}"

    def check(self) -> None:
        if self.resume and self.output is None:
            raise ValueError("--resume needs --output: the folder of the run to go on with.")
        if self.resume and self.begin_from is not None:
            raise ValueError("--resume and --from exclude each other: a resumed run has weights.")
        if self.data is not None and self.digits != Digits():
            raise ValueError("--data and --digits exclude each other: the digits are not used.")
        check_threshold(self.threshold)
        if self.resume and self.output and not (self.output / "checkpoints").is_dir():
            raise ValueError(
                f"--output {self.output}: no run lies there to go on with. Leave --resume out to "
                "begin one."
            )
        if self.output is not None and not self.resume:
            require_unused(self.output)

    def run(self, distributed: Distributed, console: Console) -> None:
        started, settings = time.monotonic(), self.settings
        root = self._recorded_data() or data_folder(self.data, self.digits, distributed, console)
        distributed.on_main(lambda: _check_data(root, settings.model.num_queries, console))
        train_set, val_set = load_folder(
            root,
            train_transform(settings.augmentation),
            eval_transform(settings.augmentation),
            skip_empty=settings.skip_empty,
        )
        folder = self.output or new_folder(self.recipe, distributed)
        settings = settings.for_classes(len(train_set.categories))
        if distributed.is_main:
            console.print(f"The run: {folder}. Interrupted, it goes on: --resume --output {folder}")
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

    def _recorded_data(self) -> Path | None:
        """Where the data of a run to go on with lay, unless other data is named."""
        if not self.resume or self.output is None or self.data or self.digits != Digits():
            return None
        return recorded_data(read_provenance(self.output / "run.json"))

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


def _settings_of(folder: Path) -> Recipe | None:
    """The recipe of the run in a folder; `None` where none has been begun."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        found: Recipe = from_json(Recipe, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(
            f"{path}: this is no recipe ({error}). Name the one that the run was begun with: "
            "--recipe, and what was changed."
        ) from None
    return found


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
