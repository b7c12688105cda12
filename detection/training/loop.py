"""The training loop: it reads from top to bottom, and its backward pass is ``loss.backward()``.

One run lives in one folder: ``config.json``, ``log.jsonl`` and ``checkpoints/``.  The same code
trains on the embedded digits and on COCO, on CPU and CUDA, alone and under ``torchrun``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detection.checkpoints import (
    CheckpointFolder,
    load_training_state,
    load_weights,
    random_states,
    restore,
    set_random_states,
)
from detection.configuration import to_json
from detection.data.coco import CocoDataset
from detection.data.loading import BatchLoader, make_loader
from detection.data.types import Batch, Categories
from detection.distributed import Distributed
from detection.evaluation import CocoScores
from detection.models.decoders import Supervised
from detection.models.detector import Detector
from detection.prediction import evaluate
from detection.training.losses import Criterion, matched_queries
from detection.training.optimization import (
    ExponentialAverage,
    clip_gradients,
    make_optimizer,
    make_schedule,
)
from detection.training.progress import JsonLines, Progress
from detection.training.recipe import Recipe


class TrainingError(RuntimeError):
    """Training cannot go on; names the images and what to do."""


@dataclass
class Trained:
    """What a run ends with: the model to use, its scores, its folder."""

    model: Detector
    scores: CocoScores
    folder: Path


class Objective(nn.Module):
    """The loss of a batch as a module, so that DistributedDataParallel can wrap it."""

    def __init__(self, detector: Detector, recipe: Recipe, distributed: Distributed) -> None:
        super().__init__()
        self.detector, self.recipe, self.distributed = detector, recipe, distributed

    def forward(self, batch: Batch, generator: torch.Generator) -> Supervised:
        criterion = Criterion(
            batch.targets,
            batch.sizes,
            self.recipe.loss,
            self.recipe.cost,
            matched_queries(batch.targets, self.recipe.model.num_queries, self.distributed),
        )
        return self.detector.losses(batch.images, batch.sizes, criterion, generator)


def train(
    recipe: Recipe,
    train_set: CocoDataset,
    val_set: CocoDataset,
    folder: Path,
    *,
    distributed: Distributed | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> Trained:
    """Train a detector and evaluate it.

    Args:
        recipe: what to train and how; its number of classes must be that of the data.
        train_set: to learn from.
        val_set: to evaluate on.
        folder: of the run; must be new or empty unless ``resume``.
        distributed: the processes; one on the CPU by default.
        resume: go on from the last checkpoint in ``folder``.
        console: where progress is shown.

    Raises:
        TrainingError: if a loss or gradient is not finite, if the folder holds another run, or
            there is nothing to resume.
    """
    distributed = distributed or Distributed()
    run = _Run(recipe, train_set, folder, distributed, resume)
    scores = None
    with (
        JsonLines(folder / "log.jsonl", run.step) if distributed.is_main else _NoLog() as log,
        Progress(
            run.total_steps, done_steps=run.step, quiet=not distributed.is_main, console=console
        ) as progress,
    ):
        for epoch in range(run.epoch, recipe.optimization.epochs):
            run.train_epoch(epoch, log, progress)
            scores = None
            last = epoch + 1 == recipe.optimization.epochs
            run.save(epoch + 1)  # before the evaluation, which may fail
            if last or (epoch + 1) % recipe.evaluate_every == 0:
                scores = run.evaluate(val_set)
                log.write({"step": run.step, "epoch": epoch + 1, "scores": to_json(scores)})
                run.save(epoch + 1, scores)
            # Last, since the clock of the steps starts anew after a note.
            progress.note(
                f"epoch {epoch + 1} of {recipe.optimization.epochs}"
                + (f": AP {scores.AP:.4f}, AP50 {scores.AP50:.4f}" if scores else "")
            )
        if scores is None:  # resumed after its last epoch, whose evaluation may have been cut off
            scores = run.evaluate(val_set)
            if run.unscored:
                log.write({"step": run.step, "epoch": run.epoch, "scores": to_json(scores)})
                run.save(run.epoch, scores)
    return Trained(run.best_weights, scores, folder)


class _Run:
    """Everything that changes while a run goes on."""

    def __init__(
        self,
        recipe: Recipe,
        train_set: CocoDataset,
        folder: Path,
        distributed: Distributed,
        resume: bool,
    ) -> None:
        settings, device = recipe.optimization, distributed.device
        _check(recipe, train_set.categories, distributed)
        checkpoints = CheckpointFolder(folder / "checkpoints")
        previous = checkpoints.latest()
        if resume and previous is None:
            raise TrainingError(f"{folder}: no checkpoint to resume from. Train without --resume.")
        if not resume and previous is not None:
            raise TrainingError(
                f"{folder} holds the checkpoints of another run, which is left as it is. Resume "
                "it (--resume), or choose another folder (--output)."
            )
        if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise TrainingError(
                f"{folder} is not an empty folder; what is in it is left as it is. Choose another "
                "folder (--output), or empty this one."
            )
        torch.manual_seed(recipe.seed)
        self.recipe, self.distributed, self.checkpoints = recipe, distributed, checkpoints
        self.categories = train_set.categories
        self.detector = Detector(recipe.model).to(device)
        self.optimizer = make_optimizer(self.detector, settings)
        self.average = ExponentialAverage(self.detector, recipe.average) if recipe.average else None
        self.objective: Callable[[Batch, torch.Generator], Supervised]
        self.objective = Objective(self.detector, recipe, distributed).train()
        if distributed.world_size > 1:
            self.objective = DistributedDataParallel(
                Objective(self.detector, recipe, distributed).train(),
                device_ids=[device.index] if device.type == "cuda" else None,
            )
        self.loader: BatchLoader = make_loader(
            train_set,
            settings.batch_size // distributed.world_size,
            training=True,
            workers=recipe.workers,
            seed=recipe.seed,
            rank=distributed.rank,
            world_size=distributed.world_size,
        )
        self.schedule = make_schedule(self.optimizer, settings, len(self.loader))
        self.total_steps = settings.epochs * len(self.loader)
        self.step = self.epoch = 0
        self.unscored = False
        # Noise differs between processes, weights do not.
        self.generator = torch.Generator(device).manual_seed(recipe.seed + 1 + distributed.rank)
        if previous is not None:
            self._restore(previous)
        elif distributed.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(
                json.dumps(to_json(recipe), indent=2) + "\n", encoding="utf-8"
            )

    @property
    def best_weights(self) -> Detector:
        """The model to evaluate and to keep: the average, where there is one."""
        model = self.average.average_model if self.average else self.detector
        assert isinstance(model, Detector)
        return model

    def train_epoch(self, epoch: int, log: JsonLines | _NoLog, progress: Progress) -> None:
        """One pass through the data."""
        self.loader.set_epoch(epoch)
        self.detector.train()
        for batch in self.loader:
            record = self._train_step(batch.to(self.distributed.device, non_blocking=True))
            self.step += 1
            log.write({"step": self.step, "epoch": epoch, **record})
            progress.update(self.step, record)

    def _train_step(self, batch: Batch) -> dict[str, float]:
        lr = self.optimizer.param_groups[-1]["lr"]
        supervised = self.objective(batch, self.generator)
        supervised.total.backward()
        norm = clip_gradients(self.optimizer, self.recipe.optimization.clip_norm)
        record = _to_host(
            {"loss": supervised.total.detach(), **supervised.parts, "gradient_norm": norm}
        )
        if not all(map(math.isfinite, record.values())):
            self._refuse(batch, record, supervised)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.average:
            self.average.update(self.detector)
        return {**record, "lr": lr}

    def _refuse(self, batch: Batch, record: dict[str, float], supervised: Supervised) -> None:
        ids = ", ".join(str(target.image_id) for target in batch.targets)
        outputs = ", ".join(f"{k} {float(v):.3g}" for k, v in supervised.losses.items())
        raise TrainingError(
            f"Step {self.step + 1}: loss {record['loss']:.4g}, gradient norm "
            f"{record['gradient_norm']:.4g}; losses by output: {outputs}. Image ids: {ids}. "
            f"The last checkpoint is kept in {self.checkpoints.folder}. What helps: a lower "
            "learning rate, a longer warm-up, or looking at the annotations of these images."
        )

    def evaluate(self, dataset: CocoDataset) -> CocoScores:
        """Scores of the model to keep."""
        return evaluate(
            self.best_weights,
            dataset,
            batch_size=self.recipe.optimization.batch_size,
            workers=self.recipe.workers,
            max_detections=self.recipe.max_detections,
            distributed=self.distributed,
        )

    def save(self, epoch: int, scores: CocoScores | None = None) -> None:
        """Write a checkpoint from which the run can go on, on the main process."""
        random = self.distributed.gather_objects(
            {"global": random_states(), "noise": self.generator.get_state()}
        )
        if not self.distributed.is_main:
            return
        self.checkpoints.save(
            weights=self.best_weights.state_dict(),
            metadata={
                "config": to_json(self.recipe),
                "class_names": list(self.categories.names),
                "category_ids": list(self.categories.ids),
                "step": self.step,
                "metrics": {} if scores is None else _finite(to_json(scores)),
            },
            training_state={
                "model": self.detector.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "average": self.average.state_dict() if self.average else None,
                "random": random,
                "epoch": epoch,
                "step": self.step,
            },
            score=None if scores is None else scores.AP,
        )

    def _restore(self, path: Path) -> None:
        _, metadata = load_weights(path)
        if metadata["config"] != json.loads(json.dumps(to_json(self.recipe))):
            raise TrainingError(
                f"{path} was trained with another configuration. Resume with that of "
                f"{path.parent.parent / 'config.json'}, or begin a new run."
            )
        self.unscored = not metadata["metrics"]
        state = load_training_state(path)
        restore(self.detector, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.step, self.epoch = int(state["step"]), int(state["epoch"])
        if len(state["random"]) != self.distributed.world_size:
            raise TrainingError(
                f"{path} was written by {len(state['random'])} processes and there are "
                f"{self.distributed.world_size} now. Resume with as many as before."
            )
        mine = state["random"][self.distributed.rank]
        set_random_states(mine["global"])
        self.generator.set_state(mine["noise"])


class _NoLog:
    """The log of processes that write none."""

    def __enter__(self) -> _NoLog:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, record: Mapping[str, Any]) -> None:
        """Nothing."""


def _check(recipe: Recipe, categories: Categories, distributed: Distributed) -> None:
    classes = recipe.model.layer.num_classes
    if classes != len(categories):
        raise TrainingError(
            f"The recipe has {classes} classes and the data {len(categories)}: use "
            "recipe.for_classes(len(dataset.categories))."
        )
    if recipe.optimization.batch_size % distributed.world_size:
        raise TrainingError(
            f"A batch of {recipe.optimization.batch_size} images cannot be shared by "
            f"{distributed.world_size} processes: choose a multiple of it."
        )


def _to_host(values: Mapping[str, Tensor]) -> dict[str, float]:
    """All values in one transfer."""
    numbers = torch.stack([value.float().reshape(()) for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


def _finite(value: Any) -> Any:
    """JSON without NaN (an AP of a size that no object has)."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
