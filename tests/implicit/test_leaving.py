"""Samples that leave the batch, what a solve hands to the next, and the newer solvers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import implicit

TIGHT = implicit.Tolerance(rtol=0.0, atol=1e-10, max_steps=300)
SOLVERS = [
    implicit.Naive(),
    implicit.Anderson(),
    implicit.Anderson(every=3),
    implicit.Broyden(),
    implicit.Broyden(line_search=True),
    implicit.NewtonKrylov(),
    implicit.Best(implicit.Anderson()),
]


class Rows:
    """``y ← a y + x`` with ``a`` from 0.1 to 0.9 by sample; counts the rows it is given."""

    def __init__(self, batch: int) -> None:
        self.rows = 0
        self.a = torch.linspace(0.1, 0.9, batch, dtype=torch.float64)[:, None]
        self.x = torch.linspace(-1, 1, 3 * batch, dtype=torch.float64).reshape(batch, 3)

    def __call__(self, y: Tensor, a: Tensor, x: Tensor) -> Tensor:
        self.rows += len(y)
        return torch.tanh(a * y + x)

    @property
    def y0(self) -> Tensor:
        return torch.zeros_like(self.x)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_sample_costs_and_gives_what_it_does_alone(solver: implicit.Solver) -> None:
    f = Rows(16)
    whole = implicit.fixed_point(
        f, f.y0, solver=solver, stop=TIGHT, args=(f.a, f.x), gradient=implicit.JFB()
    )
    together = f.rows - 16  # the gradient's own application
    assert bool(whole.converged.all())
    f.rows = 0
    for i in range(16):
        row = slice(i, i + 1)
        alone = implicit.fixed_point(
            f, f.y0[row], solver=solver, stop=TIGHT, args=(f.a[row], f.x[row])
        )
        torch.testing.assert_close(alone.value, whole.value[row], atol=1e-9, rtol=0)
    if not isinstance(solver, implicit.NewtonKrylov):  # whose products count rows too
        assert together <= 1.15 * (f.rows - 16)


def test_what_is_closed_over_keeps_the_batch_together() -> None:
    f = Rows(8)
    solution = implicit.fixed_point(
        lambda y, a: f(y, a, f.x), f.y0, stop=TIGHT, args=(f.a,), gradient=implicit.JFB()
    )
    expected = implicit.fixed_point(lambda y: f(y, f.a, f.x), f.y0, stop=TIGHT)
    torch.testing.assert_close(solution.value, expected.value)


def test_select_says_what_belongs_to_samples() -> None:
    f = Rows(8)
    table, index = f.x.flip(0).contiguous(), torch.arange(7, -1, -1)
    solution = implicit.fixed_point(
        lambda y, a, table, index: f(y, a, table[index]),
        f.y0,
        stop=TIGHT,
        args=(f.a, table, index),
        select=lambda args, rows: (args[0][rows], args[1], args[2][rows]),
    )
    expected = implicit.fixed_point(f, f.y0, stop=TIGHT, args=(f.a, f.x))
    torch.testing.assert_close(solution.value, expected.value)


@pytest.mark.parametrize("solver", [implicit.Anderson(), implicit.Broyden()], ids=repr)
def test_memory_of_the_last_solve_saves_evaluations(solver: implicit.Solver) -> None:
    f = Rows(16)
    options = {"solver": solver, "stop": TIGHT, "gradient": implicit.JFB()}
    first = implicit.fixed_point(f, f.y0, args=(f.a, f.x), keep_memory=True, **options)
    moved = (f.a, f.x + 0.01)
    cold = implicit.fixed_point(f, first.value.detach(), args=moved, **options)
    warm = implicit.fixed_point(f, first.value.detach(), args=moved, memory=first.memory, **options)
    torch.testing.assert_close(warm.value, cold.value, atol=1e-9, rtol=0)
    assert warm.evaluations.sum() < cold.evaluations.sum()
    with pytest.raises(ValueError, match="memory: the solve that it comes from kept"):
        implicit.fixed_point(f, f.y0[:2], args=(f.a[:2], f.x[:2]), memory=first.memory, **options)


def test_best_is_the_nearest_iterate_even_before_a_nan() -> None:
    def f(y: Tensor) -> Tensor:
        return torch.where(y > 4, torch.nan, 2 * y)

    y0 = torch.ones(1, 1, dtype=torch.float64)
    solution = implicit.fixed_point(f, y0, solver=implicit.Best(implicit.Naive()), stop=TIGHT)
    assert (solution.value.item(), solution.residual.item()) == (1.0, 1.0)
    assert solution.status.item() == implicit.Status.DIVERGED


def test_a_tolerance_below_bfloat16_is_refused_with_what_it_can_reach() -> None:
    y0 = torch.ones(2, 3, dtype=torch.bfloat16)
    with pytest.raises(implicit.StateError, match=r"about 0\.0078"):
        implicit.fixed_point(torch.cos, y0, stop=implicit.Tolerance(rtol=1e-6, atol=0.0))
    assert bool(implicit.fixed_point(torch.cos, y0).converged.all())


def test_a_root_is_found_where_the_map_is_no_contraction() -> None:
    y0 = torch.full((2, 1), 2.0, dtype=torch.float64)
    solution = implicit.root(
        lambda y: y**3 - 2 * y - 5, y0, solver=implicit.NewtonKrylov(), stop=TIGHT
    )
    expected = torch.full_like(y0, 2.0945514815423265)  # Newton's own example
    torch.testing.assert_close(solution.value, expected, atol=1e-10, rtol=0)


def test_an_input_of_as_many_rows_as_samples_that_is_not_theirs_keeps_them_in() -> None:
    """One row of it would be broadcast, and agree; several do not fit."""
    rates = torch.linspace(0.05, 0.99, 8, dtype=torch.float64).unsqueeze(1)
    x = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(8, 8)
    gain = torch.ones(8, dtype=torch.float64)  # of the eight elements of a sample

    def f(y: torch.Tensor, x: torch.Tensor, r: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return torch.tanh(r * y * g) + x

    y0 = torch.zeros(8, 8, dtype=torch.float64)
    together = implicit.fixed_point(f, y0, args=(x, rates, gain))
    closed = implicit.fixed_point(lambda y: f(y, x, rates, gain), y0)
    assert together.converged.all()
    torch.testing.assert_close(together.value, closed.value, rtol=0, atol=0)


def test_a_map_that_insists_on_its_batch_keeps_all_in() -> None:
    rates = torch.linspace(0.05, 0.99, 8, dtype=torch.float64).unsqueeze(1)

    def f(y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        assert len(y) == 8, "this network was built for eight samples"
        return torch.tanh(r * y) + 1

    solution = implicit.fixed_point(f, torch.zeros(8, 3, dtype=torch.float64), args=(rates,))
    assert solution.converged.all()


def test_maps_keep_their_layout_when_samples_leave() -> None:
    """A map with its channels last stays so in the smaller batch, and each sample gets its own."""
    maps = torch.rand(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    rates = torch.tensor([0.05, 0.9, 0.1, 0.8])[:, None]
    seen = []

    def f(y: torch.Tensor, maps: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
        seen.append((len(maps), maps.is_contiguous(memory_format=torch.channels_last)))
        return rates * y + maps.mean((2, 3))

    stop = implicit.Tolerance(atol=1e-6, rtol=0.0, max_steps=200)
    found = implicit.fixed_point(
        f, torch.zeros(4, 3), solver=implicit.Naive(), stop=stop, args=(maps, rates)
    )
    assert min(size for size, _ in seen) < 4 and all(kept for _, kept in seen)
    torch.testing.assert_close(found.value, maps.mean((2, 3)) / (1 - rates), atol=1e-4, rtol=0)


@pytest.mark.parametrize("apart", [1, 8], ids=["neighbours", "halves"])
def test_rows_that_are_mixed_in_pairs_stay_together(apart: int) -> None:
    """Two views of each sample, say: the two rows with the longest way are a pair."""
    for seed in range(5):
        generator = torch.manual_seed(seed)
        slope = torch.rand(8, 1, generator=generator, dtype=torch.float64) * 0.95
        slope = slope.repeat_interleave(2, 0) if apart == 1 else slope.repeat(2, 1)
        x = torch.randn(16, 4, generator=generator, dtype=torch.float64)

        def f(y: Tensor, slope: Tensor, x: Tensor) -> Tensor:
            if apart == 1:
                other = y.reshape(-1, 2, 4).flip(1).reshape_as(y)
            else:
                other = y.roll(len(y) // 2, 0)
            return slope * (0.5 * y + 0.5 * other) + x

        stop = implicit.Tolerance(rtol=0.0, atol=1e-10, max_steps=2000)
        found = implicit.fixed_point(
            f, torch.zeros_like(x), solver=implicit.Naive(), stop=stop, args=(slope, x)
        )
        assert found.converged.all()
        residual = torch.linalg.vector_norm(f(found.value, slope, x) - found.value, dim=1)
        assert (residual <= TIGHT.atol * (1 + 1e-6)).all()


def test_a_select_that_cannot_be_called_is_refused_before_the_solve() -> None:
    with pytest.raises(TypeError, match=r"select must be callable"):
        implicit.fixed_point(torch.cos, torch.zeros(1, 1), select=3)  # type: ignore[arg-type]
