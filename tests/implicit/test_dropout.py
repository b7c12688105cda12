"""Dropout that is the same map throughout a solve."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import implicit
from implicit.dropout import SolveDropout
from implicit.normalization import contract
from implicit.per_solve import PerSolve, renew


class Cell(nn.Module):
    def __init__(self, p: float = 0.5, dim: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, dtype=torch.float64)
        self.dropout = SolveDropout(p)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(0.3 * self.linear(y) + x))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


def announced(p: float = 0.5) -> SolveDropout:
    dropout = SolveDropout(p)
    dropout.renew()
    return dropout


def test_mask_holds_until_the_next_solve_begins() -> None:
    dropout, x = announced(), ones(3, 50)
    first = dropout(x)
    assert torch.equal(dropout(x), first)
    with torch.no_grad():
        assert torch.equal(dropout(x), first)
    dropout.renew()
    assert not torch.equal(dropout(x), first)


def test_share_that_is_dropped_and_mean_that_is_kept() -> None:
    n, p = 100_000, 0.3
    dropped = announced(p)(ones(1, n))
    share = (dropped == 0).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / n) ** 0.5
    torch.testing.assert_close(
        dropped[dropped != 0], torch.full_like(dropped[dropped != 0], 1 / 0.7)
    )


def test_samples_may_leave_the_batch() -> None:
    """Rows fewer than before have the mask that they had, whatever rows are left."""
    dropout = announced()
    x = torch.randn(6, 4, 5)
    whole = dropout(x)
    left = torch.tensor([4, 1])
    assert torch.equal(dropout(x[left]), whole[left])


def test_gradient_has_the_mask_of_its_own_forward() -> None:
    dropout = announced()
    x = ones(1, 50).requires_grad_()
    first = dropout(x)
    dropout.renew()
    second = dropout(x)
    (to_first,) = torch.autograd.grad(first.sum(), x, retain_graph=True)
    (to_second,) = torch.autograd.grad(second.sum(), x)
    assert torch.equal(to_first, first.detach()) and torch.equal(to_second, second.detach())
    assert not torch.equal(to_first, to_second)


def test_a_fixed_point_exists_and_is_that_of_one_map() -> None:
    cell, x = Cell(), torch.randn(4, 16, dtype=torch.float64)
    tight = implicit.Tolerance(rtol=1e-10, atol=0.0)
    renew(cell)
    solution = implicit.fixed_point(lambda y: cell(y, x), torch.zeros_like(x), stop=tight)
    y = solution.raise_for_status().value.detach()
    torch.testing.assert_close(cell(y, x).detach(), y)
    assert bool((y == 0).any())


def test_every_solve_of_a_module_draws_a_mask() -> None:
    """Through `fixed_point`, `FixedPoint` and `supervise`, without a word from the caller."""
    cell, x = Cell(), torch.randn(4, 16, dtype=torch.float64)
    y0 = torch.zeros_like(x)
    layer = implicit.FixedPoint(cell)
    values = [
        implicit.fixed_point(cell, y0, args=(x,)).value,
        implicit.fixed_point(cell, y0, args=(x,)).value,
        layer(y0, x).value,
        layer(y0, x).value,
    ]
    for _ in range(2):
        supervised = implicit.supervise(
            cell, y0, lambda y, n: y.sum(), at=(20,), args=(x,), parameters=cell.parameters()
        )
        values.append(supervised.value)
    masks = [value.detach() == 0 for value in values]
    assert all(bool((mask == mask[0]).all()) for mask in masks)  # one for all samples
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


@pytest.mark.parametrize(
    "gradient",
    [implicit.JFB(), implicit.RAG(2), implicit.Neumann(3), implicit.Implicit(), implicit.BPTT()],
)
def test_two_solves_in_one_graph_before_its_backward(gradient: implicit.Gradient) -> None:
    """The gradient of the sum of two solves is the sum of their gradients, each on its own."""
    cell, x = Cell(), torch.randn(3, 16, dtype=torch.float64)
    layer = implicit.FixedPoint(cell, gradient=gradient, solver=implicit.Naive())
    y0 = torch.zeros_like(x)
    parameters = tuple(cell.parameters())
    apart = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loss = layer(y0, x).value.square().sum()
        apart.append(torch.autograd.grad(loss, parameters))
    together = torch.zeros(())
    for seed in (1, 2):
        torch.manual_seed(seed)
        together = together + layer(y0, x).value.square().sum()
    for total, one, other in zip(torch.autograd.grad(together, parameters), *apart, strict=True):
        torch.testing.assert_close(total, one + other)
    assert not torch.allclose(apart[0][0], apart[1][0])


def test_checkpoint_around_a_solve() -> None:
    """What is computed again has the masks of the first time, with another solve in between."""
    cell, x = Cell(), torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    layer = implicit.FixedPoint(cell, gradient=implicit.RAG(2))

    def solve(x: Tensor) -> Tensor:
        return layer(torch.zeros_like(x), x).value

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(solve, x, use_reentrant=False)

    def gradient(solve: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(0)
        loss = solve(x).square().sum() + 2 * solve(x).sum()
        (grad,) = torch.autograd.grad(loss, x)
        return grad

    torch.testing.assert_close(gradient(checkpointed), gradient(solve))


def test_compiles_whole() -> None:
    """Masks and power iterations included: one graph, a new mask in each call of it."""
    cell = Cell()
    contract(cell)
    x = torch.randn(3, 16, dtype=torch.float64)

    @torch.compile(fullgraph=True, backend="eager")
    def unrolled(x: Tensor) -> Tensor:
        renew(cell)
        y = torch.zeros_like(x)
        for _ in range(3):
            y = cell(y, x)
        return y

    masks = [unrolled(x) == 0 for _ in range(2)]
    assert bool((masks[0] == masks[0][0]).all())
    assert not torch.equal(masks[0], masks[1])


def test_penalty_after_a_solve_sees_the_map_that_was_solved() -> None:
    cell, x = Cell(), torch.randn(2, 16, dtype=torch.float64)
    layer = implicit.FixedPoint(cell)
    solution = layer(torch.zeros_like(x), x)
    solved = solution.value.detach()
    torch.testing.assert_close(cell(solved, x).detach(), solved, rtol=1e-2, atol=1e-2)


def test_evaluation_mode_and_no_dropout_are_the_identity() -> None:
    x = torch.randn(3, 4)
    assert SolveDropout(0.5).eval()(x) is x
    assert SolveDropout(0.0)(x) is x


def test_state_dict_and_parameters_are_untouched() -> None:
    dropout = announced()
    dropout(torch.ones(2, 3))
    assert dropout.state_dict() == {} and not list(dropout.parameters())
    assert not list(dropout.buffers())


def test_a_copy_has_a_mask_of_its_own() -> None:
    dropout, x = announced(), ones(1, 50)
    before = dropout(x)
    copied = copy.deepcopy(dropout)
    copied.renew()
    assert not torch.equal(copied(x), before)
    assert torch.equal(dropout(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept_and_may_change_within_a_solve(dtype: torch.dtype) -> None:
    """As it does under autocast, where the first evaluation may be in float32."""
    dropout = announced()
    whole = dropout(torch.ones(2, 50))
    half = dropout(torch.ones(2, 50, dtype=dtype))
    assert half.dtype == dtype
    assert torch.equal(half == 0, whole == 0)


def test_solve_under_autocast() -> None:
    cell, x = Cell().float(), torch.randn(4, 16)
    stop = implicit.Tolerance(rtol=0.05)
    layer = implicit.FixedPoint(cell, stop=stop, gradient=implicit.RAG(2))
    with torch.autocast("cpu", torch.bfloat16):
        solution = layer(torch.zeros_like(x), x)
    solution.raise_for_status().value.sum().backward()
    assert cell.linear.weight.grad is not None and bool(cell.linear.weight.grad.isfinite().all())


def test_an_unannounced_solve_is_an_error() -> None:
    cell, x = Cell(), torch.randn(2, 16, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"implicit\.renew\(module\)"):
        implicit.fixed_point(lambda y: cell(y, x), torch.zeros_like(x))


def test_another_shape_in_one_solve_is_an_error() -> None:
    dropout = announced()
    dropout(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(3,\) and then of \(3, 1\)"):
        dropout(torch.ones(2, 3, 1))


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_probability(p: float) -> None:
    with pytest.raises(ValueError, match="SolveDropout"):
        SolveDropout(p)


def test_renew_reaches_every_module_that_asks_for_it() -> None:
    class Counter(PerSolve):
        solves = 0

        def renew(self) -> None:
            self.solves += 1

        def forward(self, y: Tensor) -> Tensor:
            return y / 2

    counter = Counter()
    implicit.FixedPoint(nn.Sequential(nn.Sequential(counter)))(torch.ones(2, 2))
    assert counter.solves == 1
    renew(counter)
    assert counter.solves == 2


def test_repr() -> None:
    assert repr(SolveDropout(0.25)) == "SolveDropout(p=0.25)"


@pytest.mark.parametrize(
    "gradient", [implicit.RAG(2, recompute=True), implicit.Implicit()], ids=repr
)
def test_what_is_evaluated_later_has_the_mask_of_its_own_solve(
    gradient: implicit.Gradient,
) -> None:
    """A layer that is used twice: its first solve is evaluated again after the second."""
    torch.manual_seed(0)
    cell = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), implicit.SolveDropout(0.5))
    cell = cell.double()
    with torch.no_grad():
        cell[0].weight.mul_(0.5)
    x = torch.randn(4, 6, dtype=torch.float64)
    plain = implicit.RAG(2) if isinstance(gradient, implicit.RAG) else gradient
    slopes = []
    for mode, create_graph in ((gradient, True), (plain, False)):
        create_graph = create_graph and isinstance(gradient, implicit.Implicit)
        stop = implicit.Tolerance(rtol=1e-12, atol=0.0, max_steps=99)
        layer = implicit.FixedPoint(cell, stop=stop, gradient=mode)
        torch.manual_seed(1)
        first = layer(x).value
        second = layer(first.detach()).value
        (slope,) = torch.autograd.grad(
            (first + second).sum(), cell[0].weight, create_graph=create_graph
        )
        slopes.append(slope.detach())
    torch.testing.assert_close(*slopes)
