"""What a trained detector does when it refines further, less, from elsewhere, or by Anderson.

Each image is refined once, 25 times, by the naive solver and once by Anderson; the answers that
fixed numbers of steps, tolerances and ``steps="auto"`` would have given are read from these paths.
The tied layer of RNNDet is walked beyond its training in the same way.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import implicit
from benchmarks.claims.fixed_points import closer
from benchmarks.claims.paths import ANDERSON, Path, rounded
from benchmarks.measure import seconds
from detection.data.coco import CocoDataset
from detection.data.loading import collate, make_loader
from detection.data.types import Batch
from detection.detections import Detections
from detection.evaluation import evaluate_coco
from detection.models.config import MOST_STEPS
from detection.models.decoders import EquilibriumDecoder, RecurrentDecoder
from detection.models.detector import Detector
from detection.prediction import read_output

NAIVE_STEPS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25)
ANDERSON_STEPS = (4, 6, 8, 12, 16, 25)
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3)
RATES = (6, 8, 16, 25)
PERCENTILES = (5, 25, 50, 75, 95)

Read = tuple[int, Detections]
"""The id of an image and what was found in it: compact until it is scored."""
Settings = dict[tuple[str, str], Callable[[Path], list[int]]]


def study(model: Detector, dataset: CocoDataset, most: int, sample: int) -> dict[str, Any]:
    """AP by refinements, residuals, and whether there is a fixed point.

    Args:
        model: trained.
        dataset: the validation images.
        most: detections kept per image.
        sample: images for a closer look.

    Returns:
        ``curve``: points of ``kind``, ``setting``, ``AP``, ``AP50`` and mean ``steps``;
        ``residuals``: percentiles over the images, by step; ``fixed_point``: see `closer`.
    """
    model.eval()
    if not isinstance(model.decoder, (EquilibriumDecoder, RecurrentDecoder)):
        return {"curve": _stacked_curve(model, dataset, most)}
    curve, residuals = _curve(model, dataset, most, implicit.Naive(), _naive(model))
    if isinstance(model.decoder, EquilibriumDecoder):
        more, _ = _curve(model, dataset, most, ANDERSON, _anderson())
        curve += more
    return {
        "curve": curve,
        "residuals": residuals,
        "fixed_point": [closer(model, batch) for batch in _first_images(model, dataset, sample)],
    }


def _naive(model: Detector) -> Settings:
    found: Settings = {("naive", str(n)): lambda path, n=n: path.fixed(n) for n in NAIVE_STEPS}
    if isinstance(model.decoder, EquilibriumDecoder):
        for rtol in TOLERANCES:
            key = "naive, tolerance", f"{rtol:g}"
            found[key] = lambda path, rtol=rtol: path.within(rtol)
        found["auto", "settled"] = Path.settled
    return found


def _anderson() -> Settings:
    found: Settings = {("Anderson", str(n)): lambda path, n=n: path.best(n) for n in ANDERSON_STEPS}
    for rtol in TOLERANCES:
        key = "Anderson, tolerance", f"{rtol:g}"
        found[key] = lambda path, rtol=rtol: path.within_or_best(rtol)
    return found


def _curve(
    model: Detector, dataset: CocoDataset, most: int, solver: implicit.Solver, settings: Settings
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    results: dict[tuple[str, str], list[Read]] = {key: [] for key in settings}
    steps: dict[tuple[str, str], list[int]] = {key: [] for key in settings}
    residuals: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for batch in batches(model, dataset):
            path = Path(model, batch, solver, MOST_STEPS)
            found = [read_output(output, batch, most) for output in path.outputs()]
            residuals.append((path.residual[: path.steps], *path.changes()))
            for key, choose in settings.items():
                taken = choose(path)
                counts = counted(path, *key) or taken
                steps[key] += [max(step, 0) for step in counts]
                for image, step in enumerate(taken):
                    results[key].append((batch.targets[image].image_id, found[step][image]))
    points = [
        {**_scores(dataset, results[key], most), "kind": key[0], "setting": key[1],
         "steps": statistics.fmean(steps[key])}
        for key in settings
    ]  # fmt: skip
    names = ("state", "content", "boxes")
    joined = [torch.cat(parts, dim=1).cpu().numpy() for parts in zip(*residuals, strict=True)]
    return points, {
        "percentiles": list(PERCENTILES),
        **{name: _percentiles(values) for name, values in zip(names, joined, strict=True)},
    }


def counted(path: Path, kind: str, setting: str) -> list[int]:
    """The steps that Anderson takes to its best state, which may be an earlier one."""
    if kind == "Anderson":
        return path.fixed(int(setting))
    return path.within(float(setting)) if kind == "Anderson, tolerance" else []


def _stacked_curve(model: Detector, dataset: CocoDataset, most: int) -> list[dict[str, Any]]:
    results: list[list[Read]] = []
    with torch.no_grad():
        for batch in batches(model, dataset):
            features, queries = model.encode(batch.images, batch.sizes)
            for n, output in enumerate(model.decoder.trajectory(features, queries)):
                if n == len(results):
                    results.append([])
                read = read_output(output, batch, most)
                ids = [target.image_id for target in batch.targets]
                results[n] += zip(ids, read, strict=True)
    return [
        {**_scores(dataset, found, most), "kind": "layers", "setting": str(n), "steps": n}
        for n, found in enumerate(results, start=1)
    ]


def _scores(dataset: CocoDataset, results: list[Read], most: int) -> dict[str, float]:
    records = [
        record
        for image_id, detections in results
        for record in detections.to_coco(image_id, dataset.categories)
    ]
    scores = evaluate_coco(
        dataset.coco, records, dataset.categories, dataset.image_ids, max_detections=max(100, most)
    )
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    return {name: round(getattr(scores, name), 5) for name in names}


def _percentiles(values: np.ndarray[Any, Any]) -> list[list[float]]:
    found = np.percentile(values, PERCENTILES, axis=1).T
    return [[rounded(value) for value in row] for row in found.tolist()]


def batches(model: Detector, dataset: CocoDataset) -> Iterator[Batch]:
    """The images; on a CPU one by one, as the detector takes them."""
    device = next(model.parameters()).device
    size = 1 if device.type == "cpu" else 16
    loader = make_loader(dataset, size, training=False, workers=0, seed=0)
    for batch in loader:
        yield batch.to(device)


def _first_images(model: Detector, dataset: CocoDataset, count: int) -> Iterator[Batch]:
    device = next(model.parameters()).device
    for number in range(min(count, len(dataset))):
        yield collate([dataset[number]]).to(device)


def rates(model: Detector, dataset: CocoDataset, sample: int) -> dict[str, float]:
    """Images a second, one at a time, by refinements: the median of so many images of one size."""
    model.eval()
    stops: dict[str, implicit.Steps | None] = {"own": None}
    if isinstance(model.decoder, EquilibriumDecoder):
        stops = {str(n): implicit.Steps(n) for n in RATES}
    found = {}
    images = of_one_size(list(_first_images(model, dataset, sample)))
    with torch.inference_mode():
        for name, stop in stops.items():
            times = [
                seconds(lambda batch=batch, stop=stop: model(batch.images, batch.sizes, stop=stop))
                for batch in [images[0], *images]
            ]
            found[name] = rounded(1 / statistics.median(times[1:]))
    return found


def of_one_size(images: Sequence[Batch]) -> list[Batch]:
    """As many images, all of the size that is most frequent: a larger one is more work."""
    by_size: dict[tuple[int, ...], list[Batch]] = {}
    for image in images:
        by_size.setdefault(tuple(image.sizes[0].tolist()), []).append(image)
    most = max(by_size.values(), key=len)
    return [most[n % len(most)] for n in range(len(images))]
