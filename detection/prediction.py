"""From images to detections: of a data set, or of files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from detection.data.coco import CocoDataset
from detection.data.images import read_image
from detection.data.loading import collate, make_loader
from detection.data.transforms import AugmentationConfig, eval_transform
from detection.data.types import Batch, Target
from detection.detections import Detections, select_detections
from detection.distributed import Distributed
from detection.evaluation import CocoScores, evaluate_coco
from detection.models.detector import Detector


@torch.inference_mode()
def detect(
    model: Detector, batches: Iterable[Batch], max_detections: int = 100
) -> Iterator[tuple[Target, Detections]]:
    """Detections of every image of some batches, in pixels of the original images."""
    device = next(model.parameters()).device
    model.eval()
    for batch in batches:
        batch = batch.to(device, non_blocking=True)
        output = model(batch.images, batch.sizes)
        found = select_detections(
            output.logits,
            output.boxes,
            batch.sizes,
            [target.original_size for target in batch.targets],
            max_detections,
        )
        yield from zip(batch.targets, found, strict=True)


def evaluate(
    model: Detector,
    dataset: CocoDataset,
    *,
    batch_size: int = 16,
    workers: int = 0,
    max_detections: int = 100,
    distributed: Distributed | None = None,
) -> CocoScores:
    """COCO metrics of a model on a data set; every process gets the scores of the whole."""
    distributed = distributed or Distributed()
    loader = make_loader(
        dataset,
        batch_size,
        training=False,
        workers=workers,
        seed=0,
        rank=distributed.rank,
        world_size=distributed.world_size,
    )
    mine = [
        result
        for target, detections in detect(model, loader, max_detections)
        for result in detections.to_coco(target.image_id, dataset.categories)
    ]
    results = [result for part in distributed.gather_objects(mine) for result in part]
    return evaluate_coco(
        dataset.coco,
        results,
        dataset.categories,
        dataset.image_ids,
        max_detections=max(100, max_detections),
    )


def predict(
    model: Detector,
    paths: Sequence[Path | str],
    size: AugmentationConfig,
    max_detections: int = 100,
) -> list[Detections]:
    """Detections on image files, each by itself, in the order of the paths.

    Args:
        model: a trained detector.
        paths: image files; all are read before the model runs, so a bad one costs nothing.
        size: how the training resized images.
        max_detections: kept per image.

    Raises:
        DataError: if a file is missing or is no whole image.
    """
    transform = eval_transform(size)
    images = [read_image(Path(path)) for path in paths]
    batches = []
    for number, image in enumerate(images):
        size_of_file = (image.shape[-2], image.shape[-1])
        empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), number, size_of_file)
        batches.append(collate([transform(image, empty)]))
    return [detections for _, detections in detect(model, batches, max_detections)]
