"""The layer of Sparse R-CNN: what it pools, how it mixes, and that any decoder takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import implicit
from detection.boxes import encode_boxes
from detection.data.types import Target
from detection.decoder.queries import Queries
from detection.decoder.sparse_rcnn import (
    DynamicConvolution,
    SparseRCNNLayer,
    SparseRCNNLayerConfig,
)
from detection.models.config import (
    BackboneConfig,
    DecoderConfig,
    EquilibriumConfig,
    ModelConfig,
    RecurrentConfig,
    StackedConfig,
)
from detection.models.decoders import EquilibriumDecoder
from detection.models.detector import Detector
from detection.training.losses import Criterion

CONFIG = SparseRCNNLayerConfig(
    content_dim=32,
    feature_channels=32,
    heads=4,
    pooled=3,
    dynamic_dim=6,
    ffn_channels=24,
    num_classes=3,
)
HEIGHT, WIDTH = 128, 192


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def layer(config: SparseRCNNLayerConfig = CONFIG) -> SparseRCNNLayer:
    made = SparseRCNNLayer(config).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def queries(batch: int = 2, number: int = 5) -> Queries:
    low = torch.rand(batch, number, 2, dtype=torch.float64) * 60
    boxes = torch.cat([low, low + 8 + 60 * torch.rand_like(low)], dim=2)
    content = torch.randn(batch, number, CONFIG.content_dim, dtype=torch.float64)
    return Queries(encode_boxes(boxes), content, boxes)


def maps(batch: int = 2) -> list[Tensor]:
    return [
        torch.randn(batch, CONFIG.feature_channels, HEIGHT // s, WIDTH // s, dtype=torch.float64)
        for s in CONFIG.strides
    ]


@pytest.mark.parametrize(
    ("side", "level"), [(20, 0), (100, 0), (113, 1), (223, 1), (225, 2), (447, 2), (449, 3)]
)
def test_a_box_is_pooled_from_the_level_of_its_size(side: float, level: int) -> None:
    """``⌊4 + log2(√(wh)/224)⌋`` of levels 2 to 5 (feature pyramid networks, Eq. 1)."""
    flat = [torch.full((1, 32, 600 // s, 600 // s), float(i)) for i, s in enumerate(CONFIG.strides)]
    boxes = torch.tensor([[[40.0, 40.0, 40.0 + side, 40.0 + side]]])
    pooled = SparseRCNNLayer(CONFIG)._pool(boxes, flat)
    assert pooled.shape == (1, 1, 9, 32)
    assert torch.equal(pooled, torch.full_like(pooled, float(level)))


def test_pooling_reads_the_centres_of_the_cells() -> None:
    """A map that is linear in the pixels is read exactly, in reading order."""
    stride = CONFIG.strides[0]
    y, x = torch.meshgrid(
        (torch.arange(32.0) + 0.5) * stride, (torch.arange(48.0) + 0.5) * stride, indexing="ij"
    )
    fine = torch.stack([x, y, x + 2 * y])[None].repeat(1, 11, 1, 1)[:, :32]
    features = [fine, *(torch.zeros(1, 32, 128 // s, 192 // s) for s in CONFIG.strides[1:])]
    box = torch.tensor([30.0, 24.0, 90.0, 66.0])
    pooled = SparseRCNNLayer(CONFIG)._pool(box.view(1, 1, 4), features)[0, 0]
    centres_x = 30 + 60 * (torch.arange(3) + 0.5) / 3
    centres_y = 24 + 42 * (torch.arange(3) + 0.5) / 3
    # RoIAlign takes the origin at the middle of the first cell of a map, half a stride further.
    torch.testing.assert_close(pooled[:, 0], centres_x.repeat(3) + stride / 2)
    torch.testing.assert_close(pooled[:, 1], centres_y.repeat_interleave(3) + stride / 2)


def test_the_dynamic_convolution_is_two_products() -> None:
    mixing = DynamicConvolution(8, feature_channels=6, inner=4, cells=9).double()
    content = torch.randn(2, 3, 8, dtype=torch.float64)
    pooled = torch.randn(2, 3, 9, 6, dtype=torch.float64)
    found = mixing(content, pooled)
    for b in range(2):
        for n in range(3):
            numbers = mixing.generator(content[b, n])
            first, second = numbers[:24].view(6, 4), numbers[24:].view(4, 6)
            x = F.relu(mixing.norms[0](pooled[b, n] @ first))
            x = F.relu(mixing.norms[1](x @ second))
            wanted = F.relu(mixing.norm_out(mixing.project_out(x.reshape(-1))))
            torch.testing.assert_close(found[b, n], wanted)


def test_boxes_stay_where_they_are_at_first() -> None:
    start = queries()
    with torch.no_grad():
        after = SparseRCNNLayer(CONFIG).double()(start, maps())
    torch.testing.assert_close(after.boxes, start.boxes, rtol=0, atol=1e-6)


def test_a_step_of_the_box_is_in_units_of_its_sides() -> None:
    position = encode_boxes(torch.tensor([[[10.0, 20.0, 30.0, 60.0]]]))
    delta = torch.tensor([[[0.5, -0.25, 1.0, -1.0]]])
    moved = SparseRCNNLayer._move(position, delta)
    # Centre (20, 40) by half of (0.5 · 20, −0.25 · 40); width doubled, height halved.
    torch.testing.assert_close(
        moved, encode_boxes(torch.tensor([[[25.0 - 20, 35.0 - 10, 25.0 + 20, 35.0 + 10]]]))
    )


def test_a_box_grows_so_much_and_no_more() -> None:
    position = encode_boxes(torch.tensor([[[0.0, 0.0, 16.0, 16.0]]]))
    delta = torch.full((1, 1, 4), 100.0)
    moved = SparseRCNNLayer._move(position, delta)
    assert moved[0, 0, 2].exp2() == pytest.approx(1000, rel=1e-5)


def test_samples_do_not_see_each_other() -> None:
    made, start, features = layer(), queries(3), maps(3)
    with torch.no_grad():
        together = made(start, features)
        alone = made(Queries(*(part[1:2] for part in start)), [f[1:2] for f in features])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=0, atol=1e-10)


def test_the_order_of_queries_does_not_matter() -> None:
    made, start, features = layer(), queries(), maps()
    order = torch.randperm(5)
    with torch.no_grad():
        sorted_, shuffled = (
            made(start, features),
            made(Queries(*(part[:, order] for part in start)), features),
        )
    for a, b in zip(sorted_, shuffled, strict=True):
        torch.testing.assert_close(a[:, order], b, rtol=0, atol=1e-10)


def test_gradient_goes_through_the_content_and_not_through_the_position() -> None:
    made, start, features = layer(), queries(), maps()
    for part in start:
        part.requires_grad_()
    boxes = made(start, features).boxes
    grads = torch.autograd.grad(boxes.sum(), start, allow_unused=True)
    assert grads[0] is None and grads[2] is None
    assert grads[1] is not None and bool(grads[1].any())


def model(decoder: DecoderConfig) -> Detector:
    return Detector(
        ModelConfig(
            BackboneConfig("small", pretrained=False), layer=CONFIG, decoder=decoder, num_queries=5
        )
    )


SIZES = torch.tensor([[HEIGHT, WIDTH], [100, 180]])
TARGETS = tuple(
    Target(torch.tensor([[10.0, 10.0, 60.0, 80.0]]), torch.tensor([i]), i, (HEIGHT, WIDTH))
    for i in range(2)
)


def losses(detector: Detector, generator: torch.Generator | None = None) -> Any:
    images = torch.randint(0, 256, (2, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    recipe_criterion = Criterion(TARGETS, SIZES)
    return detector.losses(images, SIZES, recipe_criterion, generator)


@pytest.mark.parametrize(
    "decoder",
    [
        StackedConfig(layers=2),
        RecurrentConfig(steps=3),
        EquilibriumConfig(train_steps=4, multiples=1, spacing=2),
        EquilibriumConfig(train_steps=4, multiples=1, spacing=2, initial="shared"),
        EquilibriumConfig(
            train_steps=4, multiples=1, spacing=2, gradient=implicit.Neumann(3),
            solver=implicit.Anderson(),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_every_decoder_trains_it(decoder: DecoderConfig) -> None:
    detector = model(decoder)
    supervised = losses(detector, torch.Generator().manual_seed(0))
    supervised.total.backward()
    without = [n for n, p in detector.named_parameters() if p.grad is None and p.requires_grad]
    assert not without
    assert torch.isfinite(supervised.total)


def test_a_path_is_refinement_after_refinement() -> None:
    """What `implicit` walks for it is what a loop would walk."""
    detector = model(EquilibriumConfig(steps=3)).double().eval()
    decoder = detector.decoder
    assert isinstance(decoder, EquilibriumDecoder)
    features, start = maps(), queries()
    with torch.no_grad():
        outputs = list(decoder.trajectory(features, start))
        state = decoder.first(start, features)
        for output in outputs[1:]:
            state = decoder.refinement(state, features)
            torch.testing.assert_close(output.boxes, state.boxes, rtol=0, atol=1e-9)


def test_sampling_points_are_refused() -> None:
    with pytest.raises(ValueError, match="Sparse R-CNN has no sampling points"):
        ModelConfig(layer=CONFIG, decoder=EquilibriumConfig(initial_points=8))
    with pytest.raises(ValueError, match=r"SparseRCNNLayerConfig\(pooled=0\)"):
        SparseRCNNLayerConfig(pooled=0)
