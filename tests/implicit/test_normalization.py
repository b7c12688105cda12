"""Weights held within a bound: against singular values, and against the matrix of a convolution."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import implicit
from implicit.normalization import contract, uncontract
from implicit.per_solve import renew
from implicit.regularization import lipschitz_estimate

METHODS: list[Literal["spectral", "weight"]] = ["spectral", "weight"]
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


def linear(rows: int = 6, columns: int = 6, gain: float = 3.0) -> nn.Linear:
    """A layer whose weight is ``(rows, columns)``."""
    layer = nn.Linear(columns, rows, dtype=DOUBLE)
    layer.weight.data *= gain
    return layer


def exchange(layer: nn.Module) -> None:
    """Give a contracted layer of 6 × 6 another weight, of singular values 4, 3.5, 1, 1, 1, 1."""
    left, right = (torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE))[0] for _ in range(2))
    values = torch.tensor([4, 3.5, 1, 1, 1, 1], dtype=DOUBLE)
    layer.get_parameter("parametrizations.weight.original").data = left @ torch.diag(values) @ right


def operator_norm(f: Callable[[Tensor], Tensor], *shape: int) -> float:
    """Norm of a linear map, from its matrix."""
    identity = torch.eye(torch.Size(shape).numel(), dtype=DOUBLE).reshape(-1, *shape)
    with torch.no_grad():
        return norm(f(identity).flatten(1))


@settings(deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 7), st.floats(0.05, 20), st.floats(0.1, 3), st.integers(0, 99)
)
def test_spectral_cap_is_the_bound_or_the_weight(
    rows: int, columns: int, gain: float, bound: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = linear(rows, columns, gain)
    before = layer.weight.detach().clone()
    contract(layer, bound)
    expected = before * min(1.0, bound / norm(before))
    torch.testing.assert_close(layer.weight.detach(), expected)


@settings(deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 7), st.floats(0.05, 20), st.floats(0.1, 3), st.integers(0, 99)
)
def test_weight_cap_is_the_bound_of_the_frobenius_norm(
    rows: int, columns: int, gain: float, bound: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = linear(rows, columns, gain)
    before = layer.weight.detach().clone()
    contract(layer, bound, method="weight")
    expected = before * min(1.0, bound / float(torch.linalg.matrix_norm(before)))
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert norm(layer.weight) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 3, 3, padding=1), (2, 7)),
        (nn.Conv1d(2, 3, 4, stride=2), (2, 8)),
        (nn.Conv2d(2, 2, 3, padding=1), (2, 4, 5)),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 4, 5)),
        (nn.Conv2d(2, 4, (1, 3), dilation=2, padding=2), (2, 5, 5)),
        (nn.Conv2d(4, 4, 3, groups=2, padding=1), (4, 4, 4)),
        (nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 4, 4)),
        (nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
        (nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 5)),
        (nn.ConvTranspose2d(4, 2, 3, groups=2, padding=1), (4, 4, 4)),
        (nn.ConvTranspose3d(2, 1, 2), (2, 2, 2, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("kernel", ["random", "constant"])
def test_convolutions_are_bounded_as_maps(
    layer: nn.Module, shape: tuple[int, ...], method: Literal["spectral", "weight"], kernel: str
) -> None:
    layer = copy.deepcopy(layer).double()
    weight = layer.get_parameter("weight")
    nn.init.normal_(weight) if kernel == "random" else nn.init.ones_(weight)
    nn.init.zeros_(layer.get_parameter("bias"))
    contract(layer, 0.9, method=method)
    assert operator_norm(layer, *shape) <= 0.9 * (1 + 1e-9)


def test_the_bound_of_a_convolution_is_reached() -> None:
    """A constant kernel gains √(k₁k₂)‖K‖ on a constant image, so the factor cannot be less."""
    layer = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular", bias=False, dtype=DOUBLE)
    nn.init.ones_(layer.weight)
    contract(layer, 0.9)
    assert abs(operator_norm(layer, 2, 5, 5) - 0.9) < 1e-9


def test_groups_are_bounded_one_by_one() -> None:
    layer = nn.Conv1d(2, 2, 1, groups=2, bias=False, dtype=DOUBLE)
    layer.weight.data = torch.tensor([[[0.5]], [[8.0]]], dtype=DOUBLE)
    contract(layer, 0.9)
    torch.testing.assert_close(layer.weight.flatten().tolist(), [0.5, 0.9])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gain", [0.1, 3.0], ids=["within", "beyond"])
def test_gradient_against_finite_differences(
    method: Literal["spectral", "weight"], gain: float
) -> None:
    layer = contract(linear(4, 3, gain), method=method)
    names = [name for name, _ in layer.named_parameters()]
    stored = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    x = torch.randn(2, 3, dtype=DOUBLE)

    def output(*values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        for _ in range(20):  # the singular vector follows the weight before it is looked at
            renew(layer)
            result = torch.func.functional_call(layer, weights, (x,))
        return result

    assert torch.autograd.gradcheck(output, stored)


@pytest.mark.parametrize("method", METHODS)
def test_functional_gradient(method: Literal["spectral", "weight"]) -> None:
    """`torch.func.grad` gives what autograd gives, and leaves a layer that can be copied."""
    layer = contract(linear(), method=method)
    x = torch.randn(2, 6, dtype=DOUBLE)
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        renew(layer)
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    functional = torch.func.grad(loss)(weights)
    expected = torch.autograd.grad(layer(x).square().sum(), tuple(layer.parameters()))
    torch.testing.assert_close(tuple(functional[name] for name in weights), expected)
    torch.testing.assert_close(copy.deepcopy(layer).weight, layer.weight)


@pytest.mark.parametrize("method", METHODS)
def test_a_contracted_cell_is_a_contraction(method: Literal["spectral", "weight"]) -> None:
    """Whatever its weights: the naive iteration converges, no faster than the bound asks."""
    cell = contract(nn.Sequential(linear(gain=50.0), nn.Tanh()), 0.8, method=method)
    x = torch.randn(5, 6, dtype=DOUBLE)
    stop = implicit.Tolerance(rtol=1e-8, atol=0.0, max_steps=200)
    solution = implicit.fixed_point(
        lambda y: cell(y) + x, torch.zeros_like(x), solver=implicit.Naive(), stop=stop
    )
    solution.raise_for_status()
    assert bool((lipschitz_estimate(cell, solution.value) <= 0.8 + 1e-9).all())


def test_nothing_moves_within_a_solve_and_the_vector_follows_between_them() -> None:
    """Where torch's own spectral norm is another map at each evaluation."""
    cell = contract(linear(), 0.9)
    seen: list[Tensor] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, y: Tensor) -> Tensor:
            seen.append(self.cell.weight.detach().clone())
            return torch.tanh(self.cell(y))

    watched = Watched()
    y0 = torch.randn(2, 6, dtype=DOUBLE)
    deviations = []
    exchange(cell)
    for _ in range(40):
        seen.clear()
        implicit.fixed_point(watched, y0, stop=implicit.Steps(5))
        assert len(seen) >= 6
        assert all(torch.equal(weight, seen[0]) for weight in seen)
        deviations.append(abs(norm(seen[0]) - 0.9))
    assert deviations[0] > 1e-3  # the new weight was not yet followed ...
    assert deviations[-1] < 1e-6  # ... and now it is


