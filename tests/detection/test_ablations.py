"""Every row of the paper's Table 4 is a change of a recipe, and takes a training step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.claims.grid import COMPARISONS
from detection.data.types import Target
from detection.models.config import (
    BackboneConfig,
    EquilibriumConfig,
)
from detection.models.detector import Detector
from detection.recipes import recipe
from detection.training.losses import Criterion
from detection.training.optimization import clip_gradients, make_optimizer

BASE = recipe("deqdet_init64_r50_1x")
"""The paper's ablations begin from 64 points in the initialisation layer: 45.5 AP."""


ROWS = {
    f"{comparison.name}, {row.label}": row.arm.recipe({"deqdet": BASE})
    for comparison in COMPARISONS
    for row in comparison.rows
    if comparison.name.startswith("4") and row.paper is not None
}
POSITIONS = {
    "4d, m = 4, C = 4": (1, 4, 8, 12, 16, 20),
    "4d, m = 3, C = 3": (1, 3, 6, 9, 20),
    "4d, m = 5, C = 3": (1, 3, 6, 9, 12, 15, 20),
    "4h, 15": (1, 3, 6, 9, 12, 15),
    "4h, 25": (1, 3, 6, 9, 12, 25),
}
"""``Ω`` where it is not that of the others."""


@pytest.mark.parametrize("row", ROWS)
def test_a_training_step_of_every_row(row: str) -> None:
    """At the width of a toy, with the decoder's settings as they are."""
    decoder = ROWS[row].model.decoder
    assert isinstance(decoder, EquilibriumConfig)
    assert decoder.positions == POSITIONS.get(row, (1, 3, 6, 9, 12, 20))
    narrow = replace(
        BASE.model.layer,
        content_dim=32,
        feature_channels=32,
        heads=4,
        groups=2,
        out_points=4,
        ffn_channels=16,
        num_classes=3,
    )
    torch.manual_seed(0)
    detector = Detector(
        replace(
            BASE.model,
            backbone=BackboneConfig("small", pretrained=False),
            layer=narrow,
            decoder=decoder,
            num_queries=4,
        )
    )
    sizes = torch.tensor([[64, 96], [60, 80]])
    targets = tuple(
        Target(torch.tensor([[8.0, 8.0, 40.0, 50.0]]), torch.tensor([i]), i, (64, 96))
        for i in range(2)
    )
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    supervised = detector.losses(
        images, sizes, Criterion(targets, sizes), torch.Generator().manual_seed(1)
    )
    h = decoder.extra_supervision
    assert len(supervised.losses) == 1 + h + len(decoder.positions)
    supervised.total.backward()
    optimizer = make_optimizer(detector, BASE.optimization)
    assert float(clip_gradients(optimizer, 1.0)) > 0
    assert not [name for name, p in detector.named_parameters() if p.grad is None]
    head = detector.decoder.get_submodule("refinement").get_parameter("class_head.3.weight")
    before = head.detach().clone()
    optimizer.step()
    assert not torch.equal(head, before)


def test_one_layer_less_is_the_size_of_one_layer() -> None:
    """Row "/" of Table 4a, where the refinement layer is called first as well."""
    shared = replace(BASE.model.decoder, initial="shared", initial_points=None)  # type: ignore[arg-type]
    sizes = []
    for decoder in (BASE.model.decoder, shared):
        backbone = replace(BASE.model.backbone, pretrained=False)
        with torch.device("meta"):
            model = Detector(replace(BASE.model, backbone=backbone, decoder=decoder))
        sizes.append(sum(p.numel() for p in model.parameters()))
        refinement = sum(p.numel() for p in model.decoder.get_submodule("refinement").parameters())
    more_points = 3 * 32 * 4 * 257 + 128 * 32 * 4 * 257  # offsets, and spatial mixing
    assert sizes[0] - sizes[1] == refinement + more_points
    with pytest.raises(ValueError, match="no initialisation layer to have them"):
        EquilibriumConfig(initial="shared", initial_points=64)
