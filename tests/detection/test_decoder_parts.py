"""The parts of the refinement layer against slow, literal readings of their equations."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.boxes import decode_position, encode_boxes
from detection.decoder.attention import BoxBiasedAttention
from detection.decoder.embedding import PositionEmbedding
from detection.decoder.layer import LayerConfig, RefinementLayer
from detection.decoder.mixing import AdaptiveMixing
from detection.decoder.movement import Settled
from detection.decoder.queries import Queries
from detection.decoder.sampling import Sampling3D, _read_rows, sample_pyramid

STRIDES = (4, 8, 16, 32)
HEIGHT, WIDTH = 32, 64
SMALL = LayerConfig(
    content_dim=16,
    feature_channels=8,
    heads=2,
    groups=2,
    points=4,
    out_points=6,
    ffn_channels=24,
    num_classes=3,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pyramid(channels: int = 8, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        torch.randn(batch, channels, HEIGHT // s, WIDTH // s, dtype=torch.float64).to(dtype)
        for s in STRIDES
    ]


def some_queries(number: int = 5, channels: int = 16) -> Queries:
    low = torch.rand(2, number, 2, dtype=torch.float64) * 24
    boxes = torch.cat([low, low + 4 + 20 * torch.rand_like(low)], dim=-1)
    content = torch.randn(2, number, channels, dtype=torch.float64)
    return Queries(encode_boxes(boxes), content, boxes)


def awakened(module: nn.Module) -> nn.Module:
    """Weights at random also where they start at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return module


def randomised_layer(config: LayerConfig = SMALL) -> RefinementLayer:
    layer = RefinementLayer(config).double()
    awakened(layer)
    return layer


# Position embedding


