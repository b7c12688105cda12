from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.image import imread

import implicit


@pytest.fixture(scope="module")
def deq(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("deq_digits")


@pytest.fixture
def network(deq: ModuleType) -> Any:
    torch.manual_seed(0)
    return deq.Network(None)


def test_training_and_test_digits_are_all_of_them_once(deq: ModuleType) -> None:
    training, test = deq.load(seed=3)
    assert (len(training), len(test)) == (500, 1297)
    assert training.images.mean().abs() < 1e-4 and abs(training.images.std() - 1) < 1e-4
    assert set(test.classes.tolist()) == set(range(10))


def test_peers_have_equally_many_parameters(deq: ModuleType) -> None:
    counts = {sum(p.numel() for p in deq.Network(n).parameters()) for n in deq.STEPS.values()}
    assert len(counts) == 1 and counts.pop() > 10_000


def test_the_cell_is_a_contraction(deq: ModuleType, network: Any) -> None:
    images = torch.randn(4, 1, 8, 8)
    state = torch.randn(4, deq.FINE, 8, 8), torch.randn(4, deq.COARSE, 4, 4)
    for convolution in (network.cell.fine_to_fine, network.cell.fine_to_coarse):
        with torch.no_grad():
            convolution.parametrizations.weight.original.mul_(100)  # the bound must act
    network.eval()
    other = tuple(m + torch.randn_like(m) for m in state)
    with torch.no_grad():
        images_of = [network.cell(maps, images) for maps in (state, other)]
    apart, were = (
        sum(((a - b) ** 2).flatten(1).sum(dim=1) for a, b in zip(*pair, strict=True)).sqrt()
        for pair in (images_of, (state, other))
    )
    assert bool((apart < 0.9 * were).all())


def test_the_answer_is_a_fixed_point_and_that_of_many_steps(deq: ModuleType, network: Any) -> None:
    images = deq.load(0)[1].images[:8]
    network.eval()
    exactly = {"stop": implicit.Tolerance(rtol=1e-6, atol=0.0, max_steps=100)}
    with torch.no_grad():
        solution = network.solve(images, **exactly)
        again = network.cell(solution.value, images)
        plain = network.solve(images, solver=implicit.Naive(), stop=implicit.Steps(150)).value
    assert solution.converged.all()
    for found, image, far in zip(solution.value, again, plain, strict=True):
        torch.testing.assert_close(found, image, rtol=0, atol=1e-5)
        torch.testing.assert_close(found, far, rtol=0, atol=1e-4)


def test_the_gradient_is_that_of_backpropagation_through_many_steps(
    deq: ModuleType, network: Any
) -> None:
    digits = deq.load(0)[0].part(slice(6))
    network.eval()  # the bounds on the weights stay as they are
    weights = list(network.parameters())
    found = torch.autograd.grad(network.loss(digits), weights)
    network.steps = 40
    exact = torch.autograd.grad(network.loss(digits), weights)
    error = sum(((a - b) ** 2).sum() for a, b in zip(found, exact, strict=True)).sqrt()
    size = sum((b**2).sum() for b in exact).sqrt()
    assert error < 0.02 * size


def test_a_small_run_learns_and_draws(deq: ModuleType, tmp_path: Path) -> None:
    rates = deq.main(seeds=(0,), epochs=2, output=tmp_path / "new" / "digits.png")
    assert set(rates) == set(deq.STEPS)
    assert min(rate[0] for rate in rates.values()) > 80
    picture = imread(tmp_path / "new" / "digits.png")
    assert picture.shape[0] > 300 and picture[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", 0), "epochs=0"),
        (("--output", "picture.txt"), r"\.png"),
        (("--output", "/dev/null/a.png"), "/dev/null"),
    ],
)
def test_bad_arguments_are_told(
    refusal: Callable[..., str], arguments: tuple[object, ...], message: str
) -> None:
    assert re.search(message, refusal("deq_digits", *arguments))
