from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.datasets import load_digits
from torch import Tensor

import implicit

PRECISE = implicit.Tolerance(rtol=1e-12, atol=0.0, max_steps=1000)
PRECISELY: dict[str, Any] = {"stop": PRECISE, "gradient": implicit.Implicit(stop=PRECISE)}


@pytest.fixture(scope="module")
def deq(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("deq_graph")


@pytest.fixture
def graph(deq: ModuleType) -> Any:
    return deq.load_graph(200)


@pytest.fixture
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def dense(edges: Tensor, weights: Tensor, nodes: int) -> Tensor:
    return torch.zeros(nodes, nodes, dtype=weights.dtype).index_put(tuple(edges), weights)


def diffusion_matrix(deq: ModuleType, model: Any, graph: Any) -> Tensor:
    """γ S(θ) from its formula, all pairs of nodes at once."""
    nodes = len(graph.pixels)
    joined = dense(graph.edges, torch.ones(graph.edges.shape[1]), nodes)
    difference = graph.pixels[:, None] - graph.pixels[None]
    weights = torch.exp(-(difference @ model.embed.weight.T).square().sum(dim=2)) * joined
    scale = (weights.sum(dim=1) + 1e-6).rsqrt()
    return deq.DECAY * scale[:, None] * weights * scale


def test_end_to_end(deq: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new folder" / "graph.png"
    rates = deq.main(seeds=(3, 4), updates=2, images=200, output=file)
    assert set(rates) == {(name, n) for name in deq.MODELS for n in deq.LABELS_PER_CLASS}
    assert all(len(of_seed) == 2 and 0 < min(of_seed) for of_seed in rates.values())
    printed = capsys.readouterr().out
    mean, spread = np.mean(rates["fixed point", 5]), np.std(rates["fixed point", 5])
    assert any(
        " 5 labels" in line and "fixed point" in line and f"{mean:5.1f} ± {spread:3.1f} %" in line
        for line in printed.splitlines()
    )
    picture = imread(file)[..., :3]
    for part in np.array_split(picture, 4, axis=1):
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 20


def test_graph_is_that_of_the_nearest_neighbours(deq: ModuleType, graph: Any) -> None:
    images, classes = load_digits(return_X_y=True)
    distance = np.square(images[:200, None] - images[None, :200]).sum(axis=2)
    np.fill_diagonal(distance, np.inf)
    near = distance <= np.sort(distance, axis=1)[:, [deq.NEIGHBOURS - 1]]
    joined = dense(graph.edges, torch.ones(graph.edges.shape[1]), 200)
    # Ties for the eighth place are broken by the library.
    assert (joined.numpy() <= (near | near.T)).all()
    assert (joined.sum(dim=1) >= deq.NEIGHBOURS).all() and (joined == joined.T).all()
    assert (graph.classes.numpy() == classes[:200]).all()


def test_labelled_nodes_are_as_many_of_each_class(deq: ModuleType, graph: Any) -> None:
    chosen = deq.choose_labelled(graph, 5, seed=1)
    assert len(set(chosen.tolist())) == 50
    assert torch.bincount(graph.classes[chosen]).tolist() == [5] * 10
    assert chosen.tolist() != deq.choose_labelled(graph, 5, seed=2).tolist()


def test_propagation_is_the_matrix_product(deq: ModuleType, graph: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(graph.edges.shape[1], generator=generator)
    y = torch.randn(200, 3, generator=generator)
    torch.testing.assert_close(
        deq.propagate(y, graph.edges, weights), dense(graph.edges, weights, 200) @ y
    )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 30.0])
def test_map_contracts_whatever_the_weights(deq: ModuleType, graph: Any, scale: float) -> None:
    graph.pixels = graph.pixels.double()
    torch.manual_seed(0)
    model = deq.MODELS["fixed point"](graph)
    torch.nn.init.normal_(model.embed.weight, std=scale)
    matrix = diffusion_matrix(deq, model, graph)
    assert torch.linalg.matrix_norm(matrix, 2) <= deq.DECAY + 1e-12
    # One step from the evidence B is B + γ S B.
    nodes = torch.arange(10)
    evidence = torch.zeros(200, 10).index_put((nodes, graph.classes[nodes]), torch.ones(10))
    step = model.solve(nodes, solver=implicit.Naive(), stop=implicit.Steps(1)).value[0]
    torch.testing.assert_close(step, evidence + matrix @ evidence)


@pytest.mark.usefixtures("double")
def test_fixed_point_and_its_gradient_are_those_of_the_dense_solution(
    deq: ModuleType, graph: Any
) -> None:
    graph.pixels = graph.pixels.double()
    torch.manual_seed(0)
    model = deq.MODELS["fixed point"](graph)
    nodes = deq.choose_labelled(graph, 2, seed=0)
    evidence = torch.zeros(200, 10).index_put((nodes, graph.classes[nodes]), torch.ones(20))
    probe = torch.randn(200, 10)

    matrix = diffusion_matrix(deq, model, graph)
    exact = torch.linalg.solve(torch.eye(200) - matrix, evidence)
    (right,) = torch.autograd.grad((exact * probe).sum(), [model.embed.weight])
    found = model.solve(nodes, **PRECISELY).value[0]
    (ours,) = torch.autograd.grad((found * probe).sum(), [model.embed.weight])
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ours, right, rtol=1e-8, atol=1e-8)

    # At the tolerance that the example trains with, both are as exact as it promises.
    coarse = model.solve(nodes).value[0]
    (rough,) = torch.autograd.grad((coarse * probe).sum(), [model.embed.weight])
    assert (coarse - exact).norm() < 1e-2 * exact.norm()
    assert (rough - right).norm() < 1e-2 * right.norm()