def test_embedding_is_interleaved_sines_and_cosines() -> None:
    position = torch.tensor([[[613.0, 250.5, 6.3, -0.7]]], dtype=torch.float64)
    wanted = []
    for value in (0.613, 0.2505, 6.3, -0.7):
        for i in range(8):
            # The published model computes its frequencies in float32.
            power = torch.tensor(2 * (i // 2) / 8, dtype=torch.float32)
            angle = value / float(torch.tensor(10000.0) ** power)
            wanted.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
    embedded = PositionEmbedding(32).double()(position)
    torch.testing.assert_close(
        embedded.flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_embedding_has_no_state_and_no_gradient() -> None:
    embedding = PositionEmbedding(16)
    assert not list(embedding.parameters()) and not embedding.state_dict()
    assert not embedding(torch.zeros(1, 1, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_frequencies_are_those_of_float32_in_any_module(dtype: torch.dtype) -> None:
    """In bfloat16 the phase of a position of many pixels would be another."""
    position = 500 * torch.rand(1, 4, 4)
    embedding = PositionEmbedding(64)
    wanted, periods, place = embedding(position), embedding.periods, embedding.periods.data_ptr()
    assert not torch.equal(periods.bfloat16().float(), periods)
    cast = nn.Sequential(embedding).to(dtype)
    assert torch.equal(cast(position), wanted)
    assert embedding.periods.data_ptr() == place  # as a graph has recorded it
    assert PositionEmbedding(64).to("meta", dtype).periods.is_meta


def test_embedding_refuses_a_width_it_cannot_share() -> None:
    with pytest.raises(ValueError, match=r"PositionEmbedding\(20\).*multiple of 8"):
        PositionEmbedding(20)


# Attention


def literal_attention(module: BoxBiasedAttention, tokens: Tensor, boxes: Tensor) -> Tensor:
    batch, queries, channels = tokens.shape
    width = channels // module.heads
    projected = tokens @ module.project_in.weight.T + module.project_in.bias
    q, k, v = projected.split(channels, dim=-1)
    output = torch.zeros_like(tokens)
    for b, head in product(range(batch), range(module.heads)):
        part = slice(head * width, (head + 1) * width)
        for i in range(queries):
            x1, y1, x2, y2 = boxes[b, i].tolist()
            logits = []
            for j in range(queries):
                u1, v1, u2, v2 = boxes[b, j].tolist()
                common = max(min(x2, u2) - max(x1, u1), 0) * max(min(y2, v2) - max(y1, v1), 0)
                iof = common / max((x2 - x1) * (y2 - y1), 1e-6)
                logit = q[b, i, part] @ k[b, j, part] / math.sqrt(width)
                logits.append(logit + module.tau[head] * math.log(iof + 1e-7))
            weights = torch.stack(logits).softmax(0)
            output[b, i, part] = sum(
                (weights[j] * v[b, j, part] for j in range(queries)), torch.zeros(width)
            )
    return output @ module.project_out.weight.T + module.project_out.bias


def test_attention() -> None:
    attention = BoxBiasedAttention(16, heads=4).double()
    queries = some_queries()
    wanted = literal_attention(attention, queries.content, queries.boxes)
    found = attention(queries.content, queries.boxes)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_attention_in_bfloat16_is_near_that_of_float64() -> None:
    """With the gradients of tokens and of every parameter, under autocast."""
    attention, queries = BoxBiasedAttention(16, heads=4).double(), some_queries()
    direction, tokens = torch.randn(2, 5, 16).double(), queries.content
    exact, *wanted = gradients(attention, direction, tokens, queries.boxes)
    with torch.autocast("cpu", torch.bfloat16):
        found, *narrow = gradients(
            attention.float(), direction.float(), tokens.float(), queries.boxes.float()
        )
    assert found.dtype == torch.bfloat16
    for mine, other in zip((found, *narrow), (exact, *wanted), strict=True):
        assert float((mine.double() - other).norm() / other.norm()) < 0.02


def gradients(
    module: BoxBiasedAttention, direction: Tensor, tokens: Tensor, boxes: Tensor
) -> tuple[Tensor, ...]:
    """The output, and the gradients of its product with ``direction``."""
    tokens = tokens.detach().requires_grad_()
    output = module(tokens, boxes)
    (output * direction).sum().backward()
    found = [tokens.grad, *(parameter.grad for parameter in module.parameters())]
    module.zero_grad()
    return (output.detach(), *(g.clone() for g in found if g is not None))


def test_gradient_reaches_every_parameter_of_attention_but_no_box() -> None:
    attention = BoxBiasedAttention(8, heads=2).double()
    queries = some_queries(4, 8)
    boxes = queries.boxes.requires_grad_()
    attention(queries.content, boxes).square().sum().backward()
    assert boxes.grad is None
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_gradient_of_tau() -> None:
    attention = BoxBiasedAttention(8, heads=2).double()
    queries = some_queries(4, 8)

    def by_tau(tau: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(
            attention, {"tau": tau}, (queries.content, queries.boxes)
        )
        return output

    tau = attention.tau.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(by_tau, (tau,))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_bias_of_attention_is_not_rounded_to_a_narrow_type(autocast: bool) -> None:
    """−40.12 would be −40 in bfloat16, and the two keys would count alike."""
    attention, bias = BoxBiasedAttention(2, heads=1), torch.tensor([-40.0, -40.12])
    with torch.no_grad():
        attention.project_in.weight.zero_()[4:] = torch.eye(2)  # of values alone
        attention.project_out.weight.copy_(torch.eye(2))
        attention.project_out.bias.zero_()
    tokens, boxes = torch.eye(2)[None], torch.zeros(1, 2, 4)
    if not autocast:
        attention, tokens = attention.bfloat16(), tokens.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert attention.bias(boxes).dtype == torch.float32
        attention.bias = lambda boxes: bias.expand(1, 1, 2, 2)  # type: ignore[method-assign]
        found = attention(tokens, boxes)
    assert found.dtype == torch.bfloat16
    wanted = bias.softmax(0).expand(1, 2, 2)
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.004)


def test_attention_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="16 channels cannot be shared by 3 heads"):
        BoxBiasedAttention(16, heads=3)


# Sampling


def texel(feature: Tensor, row: int, column: int) -> Tensor:
    """Of a map ``(C, H, W)``; zero outside."""
    inside = 0 <= row < feature.shape[1] and 0 <= column < feature.shape[2]
    return feature[:, row, column] if inside else torch.zeros_like(feature[:, 0, 0])


def bilinear(feature: Tensor, x: float, y: float, stride: int) -> Tensor:
    """At ``(x, y)`` pixels; the centre of cell ``(i, j)`` lies at ``((j + ½)s, (i + ½)s)``."""
    u, v = x / stride - 0.5, y / stride - 0.5
    left, top = math.floor(u), math.floor(v)
    a, b = u - left, v - top
    return (
        (1 - a) * (1 - b) * texel(feature, top, left)
        + a * (1 - b) * texel(feature, top, left + 1)
        + (1 - a) * b * texel(feature, top + 1, left)
        + a * b * texel(feature, top + 1, left + 1)
    )


def literal_sampling(points: Tensor, features: list[Tensor], groups: int) -> Tensor:
    batch, queries, _, count, _ = points.shape
    width = features[0].shape[1] // groups
    output = torch.zeros(batch, queries, groups, count, width, dtype=torch.float64)
    for b, n, g, p in product(range(batch), range(queries), range(groups), range(count)):
        x, y, z = points[b, n, g, p].tolist()
        nearness = [math.exp(-((z - math.log2(s)) ** 2) / 2.0) for s in STRIDES]
        for s, near, feature in zip(STRIDES, nearness, features, strict=True):
            part = feature[b, g * width : (g + 1) * width]
            output[b, n, g, p] += near / sum(nearness) * bilinear(part, x, y, s)
    return output


def scattered_points(number: int = 5, groups: int = 2, count: int = 6) -> Tensor:
    """Inside and outside of the image, on all scales."""
    unit = torch.rand(2, number, groups, count, 3, dtype=torch.float64)
    return unit * torch.tensor([100, 70, 8.0]) - torch.tensor([20, 20, 1.0])


LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def in_layout(layout: torch.memory_format, features: list[Tensor]) -> list[Tensor]:
    return [feature.contiguous(memory_format=layout) for feature in features]


@LAYOUTS
def test_sampling(layout: torch.memory_format) -> None:
    points, features = scattered_points(), in_layout(layout, pyramid())
    wanted = literal_sampling(points, features, groups=2)
    found = sample_pyramid(points, features, STRIDES, groups=2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@LAYOUTS
def test_the_centre_of_a_cell_reads_that_cell(layout: torch.memory_format) -> None:
    feature = torch.arange(2 * 3 * 5.0).view(1, 2, 3, 5)
    points = torch.tensor([3.5 * 8, 1.5 * 8, 3.0]).view(1, 1, 1, 1, 3)
    assert sample_pyramid(points, in_layout(layout, [feature]), (8,), 1).flatten().tolist() == [
        8,
        23,
    ]


@LAYOUTS
def test_padding_counts_as_map_and_beyond_it_is_zero(layout: torch.memory_format) -> None:
    ones = in_layout(layout, [torch.ones(1, 2, HEIGHT // s, WIDTH // s) for s in STRIDES])
    place = torch.tensor([[32, 16], [-64, 16], [32, 96], [WIDTH, 16]])
    points = torch.cat([place, torch.full((4, 1), 3.0)], -1).view(1, 4, 1, 1, 3)
    values = sample_pyramid(points, ones, STRIDES, 1)[0, :, 0, 0, 0]
    # Half a cell beyond the last centre, each level has faded to a half.
    torch.testing.assert_close(values, torch.tensor([1.0, 0.0, 0.0, 0.5]))


def test_weights_of_the_levels_sum_to_one_at_any_scale() -> None:
    ones = [torch.ones(1, 2, HEIGHT // s, WIDTH // s, dtype=torch.float64) for s in STRIDES]
    points = torch.tensor([32.0, 16.0, 0.0]).double().repeat(1, 9, 1, 1, 1)
    points[0, :, 0, 0, 2] = torch.linspace(-20, 40, 9)
    values = sample_pyramid(points, ones, STRIDES, 1)
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-12)


@LAYOUTS
def test_levels_may_have_extents_of_their_own(layout: torch.memory_format) -> None:
    """Each map is normalised by its own extent, also where strides do not divide the image."""
    features = [torch.randn(2, 8, h, w).double() for h, w in ((8, 16), (5, 9), (2, 4), (1, 3))]
    features = in_layout(layout, features)
    points = scattered_points()
    wanted = literal_sampling(points, features, groups=2)
    found = sample_pyramid(points, features, STRIDES, groups=2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@LAYOUTS
def test_gradients_of_sampling(layout: torch.memory_format) -> None:
    points = scattered_points(2, 2, 2).requires_grad_()
    features = [feature.requires_grad_() for feature in pyramid(4)]

    def sample(points: Tensor, *features: Tensor) -> Tensor:
        return sample_pyramid(points, in_layout(layout, list(features)), STRIDES, groups=2)

    assert torch.autograd.gradcheck(sample, (points, *features))


def test_points_are_relative_to_the_box() -> None:
    sampling = Sampling3D(16, groups=2, points=3, strides=STRIDES).double()
    awakened(sampling)
    queries = some_queries()
    points = sampling.place(queries.content, queries.position)
    offsets = queries.content @ sampling.offset.weight.T + sampling.offset.bias
    for b, n, g, p in product(range(2), range(5), range(2), range(3)):
        dx, dy, dz = offsets[b, n, (g * 3 + p) * 3 :][:3].tolist()
        x1, y1, x2, y2 = queries.boxes[b, n].tolist()
        z = math.log2((x2 - x1) * (y2 - y1)) / 2
        wanted = [(x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1), z + dz]
        assert points[b, n, g, p].tolist() == pytest.approx(wanted, abs=1e-5)


@LAYOUTS
def test_positions_in_float32_survive_features_in_bfloat16(layout: torch.memory_format) -> None:
    """A place in a wide image is finer than bfloat16 can say."""
    ramp = torch.arange(256.0).expand(1, 2, 4, 256)  # whole numbers up to 256 are exact
    points = torch.tensor([[801.0, 8.0, 2.0], [805.0, 8.0, 2.0]]).view(1, 2, 1, 1, 3)
    values = sample_pyramid(points, in_layout(layout, [ramp.bfloat16()]), (4,), 1)
    assert values.dtype == torch.bfloat16
    assert values[0, :, 0, 0, 0].tolist() == [200, 201]


@LAYOUTS
@pytest.mark.parametrize("place", [math.nan, math.inf, -math.inf, 1e30])
def test_places_that_are_nowhere_harm_only_themselves(
    layout: torch.memory_format, place: float
) -> None:
    features = in_layout(layout, pyramid())
    points = scattered_points()
    wanted = sample_pyramid(points, features, STRIDES, groups=2)
    lost = points.clone()
    lost[0, 0, 0, 0, 0] = place
    found = sample_pyramid(lost, features, STRIDES, groups=2)
    assert torch.equal(found.flatten(0, 3)[1:], wanted.flatten(0, 3)[1:])
    if place == 1e30:
        assert not found[0, 0, 0, 0].any()


@pytest.mark.parametrize("points", [9, 64])
def test_a_square_number_of_points_starts_as_a_grid(points: int) -> None:
    sampling = Sampling3D(16, groups=3, points=points, strides=STRIDES)
    offsets = sampling.offset.bias.detach().view(3, points, 3)
    root = math.isqrt(points)
    line = [(i + 0.5) / root - 0.5 for i in range(root)]
    for group in offsets:
        found = sorted((round(x, 6), round(y, 6)) for x, y, _ in group.tolist())
        assert found == sorted((round(x, 6), round(y, 6)) for x, y in product(line, line))
    assert offsets[..., 2].unique().tolist() == [-1]
    assert not sampling.offset.weight.any()


def test_other_numbers_of_points_start_at_random() -> None:
    sampling = Sampling3D(16, groups=64, points=32, strides=STRIDES)
    offsets = sampling.offset.bias.detach().view(64, 32, 3)
    place = offsets[..., :2]
    assert -0.5 <= float(place.min()) < -0.49 and 0.49 < float(place.max()) <= 0.5
    assert float(place.mean()) == pytest.approx(0, abs=0.02)
    assert float(place.var()) == pytest.approx(1 / 12, rel=0.05)
    assert offsets[..., 2].unique().tolist() == [-1]
    assert not torch.equal(offsets[0], offsets[1])


# Mixing


def standardised(matrix: Tensor) -> Tensor:
    mean = matrix.sum() / matrix.numel()
    variance = (matrix - mean).square().sum() / matrix.numel()
    return (matrix - mean) / torch.sqrt(variance + 1e-5)


def literal_mixing(module: AdaptiveMixing, content: Tensor, sampled: Tensor) -> Tensor:
    batch, queries, groups, points, width = sampled.shape
    rows = []
    for b, n in product(range(batch), range(queries)):
        made = module.generator.weight @ content[b, n] + module.generator.bias
        flat = []
        for g in range(groups):
            size = width**2 + module.out_points * points
            mine = made[g * size : (g + 1) * size]
            channel = mine[: width**2].reshape(width, width)
            spatial = mine[width**2 :].reshape(module.out_points, points)
            x = torch.relu(standardised(sampled[b, n, g] @ channel))
            x = torch.relu(standardised(spatial @ x))
            flat.append(x.reshape(-1))
        rows.append(module.project_out.weight @ torch.cat(flat) + module.project_out.bias)
    return torch.stack(rows).view(batch, queries, -1)


def test_mixing() -> None:
    mixing = AdaptiveMixing(16, feature_channels=12, groups=3, points=5, out_points=7).double()
    awakened(mixing)
    content = torch.randn(2, 4, 16, dtype=torch.float64)
    sampled = torch.randn(2, 4, 3, 5, 4, dtype=torch.float64)
    wanted = literal_mixing(mixing, content, sampled)
    torch.testing.assert_close(mixing(content, sampled), wanted, rtol=0, atol=1e-10)


def test_mixing_starts_the_same_for_every_query() -> None:
    mixing = AdaptiveMixing(16, feature_channels=8, groups=2, points=4, out_points=6)
    assert not mixing.generator.weight.any()
    sampled = torch.randn(1, 1, 2, 4, 4).expand(1, 3, -1, -1, -1)
    mixed = mixing(torch.randn(1, 3, 16), sampled)
    torch.testing.assert_close(mixed[:, 0], mixed[:, 1])


def test_mixing_refuses_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="8 channels cannot be split into 3 groups"):
        AdaptiveMixing(16, feature_channels=8, groups=3, points=4, out_points=6)


# The layer


def literal_layer(layer: RefinementLayer, queries: Queries, features: list[Tensor]) -> Queries:
    t = queries.content + layer.embedding(queries.position)
    t = layer.attention_norm(t + literal_attention(layer.attention, t, queries.boxes))
    points = layer.sampling.place(t, queries.position)
    sampled = literal_sampling(points, features, layer.sampling.groups)
    t = layer.mixing_norm(t + literal_mixing(layer.mixing, t, sampled))
    first, second = layer.ffn[0], layer.ffn[2]
    t = layer.ffn_norm(t + second(torch.relu(first(t))))
    tower = layer.box_head
    dx, dy, dz, dr = tower[3](torch.relu(tower[1](tower[0](t)))).unbind(-1)
    x, y, z, r = queries.position.unbind(-1)
    position = torch.stack([x + dx * 2**z, y + dy * 2**z, z + dz, r + dr], dim=-1)
    return Queries(position, t, decode_position(position))


def test_layer() -> None:
    layer, features, queries = randomised_layer(), pyramid(), some_queries()
    with torch.no_grad():
        found, wanted = layer(queries, features), literal_layer(layer, queries, features)
    for ours, literal in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, literal, rtol=0, atol=1e-9)


def test_gradient_goes_through_content_and_features_alone() -> None:
    layer = randomised_layer()
    queries = Queries(*(part.requires_grad_() for part in some_queries()))
    features = [feature.requires_grad_() for feature in pyramid()]
    refined = layer(queries, features)
    (refined.boxes.sum() + layer.classify(refined.content).sum()).backward()
    assert queries.position.grad is None and queries.boxes.grad is None
    assert queries.content.grad is not None and bool(queries.content.grad.any())
    assert all(feature.grad is not None and bool(feature.grad.any()) for feature in features)


def test_a_box_loss_reaches_the_step_of_its_own_call_alone() -> None:
    """Two calls: the second's boxes say nothing to the first's box head."""
    layer, second = randomised_layer(), randomised_layer()
    refined = second(layer(some_queries(), pyramid()), pyramid())
    refined.boxes.sum().backward()
    assert all(p.grad is None for p in layer.box_head.parameters())
    assert all(p.grad is not None for p in second.box_head.parameters())
    assert all(p.grad is not None for p in layer.ffn.parameters())


def test_no_parameter_is_dead() -> None:
    layer = randomised_layer()
    refined = layer(some_queries(), pyramid())
    (refined.boxes.square().sum() + layer.classify(refined.content).square().sum()).backward()
    dead = [n for n, p in layer.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not dead


def test_jacobian_of_content() -> None:
    layer, features, queries = randomised_layer(), pyramid(), some_queries(3)

    def by_content(content: Tensor) -> tuple[Tensor, Tensor]:
        refined = layer(queries._replace(content=content), features)
        return refined.content, refined.boxes

    assert torch.autograd.gradcheck(by_content, (queries.content.requires_grad_(),), atol=1e-4)


def test_rows_are_read_on_the_device_of_the_maps() -> None:
    """A GPU reads them where its gradients must repeat; ``meta`` refuses what is elsewhere."""
    features = in_layout(torch.channels_last, [feature.to("meta") for feature in pyramid()])
    found = _read_rows(scattered_points().to("meta"), features, STRIDES)
    assert found.device.type == "meta"
    assert found.shape == (*scattered_points().shape[:-1], features[0].shape[1] // 2)


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    layer, features, queries = randomised_layer(), pyramid(), some_queries()
    with torch.no_grad():
        together = layer(queries, features)
        alone = layer(Queries(*(part[1:] for part in queries)), [f[1:] for f in features])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:], b, rtol=0, atol=1e-11)


def test_order_of_queries_does_not_matter() -> None:
    layer, features, queries = randomised_layer(), pyramid(), some_queries()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        straight = layer(queries, features)
        permuted = layer(Queries(*(part[:, order] for part in queries)), features)
    for a, b in zip(straight, permuted, strict=True):
        torch.testing.assert_close(a[:, order], b, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3), (torch.float64, 0)]
)
def test_precisions(dtype: torch.dtype, tolerance: float) -> None:
    """Contents follow the dtype of the weights; positions stay as fine as they come."""
    layer, features, queries = randomised_layer(), pyramid(), some_queries()
    with torch.no_grad():
        wanted = layer(queries, features)
        coarse = queries._replace(content=queries.content.to(dtype))
        found = layer.to(dtype)(coarse, [feature.to(dtype) for feature in features])
    assert found.content.dtype == dtype
    assert found.position.dtype == found.boxes.dtype == torch.float64
    error = (found.content.double() - wanted.content).square().mean().sqrt()
    assert float(error) <= tolerance


def test_initialisation() -> None:
    layer = RefinementLayer(LayerConfig())
    state = layer.state_dict()
    for name in ("box_head.3.weight", "box_head.3.bias", "attention.project_in.bias"):
        assert not state[name].any(), name
    for name in ("sampling.offset.weight", "mixing.generator.weight"):
        assert not state[name].any(), name
    torch.testing.assert_close(state["class_head.3.bias"].sigmoid(), torch.full((80,), 0.01))
    assert float(state["class_head.3.bias"][0]) == pytest.approx(-4.595, abs=1e-3)
    tau = torch.cat([BoxBiasedAttention(256, 8).tau.detach() for _ in range(40)])
    assert 0 <= float(tau.min()) < 0.3 and 3.7 < float(tau.max()) <= 4
    assert float(tau.mean()) == pytest.approx(2, abs=0.25)
    for name, value in state.items():
        if "norm" in name or name.endswith(("head.1.weight", "head.1.bias")):
            assert bool((value == (1 if name.endswith("weight") else 0)).all()), name


@pytest.mark.parametrize(
    "name",
    [
        "attention.project_in",
        "attention.project_out",
        "mixing.project_out",
        "ffn.0",
        "ffn.2",
        "class_head.0",
        "class_head.3",
        "box_head.0",
    ],
)
def test_xavier_weights(name: str) -> None:
    linear = RefinementLayer(LayerConfig()).get_submodule(name)
    assert isinstance(linear, nn.Linear)
    bound = math.sqrt(6 / (linear.in_features + linear.out_features))
    largest = float(linear.weight.detach().abs().max())
    assert 0.99 * bound < largest <= bound
    assert float(linear.weight.detach().var()) == pytest.approx(bound**2 / 3, rel=0.03)


@pytest.mark.parametrize(
    "name", ["attention.project_out", "mixing.generator", "mixing.project_out", "ffn.0", "ffn.2"]
)
def test_biases_as_linear_layers_have_them(name: str) -> None:
    linear = RefinementLayer(LayerConfig()).get_submodule(name)
    assert isinstance(linear, nn.Linear)
    bound = 1 / math.sqrt(linear.in_features)
    assert 0.9 * bound < float(linear.bias.detach().abs().max()) <= bound


def test_a_fresh_layer_keeps_every_box() -> None:
    layer, queries = RefinementLayer(SMALL).double(), some_queries()
    refined = layer(queries, pyramid())
    assert torch.equal(refined.position, queries.position)


@pytest.mark.parametrize("field", ["points", "heads", "num_classes", "ffn_channels"])
def test_sizes_below_one_are_refused(field: str) -> None:
    changes: dict[str, Any] = {field: 0}
    with pytest.raises(ValueError, match=rf"LayerConfig\({field}=0\)"):
        replace(SMALL, **changes)


def test_literal_bilinear_is_that_of_the_framework() -> None:
    """The reading above, where it can be checked: inside, by resizing to twice the size."""
    feature = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    double = F.interpolate(feature, scale_factor=2, mode="bilinear", align_corners=False)
    read = bilinear(feature[0], x=2.75, y=1.75, stride=1)  # centre of cell (3, 5) of the double
    torch.testing.assert_close(read, double[0, :, 3, 5], rtol=0, atol=1e-12)


# Movement


def of_scores(scores: list[list[float]], boxes: Tensor | None = None) -> Queries:
    """One class, contents that are its logits; boxes that have not moved."""
    content = torch.tensor(scores, dtype=torch.float64).logit()[..., None]
    still = content.new_zeros(*content.shape[:2], 4)
    return Queries(still, content, still if boxes is None else boxes)


def movement(settled: Settled, before: Queries, after: Queries) -> list[float]:
    return settled.movement(before, after, lambda content: content).tolist()


def moved(queries: Queries, *by: float) -> Queries:
    """One side of each box, the same in all images."""
    boxes = queries.boxes.clone()
    boxes[..., 2] += torch.tensor(by, dtype=boxes.dtype)
    return queries._replace(boxes=boxes)


def test_movement_by_hand() -> None:
    """The largest of score times pixels and of change of score, over what is allowed of each."""
    settled = Settled(pixels=2.0, score=0.1)
    before = of_scores([[0.8, 0.1], [0.8, 0.1], [0.5, 0.1]])
    after = of_scores([[0.8, 0.1], [0.8, 0.1], [0.45, 0.4]])
    assert movement(settled, before, moved(before, -3.0, 5.0))[0] == pytest.approx(0.8 * 3 / 2)
    assert movement(settled, before, moved(before, 3.0, 50.0))[1] == pytest.approx(0.1 * 50 / 2)
    # By the larger score, that before or that after.
    assert movement(settled, before, moved(after, 7.0, 8.0))[2] == pytest.approx(3.0)  # 0.4 − 0.1
    assert movement(settled, before, moved(after, 14.0, 0.0))[2] == pytest.approx(0.5 * 14 / 2)
    assert movement(settled, before, moved(after, 0.0, 20.0))[2] == pytest.approx(0.4 * 20 / 2)


def test_a_box_that_hardly_scores_holds_up_no_image() -> None:
    settled = Settled()
    image = of_scores([[0.9, 0.01]])
    assert movement(settled, image, moved(image, 0.0, 60.0))[0] <= 1
    assert movement(settled, image, moved(image, 60.0, 0.0))[0] > 1
    # Not for ever: where it begins to score, its image goes on.
    assert movement(settled, image, of_scores([[0.9, 0.01 + 1.01 * settled.score]]))[0] > 1


def test_a_change_of_score_counts_alike_at_every_score() -> None:
    before = of_scores([[0.02], [0.4], [0.9]])
    found = movement(Settled(), before, of_scores([[0.06], [0.44], [0.86]]))
    assert found == pytest.approx([0.04 / Settled().score] * 3)


@pytest.mark.parametrize("times", [1.5, 4.0])
def test_movement_grows_with_what_moves(times: float) -> None:
    """In proportion to pixels, to the score, and to one over the limits."""
    image, settled = of_scores([[0.2, 0.1]]), Settled(pixels=1.0, score=0.05)
    once = movement(settled, image, moved(image, 3.0, 2.0))[0]
    farther = movement(settled, image, moved(image, 3.0 * times, 2.0 * times))[0]
    scored = of_scores([[0.2 * times, 0.1 * times]])
    surer = movement(settled, scored, moved(scored, 3.0, 2.0))[0]
    strict = Settled(pixels=1.0 / times, score=0.05 / times)
    stricter = movement(strict, image, moved(image, 3.0, 2.0))[0]
    assert [farther, surer, stricter] == pytest.approx([times * once] * 3)
    more = movement(settled, image, moved(image, 3.0, 2.0 * times))[0]
    assert more >= once  # another box that moves farther ends nothing sooner


def test_an_image_moves_by_itself() -> None:
    """Whatever the others do, and the order of its boxes; NaN, which is not done, with a NaN."""
    torch.manual_seed(1)
    before = of_scores(torch.rand(3, 5).tolist(), 9 * torch.rand(3, 5, 4).double())
    after = of_scores(torch.rand(3, 5).tolist(), 9 * torch.rand(3, 5, 4).double())
    together = movement(Settled(), before, after)
    for image, found in enumerate(together):
        order = torch.randperm(5)
        a, b = (Queries(*(leaf[image, order][None] for leaf in q)) for q in (before, after))
        assert movement(Settled(), a, b) == [found]
    after.boxes[1, 3, 0] = torch.nan
    found = movement(Settled(), before, after)
    assert math.isnan(found[1]) and found[::2] == together[::2]


def test_without_queries_nothing_moves() -> None:
    none = Queries(torch.zeros(3, 0, 4), torch.zeros(3, 0, 5), torch.zeros(3, 0, 4))
    assert Settled().movement(none, none, lambda content: content).tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_movement_needs_limits(value: float) -> None:
    with pytest.raises(ValueError, match=r"settled\.pixels.*above 0"):
        Settled(pixels=value)


@pytest.mark.parametrize("value", [-1, 2.5, True, math.nan])
def test_least_steps_are_a_number_of_steps(value: Any) -> None:
    with pytest.raises(ValueError, match=r"settled\.least_steps=.*integer of at least 0"):
        Settled(least_steps=value)
