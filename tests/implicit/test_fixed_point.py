"""The call itself: arguments, auxiliary output, path, trace, status, the module, bad input."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
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
    FixedPoint,
    Implicit,
    Naive,
    Neumann,
    Phantom,
    SolveError,
    Status,
    Steps,
    Tolerance,
    fixed_point,
)

SOLVERS = [Naive(), Naive(0.6), Anderson(), Broyden()]
TIGHT = Tolerance(rtol=1e-10, atol=0.0, max_steps=200)


def mixed(batch: int = 3) -> tuple[Tensor, Tensor]:
    """Affine samples that need more and more steps: rates from 0 to 0.9."""
    rate = torch.linspace(0.0, 0.9, batch, dtype=torch.float64)[:, None]
    return rate, torch.tensor([1.0, -2.0], dtype=torch.float64)


# -- arguments and auxiliary output --------------------------------------------------------------


def test_defaults_solve() -> None:
    solution = fixed_point(torch.cos, torch.ones(2, 3, dtype=torch.float64))
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, solution.value.cos(), rtol=1e-3, atol=1e-6)
    assert solution.aux is None and solution.path == () and solution.trace is None


def test_arguments_are_handed_on() -> None:
    solution = fixed_point(
        lambda y, a, b: a * y + b["shift"],
        torch.zeros(1, 1, dtype=torch.float64),
        args=(0.5, {"shift": 3.0}),
        stop=TIGHT,
    )
    assert solution.value.item() == pytest.approx(6)


def test_start_is_not_written_to() -> None:
    y0 = torch.ones(2, 3)
    for solver in SOLVERS:
        solution = fixed_point(lambda y: 0.5 * y, y0, solver=solver)
        assert torch.equal(y0, torch.ones(2, 3))
        assert solution.value.data_ptr() != y0.data_ptr()


def test_inference_mode() -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    with torch.inference_mode():
        for solver in SOLVERS:
            solution = fixed_point(lambda y: weight * y + 1, torch.zeros(1, 2), solver=solver)
            assert solution.converged.all() and not solution.value.requires_grad


@pytest.mark.parametrize(
    ("gradient", "applications"),
    [(JFB(), 1), (RAG(3), 3), (Phantom(2, 0.5), 2), (Implicit(), 1), (Neumann(3), 1), (BPTT(), 0)],
    ids=repr,
)
def test_aux_is_of_the_last_evaluation_and_gradients_cost_their_applications(
    gradient: implicit.Gradient, applications: int
) -> None:
    calls = []
    x = torch.ones(2, 3, requires_grad=True)

    def f(y: Tensor) -> tuple[Tensor, dict[str, Any]]:
        calls.append(1)
        return 0.5 * y + x, {"call": len(calls), "input": y.detach()}

    y0 = torch.zeros(2, 3)
    solution = fixed_point(f, y0, stop=Steps(5), gradient=gradient, has_aux=True)
    assert solution.aux["call"] == len(calls) == 5 + applications
    assert solution.evaluations.tolist() == [5, 5], "those of the gradient are not counted"
    if applications == 1:
        assert torch.equal(solution.aux["input"], solution.value.detach())
    calls.clear()
    with torch.no_grad():
        bare = fixed_point(f, y0, gradient=gradient, has_aux=True)
    assert bare.aux["call"] == len(calls) == int(bare.evaluations.max())
    assert torch.equal(bare.aux["input"], bare.value), "of the value that is returned"


def test_aux_comes_with_the_graph_that_the_gradient_tracks() -> None:
    x = torch.ones(1, 2, requires_grad=True)
    solution = fixed_point(
        lambda y: (0.5 * y + x, (x * 3).sum()), torch.zeros(1, 2), gradient=RAG(2), has_aux=True
    )
    (grad,) = torch.autograd.grad(solution.aux, x)
    assert grad.tolist() == [[3, 3]]


# -- the path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_path_is_the_answer_of_so_many_steps(solver: implicit.Solver) -> None:
    """The state at position n is what ``Steps(n)`` returns."""
    y0 = torch.tensor([[0.3, 1.0], [2.0, -1.0]], dtype=torch.float64)
    at = (1, 2, 5, 9)
    solution = fixed_point(torch.cos, y0, solver=solver, stop=Steps(9), path=at)
    assert len(solution.path) == len(at)
    for n, state in zip(at, solution.path, strict=True):
        wanted = fixed_point(torch.cos, y0, solver=solver, stop=Steps(n)).value
        torch.testing.assert_close(state, wanted, rtol=1e-12, atol=0)
    assert torch.equal(solution.path[-1], solution.value)


@pytest.mark.parametrize("gradient", [RAG(2), Implicit(), BPTT()], ids=repr)
@pytest.mark.parametrize("at", [(5, 20), (20,), (1, 2, 50), (50,)])
def test_path_has_as_many_states_as_asked_and_ends_in_the_answer(
    at: tuple[int, ...], gradient: implicit.Gradient
) -> None:
    """A solve that ends after three steps still gives a state for position 20: the answer."""
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    solution = fixed_point(lambda y: 0.01 * y + x, torch.zeros_like(x), path=at, gradient=gradient)
    assert int(solution.steps.max()) < 5
    assert len(solution.path) == len(at)
    assert torch.equal(solution.path[-1], solution.value.detach())
    in_the_graph = isinstance(gradient, implicit.BPTT)
    assert all(state.requires_grad == in_the_graph for state in solution.path)


@settings(max_examples=25, deadline=None)
@given(
    at=st.sets(st.integers(1, 60), min_size=1, max_size=6).map(sorted),
    index=st.integers(0, len(SOLVERS) - 1),
)
def test_path_contract(at: list[int], index: int) -> None:
    """Per sample: its iterate while it moves, and its own answer from when it stopped."""
    rate, b = mixed()
    states: list[Tensor] = []

    def f(y: Tensor) -> Tensor:
        states.append(y.clone())
        return rate * y + b

    with torch.no_grad():
        solution = fixed_point(
            f,
            torch.zeros(3, 2, dtype=torch.float64),
            solver=SOLVERS[index],
            stop=Tolerance(rtol=1e-6, atol=0.0, max_steps=60),
            path=at,
        )
    assert len(solution.path) == len(at)
    for n, state in zip(at, solution.path, strict=True):
        wanted = states[n] if n < len(states) else solution.value
        assert torch.equal(state, wanted)
        for i, steps in enumerate(solution.steps.tolist()):
            if n >= steps:
                assert torch.equal(state[i], solution.value[i])


def test_path_may_be_a_range() -> None:
    solution = fixed_point(torch.cos, torch.ones(1, 1), stop=Steps(4), path=range(1, 5))
    assert len(solution.path) == 4


# -- the trace -----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_trace_holds_the_residual_of_every_evaluation(solver: implicit.Solver) -> None:
    rate, b = mixed()
    wanted = []

    def f(y: Tensor) -> Tensor:
        fy = rate * y + b
        wanted.append((fy - y).norm(dim=1) / fy.norm(dim=1))
        return fy

    with torch.no_grad():
        solution = fixed_point(f, torch.zeros(3, 2, dtype=torch.float64), solver=solver, trace=True)
    assert solution.trace is not None
    assert solution.trace.shape == (len(wanted), 3)
    for i, count in enumerate(solution.evaluations.tolist()):
        column = solution.trace[:, i]
        torch.testing.assert_close(column[:count], torch.stack(wanted)[:count, i])
        assert column[count:].isnan().all(), "nothing where a sample had already stopped"
        assert column[count - 1] == solution.relative_residual[i]
    assert int(solution.evaluations.min()) < len(wanted)


def test_trace_of_fixed_steps() -> None:
    solution = fixed_point(torch.cos, torch.ones(2, 1), stop=Steps(6), trace=True)
    assert solution.trace is not None
    assert solution.trace.shape == (6, 2)
    assert not solution.trace.isnan().any()
    assert not solution.trace.requires_grad


# -- the status ----------------------------------------------------------------------------------


def test_raise_for_status_returns_what_converged() -> None:
    solution = fixed_point(torch.cos, torch.ones(2, 3))
    assert solution.raise_for_status() is solution


def test_raise_for_status_names_samples_figures_and_remedies() -> None:
    rate = torch.tensor([[0.1], [0.99], [0.98]], dtype=torch.float64)
    solution = fixed_point(
        lambda y: rate * y + 1,
        torch.zeros(3, 1, dtype=torch.float64),
        solver=Naive(),
        stop=Tolerance(rtol=1e-4, max_steps=7),
    )
    with pytest.raises(SolveError) as caught:
        solution.raise_for_status()
    message = str(caught.value)
    assert "2 of 3 samples (1, 2) did not converge: STOPPED" in message
    assert f"residual up to {0.99**7:.3g} after up to 7 steps" in message  # r_n = 0.99ⁿ
    for remedy in ("allow more steps", "loosen rtol or atol", "Anderson or Broyden"):
        assert remedy in message


def test_raise_for_status_tells_the_worst() -> None:
    """One sample out of steps and one that diverged: it is divergence that needs the remedy."""
    rate = torch.tensor([[0.99], [0.1], [3.0]], dtype=torch.float64)
    solution = fixed_point(
        lambda y: rate * y + 1,
        torch.zeros(3, 1, dtype=torch.float64),
        solver=Naive(),
        stop=Tolerance(rtol=1e-3, max_steps=5),
    )
    assert solution.status.tolist() == [Status.STOPPED, Status.CONVERGED, Status.DIVERGED]
    with pytest.raises(SolveError, match=r"2 of 3 samples \(0, 2\).*DIVERGED.*damp the step"):
        solution.raise_for_status()


def test_raise_for_status_of_divergence() -> None:
    solution = fixed_point(
        lambda y: 3 * y + 1, torch.zeros(12, 1), solver=Naive(), stop=Tolerance(max_steps=20)
    )
    with pytest.raises(
        SolveError,
        match=r"12 of 12 samples \(0, 1, 2, 3, 4, 5, 6, 7, …\).*DIVERGED.*damp.*contraction",
    ):
        solution.raise_for_status()


def test_fixed_steps_never_claim_to_have_converged() -> None:
    solution = fixed_point(torch.cos, torch.ones(2, 3), stop=Steps(60))
    with pytest.raises(SolveError, match="STOPPED"):
        solution.raise_for_status()


def test_status_values() -> None:
    assert [Status.CONVERGED, Status.STOPPED, Status.DIVERGED] == [0, 1, 2]
    assert issubclass(SolveError, RuntimeError)


# -- the module ----------------------------------------------------------------------------------


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        with torch.no_grad():
            self.linear.weight.copy_(0.3 * torch.eye(3))
        self.calls = 0

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(y) + x)


def test_module_owns_the_parameters_of_f() -> None:
    cell = Cell()
    layer = FixedPoint(cell, gradient=RAG(2))
    assert set(layer.parameters()) == set(cell.parameters())
    assert list(layer.state_dict()) == ["f.linear.weight", "f.linear.bias"]
    x = torch.randn(2, 3)
    value = layer(torch.zeros(2, 3), x).value
    value.sum().backward()
    assert cell.linear.weight.grad is not None
    wanted = fixed_point(cell, torch.zeros(2, 3), args=(x,), gradient=RAG(2)).value
    assert torch.equal(value, wanted)
    clone = copy.deepcopy(layer)
    assert torch.equal(clone(torch.zeros(2, 3), x).value, value)


def test_module_solves_otherwise_in_evaluation() -> None:
    cell = Cell()
    layer = FixedPoint(
        cell,
        solver=Naive(),
        stop=Steps(4),
        gradient=RAG(2),
        eval_solver=Anderson(),
        eval_stop=Steps(9),
    )
    y0, x = torch.zeros(2, 3), torch.randn(2, 3)
    training = layer(y0, x)
    assert cell.calls == 4 + 2
    assert torch.equal(
        training.value, fixed_point(cell, y0, args=(x,), solver=Naive(), stop=Steps(4)).value
    )
    cell.calls = 0
    layer.eval()
    with torch.no_grad():
        evaluation = layer(y0, x)
        assert cell.calls == 9
        wanted = fixed_point(cell, y0, args=(x,), solver=Anderson(), stop=Steps(9)).value
    assert torch.equal(evaluation.value, wanted)
    layer.train()
    assert layer(y0, x).steps.tolist() == [4, 4]


def test_module_without_choices_for_evaluation_keeps_those_of_training() -> None:
    layer = FixedPoint(lambda y: 0.5 * y, stop=Steps(3), solver=Naive()).eval()
    assert layer(torch.ones(1, 1)).steps.tolist() == [3]
    assert layer(torch.ones(1, 1)).value.item() == 0.125


def test_module_with_aux() -> None:
    layer = FixedPoint(lambda y: (0.5 * y, "seen"), has_aux=True)
    assert layer(torch.ones(1, 1)).aux == "seen"


def test_module_tells_its_choices() -> None:
    text = repr(FixedPoint(torch.cos, solver=Broyden(memory=7), stop=Steps(3), gradient=RAG(2)))
    for part in ("Broyden(memory=7", "Steps(n=3)", "RAG(k=2, recompute=False)"):
        assert part in text


# -- bad input -----------------------------------------------------------------------------------


def never(y: Tensor) -> Tensor:
    raise AssertionError("f must not be evaluated before the arguments are checked")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"solver": "anderson"}, r"solver='anderson' is not a solver.*implicit\.Anderson\(memory"),
        ({"solver": Anderson}, r"solver=.*Anderson.*is not a solver"),
        ({"solver": None}, r"solver=None is not a solver"),
        ({"solver": RAG(2)}, r"solver=RAG\(k=2, recompute=False\) is not a solver"),
        ({"stop": 20}, r"stop=20 is not a stop.*implicit\.Tolerance.*implicit\.Steps\(20\)"),
        ({"stop": 1e-3}, r"stop=0\.001 is not a stop"),
        ({"gradient": "rag"}, r"gradient='rag' is not a gradient.*implicit\.RAG\(2\)"),
        ({"gradient": 2}, r"gradient=2 is not a gradient"),
        ({"gradient": Implicit}, r"gradient=.*is not a gradient"),
        ({"max_iter": 20}, r"max_iter"),
        ({"tol": 1e-3}, r"tol"),
    ],
)
def test_wrong_choices(options: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        fixed_point(never, torch.zeros(1, 1), **options)
    with pytest.raises(TypeError, match=match):
        FixedPoint(never, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"eval_solver": "anderson"}, r"solver='anderson' is not a solver"),
        ({"eval_stop": 25}, r"stop=25 is not a stop"),
        ({"eval_stop": 0}, r"stop=0 is not a stop"),
        ({"eval_gradient": RAG(2)}, r"eval_gradient"),
    ],
)
def test_wrong_choices_for_evaluation(options: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        FixedPoint(never, **options)


def test_positional_options_are_refused() -> None:
    with pytest.raises(TypeError, match="positional"):
        fixed_point(never, torch.zeros(1, 1), Anderson())  # type: ignore[call-arg]


@pytest.mark.parametrize("f", [None, torch.zeros(2), "cos"])
def test_f_must_be_callable(f: Any) -> None:
    with pytest.raises(TypeError, match="f must be callable"):
        fixed_point(f, torch.zeros(1, 1))


@pytest.mark.parametrize("stop", [Tolerance(max_steps=50), Steps(50)])
@pytest.mark.parametrize("path", [(51,), (1, 60), (0, 3), (-1,), (5, 3), (3, 3)], ids=repr)
def test_bad_path(path: tuple[int, ...], stop: Any) -> None:
    with pytest.raises(ValueError, match=r"path=\(.*step numbers, rising, from 1 to 50 \(what"):
        fixed_point(never, torch.zeros(1, 1), stop=stop, path=path)


def test_path_holds_whole_numbers() -> None:
    """Position 1.5 is never reached; it must not be answered with something else."""
    with pytest.raises((TypeError, ValueError), match="path"):
        fixed_point(torch.cos, torch.ones(1, 1), path=(1.5, 2))  # type: ignore[arg-type]


def test_an_error_inside_f_is_left_as_it_is() -> None:
    def broken(y: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fixed_point(broken, torch.zeros(1, 1))


def test_the_map_of_a_root_must_be_callable() -> None:
    with pytest.raises(TypeError, match="g must be callable, not 3"):
        implicit.root(3, torch.zeros(1, 1))


@pytest.mark.parametrize(
    "solver", [Naive(), Anderson(), Broyden(), implicit.NewtonKrylov()], ids=repr
)
@pytest.mark.parametrize("tracked", [True, False])
def test_the_answer_is_not_the_start_itself(solver: implicit.Solver, tracked: bool) -> None:
    """Also where ``y0`` is a fixed point: writing to the answer leaves ``y0`` as it was."""
    y0 = torch.zeros(2, 3, dtype=torch.float64)
    with torch.set_grad_enabled(tracked):
        value = fixed_point(lambda y: 0.5 * y, y0, solver=solver).value
    with torch.no_grad():
        value.add_(1)
    assert not y0.any()


@pytest.mark.parametrize(
    "path",
    [
        5,
        torch.tensor([1, 2]),
        pytest.param(iter((1, 2)), id="iterator"),
        [2, 1],
        ("a",),
        {1, 2},
        (0,),
        (True,),
    ],
    ids=repr,
)
def test_a_path_that_is_no_sequence_of_steps_is_refused(path: Any) -> None:
    with pytest.raises(ValueError, match=r"path=.*positions are a sequence of step numbers"):
        implicit.fixed_point(torch.cos, torch.zeros(1, 1), path=path)


@pytest.mark.parametrize("path", [range(1, 4), [1, 2, 3], (np.int64(1), 2, 3)], ids=repr)
def test_a_path_is_any_sequence_of_whole_numbers(path: Any) -> None:
    found = implicit.fixed_point(torch.cos, torch.zeros(1, 1), solver=Naive(), path=path)
    assert [round(y.item(), 4) for y in found.path] == [1.0, 0.5403, 0.8576]


def test_who_writes_to_the_answer_leaves_what_f_returned_alone() -> None:
    constant = torch.ones(2, 3)
    with torch.no_grad():
        found = implicit.fixed_point(lambda y: constant, torch.zeros(2, 3), solver=Naive())
        found.value.zero_()
    assert (constant == 1).all()


def test_the_auxiliary_output_of_a_root_is_asked_for() -> None:
    with pytest.raises(implicit.StateError, match=r"g must return a pair"):
        implicit.root(lambda y: y - 1, torch.zeros(2, 3), has_aux=True)
