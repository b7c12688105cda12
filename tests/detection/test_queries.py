"""Where refinement starts: learned contents of unit length, and the image as everybody's box."""

from __future__ import annotations

import pytest
import torch

from detection.boxes import encode_boxes
from detection.models.queries import LearnedQueries

SIZES = torch.tensor([[480, 640], [333, 500]])


def test_every_box_is_the_image_without_its_padding() -> None:
    queries = LearnedQueries(3, 8).double()(SIZES)
    for image, (height, width) in enumerate(SIZES.tolist()):
        assert queries.boxes[image].tolist() == [[0, 0, width, height]] * 3
    assert torch.equal(queries.position, encode_boxes(queries.boxes))
    assert queries.position[0, 0, :2].tolist() == [320, 240]


def test_contents_have_mean_0_and_variance_1_on_every_use() -> None:
    queries = LearnedQueries(5, 64).double()
    with torch.no_grad():
        queries.content.mul_(7).add_(3)
    content = queries(SIZES).content
    assert content.shape == (2, 5, 64)
    torch.testing.assert_close(content.mean(-1), torch.zeros(2, 5).double(), rtol=0, atol=1e-12)
    variance = content.var(-1, correction=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-5, atol=0)
    assert torch.equal(content[0], content[1])


def test_only_the_contents_are_learned_and_stored() -> None:
    queries = LearnedQueries(3, 8)
    assert [name for name, _ in queries.named_parameters()] == ["content"]
    assert list(queries.state_dict()) == ["content"]
    started = queries(SIZES)
    assert not started.boxes.requires_grad and not started.position.requires_grad
    (started.content * torch.arange(8.0).sin()).sum().backward()
    assert queries.content.grad is not None and bool(queries.content.grad.any())


def test_contents_start_standard_normal() -> None:
    torch.manual_seed(0)
    content = LearnedQueries(100, 256).content.detach()
    assert float(content.mean()) == pytest.approx(0, abs=0.03)
    assert float(content.std()) == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_pixels_are_never_coarser_than_float32(dtype: torch.dtype) -> None:
    queries = LearnedQueries(2, 8).to(dtype)(torch.tensor([[801, 1333]]))
    assert queries.content.dtype == dtype
    assert (
        queries.boxes.dtype
        == queries.position.dtype
        == (torch.float64 if dtype == torch.float64 else torch.float32)
    )
    assert queries.boxes[0, 0].tolist() == [0, 0, 1333, 801]
