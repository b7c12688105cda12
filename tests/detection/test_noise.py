"""Noise on queries: what it moves, how far, and the published numbers for given noise."""

from __future__ import annotations

from functools import cache

import pytest
import reference
import torch
from torch import Tensor

from detection.boxes import encode_boxes
from detection.decoder.noise import BoxNoise, ContentNoise
from detection.decoder.queries import Queries

numbers = cache(reference.numbers)


@pytest.mark.parametrize("case", ["content", "position", "both"])
def test_noise_of_the_published_implementation(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content first, then boxes, with the standard normal numbers that are stored."""
    stored = numbers("perturbation")
    wanted = {
        key.split("/")[1]: value for key, value in stored.items() if key.startswith(case + "/")
    }
    drawn = [wanted[f"{kind}_noise"] for kind in ("content", "box") if f"{kind}_noise" in wanted]
    given = iter(drawn)

    def draw(shape: torch.Size, **_: object) -> Tensor:
        noise = next(given)
        assert noise.shape == shape
        return noise

    monkeypatch.setattr(torch, "randn", draw)
    queries = Queries(*(wanted[f"in_{name}"] for name in Queries._fields))
    if case != "position":
        queries = ContentNoise(float(stored["content_intensity"]))(queries)
    if case != "content":
        queries = BoxNoise(float(stored["box_intensity_px"]))(queries)
    assert next(given, None) is None
    for name, value in queries._asdict().items():
        torch.testing.assert_close(value, wanted[f"noisy_{name}"], rtol=0, atol=1e-10)


def some_queries(number: int = 4000) -> Queries:
    boxes = torch.tensor([[[100.0, 50.0, 300.0, 350.0]]], dtype=torch.float64)
    boxes = boxes.expand(1, number, 4)
    content = torch.randn(1, number, 16, generator=generator(1), dtype=torch.float64)
    return Queries(encode_boxes(boxes), content, boxes)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_box_noise_moves_each_corner_by_pixels() -> None:
    queries = some_queries()
    noisy = BoxNoise(7.0)(queries, generator(0))
    moved = (noisy.boxes - queries.boxes)[0]
    torch.testing.assert_close(moved.mean(0), torch.zeros(4).double(), rtol=0, atol=0.5)
    torch.testing.assert_close(
        moved.T.cov(), 49 * torch.eye(4, dtype=torch.float64), rtol=0, atol=4
    )
    assert torch.equal(noisy.position, encode_boxes(noisy.boxes))
    assert noisy.content is queries.content


def test_content_noise_is_measured_by_the_content() -> None:
    """σ √C times as long as the content, around (1 − σ) of it; boxes stay."""
    queries = some_queries()
    noisy = ContentNoise(0.1)(queries, generator(0))
    noise = noisy.content - 0.9 * queries.content
    ratio = noise.square().sum(-1) / queries.content.square().sum(-1)
    assert float(ratio.mean()) == pytest.approx(0.01 * 16, rel=0.03)
    assert noisy.position is queries.position and noisy.boxes is queries.boxes


@pytest.mark.parametrize("noise", [BoxNoise(5.0), ContentNoise(0.2)])
def test_the_same_generator_gives_the_same_noise(noise: BoxNoise | ContentNoise) -> None:
    first, again = (noise(some_queries(5), generator(3)) for _ in range(2))
    other = noise(some_queries(5), generator(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
