from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from torch import Tensor
from torch.nn import functional as F

SIZES = st.sampled_from((5, 9, 13, 17))
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def deq(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("deq_mazes")


@pytest.fixture
def network(deq: ModuleType) -> Any:
    torch.manual_seed(0)
    return deq.Network()


@pytest.fixture
def few(deq: ModuleType) -> Any:
    return deq.make_mazes(deq.TRAIN_SIZE, 4, np.random.default_rng(0))


def neighbours(cells: set[tuple[int, int]], cell: tuple[int, int]) -> set[tuple[int, int]]:
    y, x = cell
    return cells & {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)}


def cells_of(plane: Any) -> set[tuple[int, int]]:
    return {(int(y), int(x)) for y, x in np.argwhere(plane > 0)}


def reached(cells: set[tuple[int, int]], start: tuple[int, int]) -> set[tuple[int, int]]:
    seen, front = {start}, {start}
    while front:
        front = {n for cell in front for n in neighbours(cells, cell)} - seen
        seen |= front
    return seen


@settings(deadline=None, max_examples=60)
@given(size=SIZES, seed=SEEDS)
def test_labelled_path_is_the_only_path(deq: ModuleType, size: int, seed: int) -> None:
    picture, path = deq.make_maze(size, np.random.default_rng(seed))
    assert picture.shape == (3, size, size) and path.shape == (size, size)
    assert set(np.unique(picture)) <= {0, 1} and set(np.unique(path)) <= {0, 1}
    walk, (start,), (goal,) = (cells_of(plane) for plane in picture)
    assert start != goal

    # Connected, with one edge fewer than cells: a tree, where one path joins any two cells.
    assert reached(walk, start) == walk
    assert sum(len(neighbours(walk, cell)) for cell in walk) == 2 * (len(walk) - 1)
    # All rooms are there, so the grid is full.
    assert {(y, x) for y in range(0, size, 2) for x in range(0, size, 2)} <= walk

    # The marked cells are that path: connected, ends at start and goal, no branch on the way.
    marked = cells_of(path)
    assert marked <= walk and reached(marked, start) == marked
    degree = {cell: len(neighbours(marked, cell)) for cell in marked}
    assert {cell for cell, n in degree.items() if n == 1} == {start, goal}
    assert all(degree[cell] == 2 for cell in marked - {start, goal})


def test_no_walls_are_in_both_training_and_test(deq: ModuleType) -> None:
    mazes, tests = deq.make_data(seed=1, train=300, test=40)
    walls = [plane.numpy().tobytes() for plane in mazes.picture[:, 0]]
    unseen = [plane.numpy().tobytes() for plane in tests[deq.TRAIN_SIZE].picture[:, 0]]
    assert len(set(walls)) == 300 and len(set(unseen)) == 40 and not set(walls) & set(unseen)
    assert {size: tuple(test.picture.shape) for size, test in tests.items()} == {
        size: (40, 3, size, size) for size in deq.TEST_SIZES
    }


def test_walls_to_avoid_are_avoided(deq: ModuleType) -> None:
    # There are four mazes of 3×3 cells.
    rng = np.random.default_rng(0)
    three = {plane.numpy().tobytes() for plane in deq.make_mazes(3, 3, rng).picture[:, 0]}
    last = deq.make_mazes(3, 1, rng, avoid=three)
    assert len(three) == 3 and last.picture[0, 0].numpy().tobytes() not in three


def walk_from(network: Any, y: Tensor, injected: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        y = network.refine(y, injected)
    return y


def assert_same(found: Tensor, expected: Tensor, network: Any) -> None:
    """The losses, and their gradients."""
    torch.testing.assert_close(found, expected)
    parameters = list(network.parameters())
    for ours, right in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-6)


def loss_of(network: Any, mazes: Any, y: Tensor) -> Tensor:
    """Mean cross-entropy over the cells that are no wall."""
    on = mazes.picture[:, 0] > 0
    return F.binary_cross_entropy_with_logits(network.readout(y)[:, 0][on], mazes.path[on])


def test_solution_is_the_network_applied_again_and_again(
    deq: ModuleType, network: Any, few: Any
) -> None:
    injected = network.inject(few.picture)
    for n, logits in zip((1, 3, 7), network.solve(few.picture, (1, 3, 7)), strict=True):
        y = walk_from(network, torch.zeros_like(injected), injected, n)
        torch.testing.assert_close(logits, network.readout(y)[:, 0])


@pytest.mark.parametrize(("method", "k"), [("JFB", 1), ("RAG(2)", 2), ("RAG(4)", 4)])
def test_gradient_goes_through_k_applications_at_each_position(
    deq: ModuleType, network: Any, few: Any, method: str, k: int
) -> None:
    injected = network.inject(few.picture)
    losses = []
    for n in deq.OMEGA:
        state = walk_from(network, torch.zeros_like(injected), injected, n).detach()
        losses.append(loss_of(network, few, walk_from(network, state, injected, k)))
    expected = torch.stack(losses).mean()
    found = network.loss(few, deq.METHODS[method])
    assert_same(found, expected, network)


