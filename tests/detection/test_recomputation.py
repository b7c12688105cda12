"""What a refinement keeps for its backward pass, at full size: little, and enough."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import plain_layer
from benchmarks.full_size import full_size
from benchmarks.gradient_memory import ALL_KEPT, GOAL_PER_CALL, one_call
from detection.decoder.queries import Queries
from detection.decoder.recomputation import LARGE, forgetting


def test_one_call_keeps_less_than_the_goal() -> None:
    kept = one_call(100, 32)
    # The published layer keeps 63 MiB, and a plain composition as much: the count is a fair one.
    assert kept["plain"] / 2**20 == pytest.approx(63, abs=1)
    assert kept["ours"] <= GOAL_PER_CALL * 2**20
    assert kept["ours, channels last"] <= GOAL_PER_CALL * 2**20
    # Without making its insides again it keeps about what the plain composition does.
    assert kept[ALL_KEPT] == pytest.approx(kept["plain"], rel=0.02)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_the_plain_composition(layout: torch.memory_format) -> None:
    problem = full_size(image=(128, 160))
    layer, start = problem.layer.double(), Queries(*(leaf.double() for leaf in problem.queries))
    # Boxes in this smaller image.
    start = start._replace(content=start.content.requires_grad_())
    maps = [m.double().contiguous(memory_format=layout).requires_grad_() for m in problem.features]
    leaves: list[Tensor] = [start.content, *maps, *layer.parameters()]

    def gradients(refined: Queries) -> tuple[Tensor, ...]:
        loss = refined.content.square().mean() + refined.boxes.square().mean() / 100
        loss = loss + layer.classify(refined.content).square().mean()
        return torch.autograd.grad(loss, leaves)

    wanted = gradients(plain_layer.refine(layer, start, maps))
    for ours, plain in zip(gradients(layer(start, maps)), wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-10 * float(plain.abs().max()))


def test_without_a_graph_the_result_is_the_same() -> None:
    problem = full_size(image=(128, 160))
    with torch.no_grad():
        found = problem.layer(problem.queries, problem.prepared)
        wanted = plain_layer.refine(problem.layer, problem.queries, problem.features)
    torch.testing.assert_close(found.content, wanted.content, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.boxes, wanted.boxes, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("elements", "calls"), [(LARGE, 2), (LARGE - 1, 1)])
def test_only_what_is_large_is_computed_again(elements: int, calls: int) -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x.exp()

    x = torch.ones(3, requires_grad=True)
    forgetting(function, x, elements=elements).sum().backward()
    assert len(seen) == calls and x.grad is not None
    torch.testing.assert_close(x.grad, x.detach().exp())
    with torch.no_grad():
        forgetting(function, x, elements=elements)
    assert len(seen) == calls + 1
