"""Matching against brute force over all assignments, with costs written out literally."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detection.data.types import Target
from detection.training.matching import Matcher, MatchingCost, NonFiniteCost, focal, match

CLASSES, HEIGHT, WIDTH = 3, 40, 80


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT]) * 0.7
    side = torch.rand(count, 2, generator=generator) * 20 + 2
    return torch.cat([corner, corner + side], 1).double()


def problem(
    seed: int, queries: int, counts: list[int]
) -> tuple[Tensor, Tensor, list[Target], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(counts), queries, CLASSES, generator=generator).double()
    boxes = torch.stack([random_boxes(queries, generator) for _ in counts])
    targets = [
        Target(
            random_boxes(count, generator),
            torch.randint(CLASSES, (count,), generator=generator),
            image_id=100 + i,
            original_size=(HEIGHT, WIDTH),
        )
        for i, count in enumerate(counts)
    ]
    return logits, boxes, targets, torch.tensor([[HEIGHT, WIDTH]] * len(counts))


def literal_cost(x: float, b: list[float], t: list[float], cost: MatchingCost) -> float:
    p = 1 / (1 + math.exp(-x))
    on = -cost.alpha * (1 - p) ** cost.gamma * math.log(p)
    off = -(1 - cost.alpha) * p**cost.gamma * math.log(1 - p)
    extent = (WIDTH, HEIGHT, WIDTH, HEIGHT)
    l1 = sum(abs(u - v) / e for u, v, e in zip(b, t, extent, strict=True))
    width, height = min(b[2], t[2]) - max(b[0], t[0]), min(b[3], t[3]) - max(b[1], t[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = (b[2] - b[0]) * (b[3] - b[1]) + (t[2] - t[0]) * (t[3] - t[1]) - intersection
    hull = (max(b[2], t[2]) - min(b[0], t[0])) * (max(b[3], t[3]) - min(b[1], t[1]))
    giou = intersection / union - (hull - union) / hull
    return cost.classification * (on - off) + cost.l1 * l1 - cost.giou * giou


def cheapest(costs: list[list[float]], objects: int) -> float:
    queries = len(costs)
    if objects <= queries:
        ways = itertools.permutations(range(queries), objects)
        return min(sum(costs[q][g] for g, q in enumerate(way)) for way in ways)
    ways = itertools.permutations(range(objects), queries)
    return min(sum(costs[q][g] for q, g in enumerate(way)) for way in ways)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    queries=st.integers(1, 5),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=3),
)
def test_the_assignment_is_the_cheapest_of_all(seed: int, queries: int, counts: list[int]) -> None:
    logits, boxes, targets, sizes = problem(seed, queries, counts)
    cost = MatchingCost()
    found = match(logits, boxes, targets, sizes, cost)
    first = 0
    for image, (target, count) in enumerate(zip(targets, counts, strict=True)):
        costs = [
            [
                literal_cost(float(logits[image, q, label]), boxes[image, q].tolist(), box, cost)
                for label, box in zip(target.labels.tolist(), target.boxes.tolist(), strict=True)
            ]
            for q in range(queries)
        ]
        mine = found.batch_index == image
        query = found.query_index[mine].tolist()
        own = (found.target_index[mine] - first).tolist()
        assert len(query) == len(set(query)) == len(set(own)) == min(queries, count)
        assert all(0 <= g < count for g in own)
        total = sum(costs[q][g] for q, g in zip(query, own, strict=True))
        assert total == pytest.approx(cheapest(costs, count), rel=1e-6, abs=1e-6)
        first += count


def test_every_term_of_the_cost_follows_its_formula() -> None:
    logits, boxes, targets, sizes = problem(0, queries=4, counts=[2, 3])
    cost = MatchingCost(classification=1.5, l1=0.7, giou=3.0, alpha=0.4, gamma=1.5)
    costs = Matcher(targets, sizes, cost).costs(logits, boxes)
    for i, target in enumerate(targets):
        for q, g in itertools.product(range(4), range(len(target.labels))):
            x = float(logits[i, q, target.labels[g]])
            wanted = literal_cost(x, boxes[i, q].tolist(), target.boxes[g].tolist(), cost)
            assert float(costs[i, q, g]) == pytest.approx(wanted, rel=1e-6)


def test_an_image_is_matched_as_if_it_were_alone() -> None:
    logits, boxes, targets, sizes = problem(1, queries=6, counts=[1, 0, 4, 9])
    together = match(logits, boxes, targets, sizes)
    first = 0
    for i, target in enumerate(targets):
        alone = match(logits[i : i + 1], boxes[i : i + 1], [target], sizes[i : i + 1])
        mine = together.batch_index == i
        assert together.query_index[mine].equal(alone.query_index)
        assert (together.target_index[mine] - first).equal(alone.target_index)
        first += len(target.labels)


def test_predictions_matched_together_are_matched_as_each_alone() -> None:
    counts = [2, 0, 5]
    _, _, targets, sizes = problem(0, queries=4, counts=counts)
    predictions = [problem(seed, queries=4, counts=counts)[:2] for seed in range(3)]
    matcher = Matcher(targets, sizes)
    together = matcher.together(predictions)
    assert len({tuple(found.query_index.tolist()) for found in together}) > 1
    for found, prediction in zip(together, predictions, strict=True):
        alone = matcher(*prediction)
        assert all(mine.equal(other) for mine, other in zip(found, alone, strict=True))


def test_one_prediction_among_several_that_is_not_finite_is_refused() -> None:
    logits, boxes, targets, sizes = problem(0, queries=4, counts=[2, 3])
    bad = logits.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(NonFiniteCost, match=f"1 of 2 images .image ids {targets[1].image_id}."):
        Matcher(targets, sizes).together([(logits, boxes), (bad, boxes)])


def test_shuffled_queries_shuffle_the_assignment() -> None:
    logits, boxes, targets, sizes = problem(2, queries=7, counts=[4])
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    found = match(logits, boxes, targets, sizes)
    shuffled = match(logits[:, order], boxes[:, order], targets, sizes)
    pairs = set(zip(found.query_index.tolist(), found.target_index.tolist(), strict=True))
    back = order[shuffled.query_index].tolist()
    assert pairs == set(zip(back, shuffled.target_index.tolist(), strict=True))


def test_a_batch_without_objects_has_no_pairs() -> None:
    found = match(*problem(3, queries=4, counts=[0, 0]))
    assert [index.shape for index in found] == [(0,)] * 3
    assert all(index.dtype == torch.int64 for index in found)


def test_matching_carries_no_gradient() -> None:
    logits, boxes, targets, sizes = problem(4, queries=4, counts=[2])
    costs = Matcher(targets, sizes).costs(logits.requires_grad_(), boxes.requires_grad_())
    assert not costs.requires_grad


def test_half_precision_logits_are_matched_in_single() -> None:
    logits, boxes, targets, sizes = problem(5, queries=4, counts=[2])
    logits = logits.half()
    wanted = match(logits.float(), boxes, targets, sizes)
    found = match(logits, boxes, targets, sizes)
    assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))


def test_saturated_logits_have_finite_costs() -> None:
    logits, boxes, targets, sizes = problem(6, queries=2, counts=[2])
    logits[0] = torch.tensor([[-300.0], [300.0]])
    assert Matcher(targets, sizes).costs(logits.float(), boxes).isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["logits", "boxes", "annotation"])
def test_costs_that_are_not_finite_name_their_images(where: str, value: float) -> None:
    logits, boxes, targets, sizes = problem(7, queries=4, counts=[2, 2, 2])
    {"logits": logits, "boxes": boxes, "annotation": targets[1].boxes[None].expand(3, -1, -1)}[
        where
    ][1] = value
    with pytest.raises(NonFiniteCost, match=r"1 of 3 images \(image ids 101\)"):
        match(logits, boxes, targets, sizes)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal_is_the_published_formula(gamma: float) -> None:
    x = torch.linspace(-8, 8, 33, dtype=torch.float64)
    p = torch.sigmoid(x)
    assert torch.allclose(focal(x, gamma), -(p**gamma) * (1 - p).log(), rtol=1e-9)


def test_focal_with_gamma_zero_is_cross_entropy() -> None:
    x = torch.linspace(-30, 30, 21, dtype=torch.float64)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    assert torch.allclose(focal(x, 0.0), entropy(x, torch.zeros_like(x), reduction="none"))


@pytest.mark.parametrize(("name", "value"), [("l1", -1.0), ("giou", math.nan), ("alpha", 1.5)])
def test_impossible_weights_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"MatchingCost\\({name}={value}\\)"):
        MatchingCost(**{name: value})
