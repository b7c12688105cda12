"""Penalties and figures of the Jacobian, against linear algebra on the Jacobian itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import implicit
from implicit.regularization import (
    fixed_point_correction,
    jacobian_penalty,
    lipschitz_estimate,
    spectral_radius,
)

DOUBLE = torch.float64
FIGURES = [jacobian_penalty, spectral_radius, lipschitz_estimate]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """The map whose Jacobian is ``matrix`` at every point of every sample."""
    return lambda y: y @ matrix.mT


def each(matrices: Tensor) -> Callable[[Tensor], Tensor]:
    """The map whose Jacobian is another matrix for each sample."""
    return lambda y: torch.einsum("bij,bj->bi", matrices, y)


def jordan(size: int, eigenvalue: float) -> Tensor:
    return eigenvalue * torch.eye(size, dtype=DOUBLE) + torch.diag(torch.ones(size - 1).double(), 1)


def rotation(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=DOUBLE)


def radius_of(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvals(matrix).abs().amax(dim=-1)


class Counted:
    """A map that knows how often it was applied."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f, self.calls = f, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.f(*args)


# Jacobian regularisation


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.integers(1, 3))
def test_penalty_of_a_diagonal_jacobian_is_exact(diagonal: list[float], samples: int) -> None:
    w = torch.tensor(diagonal, dtype=DOUBLE)
    y = normal(2, len(w))
    expected = w.square().mean().expand(2)
    torch.testing.assert_close(jacobian_penalty(lambda y: w * y, y, samples=samples), expected)


def test_penalty_is_unbiased() -> None:
    """The mean of n estimates lies within five of its standard errors of ‖J‖_F² / D."""
    matrix, n = normal(5, 5), 4000
    gram = matrix @ matrix.T
    variance = 2 * (gram.square().sum() - gram.diagonal().square().sum()) / 25
    estimates = jacobian_penalty(
        linear(matrix), torch.zeros(n, 5).double(), generator=torch.Generator().manual_seed(3)
    )
    error = estimates.mean() - matrix.square().sum() / 5
    assert abs(error) < 5 * (variance / n).sqrt()
    torch.testing.assert_close(estimates.var(), variance, rtol=0.2, atol=0)


def test_more_probes_have_less_variance() -> None:
    matrix, y = normal(5, 5), torch.zeros(2000, 5).double()

    def variance(samples: int) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        return jacobian_penalty(linear(matrix), y, samples=samples, generator=generator).var()

    torch.testing.assert_close(variance(8), variance(1) / 8, rtol=0.2, atol=0)


def test_penalty_is_per_sample_and_at_the_point() -> None:
    y = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=DOUBLE)
    expected = (2 * y).square().mean(dim=1)
    torch.testing.assert_close(jacobian_penalty(lambda y: y**2, y), expected)


