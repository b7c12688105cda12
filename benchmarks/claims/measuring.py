"""What is measured of a training run beside its scores: time, memory, the course of gradients."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

import torch

from benchmarks.claims.paths import rounded
from benchmarks.counts import peak_bytes
from detection.data.coco import CocoDataset
from detection.data.loading import make_loader
from detection.data.types import Batch
from detection.distributed import Distributed
from detection.models.detector import Detector
from detection.training.recipe import Recipe
from detection.training.step import Step

WINDOWS = 120
"""Windows that the history of a run is thinned to."""


class Clock:
    """Times the steps of a run, over all its sessions.

    Args:
        path: where the seconds are kept.
    """

    def __init__(self, path: Path) -> None:
        self.last = self.now()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Line by line: what a process that is killed has measured is kept.
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Take the time since the record before."""
        taken = [now - last for now, last in zip(self.now(), self.last, strict=True)]
        if "scores" not in record:
            self.file.write(json.dumps(taken) + "\n")
        self.last = self.now()

    def close(self) -> None:
        """The training is over."""
        self.file.close()

    @staticmethod
    def now() -> tuple[float, float]:
        """Seconds of the clock on the wall, and of all processors in this process."""
        return time.perf_counter(), time.process_time()

    def medians(self) -> tuple[float, float]:
        """Seconds of a step, of both clocks; what interrupts a few of them does not count.

        They are NaN where no step was timed.
        """
        taken = list(self._taken())
        if not taken:
            return math.nan, math.nan
        wall, processor = zip(*taken, strict=True)
        return median(wall), median(processor)

    def _taken(self) -> Iterator[tuple[float, float]]:
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError):  # a line that was cut short
                wall, processor = map(float, json.loads(line))
                yield wall, processor


def history(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """What happened over training, in at most `WINDOWS` windows of equal length."""
    length = max(1, -(-len(steps) // WINDOWS))
    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        found.setdefault(name, []).append(rounded(value))

    for start in range(0, len(steps), length):
        window = steps[start : start + length]
        norms = [float(step["gradient_norm"]) for step in window]
        found.setdefault("step", []).append(int(window[-1]["step"]))
        add("loss", fmean(float(step["loss"]) for step in window))
        add("norm", fmean(norms))
        add("norm_deviation", pstdev(norms))
        add("norm_most", max(norms))
        if "residual" in window[0]:
            add("residual", fmean(float(step["residual"]) for step in window))
    return found


def memory(
    model: Detector, recipe: Recipe, train_set: CocoDataset, distributed: Distributed
) -> dict[str, int]:
    """Bytes held at the peak of a training step and of the inference of an image."""
    device = distributed.device
    image = next(first_batches(train_set, recipe, 1)).to(device)
    model.eval()
    with torch.inference_mode():
        inferred = peak_bytes(lambda: model(image.images, image.sizes)) + size_of(model)
    detector = Detector(recipe.without_pretraining().model).to(device)
    detector.load_state_dict(model.state_dict())
    step = Step(detector, replace(recipe, average=0.0), distributed, 1000)
    batch = next(first_batches(train_set, recipe, recipe.optimization.batch_size)).to(device)
    detector.train()
    step(batch)  # makes the states of the optimiser
    states = [t for state in step.optimizer.state.values() for t in state.values()]
    held = size_of(detector) + sum(tensor.nbytes for tensor in states)
    return {"train": peak_bytes(lambda: step(batch)) + held, "inference": inferred}


def size_of(model: Detector) -> int:
    """Bytes of the weights and buffers."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def first_batches(train_set: CocoDataset, recipe: Recipe, size: int) -> Iterator[Batch]:
    """Batches of training images, of a size."""
    loader = make_loader(train_set, size, training=True, workers=0, seed=recipe.seed)
    loader.set_epoch(0)
    return iter(loader)
