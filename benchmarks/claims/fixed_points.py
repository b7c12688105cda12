"""Whether a trained layer has a fixed point: refined very far, from several starts, by Anderson."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

import implicit
from benchmarks.claims.paths import ANDERSON, distance, layers, rounded
from detection.data.types import Batch
from detection.decoder.queries import Queries, QueryLayer
from detection.models.detector import Detector

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
