"""Parameters of the parts, counted without memory for them, against the published models' parts.

The published head carries a dynamic convolution that is never called and start boxes that are
never trained; both are left out here and do not exist in our modules.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import reference
import torch
from torch import nn

from detection.decoder.layer import LayerConfig, RefinementLayer
from detection.models.backbones import build_backbone
from detection.models.neck import ChannelMapper
from detection.models.queries import LearnedQueries

PUBLISHED: dict[str, Any] = json.loads((reference.FIXTURES / "param_counts.json").read_text())

BACKBONES = {"r50": "resnet50", "r101": "resnet101", "swins": "swin_s"}

ROWS = {  # truncated to whole millions, as the paper prints them
    ("r50", 100, (32,) * 6): 134_790_504,
    ("r50", 100, (64,) * 6): 160_646_760,
    ("r50", 100, (32, 32)): 61_275_640,
    ("r50", 100, (64, 64)): 69_894_392,
    ("r50", 300, (64, 32)): 65_636_216,
    ("r50", 300, (64, 64)): 69_945_592,
    ("r101", 300, (64, 32)): 84_628_344,
    ("r101", 300, (64, 64)): 88_937_720,
    ("swins", 300, (64, 32)): 90_352_386,
}
"""Backbone, queries and points of each layer of the paper's models."""


def count(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def published(backbone: str, queries: int, points: tuple[int, ...]) -> dict[str, Any]:
    if len(points) == 6:
        found: dict[str, Any] = PUBLISHED[
            f"adamixer_derived_{backbone}_{queries}q_6x{points[0]}_neck1x1"
        ]
        return found
    key = f"{backbone}_{queries}q_init{points[0]}_refine{points[1]}_neck1x1"
    found = PUBLISHED[key]
    return found


@pytest.mark.parametrize("points", [32, 64])
def test_layer(points: int) -> None:
    c, classes, groups, rows, hidden = 256, 80, 4, 128, 2048
    linear = {
        "attention": (c, 3 * c),
        "attention out": (c, c),
        "offsets": (c, groups * points * 3),
        "mixing": (c, groups * ((c // groups) ** 2 + rows * points)),
        "mixing out": (rows * c, c),
        "ffn": (c, hidden),
        "ffn out": (hidden, c),
        "class tower": (c, c),
        "class": (c, classes),
        "box tower": (c, c),
        "box": (c, 4),
    }
    norms, heads = 5 * 2 * c, 8
    wanted = sum((inputs + 1) * outputs for inputs, outputs in linear.values()) + norms + heads
    with torch.device("meta"):
        assert count(RefinementLayer(LayerConfig(points=points))) == wanted
    head = PUBLISHED["r50_100q_init64_refine32"]["heads"]["0" if points == 64 else "1"]
    assert wanted == head["total"] - head["unused_dii"]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_neck(backbone: str, kernel_size: int) -> None:
    with torch.device("meta"):
        channels = build_backbone(BACKBONES[backbone]).channels
        neck = ChannelMapper(channels, 256, kernel_size=kernel_size)
    assert count(neck) == sum(c * 256 * kernel_size**2 + 256 for c in channels) + 2 * 256
    variant = f"{backbone}_300q_init64_refine32" + ("_neck1x1" if kernel_size == 1 else "")
    assert count(neck) == PUBLISHED[variant]["by_part"]["neck"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbone(backbone: str) -> None:
    wanted = PUBLISHED[f"{backbone}_300q_init64_refine32"]
    with torch.device("meta"):
        module = build_backbone(BACKBONES[backbone])
    assert count(module) == wanted["by_part"]["backbone"]
    frozen = wanted["frozen"] - wanted["init_proposal_bboxes"]
    assert count(module) - count(module, trainable=True) == frozen


def test_small_backbone_is_small() -> None:
    with torch.device("meta"):
        assert count(build_backbone("small")) < 1_100_000


@pytest.mark.parametrize(("row", "wanted"), ROWS.items(), ids=str)
def test_whole_models(row: tuple[str, int, tuple[int, ...]], wanted: int) -> None:
    name, queries, points = row
    with torch.device("meta"):
        backbone = build_backbone(BACKBONES[name])
        parts = nn.ModuleList(
            [
                backbone,
                ChannelMapper(backbone.channels, 256),
                LearnedQueries(queries, 256),
                *(RefinementLayer(LayerConfig(points=p)) for p in points),
            ]
        )
    assert count(parts) == wanted
    theirs = published(*row)
    assert wanted == theirs["total_without_unused"] - theirs["init_proposal_bboxes"]
    assert theirs["init_proposal_bboxes"] == 4 * queries