def test_baseline_has_the_losses_and_the_gradient_of_the_whole_path(
    deq: ModuleType, network: Any, few: Any
) -> None:
    found = network.loss(few, deq.METHODS["recurrent"])
    injected = network.inject(few.picture)
    states = [walk_from(network, torch.zeros_like(injected), injected, n) for n in deq.OMEGA]
    expected = torch.stack([loss_of(network, few, y) for y in states]).mean()
    assert_same(found, expected, network)


def test_all_methods_train_the_same_network_on_the_same_batches(
    deq: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun, batches = [], []
    honest = deq.Network.loss

    def recorded(network: Any, mazes: Any, gradient: Any) -> Tensor:
        if not batches or len(batches[-1]) == 2:
            begun.append([p.detach().clone() for p in network.parameters()])
            batches.append([])
        batches[-1].append(mazes.picture)
        return honest(network, mazes, gradient)

    monkeypatch.setattr(deq.Network, "loss", recorded)
    monkeypatch.setattr(deq, "draw", lambda *_: None)
    deq.main((5,), updates=2, train_mazes=40, test_mazes=1, output=tmp_path / "mazes.png")
    assert len(begun) == len(batches) == len(deq.METHODS)
    for weights, seen in zip(begun, batches, strict=True):
        assert all(map(torch.equal, weights, begun[0]))
        assert all(map(torch.equal, seen, batches[0]))
    assert not torch.equal(batches[0][0], batches[0][1])


def test_training_lowers_the_loss(deq: ModuleType, network: Any, few: Any) -> None:
    rag = deq.METHODS["RAG(2)"]
    before = network.loss(few, rag).item()
    deq.train(network, "RAG(2)", few, updates=40, seed=0)
    assert network.loss(few, rag).item() < 0.8 * before


def test_maze_is_solved_if_every_cell_that_is_no_wall_is_right(deq: ModuleType, few: Any) -> None:
    right = few.path * 2 - 1
    assert deq.solved(right, few).tolist() == [True] * 4
    walk = few.picture[:, 0] > 0
    assert deq.solved(torch.where(walk, right, 1.0), few).all()  # walls do not count
    wrong = right.clone()
    y, x = torch.argwhere(walk[2])[5]
    wrong[2, y, x] *= -1
    assert deq.solved(wrong, few).tolist() == [True, True, False, True]


def test_end_to_end(deq: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new folder" / "mazes.png"
    curves = deq.main((3, 4), updates=2, train_mazes=20, test_mazes=3, output=file)
    assert set(curves) == {(m, size) for m in deq.METHODS for size in deq.TEST_SIZES}
    for of_seeds in curves.values():
        assert np.shape(of_seeds) == (2, len(deq.TEST_STEPS))
        assert np.all((0 <= np.array(of_seeds)) & (np.array(of_seeds) <= 100))
    printed = capsys.readouterr().out
    for method in deq.METHODS:
        assert f"seed 4, {method}: trained" in printed
    parameters = sum(p.numel() for p in deq.Network().parameters())
    assert f"2 seed(s); {parameters} parameters each" in printed
    picture = imread(file)[..., :3]
    film, curves_drawn = np.split(picture, [len(picture) // 3])
    for part in (*np.array_split(film, 7, axis=1), *np.array_split(curves_drawn, 3, axis=1)):
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 10


def test_picture_shows_a_solved_maze_with_the_longest_path(
    deq: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mazes = deq.make_mazes(13, 12, np.random.default_rng(0))
    order = mazes.path.sum(dim=(1, 2)).argsort(descending=True)
    right = mazes.path * 2 - 1
    right[order[0]] *= -1  # the longest is not solved
    shown: list[np.ndarray] = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda _, image: shown.append(image))
    network = deq.Network()
    monkeypatch.setattr(network, "solve", lambda picture, steps: [50 * right] * len(steps))
    curves = {
        (m, size): [[0.0] * len(deq.TEST_STEPS)] for m in deq.METHODS for size in deq.TEST_SIZES
    }
    deq.draw(curves, network, mazes, tmp_path / "mazes.png")
    chosen = int(order[1])
    walk, path = mazes.picture[chosen, 0].numpy() > 0, mazes.path[chosen].numpy() > 0
    assert len(shown) == 7
    for image in shown:
        inside = image[1:-1, 1:-1]
        assert (inside[~walk] == 0).all()  # black
        assert (inside[walk & ~path] > 0.99).all()  # white
        assert (inside[path][:, 0] > 0.8).all() and (inside[path][:, 1:] < 0.2).all()  # red


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--updates", "0"), "updates=0"),
        (("--train-mazes", "0"), "train_mazes=0"),
        (("--test-mazes", "-1"), "test_mazes=-1"),
        (("--seeds",), "seeds"),
        (("--output", "picture.tiff"), r"\.png"),
        (("--output", "{file}/picture.png"), "file"),
        (("--output", "{folder}"), "folder.png"),
    ],
)
def test_bad_arguments_end_in_a_message(
    refusal: Callable[..., str], arguments: tuple[object, ...], message: str
) -> None:
    assert re.search(message, refusal("deq_mazes", *arguments))