@pytest.mark.usefixtures("double")
def test_explicit_peer_is_ten_steps_of_the_same_map(deq: ModuleType, graph: Any) -> None:
    graph.pixels = graph.pixels.double()
    torch.manual_seed(0)
    model = deq.MODELS["same map, 10 steps"](graph)
    nodes = torch.arange(30)
    evidence = torch.zeros(200, 10).index_put((nodes, graph.classes[nodes]), torch.ones(30))
    matrix = diffusion_matrix(deq, model, graph)
    powers = [torch.linalg.matrix_power(matrix, i) for i in range(11)]
    expected = torch.stack(powers).sum(dim=0) @ evidence
    found = model.solve(nodes).value[0]
    torch.testing.assert_close(found, expected)
    weight, probe = [model.embed.weight], torch.randn(200, 10)
    (right,) = torch.autograd.grad((expected * probe).sum(), weight)
    torch.testing.assert_close(torch.autograd.grad((found * probe).sum(), weight)[0], right)


def test_graph_convolution_is_that_of_kipf_and_welling(deq: ModuleType, graph: Any) -> None:
    torch.manual_seed(0)
    model = deq.MODELS["GCN, 2 layers"](graph).eval()
    adjacency = dense(graph.edges, torch.ones(graph.edges.shape[1]), 200) + torch.eye(200)
    scale = adjacency.sum(dim=1).rsqrt()
    hop = scale[:, None] * adjacency * scale
    hidden = (hop @ graph.pixels @ model.first.weight.T).relu()
    expected = (hop @ hidden @ model.second.weight.T).log_softmax(dim=1)
    torch.testing.assert_close(model(torch.arange(10)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images", [200, 1797])
def test_peers_have_equally_many_parameters(deq: ModuleType, images: int) -> None:
    graph = deq.load_graph(images)
    count = {
        name: sum(p.numel() for p in make(graph).parameters() if p.requires_grad)
        for name, make in deq.MODELS.items()
    }
    assert count.pop("label spreading") == 0
    assert len(count) == 3 and len(set(count.values())) == 1 and min(count.values()) > 1000


def test_training_does_not_see_the_test_labels(
    deq: ModuleType, graph: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = deq.choose_labelled(graph, 5, seed=0)
    monkeypatch.setattr(deq, "choose_labelled", lambda *_: labelled)
    others = np.setdiff1d(np.arange(200), labelled)
    scrambled = deq.load_graph(200)
    scrambled.classes[others] = (scrambled.classes[others] + 1) % 10
    for name in deq.MODELS:
        model, right = deq.run(name, graph, 5, updates=3, seed=0)
        same, wrong = deq.run(name, scrambled, 5, updates=3, seed=0)
        for a, b in zip(model.parameters(), same.parameters(), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            answers = model(labelled).argmax(dim=1)
        # Only the nodes without a label count.
        for rate, classes in ((right, graph.classes), (wrong, scrambled.classes)):
            expected = (answers[others] == classes[others]).float().mean().item()
            assert rate == pytest.approx(100 * expected)


def test_half_of_the_labels_is_asked_given_the_other_half(
    deq: ModuleType, graph: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = deq.MODELS["fixed point"](graph)
    labelled = deq.choose_labelled(graph, 2, seed=0)
    seen: list[Tensor] = []
    solve = model.solve
    monkeypatch.setattr(model, "solve", lambda nodes: (seen.append(nodes), solve(nodes))[1])
    losses = [model.loss(labelled).item() for _ in range(2)]
    assert len(seen) == 2 and set(seen[0].tolist()) != set(seen[1].tolist())
    for loss, given in zip(losses, list(seen), strict=True):
        asked = sorted(set(labelled.tolist()) - set(given.tolist()))
        assert len(given) == len(asked) == 10
        right = model(given)[asked, graph.classes[asked]]
        assert loss == pytest.approx(-right.mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--updates", 0), "updates=0"),
        (("--images", 50), "images=50"),
        (("--images", 2000), "1797"),
        (("--seeds",), "one seed"),
        (("--output", "picture.tiff"), r"\.png"),
        (("--output", "{file}/picture.png"), "file"),
        (("--output", "{folder}"), "folder.png"),
    ],
)
def test_bad_arguments_end_in_a_message(
    refusal: Callable[..., str], arguments: tuple[object, ...], message: str
) -> None:
    assert re.search(message, refusal("deq_graph", *arguments))
