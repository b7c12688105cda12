"""What a trained detector does when it refines further, less, from elsewhere, or by Anderson.

Each image is refined once, 25 times, by the naive solver and once by Anderson; the answers that
fixed numbers of steps, tolerances and ``steps="auto"`` would have given are read from these paths.
The tied layer of RNNDet is walked beyond its training in the same way.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import implicit
from benchmarks.measure import seconds
from detection.data.coco import CocoDataset
from detection.data.loading import make_loader
from detection.data.types import Batch
from detection.decoder.queries import Queries, QueryLayer
from detection.evaluation import evaluate_coco
from detection.models.config import MOST_STEPS
from detection.models.decoders import EquilibriumDecoder, Output, RecurrentDecoder
from detection.models.detector import Detector
from detection.prediction import read_output

NAIVE_STEPS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25)
ANDERSON_STEPS = (4, 6, 8, 12, 16, 25)
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3)
ANDERSON = implicit.Anderson(memory=5)
RATES = (6, 8, 16, 25)
PERCENTILES = (5, 25, 50, 75, 95)

Settings = dict[tuple[str, str], Callable[["Path"], list[int]]]


class Path:
    """A batch refined step by step.

    Attributes:
        states: before the first refinement, and after each.
        residual: ``(T, B)`` relative residual of every state but the last, of the whole state.
    """

    def __init__(self, model: Detector, batch: Batch, solver: implicit.Solver, steps: int) -> None:
        first, layer = layers(model)
        features, queries = model.encode(batch.images, batch.sizes)
        start = first(queries, features)
        solution = implicit.fixed_point(
            layer,
            start,
            solver=solver,
            stop=implicit.Steps(steps),
            gradient=implicit.JFB(),
            args=(features,),
            path=range(1, steps + 1),
            trace=True,
        )
        assert solution.trace is not None
        self.model, self.batch = model, batch
        self.states: list[Queries] = [start, *solution.path]
        self.residual = solution.trace[:steps]

    def fixed(self, steps: int) -> list[int]:
        """The state that each image has after so many steps."""
        return [steps] * len(self.batch)

    def best(self, steps: int) -> list[int]:
        """The state of each image with the least residual among the first so many."""
        lowest: list[int] = self.residual[:steps].nan_to_num(torch.inf).argmin(0).tolist()
        return lowest

    def within(self, tolerance: float) -> list[int]:
        """The first state of each image whose residual is within tolerance."""
        return _first(self.residual <= tolerance)

    def settled(self) -> list[int]:
        """The state at which ``steps="auto"`` ends."""
        decoder = self.model.decoder
        assert isinstance(decoder, EquilibriumDecoder)
        settled, classify = decoder.config.settled, decoder.refinement.classify
        moved = [settled.movement(a, b, classify) for a, b in pairwise(self.states)]
        return _first(torch.stack(moved) <= 1)

    def changes(self) -> tuple[Tensor, Tensor]:
        """``(T, B)`` change of the contents, over their norm, and of the boxes in pixels."""
        found = [distance(a, b) for a, b in pairwise(self.states)]
        contents, boxes = zip(*found, strict=True)
        return torch.stack(contents), torch.stack(boxes)

    def outputs(self) -> list[Output]:
        """What each state says."""
        first, layer = layers(self.model)
        read = [first, *[layer] * (len(self.states) - 1)]
        return [
            Output(layer.classify(state.content), state.boxes)
            for layer, state in zip(read, self.states, strict=True)
        ]


def layers(model: Detector) -> tuple[QueryLayer, QueryLayer]:
    """The layer that is called first, and the one that is called from then on."""
    decoder = model.decoder
    assert isinstance(decoder, (EquilibriumDecoder, RecurrentDecoder))
    layer = decoder.refinement
    assert isinstance(layer, QueryLayer)
    return decoder.first, layer


def distance(a: Queries, b: Queries) -> tuple[Tensor, Tensor]:
    """``(B,)`` of two states: of contents relative to ``b``, of boxes in pixels (mean of sides)."""
    content = (a.content - b.content).flatten(1).norm(dim=1) / b.content.flatten(1).norm(dim=1)
    return content, (a.boxes - b.boxes).abs().mean(dim=(1, 2))


def _first(reached: Tensor) -> list[int]:
    """The first step of each image at which it is reached, or the last state of all."""
    first: list[int] = torch.where(reached.any(0), reached.int().argmax(0), len(reached)).tolist()
    return first


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
        found[key] = lambda path, rtol=rtol: path.within(rtol)
    return found


def _curve(
    model: Detector, dataset: CocoDataset, most: int, solver: implicit.Solver, settings: Settings
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    results: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in settings}
    steps: dict[tuple[str, str], list[int]] = {key: [] for key in settings}
    residuals: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for batch in batches(model, dataset):
            path = Path(model, batch, solver, MOST_STEPS)
            found = [read_output(output, batch, most) for output in path.outputs()]
            residuals.append((path.residual, *path.changes()))
            for key, choose in settings.items():
                taken = choose(path)
                # Anderson takes all its steps, whichever of its states is the best.
                steps[key] += path.fixed(int(key[1])) if key[0] == "Anderson" else taken
                for image, step in enumerate(taken):
                    number = batch.targets[image].image_id
                    results[key] += found[step][image].to_coco(number, dataset.categories)
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


def _stacked_curve(model: Detector, dataset: CocoDataset, most: int) -> list[dict[str, Any]]:
    results: list[list[dict[str, Any]]] = []
    with torch.no_grad():
        for batch in batches(model, dataset):
            features, queries = model.encode(batch.images, batch.sizes)
            for n, output in enumerate(model.decoder.trajectory(features, queries)):
                if n == len(results):
                    results.append([])
                for target, found in zip(
                    batch.targets, read_output(output, batch, most), strict=True
                ):
                    results[n] += found.to_coco(target.image_id, dataset.categories)
    return [
        {**_scores(dataset, found, most), "kind": "layers", "setting": str(n), "steps": n}
        for n, found in enumerate(results, start=1)
    ]


def _scores(dataset: CocoDataset, results: list[dict[str, Any]], most: int) -> dict[str, float]:
    scores = evaluate_coco(
        dataset.coco, results, dataset.categories, dataset.image_ids, max_detections=max(100, most)
    )
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    return {name: round(getattr(scores, name), 5) for name in names}


def _percentiles(values: np.ndarray[Any, Any]) -> list[list[float]]:
    found = np.percentile(values, PERCENTILES, axis=1).T
    return [[rounded(value) for value in row] for row in found.tolist()]


def rounded(value: float) -> float:
    """To four significant digits."""
    return float(f"{value:.4g}")


def batches(model: Detector, dataset: CocoDataset) -> Iterator[Batch]:
    """The images; on a CPU one by one, as the detector takes them."""
    device = next(model.parameters()).device
    size = 1 if device.type == "cpu" else 16
    loader = make_loader(dataset, size, training=False, workers=0, seed=0)
    for batch in loader:
        yield batch.to(device)


def _first_images(model: Detector, dataset: CocoDataset, count: int) -> Iterator[Batch]:
    from detection.data.loading import collate

    device = next(model.parameters()).device
    for number in range(min(count, len(dataset))):
        yield collate([dataset[number]]).to(device)


FAR = 200
"""Naive refinements after which a path is taken to be where it ends."""
LOOKS = (25, 50, 100, 200)
SEEN, SAME = 0.3, 0.9
"""Detections that are compared: least score, and the IoU at which two are the same."""


def closer(model: Detector, batch: Batch) -> dict[str, Any]:
    """Whether one image has a fixed point.

    Returns:
        ``content`` and ``boxes``: change at a refinement after `LOOKS` steps, as in `distance`;
        ``rate``: factor by which the change of contents shrinks a step, between 25 and 100;
        ``radius``: spectral radius of the layer's Jacobian at the end, of what gradients pass
        through (positions are detached); ``anderson``: relative residual that Anderson reaches;
        ``from``: of paths that begin elsewhere (boxes moved, contents drawn anew, no first layer),
        the distance from this one's end at the beginning (``start_…``) and at the end, and the
        share of detections that both have (``agreeing``).
    """
    first, layer = layers(model)
    with torch.no_grad():
        features, queries = model.encode(batch.images, batch.sizes)
        begin = first(queries, features)
        end, changes = _far(layer, begin, features)
        contents, boxes = ([rounded(float(c[i])) for c in changes] for i in (0, 1))
        anderson = implicit.fixed_point(
            layer,
            begin,
            solver=implicit.Best(ANDERSON),
            stop=implicit.Steps(FAR // 2),
            gradient=implicit.JFB(),
            args=(features,),
        )
        elsewhere = {}
        for name, other in _other_starts(begin, queries, batch).items():
            reached, _ = _far(layer, other, features)
            apart = (*distance(other, end), *distance(reached, end))
            names = ("start_content", "start_boxes", "content", "boxes")
            elsewhere[name] = {k: rounded(float(v)) for k, v in zip(names, apart, strict=True)}
            elsewhere[name]["agreeing"] = rounded(_agreeing(layer, end, reached))
    radius = implicit.spectral_radius(layer, end, args=(features,))
    floor = 1e-6  # of float32
    steps = [t for t in range(25, 101) if contents_of(changes, t) > floor]
    rate = None
    if len(steps) > 10:
        rate = (contents_of(changes, steps[-1]) / contents_of(changes, steps[0])) ** (
            1 / (steps[-1] - steps[0])
        )
    return {
        "content": [contents[t - 1] for t in LOOKS],
        "boxes": [boxes[t - 1] for t in LOOKS],
        "rate": None if rate is None else rounded(rate),
        "radius": rounded(float(radius)),
        "anderson": rounded(float(anderson.relative_residual)),
        "from": elsewhere,
    }


def contents_of(changes: Sequence[tuple[Tensor, Tensor]], step: int) -> float:
    """Change of the contents at a refinement, counted from 1."""
    return float(changes[step - 1][0])


def _far(
    layer: QueryLayer, state: Queries, features: Sequence[Tensor]
) -> tuple[Queries, list[tuple[Tensor, Tensor]]]:
    """Where many refinements lead, and how far each moved."""
    changes = []
    for _ in range(FAR):
        after = layer(state, features)
        changes.append(distance(state, after))
        state = after
    return state, changes


def _other_starts(begin: Queries, queries: Queries, batch: Batch) -> dict[str, Queries]:
    generator = torch.Generator().manual_seed(int(batch.targets[0].image_id))

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    height, width = batch.images.shape[-2:]
    shift = 0.05 * max(height, width) * normal(begin.position[..., :2])
    position = torch.cat([begin.position[..., :2] + shift, begin.position[..., 2:]], dim=-1)
    moved = begin._replace(position=position, boxes=begin.boxes + torch.cat([shift, shift], dim=-1))
    noise = normal(begin.content)
    scale = begin.content.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return {
        "boxes moved": moved,
        "contents drawn anew": begin._replace(content=noise * scale),
        "no first layer": queries,
    }


def _agreeing(layer: QueryLayer, a: Queries, b: Queries) -> float:
    """Share of what two states detect that the other detects too; 1 if they detect nothing."""
    from torchvision.ops import box_iou

    found = []
    for state in (a, b):
        scores, classes = layer.classify(state.content)[0].sigmoid().max(dim=-1)
        seen = scores >= SEEN
        found.append((state.boxes[0][seen], classes[seen]))
    (boxes_a, classes_a), (boxes_b, classes_b) = found
    total = len(boxes_a) + len(boxes_b)
    if not total:
        return 1.0
    if not len(boxes_a) or not len(boxes_b):
        return 0.0
    same = (box_iou(boxes_a, boxes_b) >= SAME) & (classes_a[:, None] == classes_b[None])
    return float(same.any(1).sum() + same.any(0).sum()) / total


def rates(model: Detector, dataset: CocoDataset, sample: int) -> dict[str, float]:
    """Images a second, one at a time, by refinements; of the fastest of some images.

    All are of one size and take the same work: what is slower was held up by other processes.
    """
    model.eval()
    stops: dict[str, implicit.Steps | None] = {"own": None}
    if isinstance(model.decoder, EquilibriumDecoder):
        stops = {str(n): implicit.Steps(n) for n in RATES}
    found = {}
    images = list(_first_images(model, dataset, sample))
    with torch.inference_mode():
        for name, stop in stops.items():
            times = [
                seconds(lambda batch=batch, stop=stop: model(batch.images, batch.sizes, stop=stop))
                for batch in [images[0], *images]
            ]
            found[name] = rounded(1 / min(times[1:]))
    return found