def test_gradient_of_penalty_against_finite_differences() -> None:
    w, x, y = normal(3, 3).requires_grad_(), normal(2, 3, seed=1).requires_grad_(), normal(2, 3)

    def penalty(w: Tensor, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return jacobian_penalty(
            lambda y, x: torch.tanh(y @ w + x), y, args=(x,), samples=2, generator=generator
        )

    assert torch.autograd.gradcheck(penalty, (w, x))
    assert torch.autograd.gradgradcheck(penalty, (w, x))


def test_gradient_of_penalty_of_a_diagonal_is_known() -> None:
    w = normal(4).requires_grad_()
    (grad,) = torch.autograd.grad(jacobian_penalty(lambda y: w * y, normal(3, 4)).mean(), w)
    torch.testing.assert_close(grad, 2 * w.detach() / 4)


def test_the_point_is_a_constant() -> None:
    y = normal(2, 3).requires_grad_()
    w = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    penalty = jacobian_penalty(lambda y: w * y**2, y).sum()
    to_y, to_w = torch.autograd.grad(penalty, (y, w), allow_unused=True)
    assert to_y is None and to_w is not None


def test_penalty_trains_a_map_towards_contraction() -> None:
    cell = nn.Linear(6, 6, dtype=DOUBLE)
    nn.init.orthogonal_(cell.weight, gain=1.5)
    optimiser = torch.optim.SGD(cell.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(0)
    y = normal(4, 6)
    for _ in range(20):
        optimiser.zero_grad()
        jacobian_penalty(cell, y, generator=generator).mean().backward()
        optimiser.step()
    assert radius_of(cell.weight.detach()) < 0.5


@pytest.mark.parametrize("samples", [1, 3])
def test_penalty_applies_f_once(samples: int) -> None:
    f = Counted(torch.tanh)
    jacobian_penalty(f, normal(2, 3), samples=samples)
    assert f.calls == 1


def test_penalty_repeats_with_its_generator() -> None:
    matrix, y = normal(5, 5), normal(3, 5)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return jacobian_penalty(linear(matrix), y, generator=generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_penalty_without_grad_has_no_graph() -> None:
    w = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    with torch.no_grad():
        penalty = jacobian_penalty(lambda y: w * y, normal(2, 3))
    assert not penalty.requires_grad
    torch.testing.assert_close(penalty, torch.ones(2, dtype=DOUBLE))


# Spectral radius


@pytest.mark.parametrize("angle", [math.pi / 2, 0.3, math.pi, 2.0])
def test_a_rotation_has_radius_one(angle: float) -> None:
    radius = spectral_radius(linear(rotation(angle)), normal(3, 2))
    torch.testing.assert_close(radius, torch.ones(3, dtype=DOUBLE))


@pytest.mark.parametrize(("size", "error"), [(1, 0.0), (2, 1e-6), (3, 1e-4)])
def test_a_nilpotent_map_has_radius_zero(size: int, error: float) -> None:
    """Up to the ``size``-th root of the rounding error, as for any method on such a matrix."""
    assert spectral_radius(linear(jordan(size, 0.0)), normal(1, size)).item() <= error


def test_radius_of_a_non_normal_map_is_not_its_norm() -> None:
    matrix = torch.tensor([[0.5, 100.0], [0.0, -0.25]], dtype=DOUBLE)
    torch.testing.assert_close(
        spectral_radius(linear(matrix), normal(1, 2)), torch.tensor([0.5], dtype=DOUBLE)
    )


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 10_000))
def test_radius_is_that_of_eigvals(size: int, seed: int) -> None:
    matrices = normal(3, size, size, seed=seed)
    radius = spectral_radius(each(matrices), normal(3, size))
    torch.testing.assert_close(radius, radius_of(matrices), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "eigenvalues",
    [[0.7] * 40, [0.7] * 20 + [-0.9] * 20, [0.0] * 39 + [2.0], [0.999] * 39 + [1.0], [0.0] * 40],
)
def test_few_distinct_eigenvalues_need_few_iterations(eigenvalues: list[float]) -> None:
    values = torch.tensor(eigenvalues, dtype=DOUBLE)
    basis, _ = torch.linalg.qr(normal(40, 40))
    matrix = basis @ torch.diag(values) @ basis.T
    radius = spectral_radius(linear(matrix), normal(1, 40), iterations=3)
    torch.testing.assert_close(radius, values.abs().max()[None], rtol=1e-10, atol=1e-10)


def test_radius_of_a_large_map_by_few_iterations() -> None:
    """One complex pair, of modulus 0.95, apart from a disc of radius 0.6."""
    matrix = 0.6 * normal(200, 200) / math.sqrt(200)
    matrix[:2] = 0
    matrix[:, :2] = 0
    matrix[:2, :2] = 0.95 * rotation(1.0)
    basis, _ = torch.linalg.qr(normal(200, 200, seed=1))
    radius = spectral_radius(linear(basis @ matrix @ basis.T), normal(1, 200), iterations=30)
    assert abs(radius.item() - 0.95) < 1e-3


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 10), st.integers(0, 1000))
def test_radius_of_a_normal_map_comes_from_below(iterations: int, seed: int) -> None:
    matrix = normal(12, 12, seed=seed)
    matrix = matrix - matrix.T  # eigenvalues in pairs ±iω
    radius = spectral_radius(linear(matrix), normal(1, 12), iterations=iterations)
    assert radius.item() <= radius_of(matrix).item() * (1 + 1e-9)


# Lipschitz estimate


def test_lipschitz_estimate_of_known_maps() -> None:
    matrices = torch.stack([3 * rotation(0.4), torch.diag(torch.tensor([-2.0, 1.0]).double())])
    shear = torch.tensor([[[0.0, 5.0], [0.0, 0.0]]], dtype=DOUBLE)
    estimate = lipschitz_estimate(each(torch.cat([matrices, shear])), normal(3, 2))
    torch.testing.assert_close(estimate, torch.tensor([3.0, 2.0, 5.0], dtype=DOUBLE))


