"""Boxes and positions: round trips, flips, overlaps against areas counted by hand or by cells."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detection.boxes import (
    decode_position,
    encode_boxes,
    generalized_iou,
    intersection_over_foreground,
    perturb_boxes,
    side_lengths,
)

WholeBox = tuple[int, int, int, int]
corner = st.floats(-2000, 2000)
side = st.floats(0.01, 3000)
whole_boxes = st.tuples(
    st.integers(0, 9), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9)
).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@st.composite
def boxes(draw: st.DrawFn) -> Tensor:
    x, y = draw(corner), draw(corner)
    return torch.tensor([x, y, x + draw(side), y + draw(side)], dtype=torch.float64)


@given(box=boxes())
@settings(max_examples=60, deadline=None)
def test_decoding_undoes_encoding(box: Tensor) -> None:
    # 1e-7 px are added to the sides before their logarithm.
    torch.testing.assert_close(decode_position(encode_boxes(box)), box, rtol=0, atol=1e-7)


@given(
    x=corner,
    y=corner,
    z=st.floats(-3, 12),
    r=st.floats(-4, 4),
)
@settings(max_examples=60, deadline=None)
def test_encoding_undoes_decoding(x: float, y: float, z: float, r: float) -> None:
    position = torch.tensor([x, y, z, r], dtype=torch.float64)
    torch.testing.assert_close(encode_boxes(decode_position(position)), position, rtol=0, atol=1e-5)


@given(box=boxes(), flips=st.tuples(st.booleans(), st.booleans()))
@settings(max_examples=30, deadline=None)
def test_a_flipped_box_has_the_position_of_its_twin(box: Tensor, flips: tuple[bool, bool]) -> None:
    x1, y1, x2, y2 = box.tolist()
    if flips[0]:
        x1, x2 = x2, x1
    if flips[1]:
        y1, y2 = y2, y1
    flipped = torch.tensor([x1, y1, x2, y2], dtype=torch.float64)
    torch.testing.assert_close(encode_boxes(flipped), encode_boxes(box), rtol=0, atol=1e-12)


def test_position_by_hand() -> None:
    # 8 wide and 32 high: z = log2 16, r = log2 4.
    box = torch.tensor([100.0, 50.0, 108.0, 82.0], dtype=torch.float64)
    wanted = torch.tensor([104.0, 66.0, 4.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(encode_boxes(box), wanted, rtol=0, atol=1e-7)
    assert side_lengths(wanted).tolist() == [8, 32]


def test_an_empty_box_has_a_finite_position() -> None:
    position = encode_boxes(torch.tensor([5.0, 6.0, 5.0, 6.0], dtype=torch.float64))
    assert position.tolist() == pytest.approx([5, 6, math.log2(1e-7), 0])


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 0, 4), (2, 3, 5, 4)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    position = torch.zeros(shape)
    assert decode_position(position).shape == encode_boxes(position).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    box = torch.tensor([[[0, 0, 8, 8]]], dtype=dtype)
    outputs = [encode_boxes(box), decode_position(box), intersection_over_foreground(box)]
    assert {o.dtype for o in [*outputs, generalized_iou(box, box)]} == {dtype}


def cells(box: WholeBox) -> set[tuple[int, int]]:
    x1, y1, x2, y2 = box
    return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}


@given(a=whole_boxes, b=whole_boxes)
@settings(max_examples=60, deadline=None)
def test_overlaps_of_whole_pixels_are_counts_of_pixels(a: WholeBox, b: WholeBox) -> None:
    common, either = len(cells(a) & cells(b)), len(cells(a) | cells(b))
    pair = torch.tensor([[a, b]], dtype=torch.float64)
    iof = intersection_over_foreground(pair)[0]
    shares = [[1.0, common / len(cells(a))], [common / len(cells(b)), 1.0]]
    torch.testing.assert_close(iof, torch.tensor(shares, dtype=torch.float64))
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    giou = float(generalized_iou(pair[0, 0], pair[0, 1]))
    assert giou == pytest.approx(common / either - (hull - either) / hull, abs=1e-12)


@given(a=boxes(), b=boxes(), scale=st.floats(0.1, 10), shift=st.floats(-500, 500))
@settings(max_examples=40, deadline=None)
def test_giou_is_symmetric_bounded_and_blind_to_units(
    a: Tensor, b: Tensor, scale: float, shift: float
) -> None:
    value = float(generalized_iou(a, b))
    assert -1 <= value <= 1 + 1e-12
    assert float(generalized_iou(b, a)) == pytest.approx(value, abs=1e-12)
    assert float(generalized_iou(a, a)) == pytest.approx(1, abs=1e-9)
    moved = float(generalized_iou(a * scale + shift, b * scale + shift))
    assert moved == pytest.approx(value, abs=1e-5)


def test_giou_broadcasts_to_pairs() -> None:
    torch.manual_seed(0)
    low = torch.rand(2, 5, 2).double()
    some = torch.cat([low, low + torch.rand(2, 5, 2)], dim=-1)
    pairs = generalized_iou(some[:, :, None], some[:, None, :3])
    assert pairs.shape == (2, 5, 3)
    for i in range(5):
        for j in range(3):
            torch.testing.assert_close(pairs[:, i, j], generalized_iou(some[:, i], some[:, j]))


def test_giou_of_empty_boxes_is_finite_and_so_is_its_gradient() -> None:
    point = torch.tensor([3.0, 3.0, 3.0, 3.0], requires_grad=True)
    value = generalized_iou(point, torch.tensor([3.0, 3.0, 3.0, 3.0]))
    value.backward()
    assert bool(value.isfinite()) and point.grad is not None and bool(point.grad.isfinite().all())


def test_giou_gradient() -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 3.0], [0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 1.5, 4.0, 5.0], [3.0, 2.0, 4.0, 4.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        generalized_iou, (a.requires_grad_(), b.requires_grad_()), raise_exception=True
    )


def test_iof_rows_are_the_attending_boxes() -> None:
    small, large = [2.0, 2.0, 4.0, 4.0], [0.0, 0.0, 8.0, 8.0]
    iof = intersection_over_foreground(torch.tensor([[small, large]]))
    assert iof.tolist() == [[[1.0, 1.0], [4 / 64, 1.0]]]


def test_iof_of_flipped_and_empty_boxes() -> None:
    """A flipped side makes the overlap 0; an area is never below 1e-6."""
    flipped, empty, plain = [4.0, 0.0, 0.0, 4.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 4.0, 4.0]
    iof = intersection_over_foreground(torch.tensor([[flipped, empty, plain]]).double())[0]
    assert iof[0].tolist() == [0, 0, 0]
    assert iof[1].tolist() == [0, 0, 0]
    assert iof[2].tolist() == [0, 0, 1]
    thin = torch.tensor([[[0.0, 0.0, 1e-4, 1e-4], plain]], dtype=torch.float64)
    assert float(intersection_over_foreground(thin)[0, 0, 1]) == pytest.approx(1e-8 / 1e-6)


def test_noise_moves_corners_and_the_position_follows_the_twin() -> None:
    box = torch.tensor([10.0, 10.0, 20.0, 40.0], dtype=torch.float64)
    noise = torch.tensor([30.0, 0.0, 0.0, 5.0], dtype=torch.float64)
    position, noisy = perturb_boxes(box, noise)
    assert noisy.tolist() == [40, 10, 20, 45]
    orderly = torch.tensor([20.0, 10.0, 40.0, 45.0], dtype=torch.float64)
    torch.testing.assert_close(decode_position(position), orderly, rtol=0, atol=1e-6)
