"""Deep supervision: Eq. 12, and that the sum of its gradients is an ordinary loss."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import implicit
from implicit import (
    BPTT,
    JFB,
    RAG,
    Anderson,
    Broyden,
    GaussianNoise,
    Gradient,
    Implicit,
    Naive,
    Neumann,
    Perturbation,
    Phantom,
    Steps,
    Tolerance,
    fixed_point,
    positions,
    supervise,
)

AT = (1, 3, 6, 9, 12, 20)
EXACT = Implicit(stop=Tolerance(rtol=1e-12, atol=0.0, max_steps=300))
MODES = [JFB(), RAG(2), RAG(3), Neumann(3), Phantom(3, 0.4), EXACT]
SOLVERS = [Naive(), Naive(0.6), Anderson(), Broyden()]


class Cell(nn.Module):
    """A contraction with parameters, and one parameter that nothing uses."""

    def __init__(self, dim: int = 4, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(0.7 * weight / torch.linalg.matrix_norm(weight, 2))
        self.bias = nn.Parameter(torch.randn(dim, generator=generator, dtype=torch.float64))
        self.idle = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(y @ self.weight + self.bias + x)


def inputs(batch: int = 3, dim: int = 4, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    target = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    return x, target


def loss_to(target: Tensor) -> Callable[[Any, int], Tensor]:
    """A loss that depends on the position too, as weights of the positions would."""
    return lambda y, position: (1 + 0.1 * position) * (y - target).square().mean()


def by_hand(
    cell: Cell,
    x: Tensor,
    target: Tensor,
    gradient: Gradient,
    solver: implicit.Solver,
    at: tuple[int, ...] = AT,
) -> list[Tensor]:
    """The losses, each on its own graph from its own detached state of the path."""
    with torch.no_grad():
        path = fixed_point(
            lambda y: cell(y, x),
            torch.zeros_like(target),
            solver=solver,
            stop=Steps(at[-1]),
            path=at,
        ).path
    loss = loss_to(target)
    losses = []
    for n, state in zip(at, path, strict=True):
        y = gradient.attach(lambda y: cell(y, x), state)
        losses.append(loss(y, n))
    return losses


def total(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum()


def run(
    cell: Cell,
    x: Tensor,
    target: Tensor,
    gradient: Gradient = RAG(2),
    solver: implicit.Solver = Naive(),
    at: tuple[int, ...] = AT,
    **options: Any,
) -> implicit.Supervision:
    return supervise(
        cell,
        torch.zeros_like(target),
        loss_to(target),
        at=at,
        gradient=gradient,
        solver=solver,
        args=(x,),
        parameters=cell.parameters(),
        **options,
    )


def grads(cell: Cell) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in cell.parameters()]


def assert_same(one: list[Tensor | None], other: list[Tensor | None], scale: float = 1) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, scale * b, rtol=1e-7, atol=1e-10 * scale)


# -- positions (Eq. 12) --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "c", "t", "wanted"),
    [
        (4, 3, 20, (1, 3, 6, 9, 12, 20)),  # the paper's
        (0, 3, 20, (1, 20)),
        (0, 1, 1, (1,)),
        (1, 1, 1, (1,)),  # 1 = C = T: three times the same
        (3, 1, 20, (1, 2, 3, 20)),  # C = 1 is the first position itself
        (5, 1, 5, (1, 2, 3, 4, 5)),
        (4, 5, 20, (1, 5, 10, 15, 20)),  # mC = T
        (1, 20, 20, (1, 20)),
    ],
)
def test_positions(m: int, c: int, t: int, wanted: tuple[int, ...]) -> None:
    assert positions(m, c, t) == wanted
    assert positions(m=m, C=c, T=t) == wanted


@given(st.integers(0, 10), st.integers(1, 10), st.integers(0, 30))
def test_positions_are_the_set_of_the_equation(m: int, c: int, beyond: int) -> None:
    t = max(1, m * c) + beyond
    found = positions(m, c, t)
    assert set(found) == {1, t} | {i * c for i in range(1, m + 1)}
    assert list(found) == sorted(set(found))


@pytest.mark.parametrize(
    ("m", "c", "t", "match"),
    [
        (7, 3, 20, r"m=7, C=3, T=20\): the last multiple, 21, lies beyond .* 20 steps.*m ≤ 6"),
        (1, 2, 1, r"m=1, C=2, T=1\): the last multiple, 2, lies beyond the path of 1 steps"),
        (-1, 3, 20, r"positions\(m=-1\): must be an integer of at least 0"),
        (1, 0, 20, r"positions\(C=0\): must be an integer of at least 1"),
        (0, 1, 0, r"positions\(T=0\): must be an integer of at least 1"),
        ("a", 1, 5, r"positions\(m='a'\): must be an integer"),
        (1, 2.5, 9, r"positions\(C=2.5\): must be an integer"),
    ],
)
def test_bad_positions(m: Any, c: Any, t: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        positions(m, c, t)


# -- the sum of separate losses ------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("gradient", MODES, ids=repr)
def test_supervision_is_the_sum_of_its_positions(
    gradient: Gradient, solver: implicit.Solver
) -> None:
    cell, twin = Cell(), Cell()
    x, target = inputs()
    x, same_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = run(cell, x, target, gradient, solver)
    wanted = by_hand(twin, same_x, target, gradient, solver)
    torch.testing.assert_close(found.losses, torch.stack(wanted).detach(), rtol=1e-8, atol=0)
    assert found.loss.shape == ()
    torch.testing.assert_close(found.loss, total(wanted), rtol=1e-8, atol=0)
    found.loss.backward()
    total(wanted).backward()
    assert_same([*grads(cell), x.grad], [*grads(twin), same_x.grad])
    assert cell.idle.grad is None, "what nothing uses gets no gradient, as in autograd"


@settings(max_examples=15, deadline=None)
@given(
    at=st.sets(st.integers(1, 12), min_size=1, max_size=6).map(sorted).map(tuple),
    k=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_any_positions_and_terms(at: tuple[int, ...], k: int, seed: int) -> None:
    cell, twin = Cell(seed=seed), Cell(seed=seed)
    x, target = inputs(seed=seed)
    run(cell, x, target, RAG(k), at=at).loss.backward()
    total(by_hand(twin, x, target, RAG(k), Naive(), at)).backward()
    assert_same(grads(cell), grads(twin))


def test_against_a_literal_loop() -> None:
    """Written out without the library: path, k tracked steps from each state, sum."""
    cell, twin = Cell(), Cell()
    x, target = inputs()
    found = run(cell, x, target, RAG(2), at=(2, 3))
    found.loss.backward()
    with torch.no_grad():
        y1 = twin(torch.zeros_like(target), x)
        y2 = twin(y1, x)
        y3 = twin(y2, x)
    wanted = torch.zeros((), dtype=torch.float64)
    for n, state in ((2, y2), (3, y3)):
        refined = twin(twin(state, x), x)
        wanted = wanted + (1 + 0.1 * n) * (refined - target).square().mean()
    wanted.backward()
    torch.testing.assert_close(found.loss.detach(), wanted.detach())
    torch.testing.assert_close(found.value, y3)
    assert_same(grads(cell), grads(twin))


def test_gradient_against_finite_differences() -> None:
    """With a single position at step 1 from a fixed y0, RAG(k) on top of one step held fixed."""
    weight = Cell().weight.detach().clone().requires_grad_()
    x, target = inputs()
    x = x.requires_grad_()
    found = supervise(
        lambda y, w, x: torch.tanh(y @ w + x),
        torch.zeros_like(target),
        loss_to(target),
        at=(1,),
        args=(weight, x),
    )
    start = torch.tanh(x).detach()  # the state after one step from zero

    def refined(w: Tensor, x: Tensor) -> Tensor:
        y = torch.tanh(torch.tanh(start @ w + x) @ w + x)
        return loss_to(target)(y, 1)

    assert torch.autograd.gradcheck(refined, (weight, x))
    for a, b in zip(
        torch.autograd.grad(found.loss, (weight, x)),
        torch.autograd.grad(refined(weight, x), (weight, x)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_supervised_applications_do_not_advance_the_path() -> None:
    cell = Cell()
    x, target = inputs()
    with torch.no_grad():
        wanted = fixed_point(
            lambda y: cell(y, x), torch.zeros_like(target), solver=Naive(), stop=Steps(20)
        ).value
    assert torch.equal(run(cell, x, target, RAG(3)).value, wanted)
    assert not run(cell, x, target).value.requires_grad


@pytest.mark.parametrize("k", [1, 2, 5])
def test_evaluations_are_the_path_and_k_for_each_position(k: int) -> None:
    cell = Cell()
    x, target = inputs()
    calls = []

    def f(y: Tensor) -> Tensor:
        calls.append(1)
        return cell(y, x)

    supervise(
        f,
        torch.zeros_like(target),
        loss_to(target),
        at=AT,
        gradient=RAG(k),
        parameters=cell.parameters(),
    )
    assert len(calls) == AT[-1] + k * len(AT)


def test_start_is_detached() -> None:
    cell = Cell()
    x, target = inputs()
    y0 = torch.zeros_like(target).requires_grad_()
    found = supervise(cell, y0, loss_to(target), at=(1, 2), args=(x,), parameters=cell.parameters())
    found.loss.backward()
    assert y0.grad is None


# -- an ordinary loss ----------------------------------------------------------------------------


def reference(gradient: Gradient = RAG(2), seed: int = 5) -> list[Tensor | None]:
    cell = Cell()
    x, target = inputs(seed=seed)
    total(by_hand(cell, x, target, gradient, Naive())).backward()
    return grads(cell)


def test_gradients_accumulate() -> None:
    cell = Cell()
    run(cell, *inputs(seed=5)).loss.backward()
    run(cell, *inputs(seed=6)).loss.backward()
    both = [
        None if a is None or b is None else a + b
        for a, b in zip(reference(seed=5), reference(seed=6), strict=True)
    ]
    assert_same(grads(cell), both)


@pytest.mark.parametrize("scale", [0.5, 2.0**16, 1e-8])
def test_loss_scaling_is_linear(scale: float) -> None:
    cell = Cell()
    (scale * run(cell, *inputs()).loss).backward()
    assert_same(grads(cell), reference(), scale)


def test_incoming_gradient_through_a_nonlinear_function() -> None:
    """``d exp(L) = exp(L) dL``: the loss may go on into further arithmetic."""
    cell = Cell()
    found = run(cell, *inputs())
    (0.1 * found.loss).exp().backward()
    assert_same(grads(cell), reference(), 0.1 * float((0.1 * found.loss.detach()).exp()))


def test_retained_graph() -> None:
    cell = Cell()
    loss = run(cell, *inputs()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(grads(cell), reference(), 2)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_two_uses_in_one_graph() -> None:
    """Twice the same layer, and an ordinary loss on its parameters beside it."""
    cell = Cell()
    one, two = run(cell, *inputs(seed=5)).loss, run(cell, *inputs(seed=6)).loss
    (one + 3 * two + cell.weight.square().sum()).backward()
    ones, twos = reference(seed=5), reference(seed=6)
    wanted = [
        None if a is None or b is None else a + 3 * b for a, b in zip(ones, twos, strict=True)
    ]
    assert wanted[0] is not None
    wanted[0] = wanted[0] + 2 * cell.weight.detach()
    assert_same(grads(cell), wanted)


def test_gradient_flows_on_through_a_non_leaf_argument() -> None:
    """A backbone before the equilibrium is trained by what reaches its output."""
    backbone, same = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    same.load_state_dict(backbone.state_dict())
    cell, twin = Cell(), Cell()
    x, target = inputs()
    run(cell, backbone(x), target).loss.backward()
    total(by_hand(twin, same(x), target, RAG(2), Naive())).backward()
    assert backbone.weight.grad is not None and same.weight.grad is not None
    torch.testing.assert_close(backbone.weight.grad, same.weight.grad)
    assert_same(grads(cell), grads(twin))


def through_features(
    make: Callable[[Tensor], tuple[Tensor, ...]], named: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradient of a weight behind the arguments: by supervise, and by hand."""
    x, target = inputs()
    start = torch.zeros_like(target)
    loss = loss_to(target)

    def f(y: Tensor, *features: Tensor) -> Tensor:
        return torch.tanh(0.4 * y + sum(features))

    weight = Cell().weight
    found = supervise(
        f,
        start,
        loss,
        at=(1, 4),
        args=make(x @ weight),
        parameters=[weight] if named else [],
    ).loss
    (gradient,) = torch.autograd.grad(found, weight)
    features = make(x @ weight)
    y, losses = start, []
    for n in range(1, 5):
        y = f(y, *features).detach()
        if n in (1, 4):
            losses.append(loss(f(f(y, *features), *features), n))
    (wanted,) = torch.autograd.grad(total(losses), weight)
    return found.detach(), gradient, total(losses).detach(), wanted