@settings(deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=n, max_size=n
        )
    )
)
def test_lipschitz_estimate_is_the_largest_singular_value(rows: list[list[int]]) -> None:
    """Of any matrix, the rank-deficient, defective and zero ones included."""
    matrix = torch.tensor(rows, dtype=DOUBLE)
    estimate = lipschitz_estimate(linear(matrix), normal(1, len(rows)))
    expected = torch.linalg.matrix_norm(matrix, 2)[None]
    torch.testing.assert_close(estimate, expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_lipschitz_estimate_comes_from_below_and_grows(iterations: int, seed: int) -> None:
    matrix, y = normal(12, 12, seed=seed), normal(1, 12)
    here = lipschitz_estimate(linear(matrix), y, iterations=iterations).item()
    further = lipschitz_estimate(linear(matrix), y, iterations=iterations + 1).item()
    assert here <= further * (1 + 1e-9)
    assert further <= torch.linalg.matrix_norm(matrix, 2).item() * (1 + 1e-9)


def test_lipschitz_estimate_is_local() -> None:
    y = torch.tensor([[0.0], [2.0]], dtype=DOUBLE)
    expected = 1 - torch.tanh(y).square().flatten()
    torch.testing.assert_close(lipschitz_estimate(torch.tanh, y), expected)


def test_lipschitz_estimate_bounds_the_radius() -> None:
    matrices, y = normal(20, 6, 6), normal(20, 6)
    radius, constant = spectral_radius(each(matrices), y), lipschitz_estimate(each(matrices), y)
    assert bool((radius <= constant * (1 + 1e-9)).all())


# What the three have in common


@pytest.mark.parametrize("figure", [spectral_radius, lipschitz_estimate])
def test_a_sample_has_the_same_figure_in_any_batch(figure: Callable[..., Tensor]) -> None:
    """One whose Krylov space ends at once beside one that needs it whole, and one of NaN."""
    matrices = torch.stack(
        [
            0.5 * torch.eye(4).double(),
            normal(4, 4),
            jordan(4, 0.9),
            torch.full((4, 4), torch.nan).double(),
            torch.zeros(4, 4).double(),
        ]
    )
    y = normal(5, 4)
    together = figure(each(matrices), y)
    alone = torch.cat([figure(each(matrices[i : i + 1]), y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-12, equal_nan=True)
    assert together.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("figure", [spectral_radius, lipschitz_estimate])
def test_figures_cost_one_application_and_leave_no_trace(figure: Callable[..., Tensor]) -> None:
    w = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    f = Counted(lambda y: w * torch.tanh(y))
    before = torch.get_rng_state()
    result = figure(f, normal(2, 3))
    assert f.calls == 1
    assert not result.requires_grad and w.grad is None
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(result, figure(f, normal(2, 3)))


@pytest.mark.parametrize("figure", FIGURES)
def test_pytrees_of_any_shape(figure: Callable[..., Tensor]) -> None:
    """A state of two leaves that act on each other is the matrix of both."""
    scale = torch.tensor([2.0, 3.0, 0.5, 1.0, 4.0, 0.25], dtype=DOUBLE)

    def f(y: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = torch.cat([y["a"].flatten(1), y["b"]], dim=1).roll(1, dims=1) * scale
        return {"a": flat[:, :4].reshape(-1, 2, 2), "b": flat[:, 4:]}

    y = {"a": normal(3, 2, 2), "b": normal(3, 2)}
    matrix = torch.diag(scale) @ torch.eye(6, dtype=DOUBLE).roll(1, dims=0)
    expected = {
        jacobian_penalty: matrix.square().sum() / 6,
        spectral_radius: radius_of(matrix),
        lipschitz_estimate: torch.linalg.matrix_norm(matrix, 2),
    }[figure]
    torch.testing.assert_close(figure(f, y), expected.expand(3))


@pytest.mark.parametrize("figure", FIGURES)
def test_arguments_are_handed_to_f(figure: Callable[..., Tensor]) -> None:
    scale = torch.tensor([[2.0], [3.0]], dtype=DOUBLE)
    result = figure(lambda y, s, t: s * y + t, normal(2, 4), args=(scale, 1.0))
    expected = scale.flatten() ** 2 if figure is jacobian_penalty else scale.flatten()
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("constant", [lambda y: torch.ones_like(y), lambda y: y.detach()])
def test_a_constant_map_has_no_jacobian(
    figure: Callable[..., Tensor], constant: Callable[[Tensor], Tensor]
) -> None:
    assert figure(constant, normal(2, 3)).tolist() == [0.0, 0.0]
    w = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    assert figure(lambda y: w.expand_as(y), normal(2, 3)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("figure", FIGURES)
def test_samples_without_elements_have_no_jacobian(figure: Callable[..., Tensor]) -> None:
    assert figure(lambda y: 2 * y, torch.zeros(2, 0)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precision_of_the_state(figure: Callable[..., Tensor], dtype: torch.dtype) -> None:
    result = figure(lambda y: 2 * y, torch.ones(2, 3, dtype=dtype))
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    expected = 4.0 if figure is jacobian_penalty else 2.0
    error = 2 * torch.finfo(dtype).eps  # f rounds to the dtype of the state
    torch.testing.assert_close(result, torch.full_like(result, expected), rtol=error, atol=0)


@pytest.mark.parametrize("figure", FIGURES)
def test_autocast(figure: Callable[..., Tensor]) -> None:
    weight = (2 * torch.eye(3)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = figure(lambda y: y @ weight, torch.ones(2, 3))
    expected = 4.0 if figure is jacobian_penalty else 2.0
    torch.testing.assert_close(result, torch.full((2,), expected), check_dtype=False)


@pytest.mark.parametrize("figure", FIGURES)
def test_works_without_grad_and_says_so_in_inference_mode(figure: Callable[..., Tensor]) -> None:
    with torch.no_grad():
        assert figure(lambda y: 2 * y, torch.ones(1, 2)).item() > 0
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        figure(lambda y: 2 * y, torch.ones(1, 2))


@pytest.mark.parametrize("figure", FIGURES)
def test_bad_input_is_refused(figure: Callable[..., Tensor]) -> None:
    with pytest.raises(implicit.StateError, match="batch is empty"):
        figure(torch.tanh, torch.zeros(0, 2))
    with pytest.raises(implicit.StateError, match="shape"):
        figure(lambda y: y[:, :1], torch.zeros(2, 2))
    option = "samples" if figure is jacobian_penalty else "iterations"
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"{figure.__name__}\\({option}="):
            figure(torch.tanh, torch.zeros(2, 2), **{option: bad})


def test_figures_of_a_solution_of_a_layer() -> None:
    """tanh(0.9 Qy + x) with Q orthogonal: a contraction by 0.9, more so where tanh bends."""
    q, _ = torch.linalg.qr(normal(5, 5))
    cell = nn.Linear(5, 5, dtype=DOUBLE)
    cell.weight.data = 0.9 * q

    def f(y: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(cell(y) + x)

    x = normal(4, 5, seed=2)
    y = implicit.fixed_point(f, torch.zeros_like(x), args=(x,)).raise_for_status().value
    slopes = 1 - torch.tanh(cell(y) + x).square()
    jacobians = (slopes[:, :, None] * cell.weight).detach()
    torch.testing.assert_close(
        lipschitz_estimate(f, y, args=(x,)), torch.linalg.matrix_norm(jacobians, 2)
    )
    torch.testing.assert_close(spectral_radius(f, y, args=(x,)), radius_of(jacobians))


# Fixed-point correction


def squares(y: Tensor) -> Tensor:
    return (y - 1).square().mean()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("solver", [implicit.Naive(), implicit.Anderson()])
def test_correction_has_the_gradient_of_supervision(k: int, solver: implicit.Solver) -> None:
    """The same weighted losses, by `supervise` on the same path."""
    at, gamma = (1, 3, 4), 0.7
    w = (0.3 * normal(3, 3)).requires_grad_()
    x = normal(2, 3, seed=1).requires_grad_()

    def f(y: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(y @ w + x)

    y0 = torch.zeros(2, 3, dtype=DOUBLE)
    solution = implicit.fixed_point(
        f, y0, solver=solver, stop=implicit.Steps(6), args=(x,), path=at
    )
    correction = fixed_point_correction(f, solution, squares, args=(x,), gamma=gamma, k=k)
    supervised = implicit.supervise(
        f,
        y0,
        lambda y, n: gamma ** (len(at) - at.index(n)) * squares(y),
        at=at,
        gradient=implicit.RAG(k),
        solver=solver,
        args=(x,),
        parameters=[w],
    )
    torch.testing.assert_close(correction, supervised.loss)
    torch.testing.assert_close(
        torch.autograd.grad(correction, (w, x)), torch.autograd.grad(supervised.loss, (w, x))
    )


def test_correction_weighs_later_states_more() -> None:
    solution = implicit.fixed_point(
        lambda y: y, torch.ones(1, 1), stop=implicit.Steps(3), path=(1, 2, 3)
    )
    weights = iter([1.0, 10.0, 100.0])
    total = fixed_point_correction(
        lambda y: y, solution, lambda y: next(weights) * y.sum(), gamma=0.5
    )
    assert total.item() == 1 / 8 + 10 / 4 + 100 / 2


def test_correction_beside_the_loss_of_the_answer() -> None:
    """Both reach the weight; the states of the path do not reach what made them."""
    w = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    y0 = torch.zeros(1, 1, dtype=DOUBLE)

    def f(y: Tensor) -> Tensor:
        return w * y + 1

    tight = implicit.Tolerance(rtol=1e-12, atol=0.0)
    solution = implicit.fixed_point(f, y0, stop=tight, solver=implicit.Naive(), path=(1, 2))
    (grad,) = torch.autograd.grad(
        solution.value.sum() + fixed_point_correction(f, solution, torch.sum, gamma=1.0), w
    )
    # 1 / (1 − w)² = 4 from the answer, and the states 1 and 1.5 themselves.
    torch.testing.assert_close(grad, torch.tensor(4 + 1 + 1.5, dtype=DOUBLE))


def test_correction_of_a_pytree() -> None:
    y0 = (torch.zeros(2, 1), torch.ones(2, 3))
    solution = implicit.fixed_point(
        lambda y: (y[0] / 2, y[1] / 2), y0, stop=implicit.Steps(2), path=(1,),
        solver=implicit.Naive(),
    )  # fmt: skip
    total = fixed_point_correction(lambda y: y, solution, lambda y: y[1].sum(), gamma=0.5)
    assert total.item() == 6 * 0.5 * 0.5


def test_correction_refuses_what_it_cannot_use() -> None:
    without = implicit.fixed_point(torch.cos, torch.ones(1, 1))
    with pytest.raises(ValueError, match="has no path"):
        fixed_point_correction(torch.cos, without, torch.sum)
    solution = implicit.fixed_point(torch.cos, torch.ones(1, 1), path=(1,))
    for gamma in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="gamma"):
            fixed_point_correction(torch.cos, solution, torch.sum, gamma=gamma)
    with pytest.raises(ValueError, match="k=0"):
        fixed_point_correction(torch.cos, solution, torch.sum, k=0)


# -- Krylov spaces that end early: nothing is left but rounding error ------------------------------


def rank_one(size: int) -> Tensor:
    return torch.full((size, size), 0.7 / size, dtype=torch.float64)


def two_eigenvalues(size: int) -> Tensor:
    half = size // 2
    return torch.diag(torch.tensor([0.9] * half + [-0.95] * (size - half), dtype=torch.float64))


def turned(size: int) -> Tensor:
    """Quarter turns about 0.5."""
    turn = torch.tensor([[0.5, 1.0], [-1.0, 0.5]], dtype=torch.float64)
    return torch.block_diag(*[turn] * (size // 2))


def shifted(size: int) -> Tensor:
    """A permutation of four cycles."""
    return torch.block_diag(*[torch.eye(size // 4, dtype=torch.float64).roll(1, 0)] * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("matrix", "radius", "norm"),
    [
        (rank_one(20), 0.7, 0.7),
        (rank_one(300), 0.7, 0.7),
        (two_eigenvalues(100), 0.95, 0.95),
        (turned(40), 1.25**0.5, 1.25**0.5),
        (shifted(40), 1.0, 1.0),
        (0.5 * torch.eye(64, dtype=torch.float64), 0.5, 0.5),
        (torch.zeros(8, 8, dtype=torch.float64), 0.0, 0.0),
    ],
    ids=["rank one", "rank one, large", "two", "turned", "permutation", "multiple", "zero"],
)
def test_radius_and_norm_where_the_krylov_space_ends_early(
    matrix: Tensor, radius: float, norm: float, dtype: torch.dtype
) -> None:
    matrix = matrix.to(dtype)
    y = torch.ones(3, len(matrix), dtype=dtype)
    expected = torch.full((3,), radius, dtype=dtype)
    found = implicit.spectral_radius(lambda y: y @ matrix, y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    lipschitz = implicit.lipschitz_estimate(lambda y: y @ matrix, y)
    torch.testing.assert_close(lipschitz, torch.full_like(expected, norm), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_the_radius_never_exceeds_the_norm(seed: int, dtype: torch.dtype) -> None:
    generator = torch.manual_seed(seed)
    low = torch.randn(64, 4, generator=generator, dtype=dtype) / 8
    high = torch.randn(4, 64, generator=generator, dtype=dtype) / 8
    y = torch.randn(2, 64, generator=generator, dtype=dtype)
    radius = implicit.spectral_radius(lambda y: y @ low @ high, y)
    norm = torch.linalg.matrix_norm(low @ high, 2)
    assert (radius <= norm * (1 + 1e-5)).all()
    true = torch.linalg.eigvals(low @ high).abs().max()
    torch.testing.assert_close(radius, true.expand(2), rtol=1e-3, atol=1e-5)
