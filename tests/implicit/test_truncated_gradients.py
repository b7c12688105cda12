"""Gradients of k terms: `JFB`, `RAG` and `Phantom`, which track steps, and `Neumann`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_problems import TIGHT, cell, problem, random
from torch import Tensor

import implicit
from implicit import JFB, RAG, Gradient, Neumann, Phantom, fixed_point


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_unrolled_gradients_against_finite_differences(k: int, rate: float) -> None:
    """RAG(k) and Phantom(k, λ) are the derivative of their k steps from a fixed solution."""
    w, x, y0 = problem()
    gradient = RAG(k) if rate == 1 else Phantom(k, rate)
    solution = fixed_point(lambda y: cell(y, w, x), y0, stop=TIGHT, gradient=gradient)
    v = random(3, 4, seed=14)
    found = torch.autograd.grad((v * solution.value).sum(), (w, x))
    start = solution.value.detach()

    def steps(w: Tensor, x: Tensor) -> Tensor:
        y = start
        for _ in range(k):
            y = (1 - rate) * y + rate * cell(y, w, x)
        return y

    assert torch.autograd.gradcheck(steps, (w, x))
    wanted = torch.autograd.grad((v * steps(w, x)).sum(), (w, x))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_jfb_is_rag_of_one_and_neumann_is_rag_on_nonlinear_maps() -> None:
    w, x, y0 = problem()
    v = random(3, 4, seed=14)

    def gradients(mode: Gradient) -> tuple[Tensor, ...]:
        value = fixed_point(lambda y: cell(y, w, x), y0, stop=TIGHT, gradient=mode).value
        return torch.autograd.grad((v * value.sin()).sum(), (w, x))

    for one, other in (
        (JFB(), RAG(1)),
        (RAG(1), Phantom(1, 1.0)),
        *((Neumann(k), RAG(k)) for k in (1, 2, 3, 6)),
        (RAG(3), Phantom(3, 1.0)),
    ):
        for a, b in zip(gradients(one), gradients(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_more_terms_come_nearer_to_the_implicit_gradient() -> None:
    """The error of k terms is ``J^k (I − J)⁻¹``: it falls by the radius with each term."""
    j = torch.diag(torch.tensor([0.5, -0.5], dtype=torch.float64))
    exact = torch.linalg.inv(torch.eye(2, dtype=torch.float64) - j)
    x = random(2, seed=1)
    for k in range(1, 12):
        found = torch.autograd.functional.jacobian(
            lambda x, k=k: fixed_point(
                lambda y: y @ j + x,
                torch.zeros(1, 2, dtype=torch.float64),
                stop=TIGHT,
                gradient=RAG(k),
            ).value[0],
            x,
        )
        wanted = torch.linalg.matrix_power(j, k) @ exact
        torch.testing.assert_close(exact - found, wanted, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_neumann_tells_its_products_and_tests_nothing(k: int) -> None:
    x = torch.ones(3, 2, requires_grad=True)
    solution = fixed_point(lambda y: 0.5 * y + x, torch.zeros(3, 2), gradient=Neumann(k))
    solution.value.sum().backward()
    (figures,) = solution.adjoints
    assert figures.products.dtype == torch.int64
    assert figures.products.tolist() == [k - 1] * 3
    assert bool(figures.error.isnan().all())


# -- recomputation -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_recomputed_applications_give_the_same_gradient(k: int) -> None:
    """To the last bit, dropout and closed-over weights included; only states are kept."""
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.3), torch.nn.Tanh())
    kept, gradients = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer.zero_grad()
        x = torch.ones(8, 64, requires_grad=True)
        sizes: list[int] = []
        # What is taken apart in the backward pass is not seen here.
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            solution = implicit.fixed_point(
                lambda y, x: layer(y) + x,
                torch.zeros(8, 64),
                solver=implicit.Naive(),
                stop=implicit.Steps(3),
                gradient=implicit.RAG(k, recompute=recompute),
                args=(x,),
            )
        solution.value.square().sum().backward()
        kept.append(sum(sizes))
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    assert kept[1] < kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_torch_func_cannot_recompute_and_says_what_can() -> None:
    def loss(w: Tensor) -> Tensor:
        gradient = implicit.RAG(2, recompute=True)
        return implicit.fixed_point(
            lambda y: torch.tanh(y * w), torch.zeros(1, 3), gradient=gradient
        ).value.sum()

    with pytest.raises(RuntimeError, match=r"cannot recompute. Use RAG\(2\), or Neumann\(2\)"):
        torch.func.grad(loss)(torch.ones(3))


def test_recompute_is_a_flag() -> None:
    with pytest.raises(ValueError, match=r"RAG\(recompute='no'\)"):
        implicit.RAG(2, recompute="no")  # type: ignore[arg-type]


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RAG, Neumann, Phantom])
@pytest.mark.parametrize("k", [0, -1, 2.0, 1.5, "2", True, None])
def test_k_must_be_a_positive_integer(kind: Any, k: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(k=.*must be an integer of at least 1"):
        kind(k)


@pytest.mark.parametrize("damping", [0.0, -0.1, 1.1, float("nan")])
def test_phantom_damping_out_of_range(damping: float) -> None:
    with pytest.raises(ValueError, match=r"Phantom\(damping=.*must be a finite number in \(0, 1\]"):
        Phantom(2, damping)