def test_bound_holds_throughout_training() -> None:
    """Adam pushes the weight outwards; the tracked norm stays within one per cent of the bound."""
    cell = contract(linear(16, 16, gain=1.0), 0.9)
    optimiser = torch.optim.Adam(cell.parameters(), lr=0.02)
    x = torch.randn(8, 16, dtype=DOUBLE)
    layer = implicit.FixedPoint(nn.Sequential(cell, nn.Tanh()), gradient=implicit.RAG(2))
    for _ in range(60):
        optimiser.zero_grad()
        value = layer(x).value
        (-value.square().mean()).backward()
        assert norm(cell.weight) < 0.9 * 1.01
        optimiser.step()
    assert norm(cell.get_parameter("parametrizations.weight.original")) > 1.5


def test_unannounced_it_follows_at_every_training_call() -> None:
    layer = contract(linear(), 0.9)
    exchange(layer)
    assert abs(norm(layer.weight) - 0.9) > 1e-3
    for _ in range(50):
        layer(torch.zeros(1, 6, dtype=DOUBLE))
    assert abs(norm(layer.weight) - 0.9) < 1e-6


def test_nothing_moves_in_evaluation_mode() -> None:
    layer = contract(linear(), 0.9).eval()
    exchange(layer)
    before = layer.weight
    renew(layer)
    assert torch.equal(layer.weight, before)


def test_two_uses_in_one_graph_before_its_backward() -> None:
    layer = contract(linear(), 0.9)
    x = torch.randn(2, 6, dtype=DOUBLE)
    renew(layer)
    first = layer(x).square().sum()
    (alone,) = torch.autograd.grad(first, layer.bias, retain_graph=True)
    renew(layer)
    second = layer(x).square().sum()
    for buffer in layer.buffers():  # as DistributedDataParallel does before each forward
        buffer.copy_(buffer.clone())
    (first + second).backward()
    assert layer.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, 2 * alone)


