"""States: what they may be, their flat view, and the words in which anything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import implicit
from implicit.state import Layout, StateError

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Pair(NamedTuple):
    position: Any
    content: Any


def leaves(state: Any) -> list[Tensor]:
    found = torch.utils._pytree.tree_leaves(state)
    assert all(isinstance(leaf, Tensor) for leaf in found)
    return found


def structures(batch: int) -> list[Any]:
    """The kinds of state a user may hold, all with the same batch."""
    a = torch.linspace(-1, 1, batch * 3).reshape(batch, 3)
    b = torch.linspace(0, 2, batch * 4).reshape(batch, 2, 2)
    c = torch.linspace(-2, 0, batch)
    return [
        a,
        c,
        (a, b),
        [a, c],
        {"a": a, "b": b},
        {"outer": {"inner": (a, [b])}, "c": c},
        Pair(a, b),
        Pair({"x": a}, (b, c)),
    ]


# -- the flat view -------------------------------------------------------------------------------


@st.composite
def states(draw: st.DrawFn) -> dict[str, Tensor]:
    batch = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for index in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = draw(st.sampled_from(REAL))
        state[f"leaf{index}"] = torch.randn(batch, *shape, generator=generator).to(dtype)
    return state


@settings(max_examples=60, deadline=None)
@given(states())
def test_packing_loses_nothing(state: dict[str, Tensor]) -> None:
    layout = Layout(state)
    flat = layout.pack(state)
    batch = len(next(iter(state.values())))
    assert flat.shape == (batch, sum(leaf[0].numel() for leaf in state.values()))
    back = layout.unpack(flat)
    assert back.keys() == state.keys()
    for name, leaf in state.items():
        assert back[name].dtype == leaf.dtype
        assert back[name].shape == leaf.shape
        assert torch.equal(back[name], leaf)


@settings(max_examples=30, deadline=None)
@given(states())
def test_norm_of_a_sample_is_the_norm_over_its_leaves(state: dict[str, Tensor]) -> None:
    flat = Layout(state).pack(state)
    squares = sum(leaf.double().reshape(len(leaf), -1).square().sum(1) for leaf in state.values())
    assert isinstance(squares, Tensor)
    torch.testing.assert_close(flat.double().square().sum(1), squares)


@pytest.mark.parametrize(
    ("dtypes", "working"),
    [
        ((torch.bfloat16,), torch.float32),
        ((torch.float16,), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
        ((torch.float64,), torch.float64),
    ],
)
def test_working_dtype_is_the_widest_and_float32_at_least(
    dtypes: tuple[torch.dtype, ...], working: torch.dtype
) -> None:
    state = [torch.ones(2, 3, dtype=dtype) for dtype in dtypes]
    assert Layout(state).pack(state).dtype == working


def test_packing_is_differentiable() -> None:
    a = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    layout = Layout((a, b))
    assert torch.autograd.gradcheck(lambda *state: layout.pack(state), (a, b))
    assert torch.autograd.gradcheck(lambda *state: layout.unpack(layout.pack(state).sin()), (a, b))


# -- every structure through a solve ------------------------------------------------------------


@pytest.mark.parametrize("solver", [implicit.Naive(), implicit.Anderson(), implicit.Broyden()])
@pytest.mark.parametrize("index", range(8))
def test_structure_goes_through_a_solve(index: int, solver: implicit.Solver) -> None:
    """``y = y / 2 + y0 / 2`` from 0 has the fixed point ``y0``, whatever the structure."""
    state = structures(3)[index]
    tree_map = torch.utils._pytree.tree_map
    zero = tree_map(torch.zeros_like, state)
    solution = implicit.fixed_point(
        lambda y: tree_map(lambda leaf, target: 0.5 * (leaf + target), y, state),
        zero,
        solver=solver,
        stop=implicit.Tolerance(rtol=1e-6),
        path=(1, 50),
    )
    assert type(solution.value) is type(state)
    for found, wanted in zip(leaves(solution.value), leaves(state), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for visited in solution.path:
        assert type(visited) is type(state)
        assert [x.shape for x in leaves(visited)] == [x.shape for x in leaves(state)]


def test_f_sees_each_leaf_in_its_own_shape_and_dtype() -> None:
    seen = []

    def f(y: Pair) -> Pair:
        seen.append([(leaf.shape, leaf.dtype) for leaf in y])
        return Pair(0.5 * y.position + 1, 0.5 * y.content + 2)

    y0 = Pair(torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 3, 5, dtype=torch.bfloat16))
    solution = implicit.fixed_point(f, y0)
    assert seen
    assert all(call == [(leaf.shape, leaf.dtype) for leaf in y0] for call in seen)
    assert solution.value.position.dtype == torch.float64
    assert solution.value.content.dtype == torch.bfloat16
    torch.testing.assert_close(
        solution.value.content, torch.full((2, 3, 5), 4.0, dtype=torch.bfloat16), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize(
    "solver", [implicit.Naive(), implicit.Anderson(), implicit.Broyden()], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_solved_in_float32(
    dtype: torch.dtype, solver: implicit.Solver
) -> None:
    torch.manual_seed(0)
    a = (0.4 * torch.randn(6, 6) / 6**0.5).to(dtype)
    b = torch.randn(3, 6).to(dtype)
    solution = implicit.fixed_point(
        lambda y: torch.tanh(y @ a + b),
        torch.zeros(3, 6, dtype=dtype),
        solver=solver,
        stop=implicit.Tolerance(rtol=2e-2, atol=0.0),
        gradient=implicit.Implicit(),
    )
    assert solution.converged.all()
    assert solution.value.dtype == dtype
    assert solution.residual.dtype == torch.float32
    exact = implicit.fixed_point(
        lambda y: torch.tanh(y @ a.double() + b.double()), torch.zeros(3, 6, dtype=torch.float64)
    ).value
    torch.testing.assert_close(solution.value.double(), exact, rtol=0.05, atol=0.05)


def test_state_without_elements_is_solved_at_once() -> None:
    for solver in (implicit.Naive(), implicit.Anderson(), implicit.Broyden()):
        solution = implicit.fixed_point(lambda y: y + 1, torch.zeros(2, 0), solver=solver)
        assert solution.converged.all()
        assert solution.evaluations.tolist() == [1, 1]


# -- what is refused: the state ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y0", "match"),
    [
        ({}, r"y0 holds no tensor: pass a tensor"),
        ({"a": torch.zeros(2), "b": 3.0}, r"y0\['b'\] is a float.*must be a tensor"),
        (torch.zeros(2, 3, dtype=torch.int64), r"y0 is torch\.int64.*y0\.float\(\)"),
        (torch.zeros(2, 3, dtype=torch.bool), r"y0 is torch\.bool.*y0\.float\(\)"),
        (torch.zeros(2, 3, dtype=torch.complex64), r"y0 is torch\.complex64.*view_as_real"),
        (torch.tensor(1.0), r"y0 has no dimension.*batch.*reshape\(1\)"),
        (torch.zeros(0, 3), r"y0 has shape \(0, 3\): the batch is empty"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), r"y0\[1\] has 3 samples and y0\[0\] has 2"),
        (torch.zeros(2, 3, dtype=torch.float8_e5m2), r"y0 is torch\.float8_e5m2.*y0\.float\(\)"),
        (torch.zeros(2, 3).to_sparse(), r"y0 is torch\.sparse_coo.*to_dense"),
        (
            {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3, device="meta")},
            r"y0\['b'\] is on meta and y0\['a'\] on cpu: move the whole state",
        ),
    ],
)
def test_bad_state(y0: Any, match: str) -> None:
    def never(y: Any) -> Any:
        raise AssertionError("f must not be evaluated at a state that is refused")

    with pytest.raises(StateError, match=match):
        implicit.fixed_point(never, y0)
    with pytest.raises(StateError, match=match):
        implicit.supervise(never, y0, lambda y, n: y.sum(), at=(1,))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_start_without_a_finite_sample(bad: float) -> None:
    """Refused where nothing can be solved; one bad sample among good ones is only diverged."""
    y0 = torch.zeros(2, 3)
    y0[:, 1] = bad
    with pytest.raises(StateError, match=r"y0 is not finite.*NaN or infinity.*start from zeros"):
        implicit.fixed_point(lambda y: 0.5 * y + 1, y0)
    y0[0] = 0
    solution = implicit.fixed_point(lambda y: 0.5 * y + 1, y0, stop=implicit.Tolerance(rtol=1e-6))
    assert solution.status.tolist() == [implicit.Status.CONVERGED, implicit.Status.DIVERGED]
    torch.testing.assert_close(solution.value[0], torch.full((3,), 2.0))


def test_state_error_is_a_value_error() -> None:
    assert issubclass(implicit.StateError, ValueError)


# -- what is refused: what f makes of it ---------------------------------------------------------

BAD_MAPS: list[tuple[Callable[[Any], Any], str]] = [
    (
        lambda y: {**y, "a": y["a"][:, :2]},
        r"f\(y\)\['a'\] has shape \(2, 2\) where y0\['a'\] has \(2, 3\).*same shape",
    ),
    (
        lambda y: {**y, "b": y["b"].double()},
        r"f\(y\)\['b'\] is torch\.float64 where y0\['b'\] is torch\.float32"
        r".*start from y0 in torch\.float64, or cast inside f",
    ),
    (
        lambda y: {**y, "b": y["b"].bfloat16()},
        r"f\(y\)\['b'\] is torch\.bfloat16 where y0\['b'\] is torch\.float32",
    ),
    (
        lambda y: {**y, "a": y["a"].to("meta")},
        r"f\(y\)\['a'\] is on meta and y0\['a'\] on cpu.*move y0",
    ),
    (lambda y: y["a"], r"(?s)f returned another structure.*set has_aux=True"),
    (lambda y: (y, None), r"(?s)f returned another structure.*set has_aux=True"),
    (lambda y: {"a": y["a"]}, r"(?s)f returned another structure"),
    (lambda y: {**y, "a": 1.0}, r"f\(y\)\['a'\] is a float, not a tensor"),
    (lambda y: {**y, "a": None}, r"f\(y\)\['a'\] is a NoneType, not a tensor"),
]


@pytest.mark.parametrize(("change", "match"), BAD_MAPS)
@pytest.mark.parametrize("gradient", [implicit.JFB(), implicit.Implicit(), implicit.BPTT()])
def test_map_that_does_not_return_a_state(
    change: Callable[[Any], Any], match: str, gradient: implicit.Gradient
) -> None:
    calls = []

    def f(y: Any) -> Any:
        calls.append(1)
        return change(y)

    y0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 1)}
    with pytest.raises(StateError, match=match):
        implicit.fixed_point(f, y0, gradient=gradient)
    assert len(calls) == 1, "the mismatch must be found before the first step"


@pytest.mark.parametrize(("change", "match"), BAD_MAPS)
def test_supervised_map_that_does_not_return_a_state(
    change: Callable[[Any], Any], match: str
) -> None:
    y0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 1)}
    with pytest.raises(StateError, match=match):
        implicit.supervise(change, y0, lambda y, n: y["a"].sum(), at=(1, 3))


def test_broadcasting_map_is_refused() -> None:
    """``(2, 3) + (4, 1, 3)`` broadcasts quietly; a state must not grow a dimension."""
    with pytest.raises(StateError, match=r"has shape \(4, 2, 3\) where y0 has \(2, 3\)"):
        implicit.fixed_point(lambda y: 0.5 * y + torch.ones(4, 1, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("answer", [lambda y: y, lambda y: (y, 1, 2), lambda y: [y, 1]])
def test_has_aux_needs_a_pair(answer: Callable[[Tensor], Any]) -> None:
    with pytest.raises(StateError, match=r"has_aux=True: f must return a pair \(state, aux\)"):
        implicit.fixed_point(answer, torch.zeros(2, 3), has_aux=True)


def test_autocast_dtype_is_welcome_under_autocast_alone() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 4)

    def f(y: Tensor) -> Tensor:
        return 0.1 * linear(y)

    with torch.autocast("cpu", torch.bfloat16):
        assert implicit.fixed_point(f, torch.zeros(2, 4)).value.dtype == torch.float32
        with pytest.raises(StateError, match=r"torch\.float64.*cast inside f"):
            implicit.fixed_point(lambda y: f(y).double(), torch.zeros(2, 4))
        with pytest.raises(StateError, match=r"torch\.float16.*cast inside f"):
            implicit.fixed_point(lambda y: f(y).half(), torch.zeros(2, 4))
    with pytest.raises(StateError, match=r"torch\.bfloat16.*cast inside f"):
        implicit.fixed_point(lambda y: f(y).bfloat16(), torch.zeros(2, 4))
