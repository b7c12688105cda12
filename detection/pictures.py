"""The pictures that a run ends with: detections, a film of the refinement, curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from detection.curves import plot_training
from detection.data.coco import CocoDataset
from detection.data.images import read_image
from detection.data.loading import collate
from detection.data.types import Batch, Categories, Target
from detection.detections import Detections
from detection.models.decoders import EquilibriumDecoder
from detection.models.detector import Detector
from detection.prediction import detect
from detection.training.matching import image_extent
from detection.training.progress import read_json_lines
from detection.visualization import contact_sheet, draw_detections, refinement_film, save_image

SHOWN = 16
"""Validation images on the page, and for the residuals."""
SHORT_SIDE = 360
"""Small images are enlarged to about this many pixels, so that labels can be read."""


def draw_run(
    model: Detector, dataset: CocoDataset, folder: Path, threshold: float = 0.3
) -> list[Path]:
    """Draw a trained model on its validation set; returns the files, all in ``folder``.

    - ``validation.png``: the first images with predicted and true boxes;
    - ``refinement.gif``: the boxes of the image with the most objects, refinement by refinement;
    - ``training.png``: loss, gradient norm, and the relative residual over the refinements.

    Args:
        model: a trained detector.
        dataset: validation set with its transform.
        folder: of the run; its ``log.jsonl`` is read.
        threshold: lowest score that is drawn.
    """
    page, film, curves = (folder / n for n in ("validation.png", "refinement.gif", "training.png"))
    draw_validation(model, dataset, page, threshold)
    batches = _first(dataset)
    busiest = max(batches, key=lambda batch: len(batch.targets[0].labels))
    _film(model, busiest, dataset.categories, film)
    plot_training(read_json_lines(folder / "log.jsonl"), residuals(model, batches), curves)
    return [page, film, curves]


def draw_validation(
    model: Detector, dataset: CocoDataset, path: Path, threshold: float = 0.3
) -> None:
    """Draw the first images of a validation set with predicted and true boxes on one page.

    Args:
        model: a detector.
        dataset: validation set with its transform.
        path: of the picture; its ending names the format.
        threshold: lowest score that is drawn.
    """
    batches = _first(dataset)
    pictures = [
        draw_image(dataset, i, detections, true_boxes(target, batches[i].sizes[0]), threshold)
        for i, (target, detections) in enumerate(detect(model, batches))
    ]
    title = f"Validation: solid boxes are predictions above {threshold}, dashed ones are true"
    save_image(contact_sheet(pictures, columns=4, title=title), path)


def draw_image(
    dataset: CocoDataset,
    place: int,
    detections: Detections,
    truth: tuple[Tensor, Tensor],
    threshold: float,
) -> Image.Image:
    """An image of a data set with what was found in it and what is there, enlarged if small."""
    image = read_image(dataset.path(place), dataset.sizes[place])
    return draw_detections(
        image,
        detections,
        dataset.categories,
        truth=truth,
        threshold=threshold,
        scale=enlargement(image),
    )


def true_boxes(target: Target, size: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes ``(G, 4)`` in pixels of the original image, and labels, of a transformed image.

    Args:
        target: its boxes are in pixels of the transformed image.
        size: ``(2,)`` int (h, w) of that.
    """
    return target.boxes * to_original(target, size), target.labels


def to_original(target: Target, size: Tensor) -> Tensor:
    """``(4,)`` factors from boxes of an image transformed to ``size (2,)`` to the original's."""
    height, width = target.original_size
    extent = torch.tensor([width, height, width, height])
    return (extent / image_extent(size[None].cpu()))[0]


@torch.inference_mode()
def refinements(model: Detector, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes ``(N, 4)``, scores and labels ``(N,)`` of the best class, after every layer call.

    Args:
        model: a detector.
        batch: of one image, in whose pixels the boxes are.
    """
    batch = batch.to(next(model.parameters()).device)
    found = []
    for output in model.decoder.trajectory(*model.encode(batch.images, batch.sizes)):
        scores, labels = output.logits[0].float().sigmoid().max(dim=-1)
        found.append((output.boxes[0].cpu(), scores.cpu(), labels.cpu()))
    return found


def _first(dataset: CocoDataset) -> list[Batch]:
    return [collate([dataset[i]]) for i in range(min(SHOWN, len(dataset)))]


def _film(model: Detector, batch: Batch, categories: Categories, path: Path) -> None:
    """Every query with its best class, after every refinement of the only image of a batch."""
    (height, width), image = batch.sizes[0].tolist(), batch.images[0]
    image = image[:, :height, :width]
    boxes, scores, labels = zip(*refinements(model, batch), strict=True)
    refinement_film(
        image,
        boxes,
        scores,
        labels,
        categories,
        path,
        scale=enlargement(image),
    )


@torch.inference_mode()
def residuals(model: Detector, batches: Sequence[Batch]) -> Tensor | None:
    """``(T, images)`` relative residual at each refinement, of a decoder that solves for one."""
    if not isinstance(model.decoder, EquilibriumDecoder):
        return None
    columns = []
    for batch in batches:
        batch = batch.to(next(model.parameters()).device)
        encoded = model.encode(batch.images, batch.sizes)
        # Of all steps, also of images whose detections have settled.
        output = model.decoder(*encoded, stop=model.decoder.config.fixed_stop, trace=True)
        columns.append(output.residual)
    return torch.cat(columns, dim=1).cpu()


def enlargement(image: Tensor) -> float:
    """How much to enlarge an image ``(3, H, W)`` so that labels can be read on it."""
    return max(1.0, min(SHORT_SIDE / min(image.shape[1:]), 2000 / max(image.shape[1:])))
