"""The training loop, and everything that a run needs to end as if it had never been killed.

One run lives in one folder: ``config.json`` (the recipe), ``run.json`` (where it comes from),
``log.jsonl`` and ``checkpoints/``.  The same code trains on the embedded digits and on COCO, on CPU
and CUDA, alone and under ``torchrun``.

A run is at a position: so many batches into an epoch, or at its end, where it is yet to be
evaluated.  A checkpoint says where, and all that follows depends on nothing but the checkpoint; so
a resumed run ends with the same weights, states, scores and log, on the CPU to the last bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from detection.checkpoints import (
    CheckpointFolder,
    Resumable,
    load_training_state,
)
from detection.configuration import ConfigurationError, from_json, to_json
from detection.data.coco import CocoDataset
from detection.data.loading import make_loader
from detection.distributed import Distributed
from detection.evaluation import CocoScores
from detection.files import remove_leftovers, replacing
from detection.models.detector import Detector
from detection.prediction import evaluate
from detection.randomness import random_states, seed_all, set_random_states
from detection.training.determinism import deterministic
from detection.training.errors import TrainingError
from detection.training.fine_tuning import begin_from as take_weights
from detection.training.progress import JsonLines, Progress
from detection.training.provenance import write_provenance
from detection.training.recipe import Recipe
from detection.training.step import Step
from detection.training.tracking import Tracker

__all__ = ["Trained", "TrainingError", "train"]

OnEvaluation = Callable[[Detector, CocoScores, int], None]


@dataclass
class Trained:
    """What a run ends with: the model to use, its scores, its folder."""

    model: Detector
    scores: CocoScores
    folder: Path


def train(
    recipe: Recipe,
    train_set: CocoDataset,
    val_set: CocoDataset,
    folder: Path,
    *,
    distributed: Distributed | None = None,
    resume: bool = False,
    console: Console | None = None,
    begin_from: Path | None = None,
    trackers: Sequence[Tracker] = (),
    about: Mapping[str, Any] | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Trained:
    """Train a detector and evaluate it.

    Args:
        recipe: what to train and how; its number of classes must be that of the data.
        train_set: to learn from.
        val_set: to evaluate on.
        folder: of the run; must be new or empty unless ``resume``.
        distributed: the processes; one on the CPU by default.
        resume: go on from the newest whole checkpoint in ``folder``.  A run that is killed at any
            moment and resumed with as many processes ends as it would have; on the CPU its
            weights, states and log are the same to the last bit.
        console: where progress is shown.
        begin_from: checkpoint whose weights to begin from, see `detection.training.fine_tuning`; a
            run that is resumed has its own.
        trackers: take the records too, on the main process.
        about: more to write into ``run.json``, such as where the data is.
        on_evaluation: called on the main process after each evaluation with the model that was
            evaluated, its scores, and the number of epochs done.  A run that is killed before the
            next checkpoint calls it again.

    Raises:
        TrainingError: if a loss or gradient is not finite, memory does not suffice, the folder
            holds another run, or there is nothing to resume.
        CheckpointError: if a checkpoint cannot be written (a full disk) or read.  What was written
            before is untouched, and the run can be resumed from it.
    """
    distributed = distributed or Distributed()
    with deterministic(distributed.device, recipe.deterministic):
        run = _Run(recipe, train_set, val_set, folder, distributed, resume, begin_from, about or {})
        with (
            run.recording(trackers),
            Progress(
                run.total_steps,
                done_steps=run.step.count,
                quiet=not distributed.is_main,
                console=console,
            ) as progress,
        ):
            for text in run.told:
                progress.note(text)
            scores = run.go(progress, on_evaluation)
            if scores is None:  # resumed after its end
                scores = run.evaluate()
    return Trained(run.best_weights, scores, folder)


class _Run:
    """Everything that changes while a run goes on.

    Attributes:
        epoch, batch: the position: batches done of this epoch.
        best_score, stale: best AP so far, and evaluations since then.
        written: records in the log.
        told: what there is to say of the beginning.
    """

    def __init__(
        self,
        recipe: Recipe,
        train_set: CocoDataset,
        val_set: CocoDataset,
        folder: Path,
        distributed: Distributed,
        resume: bool,
        begin_from: Path | None,
        about: Mapping[str, Any],
    ) -> None:
        settings = recipe.optimization
        _check(recipe, train_set, distributed)
        self.recipe, self.folder, self.distributed = recipe, folder, distributed
        self.train_set, self.val_set = train_set, val_set
        self.checkpoints = CheckpointFolder(folder / "checkpoints")
        self.told: list[str] = []
        found = self._open_folder(resume)
        seed_all(recipe.seed)
        # Weights that are loaded anyway need not be fetched.
        fresh = recipe if found is None and begin_from is None else recipe.without_pretraining()
        detector = Detector(fresh.model)
        if found is None and begin_from is not None:
            self.told.append(take_weights(detector, train_set.categories, begin_from))
        self.loader = make_loader(
            train_set,
            settings.batch_size // distributed.world_size,
            training=True,
            workers=recipe.workers,
            seed=recipe.seed,
            rank=distributed.rank,
            world_size=distributed.world_size,
        )
        # What else is drawn (stochastic depth) differs between processes, weights do not.
        seed_all(recipe.seed + distributed.rank)
        self.detector = detector.to(distributed.device)
        self.step = Step(self.detector, recipe, distributed, len(self.loader))
        self.total_steps = settings.epochs * len(self.loader)
        self.epoch = self.batch = self.stale = self.written = 0
        self.best_score = -math.inf
        self.records: Sequence[Tracker] = ()
        if found is not None:
            self._restore(found)
        if found is None:
            self.save()  # so that a folder that cannot be written to is found out now
        self.distributed.on_main(lambda: self._describe(about))

    @property
    def best_weights(self) -> Detector:
        """The model to evaluate and to keep: the average, where there is one."""
        model = self.step.average.average_model if self.step.average else self.detector
        assert isinstance(model, Detector)
        return model

    @contextmanager
    def recording(self, trackers: Sequence[Tracker]) -> Iterator[None]:
        """The log is open, on the main process."""
        if self.distributed.is_main:
            self.records = (JsonLines(self.folder / "log.jsonl", keep=self.written), *trackers)
        try:
            yield
        finally:
            for records in self.records:
                records.close()
            self.records = ()

    def go(self, progress: Progress, on_evaluation: OnEvaluation | None) -> CocoScores | None:
        """Train to the end; the scores of the last evaluation, if there was one."""
        recipe, scores = self.recipe, None
        epochs = recipe.optimization.epochs
        while self.epoch < epochs and not self._is_stale():
            self._train_epoch(progress)
            scores, done = None, self.epoch + 1
            if done == epochs or done % recipe.evaluate_every == 0:
                self.save()  # before the evaluation, which takes long and may fail
                scores = self.evaluate()
                self._write({"step": self.step.count, "epoch": done, "scores": to_json(scores)})
                if on_evaluation is not None and self.distributed.is_main:
                    on_evaluation(self.best_weights, scores, done)
                self.stale += 1
                if self.best_score < scores.AP:  # never where it is NaN: there are no objects
                    self.best_score, self.stale = scores.AP, 0
            self.epoch, self.batch = done, 0
            self.save(scores)
            # Last, since the clock of the steps starts anew after a note.
            progress.note(
                f"epoch {done} of {epochs}"
                + (f": AP {scores.AP:.4f}, AP50 {scores.AP50:.4f}" if scores else "")
            )
        if self._is_stale() and self.epoch < epochs:
            progress.note(
                f"Stopped after {self.epoch} of {epochs} epochs: no better AP than "
                f"{self.best_score:.4f} in {self.stale} evaluations."
            )
        return scores

    def _is_stale(self) -> bool:
        return 0 < self.recipe.patience <= self.stale

    def _train_epoch(self, progress: Progress) -> None:
        """What is left of a pass through the data."""
        self.loader.set_epoch(self.epoch, start=self.batch)
        self.detector.train()
        saved = time.monotonic()
        for batch in self.loader:
            record = self.step(batch.to(self.distributed.device, non_blocking=True))
            self.batch += 1
            self._write({"step": self.step.count, "epoch": self.epoch, **record})
            progress.update(self.step.count, record)
            if not math.isfinite(record["gradient_norm"]):
                progress.note(
                    f"Step {self.step.count} overflowed in float16 and was left out; the loss "
                    f"scale was {record['loss_scale']:g}."
                )
            due = time.monotonic() - saved >= 60 * self.recipe.save_minutes
            if self.batch < len(self.loader) and self.distributed.agree(due):
                self.save()
                saved = time.monotonic()

    def _write(self, record: Mapping[str, Any]) -> None:
        self.written += 1
        for records in self.records:
            records.write(record)

    def evaluate(self) -> CocoScores:
        """Scores of the model to keep."""
        return evaluate(
            self.best_weights,
            self.val_set,
            batch_size=self.recipe.optimization.batch_size,
            workers=self.recipe.workers,
            max_detections=self.recipe.max_detections,
            distributed=self.distributed,
        )

    def save(self, scores: CocoScores | None = None) -> None:
        """Write a checkpoint from which the run can go on, on the main process."""
        random = self.distributed.gather_objects(random_states())
        self.distributed.on_main(lambda: self._write_checkpoint(random, scores))

    def _write_checkpoint(self, random: list[Any], scores: CocoScores | None) -> None:
        categories = self.train_set.categories
        self.checkpoints.save(
            weights=self.best_weights.state_dict(),
            metadata={
                "config": to_json(self.recipe),
                "class_names": list(categories.names),
                "category_ids": list(categories.ids),
                "step": self.step.count,
                "metrics": {} if scores is None else _finite(to_json(scores)),
            },
            training_state={
                "step": self.step.state_dict(),
                "random": random,
                "epoch": self.epoch,
                "batch": self.batch,
                "best_score": self.best_score,
                "stale": self.stale,
                "written": self.written,
                "images": len(self.train_set),
                "device": self.distributed.device.type,
            },
            score=None if scores is None else scores.AP,
        )

    def _open_folder(self, resume: bool) -> Resumable | None:
        """What to go on from; the main process looks, and decides for all."""

        def look() -> tuple[Path, tuple[str, ...]] | None:
            remove_leftovers(self.folder)
            remove_leftovers(self.checkpoints.folder)
            if resume:
                found = self.checkpoints.resume()
                if found is None:
                    raise TrainingError(
                        f"{self.folder}: no checkpoint to resume from. Train without --resume."
                    )
                return found.path, found.passed
            if any(self.checkpoints.folder.glob("*")):
                raise TrainingError(
                    f"{self.folder} holds the checkpoints of another run, which is left as it is. "
                    "Resume it (--resume), or choose another folder (--output)."
                )
            if self.folder.exists() and not _is_unused(self.folder):
                raise TrainingError(
                    f"{self.folder} is not an empty folder; what is in it is left as it is. Choose "
                    "another folder (--output), or empty this one."
                )
            return None

        found = self.distributed.on_main(look)
        if found is None:
            return None
        path, passed = found
        for reason in passed:
            self.told.append(f"warning: {reason} It is passed over.")
        return Resumable(path, load_training_state(path))

    def _restore(self, found: Resumable) -> None:
        path, state = found.path, found.state
        self._check_same(path, state)
        self.step.load_state_dict(state["step"])
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self.best_score, self.stale = float(state["best_score"]), int(state["stale"])
        self.written = int(state["written"])
        weights = self.best_weights.state_dict()
        for text in self.distributed.on_main(lambda: self.checkpoints.complete(found, weights)):
            self.told.append(f"warning: {text}")
        set_random_states(state["random"][self.distributed.rank])
        self.told.append(
            f"Resumed after step {self.step.count} of {self.total_steps}, from {path.name}."
        )

    def _check_same(self, path: Path, state: Mapping[str, Any]) -> None:
        """Raise unless the run that wrote the checkpoint is this one."""
        config = json.loads(state["folder"]["metadata"])["config"]
        try:
            stored: Recipe | None = from_json(Recipe, config)
        except ConfigurationError:
            stored = None
        # These two decide nothing of what a run ends with.
        mine = self.recipe
        if (
            stored is None
            or replace(stored, workers=mine.workers, save_minutes=mine.save_minutes) != mine
        ):
            raise TrainingError(
                f"{path} was trained with another configuration. Resume with that of "
                f"{self.folder / 'config.json'}, or begin a new run."
            )
        processes, images = self.distributed.world_size, len(self.train_set)
        if len(state["random"]) != processes:
            raise TrainingError(
                f"{path} was written by {len(state['random'])} processes and there are "
                f"{processes} now. Resume with as many as before."
            )
        if state["images"] != images:
            raise TrainingError(
                f"{path} was trained on {state['images']} images and there are {images} now. "
                "Resume with the same data, or begin a new run from these weights."
            )
        if state["device"] != self.distributed.device.type:
            self.told.append(
                f"warning: the run was on {state['device']} and goes on on "
                f"{self.distributed.device.type}: it will not end with the same bits."
            )

    def _describe(self, about: Mapping[str, Any]) -> None:
        """Say in the folder what the run is and where it comes from."""
        config = self.folder / "config.json"
        if not config.exists():
            with replacing(config) as temporary:
                text = json.dumps(to_json(self.recipe), indent=2) + "\n"
                temporary.write_text(text, encoding="utf-8")
        write_provenance(self.folder / "run.json", self.distributed, about)


def _is_unused(folder: Path) -> bool:
    """Whether nothing is in a folder but what a run leaves that was killed as it began."""
    return folder.is_dir() and all(
        path.name == "checkpoints" and path.is_dir() for path in folder.iterdir()
    )


def _check(recipe: Recipe, train_set: CocoDataset, distributed: Distributed) -> None:
    classes, settings = recipe.model.layer.num_classes, recipe.optimization
    if classes != len(train_set.categories):
        raise TrainingError(
            f"The recipe has {classes} classes and the data {len(train_set.categories)}: use "
            "recipe.for_classes(len(dataset.categories))."
        )
    if settings.batch_size % (distributed.world_size * settings.accumulate):
        parts = f", each in {settings.accumulate} parts" if settings.accumulate > 1 else ""
        raise TrainingError(
            f"A batch of {settings.batch_size} images cannot be shared by "
            f"{distributed.world_size} processes{parts}: choose a multiple of "
            f"{distributed.world_size * settings.accumulate}."
        )


def _finite(value: Any) -> Any:
    """JSON without NaN (an AP of a size that no object has)."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
