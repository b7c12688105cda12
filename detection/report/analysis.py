"""What the best checkpoint of a run does on its validation set, looked at from several sides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from detection.data.coco import CocoDataset
from detection.data.loading import collate, make_loader
from detection.detections import Detections
from detection.evaluation import CocoScores, evaluate_coco
from detection.pictures import residuals, true_boxes
from detection.prediction import detect
from detection.predictor import Predictor
from detection.report.confusion import Pairs, confusion_matrix, pair
from detection.report.film import Film, film

PICTURES = 12
"""Images of each gallery, and for the residuals."""
FILMS = 4


@dataclass(frozen=True)
class Image:
    """One image of the validation set: what is there, and what was found.

    Attributes:
        place: in the data set.
        truth: boxes ``(G, 4)`` in pixels of the original image, and labels ``(G,)``.
        pairs: objects and detections from the threshold on.
    """

    place: int
    detections: Detections
    truth: tuple[Tensor, Tensor]
    pairs: Pairs


@dataclass(frozen=True)
class Analysis:
    """What a report tells of a model.

    Attributes:
        scores: COCO's metrics.
        images: all of the data set, in its order.
        confusion: see `detection.report.confusion.confusion_matrix`.
        films: of the images with the most objects.
        residuals: ``(T, images)`` relative residual of some images at each refinement; `None`
            where nothing is solved.
    """

    scores: CocoScores
    images: Sequence[Image]
    confusion: Tensor
    films: Sequence[Film]
    residuals: Tensor | None

    def hardest(self, count: int) -> list[Image]:
        """The images with the most mistakes, worst first; none without any."""
        wrong = [image for image in self.images if image.pairs.mistakes]
        return sorted(wrong, key=lambda image: -image.pairs.mistakes)[:count]


def analyse(model: Predictor, dataset: CocoDataset, threshold: float, console: Console) -> Analysis:
    """Detect in every image of a data set once, and draw everything from that.

    Args:
        model: what is looked at.
        dataset: with the model's classes and its transform for evaluation.
        threshold: lowest score that counts as found, in confusions and mistakes.
        console: for a bar of progress.
    """
    images = list(_images(model, dataset, threshold, console))
    results = [
        record
        for image in images
        for record in image.detections.to_coco(dataset.image_ids[image.place], dataset.categories)
    ]
    scores = evaluate_coco(
        dataset.coco,
        results,
        dataset.categories,
        dataset.image_ids,
        max_detections=max(100, model.recipe.max_detections),
    )
    busiest = sorted(images, key=lambda image: -len(image.truth[1]))[:FILMS]
    some = [collate([dataset[i]]) for i in range(min(PICTURES, len(dataset)))]
    return Analysis(
        scores,
        images,
        confusion_matrix([image.pairs for image in images], len(dataset.categories)),
        [film(model.detector, dataset, image.place) for image in busiest],
        residuals(model.detector, some),
    )


def _images(
    model: Predictor, dataset: CocoDataset, threshold: float, console: Console
) -> list[Image]:
    """Every image of the data set, in its order."""
    loader = make_loader(
        dataset,
        model.recipe.optimization.batch_size,
        training=False,
        workers=min(model.recipe.workers, os.cpu_count() or 1),
        seed=0,
    )
    places = {image_id: place for place, image_id in enumerate(dataset.image_ids)}
    images = []
    for batch in track(loader, "Detecting", console=console, transient=True):
        found = detect(model.detector, [batch], model.recipe.max_detections)
        for size, (target, detections) in zip(batch.sizes, found, strict=True):
            place, truth = places[target.image_id], true_boxes(target, size)
            pairs = pair(
                detections,
                *truth,
                len(dataset.categories),
                threshold=threshold,
                crowds=_crowds(dataset, place),
            )
            images.append(Image(place, detections, truth, pairs))
    return sorted(images, key=lambda image: image.place)


def _crowds(dataset: CocoDataset, place: int) -> Tensor:
    """``(C, 4)`` xyxy boxes of the crowd regions of an image."""
    records = dataset.coco.imgToAnns.get(dataset.image_ids[place], ())
    boxes = [record["bbox"] for record in records if record.get("iscrowd", 0)]
    regions = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return torch.cat([regions[:, :2], regions[:, :2] + regions[:, 2:]], dim=1)
