"""From images to detections: of a data set, or of images wherever they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import implicit
from detection.data.coco import CocoDataset
from detection.data.loading import collate, make_loader, padded_size
from detection.data.transforms import AugmentationConfig, EvalTransform, eval_transform
from detection.data.types import Batch, Target
from detection.detections import Detections, select_detections
from detection.distributed import Distributed
from detection.evaluation import CocoScores, evaluate_coco
from detection.models.decoders import Output
from detection.models.detector import Detector
from detection.sources import ImageLike, NamedImage


def detect(
    model: Detector,
    batches: Iterable[Batch],
    max_detections: int = 100,
    *,
    stop: implicit.Steps | implicit.Tolerance | None = None,
) -> Iterator[tuple[Target, Detections]]:
    """Detections of every image of some batches, in pixels of the original images.

    Args:
        model: put in evaluation mode.
        batches: of images and their targets, of which the original sizes are used.
        max_detections: kept per image.
        stop: when to stop refining, where a fixed point is solved for; by default as configured.
    """
    device = next(model.parameters()).device
    model.eval()
    for batch in batches:
        batch = batch.to(device, non_blocking=True)
        with torch.inference_mode():
            output = model(batch.images, batch.sizes, stop=stop)
        yield from zip(batch.targets, read_output(output, batch, max_detections), strict=True)


def read_output(output: Output, batch: Batch, max_detections: int) -> list[Detections]:
    """The detections of each image of a batch, with how it was refined."""
    found = select_detections(
        output.logits,
        output.boxes,
        batch.sizes,
        [target.original_size for target in batch.targets],
        max_detections,
    )
    if output.steps is None or output.relative_residual is None:
        return found
    refined = zip(output.steps.tolist(), output.relative_residual.tolist(), strict=True)
    return [
        replace(detections, steps=steps, residual=residual)
        for detections, (steps, residual) in zip(found, refined, strict=True)
    ]


def evaluate(
    model: Detector,
    dataset: CocoDataset,
    *,
    batch_size: int = 16,
    workers: int = 0,
    max_detections: int = 100,
    stop: implicit.Steps | implicit.Tolerance | None = None,
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
        for target, detections in detect(model, loader, max_detections, stop=stop)
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
    images: Sequence[ImageLike | NamedImage],
    size: AugmentationConfig,
    max_detections: int = 100,
    *,
    batch_size: int = 1,
    stop: implicit.Steps | implicit.Tolerance | None = None,
) -> list[Detections]:
    """Detections in images, in their order.

    What is found in an image does not depend on the others: only images that are padded to the
    same size share a batch, and no more of them are in memory than wait for a batch.

    Args:
        model: a trained detector.
        images: whatever `detection.sources.read_image_of` takes.  A path that leads nowhere is
            told of before the model runs, a damaged file when its turn comes.
        size: how the training resized images.
        max_detections: kept per image.
        batch_size: images that go through the model together.
        stop: as for `detect`.

    Raises:
        DataError: if a file is missing or is no whole image, naming it.
        ValueError: if ``batch_size`` or ``max_detections`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1.")
    named = [NamedImage.of(image, place) for place, image in enumerate(images)]
    found: dict[int, Detections] = {}
    batches = _batches(named, eval_transform(size), batch_size)
    for target, detections in detect(model, batches, max_detections, stop=stop):
        place = target.image_id
        found[place] = replace(detections, source=named[place])
    return [found[place] for place in range(len(named))]


def sample(image: NamedImage, transform: EvalTransform, place: int = 0) -> tuple[Tensor, Target]:
    """An image as evaluation would see it, under the number ``place``."""
    pixels = image.read()
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    return transform(pixels, Target(*nothing, place, (pixels.shape[1], pixels.shape[2])))


def _batches(
    images: Sequence[NamedImage], transform: EvalTransform, batch_size: int
) -> Iterator[Batch]:
    """Batches of images that are padded to the same size."""
    waiting: dict[tuple[int, int], list[tuple[Tensor, Target]]] = {}
    for place, image in enumerate(images):
        pixels, target = sample(image, transform, place)
        key = padded_size((pixels.shape[1], pixels.shape[2]))
        group = waiting.setdefault(key, [])
        group.append((pixels, target))
        if len(group) == batch_size:
            yield collate(waiting.pop(key))
    yield from map(collate, waiting.values())