def test_a_weight_of_zeros_loses_no_direction() -> None:
    layer = contract(linear(gain=0.0), 0.9)
    renew(layer)
    assert norm(layer.weight) == 0
    layer(torch.ones(1, 6, dtype=DOUBLE)).sum().backward()
    stored = layer.get_parameter("parametrizations.weight.original")
    assert stored.grad is not None and bool(stored.grad.isfinite().all())
    stored.data = 5 * torch.eye(6, dtype=DOUBLE)
    torch.testing.assert_close(norm(layer.weight), 0.9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precision(method: Literal["spectral", "weight"], dtype: torch.dtype) -> None:
    """The norm is taken in float32 at least, also under autocast; the weight keeps its dtype."""
    layer = nn.Linear(64, 64).to(dtype)
    layer.weight.data *= 5
    contract(layer, 0.9, method=method)
    plain = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, plain)
    assert plain.dtype == dtype
    reached = norm(plain) if method == "spectral" else float(plain.detach().double().norm())
    assert abs(reached - 0.9) < 0.9 * 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", METHODS)
def test_uncontract_leaves_plain_parameters(method: Literal["spectral", "weight"]) -> None:
    module = nn.Sequential(linear(), nn.Tanh(), nn.Conv1d(2, 2, 3))
    names = [name for name, _ in module.named_parameters()]
    contract(module, 0.5, method=method)
    weights = [module[0].weight.detach().clone(), module[2].weight.detach().clone()]
    assert uncontract(module) is module
    assert sorted(name for name, _ in module.named_parameters()) == sorted(names)
    assert not list(module.buffers())
    torch.testing.assert_close([module[0].weight.detach(), module[2].weight.detach()], weights)
    contract(module, 0.5, method=method)  # and it may be put on again


def test_spectral_keeps_the_parameters_of_the_optimiser() -> None:
    layer = linear()
    weight = layer.weight
    contract(layer)
    assert layer.get_parameter("parametrizations.weight.original") is weight


def test_state_dict_round_trip() -> None:
    one, other = contract(linear(), 0.9), contract(linear(), 0.9)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.eval().weight, other.eval().weight)
    assert torch.equal(copy.deepcopy(one).weight, one.weight)


def test_a_weight_may_be_assigned() -> None:
    layer = contract(linear(), 0.9)
    layer.weight = 0.5 * torch.eye(6, dtype=DOUBLE)
    torch.testing.assert_close(layer.weight.detach(), 0.5 * torch.eye(6, dtype=DOUBLE))


def test_only_layers_with_weights_are_touched() -> None:
    module = nn.Sequential(linear(), nn.LayerNorm(6), nn.Embedding(3, 6))
    contract(module)
    assert parametrize.is_parametrized(module[0], "weight")
    assert not parametrize.is_parametrized(module[1])
    assert not parametrize.is_parametrized(module[2])


def test_what_cannot_be_contracted_is_refused_before_anything_changes() -> None:
    with pytest.raises(ValueError, match="Tanh has nothing to normalise"):
        contract(nn.Tanh())
    with pytest.raises(ValueError, match="Linear is parametrized already"):
        contract(parametrizations.spectral_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"Linear '0' is parametrized already.*uncontract"):
        contract(contract(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match=r"LazyLinear '1' has no weight yet"):
        contract(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)))
    module = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 3, padding_mode="reflect"))
    with pytest.raises(ValueError, match=r"Conv2d '1' pads with padding_mode='reflect'"):
        contract(module)
    assert not parametrize.is_parametrized(module[0])
    with pytest.raises(ValueError, match="method='power'"):
        contract(nn.Linear(2, 2), method="power")  # type: ignore[arg-type]
    for bound in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="bound="):
            contract(nn.Linear(2, 2), bound)


def test_uncontract_refuses_what_was_not_contracted() -> None:
    with pytest.raises(ValueError, match="nothing in Linear was contracted"):
        uncontract(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing in ParametrizedLinear was contracted"):
        uncontract(parametrizations.spectral_norm(nn.Linear(2, 2)))


def test_repr_shows_the_bound() -> None:
    assert "bound=0.7" in repr(contract(nn.Linear(2, 2), 0.7))


def test_what_is_no_module_has_no_weights() -> None:
    with pytest.raises(TypeError, match=r"contract: .*cos.* is no torch.nn.Module"):
        contract(torch.cos)  # type: ignore[type-var]