@pytest.mark.parametrize("named", [False, True], ids=["", "the weight is a parameter too"])
@pytest.mark.parametrize(
    "make",
    [
        lambda h: (h,),
        lambda h: (h.exp(),),  # whose graph keeps tensors, which only one pass may use up
        lambda h: (h, h + 1),
        lambda h: (h.tanh(), h.tanh().exp(), h),
        lambda h: (h, h.sin(), h),
    ],
    ids=["linear", "kept", "two levels", "a pyramid", "a level twice"],
)
def test_arguments_made_from_one_another_and_from_parameters(
    make: Callable[[Tensor], tuple[Tensor, ...]], named: bool
) -> None:
    """Feature maps of a backbone, each made from the one before, and ``model.parameters()``.

    What lies behind an argument gets its gradient through it, once and in the outer pass.
    """
    loss, gradient, wanted_loss, wanted = through_features(make, named)
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(gradient, wanted)


def test_intermediate_tensor_that_is_closed_over_and_named() -> None:
    """Named itself it gets gradient like a leaf, and hands it on to what it was made from."""
    cell, base = Cell(), torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    x, target = inputs()

    def answer(shift: Tensor, by_supervise: bool) -> Tensor:
        def f(y: Tensor) -> Tensor:
            return cell(y, x + shift)

        if by_supervise:
            return supervise(
                f,
                torch.zeros_like(target),
                loss_to(target),
                at=(1, 4),
                parameters=[*cell.parameters(), shift],
            ).loss
        y, losses = torch.zeros_like(target), []
        for n in range(1, 5):
            y = f(y).detach()
            if n in (1, 4):
                losses.append(loss_to(target)(f(f(y)), n))
        return total(losses)

    found, wanted = (
        torch.autograd.grad(answer(base.exp(), way), (base, cell.weight)) for way in (True, False)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gradient", MODES, ids=repr)
def test_closed_form_on_an_affine_map(gradient: Gradient) -> None:
    """``f(y) = yJᵀ + x`` and the loss ``⟨v_n, y⟩``: by ``x`` it is ``Σ_n M v_n``, wherever y is."""
    j = Cell().weight.detach().T
    x, start = inputs()
    x = x.requires_grad_()
    v = {n: inputs(seed=n)[0] for n in (1, 4, 6)}
    found = supervise(
        lambda y, x: y @ j.T + x,
        start,
        lambda y, n: (v[n] * y).sum(),
        at=tuple(v),
        gradient=gradient,
        args=(x,),
    )
    (of_x,) = torch.autograd.grad(found.loss, x)
    eye = torch.eye(4, dtype=torch.float64)
    if isinstance(gradient, Implicit):
        matrix = torch.linalg.inv(eye - j)
    else:
        terms = getattr(gradient, "k", 1)
        rate = getattr(gradient, "damping", 1.0)
        step = rate * j + (1 - rate) * eye
        powers = [torch.linalg.matrix_power(step, i) for i in range(terms)]
        matrix = rate * torch.stack(powers).sum(0)
    torch.testing.assert_close(of_x, sum(v.values()) @ matrix, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("", "w"),  # closed over and named
        ("w", ""),  # an argument
        ("ww", ""),  # the same argument twice
        ("w", "w"),  # an argument that is also among the parameters (of the same module, say)
        ("", "ww"),  # named twice
        ("w", "w and closed over"),  # both ways into f
    ],
)
def test_one_tensor_in_several_places(args: str, named: str) -> None:
    """The gradient of a tensor is complete and arrives once, however often it is handed in."""
    x, target = inputs()
    w = nn.Parameter(0.2 * torch.ones(4, dtype=torch.float64))
    closed = w if "closed" in named or not args else None

    def f(y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        one = w if a is None else a
        other = closed if closed is not None else (one if b is None else b)
        return torch.sin(one * y + other * x)

    found = supervise(
        f,
        torch.zeros_like(target),
        loss_to(target),
        at=(1, 4),
        args=(w,) * args.count("w"),
        parameters=[w] * named.split(" ")[0].count("w"),
    ).loss
    found.backward()

    def g(y: Tensor) -> Tensor:
        return torch.sin(w * y + w * x)

    with torch.no_grad():
        states = fixed_point(
            g, torch.zeros_like(x), solver=Naive(), stop=Steps(4), path=(1, 4)
        ).path
    losses = [loss_to(target)(g(g(state)), n) for n, state in zip((1, 4), states, strict=True)]
    (wanted,) = torch.autograd.grad(total(losses), w)
    torch.testing.assert_close(found.detach(), total(losses).detach())
    assert w.grad is not None
    torch.testing.assert_close(w.grad, wanted)


def test_arguments_inside_pytrees() -> None:
    x, target = inputs()
    x = x.requires_grad_()
    w = Cell().weight.detach().clone().requires_grad_()
    found = supervise(
        lambda y, given: torch.tanh(y @ given["w"] + given["x"][0]) * given["factor"],
        torch.zeros_like(target),
        loss_to(target),
        at=(1, 3),
        args=({"w": w, "x": [x], "factor": 0.5, "name": "anything"},),
    )
    found.loss.backward()
    assert w.grad is not None and x.grad is not None
    assert float(w.grad.norm()) > 0 and float(x.grad.norm()) > 0


def test_parameters_of_the_loss_are_trained() -> None:
    cell, head = Cell(), nn.Linear(4, 2).double()
    x, target = inputs()
    found = supervise(
        cell,
        torch.zeros_like(target),
        lambda y, n: head(y).square().mean(),
        at=(1, 3),
        args=(x,),
        parameters=[*cell.parameters(), *head.parameters()],
    )
    found.loss.backward()
    assert head.weight.grad is not None and float(head.weight.grad.norm()) > 0


def test_hooks_on_parameters() -> None:
    """A hook sees the whole gradient once, and what it returns is what arrives."""
    cell = Cell()
    seen: list[Tensor] = []

    def hook(grad: Tensor) -> Tensor:
        seen.append(grad.clone())
        return 2 * grad

    cell.weight.register_hook(hook)
    after: list[str] = []
    cell.bias.register_post_accumulate_grad_hook(lambda p: after.append("bias"))
    run(cell, *inputs()).loss.backward()
    wanted = reference()
    assert len(seen) == 1 and after == ["bias"]
    assert wanted[0] is not None
    assert_same([seen[0], cell.weight.grad], [wanted[0], 2 * wanted[0]])


@pytest.mark.parametrize(("gradient", "factor"), [(JFB(), 1.0), (RAG(2), 1.5)], ids=repr)
def test_hook_that_scales_in_place_does_not_reach_another_tensor(
    gradient: Gradient, factor: float
) -> None:
    """Autograd may hand one tensor to two sources; sums must not be aliased."""
    a = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    found = supervise(
        lambda y, a, b: 0.5 * y + a + b,
        torch.ones(2, 3, dtype=torch.float64),
        lambda y, n: y.sum(),
        at=(1, 2, 4),
        gradient=gradient,
        args=(a, b),
    )
    found.loss.backward()
    assert a.grad is not None and b.grad is not None
    wanted = torch.full((2, 3), 3 * factor, dtype=torch.float64)  # 1 or 1 + 1/2, thrice
    torch.testing.assert_close(a.grad, wanted)
    a.grad.mul_(100)
    torch.testing.assert_close(b.grad, wanted)


def test_frozen_parameters_get_nothing() -> None:
    cell = Cell()
    cell.bias.requires_grad_(False)
    run(cell, *inputs()).loss.backward()
    assert cell.bias.grad is None
    assert_same([cell.weight.grad], [reference()[0]])


def test_without_gradients() -> None:
    cell = Cell()
    with_graph = run(cell, *inputs())
    with torch.no_grad():
        without = run(cell, *inputs())
    frozen = Cell().requires_grad_(False)
    nothing = run(frozen, *inputs())
    for found in (without, nothing):
        assert not found.loss.requires_grad
        torch.testing.assert_close(found.loss, with_graph.loss.detach())
        torch.testing.assert_close(found.losses, with_graph.losses)


def test_double_backward_raises() -> None:
    """A gradient penalty must not quietly count as a constant."""
    cell = Cell()
    loss = run(cell, *inputs()).loss

    def train_with_penalty() -> None:
        (first,) = torch.autograd.grad(loss, cell.weight, create_graph=True)
        (loss + first.square().sum()).backward()

    with pytest.raises(RuntimeError):
        train_with_penalty()


def test_double_backward_with_a_factor_raises() -> None:
    """The same where the incoming gradient itself depends on something to be trained."""
    cell = Cell()
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = factor * run(cell, *inputs()).loss

    def differentiate_twice() -> None:
        (first,) = torch.autograd.grad(loss, cell.weight, create_graph=True)
        first.square().sum().backward()

    with pytest.raises(RuntimeError):
        differentiate_twice()


def test_scaler_and_clipping() -> None:
    """A step under loss scaling and clipping is that of the sum by hand."""
    cell, twin = Cell(), Cell()
    x, target = inputs()
    for model, loss in (
        (cell, run(cell, x, target).loss),
        (twin, total(by_hand(twin, x, target, RAG(2), Naive()))),
    ):
        optimizer = torch.optim.SGD([model.weight, model.bias], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([model.weight, model.bias], 0.01)
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(cell.weight, twin.weight)
    torch.testing.assert_close(cell.bias, twin.bias)
    assert not torch.equal(cell.weight, Cell().weight)


@pytest.mark.parametrize("gradient", [RAG(2), Neumann(2), Implicit(stop=Steps(6))], ids=repr)
def test_autocast(gradient: Gradient) -> None:
    x, target = (t.float() for t in inputs())
    cell = Cell().float()
    run(cell, x, target, gradient).loss.backward()
    wanted = cell.weight.grad
    cell.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(cell, x, target, gradient)
    found.loss.backward()
    assert wanted is not None and cell.weight.grad is not None
    assert cell.weight.grad.dtype == torch.float32
    assert float((cell.weight.grad - wanted).norm() / wanted.norm()) < 0.05


# -- what it hands back --------------------------------------------------------------------------


def test_aux_of_the_losses_is_detached() -> None:
    cell = Cell()
    x, target = inputs()
    found = supervise(
        cell,
        torch.zeros_like(target),
        lambda y, n: (y.square().mean(), {"position": n, "mean": y.mean(), "parts": [y]}),
        at=(1, 4),
        args=(x,),
        parameters=cell.parameters(),
    )
    assert [aux["position"] for aux in found.aux] == [1, 4]
    for aux, loss in zip(found.aux, found.losses, strict=True):
        assert not aux["mean"].requires_grad and not aux["parts"][0].requires_grad
        torch.testing.assert_close(aux["parts"][0].square().mean(), loss)


def test_structured_states() -> None:
    """Supervising a dict is supervising the same numbers in one tensor."""
    cell, twin = Cell(), Cell()
    x, target = inputs()

    def f(y: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        image = cell(torch.cat([y["a"], y["b"]], dim=1), x)
        return {"a": image[:, :1], "b": image[:, 1:]}

    zero = torch.zeros_like(target)
    found = supervise(
        f,
        {"a": zero[:, :1], "b": zero[:, 1:]},
        lambda y, n: loss_to(target)(torch.cat([y["a"], y["b"]], dim=1), n),
        at=AT,
        args=(x,),
        parameters=cell.parameters(),
    )
    found.loss.backward()
    total(by_hand(twin, x, target, RAG(2), Naive())).backward()
    assert_same(grads(cell), grads(twin))
    assert set(found.value) == {"a", "b"}


# -- memory --------------------------------------------------------------------------------------


def peak_saved(at: tuple[int, ...], gradient: Gradient = RAG(2)) -> int:
    """Peak of the bytes that autograd keeps at any moment of the forward pass.

    Every storage that is saved is counted from when it is saved until the last holder drops it.
    """
    cell = Cell(8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 8, generator=generator, dtype=torch.float64)
    live: dict[int, int] = {}
    ids = iter(range(10**9))
    peak = 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Held:
        nonlocal peak
        held, key = Held(tensor), next(ids)
        live[key] = tensor.nbytes
        weakref.finalize(held, live.pop, key)
        peak = max(peak, sum(live.values()))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        found = run(cell, x, torch.ones_like(x), gradient=gradient, at=at)
    assert found.loss.requires_grad
    kept = sum(live.values())
    parameters = cell.weight.nbytes + cell.bias.nbytes
    assert kept <= 2 * parameters, "after the forward pass only sums of gradients are kept"
    return peak


@pytest.mark.parametrize("gradient", [JFB(), RAG(2), RAG(4), Neumann(3)], ids=repr)
def test_memory_is_flat_in_positions_and_in_path_length(gradient: Gradient) -> None:
    """Not "little more": the same number of bytes, whatever Ω and T."""
    one = peak_saved((1,), gradient)
    assert one > 0
    for at in ((20,), (1, 20), AT, tuple(range(1, 41)), (200,)):
        assert peak_saved(at, gradient) == one, at


def test_memory_grows_with_the_terms() -> None:
    """The measure itself must be able to see an increase."""
    assert peak_saved(AT, RAG(1)) < peak_saved(AT, RAG(2)) < peak_saved(AT, RAG(4))


class Token:
    """Something to hold a weak reference to."""


class Marked(torch.autograd.Function):
    """The identity; its node holds a token for as long as the graph lives."""

    tokens: ClassVar[list[weakref.ref[Token]]] = []

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.token = Token()
        Marked.tokens.append(weakref.ref(ctx.token))
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_graph_of_a_position_is_freed_before_the_next() -> None:
    cell = Cell()
    x, target = inputs()
    Marked.tokens.clear()

    def loss(y: Tensor, position: int) -> Tensor:
        assert all(token() is None for token in Marked.tokens)
        marked = Marked.apply(y)
        assert Marked.tokens[-1]() is not None
        return marked.square().mean()

    found = supervise(
        cell, torch.zeros_like(target), loss, at=AT, args=(x,), parameters=cell.parameters()
    )
    assert len(Marked.tokens) == len(AT)
    assert found.loss.requires_grad
    assert all(token() is None for token in Marked.tokens)


# -- several processes ---------------------------------------------------------------------------


class Supervised(nn.Module):
    """As a model is wrapped: its forward pass returns the supervised loss."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()
        del self.cell.idle

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return run(self.cell, x, target).loss


def _rank(rank: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        model = torch.nn.parallel.DistributedDataParallel(Supervised())
        for seed in (5, 7):  # a second step: the reducer must have been left in order
            model.zero_grad()
            model(*inputs(seed=seed + rank)).backward()
            cell = model.module.cell
            torch.save([cell.weight.grad, cell.bias.grad], Path(folder) / f"{seed}-{rank}.pt")
        torch.distributed.barrier()  # neither leaves while the other still talks
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_gradients_are_the_mean_of_the_ranks(tmp_path: Path) -> None:
    """Two processes under DistributedDataParallel, each with samples of its own."""
    home = str(Path(implicit.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": home}
    address = (tmp_path / "rendezvous").as_uri()
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), address, str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        messages = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(messages)
    for seed in (5, 7):
        ones, twos = reference(seed=seed)[:2], reference(seed=seed + 1)[:2]
        mean: list[Tensor | None] = [
            (a + b) / 2 for a, b in zip(ones, twos, strict=True) if a is not None and b is not None
        ]
        assert len(mean) == 2
        for rank in range(2):
            assert_same(torch.load(tmp_path / f"{seed}-{rank}.pt"), mean)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at",
    [(), (0, 3), (-1,), (3, 1), (1, 1, 2)],
    ids=["empty", "zero", "negative", "falls", "twice"],
)
def test_bad_positions_of_supervision(at: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"at=.*(rising, from 1 on|at least one position)"):
        run(Cell(), *inputs(), at=at)


def test_bptt_needs_a_solver_that_has_derivatives() -> None:
    with pytest.raises(ValueError, match=r"NewtonKrylov.*cannot be differentiated step by step"):
        run(Cell(), *inputs(), gradient=BPTT(), solver=implicit.NewtonKrylov())


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_bptt_supervises_the_path_itself(solver: implicit.Solver) -> None:
    """The same as the losses on the states of a solve whose path is in the graph."""
    cell, (x, target) = Cell(), inputs()
    x.requires_grad_()
    supervision = run(cell, x, target, gradient=BPTT(), solver=solver)
    path = fixed_point(
        lambda y: cell(y, x),
        torch.zeros_like(target),
        solver=solver,
        stop=Steps(AT[-1]),
        gradient=BPTT(),
        path=AT,
    ).path
    expected = [loss_to(target)(y, n) for n, y in zip(AT, path, strict=True)]
    torch.testing.assert_close(supervision.losses, torch.stack(expected).detach())
    wanted = x, cell.weight, cell.bias
    torch.testing.assert_close(
        torch.autograd.grad(supervision.loss, wanted), torch.autograd.grad(total(expected), wanted)
    )


def test_bptt_sees_the_noise_of_the_path_and_has_second_derivatives() -> None:
    noise = Perturbation(lambda y, generator: y * (1 + torch.rand(1, generator=generator)), 1.0)
    cell, (x, target) = Cell(), inputs()

    def loss(x: Tensor) -> Tensor:
        return run(
            cell,
            x,
            target,
            gradient=BPTT(),
            at=(2, 3),
            perturbation=(noise,),
            generator=torch.manual_seed(0),
        ).loss

    x.requires_grad_()
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


def test_bptt_keeps_no_graph_where_none_is_wanted() -> None:
    with torch.no_grad():
        supervision = run(Cell(), *inputs(), gradient=BPTT())
    assert not supervision.loss.requires_grad
    assert not supervision.value.requires_grad


@pytest.mark.parametrize("gradient", ["rag", RAG, 2, None])
def test_gradient_must_be_one(gradient: Any) -> None:
    with pytest.raises(TypeError, match=r"gradient=.*is not a gradient.*RAG\(2\)"):
        run(Cell(), *inputs(), gradient=gradient)


@pytest.mark.parametrize("solver", ["anderson", Anderson, None])
def test_solver_must_be_one(solver: Any) -> None:
    with pytest.raises(TypeError, match=r"solver=.*is not a solver"):
        run(Cell(), *inputs(), solver=solver)


@pytest.mark.parametrize("gradient", MODES, ids=repr)
def test_unnamed_parameter_is_an_error_and_not_lost(gradient: Gradient) -> None:
    cell = Cell()
    x, target = inputs()
    with pytest.raises(
        ValueError, match=r"tensor of shape \(4,\).*neither in args nor in parameters.*Pass param"
    ):
        supervise(
            cell,
            torch.zeros_like(target),
            loss_to(target),
            at=(1, 2),
            gradient=gradient,
            args=(x,),
            parameters=[cell.weight],
        )
    assert grads(cell) == [None, None, None]


def test_nothing_named_at_all_is_an_error_too() -> None:
    """The quickest mistake: parameters and args forgotten altogether."""
    cell = Cell()
    x, target = inputs()
    with pytest.raises(ValueError, match=r"neither in args nor in parameters"):
        supervise(lambda y: cell(y, x), torch.zeros_like(target), loss_to(target), at=(1, 2))


def test_unnamed_closed_over_input_is_an_error() -> None:
    cell = Cell()
    x, target = inputs()
    x = x.requires_grad_()
    with pytest.raises(ValueError, match=r"tensor of shape \(3, 4\).*inputs through args"):
        supervise(
            lambda y: cell(y, x),
            torch.zeros_like(target),
            loss_to(target),
            at=(1, 2),
            parameters=cell.parameters(),
        )


def test_parameter_reached_only_at_a_later_position_is_an_error() -> None:
    cell, late = Cell(), nn.Parameter(torch.ones((), dtype=torch.float64))
    x, target = inputs()
    with pytest.raises(ValueError, match=r"neither in args nor in parameters"):
        supervise(
            cell,
            torch.zeros_like(target),
            lambda y, n: (late if n == 3 else 1) * y.square().mean(),
            at=(1, 3),
            args=(x,),
            parameters=cell.parameters(),
        )


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda y, n: y, r"loss\(y, 1\) returned \(3, 4\): it must be a scalar"),
        (lambda y, n: y.sum(0), r"loss\(y, 1\) returned \(4,\): it must be a scalar"),
        (lambda y, n: 1.0, r"loss\(y, 1\) returned float: it must be a scalar tensor"),
        (lambda y, n: None, r"loss\(y, 1\) returned NoneType: it must be a scalar tensor"),
    ],
)
def test_loss_must_be_a_scalar(answer: Any, match: str) -> None:
    cell = Cell()
    x, target = inputs()
    with pytest.raises(ValueError, match=match):
        supervise(
            cell,
            torch.zeros_like(target),
            answer,
            at=(1, 2),
            args=(x,),
            parameters=cell.parameters(),
        )


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="positions"):
        run(Cell(), *inputs(), positions=(1, 2))


def test_noise_repeats_with_the_generator() -> None:
    noise = (Perturbation(GaussianNoise(0.3), probability=0.5),)

    def once(seed: int) -> tuple[Tensor, list[Tensor | None]]:
        cell = Cell()
        generator = torch.Generator().manual_seed(seed)
        found = run(cell, *inputs(), perturbation=noise, generator=generator)
        found.loss.backward()
        return found.losses, grads(cell)

    one, again, other = once(1), once(1), once(2)
    assert torch.equal(one[0], again[0])
    for a, b in zip(one[1], again[1], strict=True):
        assert a is None or torch.equal(a, b)  # type: ignore[arg-type]
    assert not torch.equal(one[0], other[0])


if __name__ == "__main__":  # one rank of the distributed test
    _rank(int(sys.argv[1]), *sys.argv[2:])


def test_loss_scale_keeps_float16_gradients_from_vanishing() -> None:
    """Gradients of 1e-9 are zero in float16; taken of a larger loss, they arrive as they are."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight.mul_(0.3)
    x = torch.randn(3, 4)

    def gradient(loss_scale: float, half: bool) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=half):
            supervision = supervise(
                lambda y: torch.tanh(linear(y) + x),
                torch.zeros(3, 4),
                lambda y, position: 1e-9 * y.square().mean(),
                at=(2, 4),
                parameters=linear.parameters(),
                loss_scale=loss_scale,
            )
        scaler_scale = 2.0**20
        scaled = torch.autograd.grad(supervision.loss * scaler_scale, linear.weight)[0]
        return scaled / scaler_scale

    wanted = gradient(1.0, half=False)
    torch.testing.assert_close(gradient(2.0**20, half=False), wanted)
    torch.testing.assert_close(gradient(2.0**20, half=True), wanted, rtol=0.02, atol=1e-12)
    assert not gradient(1.0, half=True).any()


@pytest.mark.parametrize("loss_scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_loss_scale_that_is_none_is_refused(loss_scale: float) -> None:
    with pytest.raises(ValueError, match="loss_scale"):
        supervise(
            torch.cos, torch.zeros(1, 1), lambda y, n: y.sum(), at=(1,), loss_scale=loss_scale
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"at": 5}, r"at=5: positions are a sequence"),
        ({"at": iter((1, 2))}, r"at=.*positions are a sequence"),
        ({"loss": None}, r"loss must be callable"),
        ({"args": torch.zeros(2, 3)}, r"args is a Tensor: give a tuple"),
        ({"parameters": nn.Linear(3, 3)}, r"parameters is a Linear.*module.parameters\(\)"),
        ({"parameters": torch.zeros(3)}, r"parameters is a Tensor"),
        ({"parameters": nn.Linear(3, 3).named_parameters()}, r"parameters holds a tuple"),
        ({"parameters": {"weight": torch.zeros(3)}}, r"parameters holds a str"),
        ({"perturbation": Perturbation(GaussianNoise(0.1), 0.2)}, r"pass a sequence"),
        ({"perturbation": ("noise",)}, r"perturbation='noise' is not a perturbation"),
        ({"generator": 0}, r"generator=0 is not a generator"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_supervision(options: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"loss": lambda y, position: y.sum(), "at": (1, 2)} | options
    loss = given.pop("loss")
    with pytest.raises((TypeError, ValueError), match=match):
        supervise(torch.cos, torch.zeros(2, 3), loss, **given)


@pytest.mark.parametrize("mode", ["jvp", "grad", "dual"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of torch itself, in forward mode
def test_supervision_under_transforms_says_what_to_use(mode: str) -> None:
    cell, (x, target) = Cell(), inputs()

    def loss(x: Tensor, gradient: Gradient = RAG(2)) -> Tensor:
        return run(cell, x, target, gradient=gradient, at=(1, 3)).loss

    def derivative(gradient: Gradient) -> Tensor:
        if mode == "grad":
            return (torch.func.grad(loss)(x, gradient) * target).sum()
        if mode == "jvp":
            return torch.func.jvp(lambda x: loss(x, gradient), (x,), (target,))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, target)
            return torch.autograd.forward_ad.unpack_dual(loss(dual, gradient)).tangent

    with pytest.raises(RuntimeError, match=r"supervise.*backward\(\).*BPTT\(\)"):
        derivative(RAG(2))
    (exact,) = torch.autograd.grad(loss(x.requires_grad_(), BPTT()), x)
    x.requires_grad_(False)
    torch.testing.assert_close(derivative(BPTT()), (exact * target).sum())
