"""The problem suite: that its maps are what their names say, and who solves them as it comes.

That a fixed point exists is settled by Newton's method with the dense Jacobian, which shares
nothing with the solvers; what the fixed point must be, by the theory of each problem, with the
equations written out a second time.  Then every solver meets every problem under the budget of
the robustness benchmark, and the verdict is compared with the lists below.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import scipy.special
import torch
from torch import Tensor

import implicit
from benchmarks.counts import Counted
from benchmarks.problems import FAMILIES, Map, linspace, normal, problem, problems, shrink

PROBLEMS = {p.name: p for p in problems()}
EACH = pytest.mark.parametrize("name", PROBLEMS)
TOLERANCE, BUDGET = 1e-6, 1000


def jacobian(f: Map, y: Tensor) -> Tensor:
    return torch.func.jacrev(f)(y).reshape(y.numel(), y.numel())


def newton(f: Map, y: Tensor, steps: int = 60) -> tuple[Tensor, float]:
    """Damped by halving; least squares, because some Jacobians are singular at the solution."""
    for _ in range(steps):
        residual = (f(y) - y).norm()
        if residual < 1e-13:
            break
        system = torch.eye(y.numel(), dtype=y.dtype) - jacobian(f, y)
        step = torch.linalg.lstsq(system, (f(y) - y).mT, driver="gelsd").solution.mT
        lengths = [0.5**k for k in range(20)]
        better = [t for t in lengths if (f(y + t * step) - y - t * step).norm() < residual]
        if not better:
            break
        y = y + better[0] * step
    return y, (f(y) - y).norm().item()


@cache
def answer(name: str) -> Tensor:
    """A fixed point ``(1, D)``: Newton's, from the start or from what half-steps lead to."""
    f, start = PROBLEMS[name].f, PROBLEMS[name].y0
    y, residual = newton(f, start)
    for half_steps in (30, 300, 3000, 10000):
        if residual <= 1e-10:
            break
        y = start
        for _ in range(half_steps):
            y = 0.5 * (y + f(y))
        y, residual = newton(f, y)
    assert residual <= 1e-10
    return y


def radius(name: str) -> float:
    """Spectral radius of the Jacobian at the fixed point."""
    y = answer(name)
    return torch.linalg.eigvals(jacobian(PROBLEMS[name].f, y)).abs().max().item()


# -- every problem -------------------------------------------------------------------------------


def test_names_differ_and_no_family_is_empty() -> None:
    assert len(problems()) == len(PROBLEMS) >= 30
    assert {p.family for p in PROBLEMS.values()} == {family.__name__ for family in FAMILIES}


@EACH
def test_starts_from_one_row_in_float64(name: str) -> None:
    start = PROBLEMS[name].y0
    image = PROBLEMS[name].f(start)
    assert start.ndim == 2 and start.shape[0] == 1 and start.dtype == torch.float64
    assert image.shape == start.shape and image.dtype == torch.float64
    assert image.isfinite().all()


def test_are_the_same_when_built_again() -> None:
    for again in problems():
        before = PROBLEMS[again.name]
        assert torch.equal(again.y0, before.y0)
        assert torch.equal(again.f(again.y0), before.f(before.y0)), again.name


@EACH
def test_treats_rows_apart(name: str) -> None:
    f, start = PROBLEMS[name].f, PROBLEMS[name].y0
    rows = torch.cat([start, answer(name), 0.9 * start + 0.1 * answer(name)])
    alone = torch.cat([f(row[None]) for row in rows])
    torch.testing.assert_close(f(rows), alone, rtol=1e-9, atol=1e-12)


@EACH
def test_has_a_fixed_point(name: str) -> None:
    y = answer(name)
    assert (PROBLEMS[name].f(y) - y).norm() <= 1e-10


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        problem("nonsense")


# -- what the fixed point must be ----------------------------------------------------------------


def close(name: str, expected: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(answer(name).squeeze(0), expected, rtol=0, atol=atol)


def test_componentwise_answers() -> None:
    close("cosine", torch.tensor([0.7390851332151606], dtype=torch.float64))
    close("golden-ratio", torch.full((8,), (1 + math.sqrt(5)) / 2, dtype=torch.float64))
    close("heron", torch.tensor([2.0, 3, 5, 7], dtype=torch.float64).sqrt())
    close("reflection", torch.ones(3, dtype=torch.float64))
    close("decay", torch.full((10,), scipy.special.lambertw(1).real, dtype=torch.float64))
    x = torch.linspace(0.5, 10, 12).double()
    close("lambert", torch.from_numpy(scipy.special.lambertw(x.numpy()).real))
    sine, arctangent, logarithm, cubic = (
        answer(name).squeeze(0) for name in ("sine", "arctangent", "logarithm", "cubic")
    )
    torch.testing.assert_close(sine.sin(), sine - 0.5)
    torch.testing.assert_close(torch.tan(arctangent / 2 - 0.05), arctangent)
    torch.testing.assert_close(logarithm.exp(), 3 + logarithm)
    torch.testing.assert_close(cubic**3, 1 - cubic)


def test_magnet_solved_for_the_field() -> None:
    m = answer("magnet").squeeze(0)
    torch.testing.assert_close(m.atanh() - linspace(0.5, 1.5, 11) * m, torch.full_like(m, 0.01))


@pytest.mark.parametrize("e", [0.5, 0.9, 0.99])
def test_kepler(e: float) -> None:
    eccentric = answer(f"kepler-{e}").squeeze(0)
    torch.testing.assert_close(eccentric - e * eccentric.sin(), linspace(0.05, 3.1, 16))


@pytest.mark.parametrize(
    ("name", "low", "high"), [("logistic-stable", 1.5, 2.95), ("logistic-cycle", 3.1, 3.5)]
)
def test_logistic_equilibrium(name: str, low: float, high: float) -> None:
    close(name, 1 - 1 / linspace(low, high, 8))


def test_epidemic_solved_by_lambert() -> None:
    r0 = linspace(1.1, 4, 12)
    w = scipy.special.lambertw((-r0 * torch.exp(-r0)).numpy()).real
    close("epidemic", 1 + torch.from_numpy(w) / r0)


def test_colebrook() -> None:
    reynolds = 10 ** linspace(4, 8, 9)
    friction = answer("colebrook").squeeze(0) ** -2
    inner = 1e-4 / 3.7 + 2.51 / (reynolds * friction.sqrt())
    torch.testing.assert_close(1 / friction.sqrt(), -2 * torch.log10(inner))


@pytest.mark.parametrize("kind", ["symmetric", "general"])
@pytest.mark.parametrize("size", ["20-0.5", "20-0.9", "50-0.999", "200-0.99"])
def test_affine_maps_have_the_radius_of_their_name(kind: str, size: str) -> None:
    assert radius(f"{kind}-{size}") == pytest.approx(float(size.split("-")[1]), rel=1e-9)


def test_other_affine_answers() -> None:
    close("jordan", 2.0 ** torch.arange(2, 12).double() - 2)
    close("alternating-projections", normal(40, seed=6))
    assert radius("expanding") == pytest.approx(5)
    assert radius("rotations-ten") == pytest.approx(0.99, rel=1e-6)


@pytest.mark.parametrize("degrees", [60, 90, 170])
def test_rotations_turn_by_their_angle(degrees: int) -> None:
    f, centre = PROBLEMS[f"rotation-{degrees}"].f, answer(f"rotation-{degrees}")
    offset = torch.tensor([[0.3, -2.0]], dtype=torch.float64)
    turned = f(centre + offset) - centre
    cosine = torch.cosine_similarity(turned, offset).item()
    assert math.degrees(math.acos(cosine)) == pytest.approx(degrees)
    torch.testing.assert_close(turned.norm(), offset.norm())


@pytest.mark.parametrize(("name", "radius"), [("50-0.8", 0.8), ("100-3.0", 3.0)])
def test_tanh_weights_have_the_radius_of_their_name(name: str, radius: float) -> None:
    f, size = PROBLEMS[f"tanh-{name}"].f, int(name.split("-")[0])
    zero = torch.zeros(1, size, dtype=torch.float64)
    weights = jacobian(f, zero) / (1 - f(zero) ** 2).mT
    assert torch.linalg.eigvals(weights).abs().max().item() == pytest.approx(radius, rel=0.2)


def test_hopfield_retrieval_is_stationary_for_its_energy() -> None:
    patterns, y = normal(10, 30, seed=1), answer("hopfield").squeeze(0).clone().requires_grad_()
    energy = 0.5 * y.square().sum() - torch.logsumexp(0.1 * patterns @ y, dim=0) / 0.1
    (slope,) = torch.autograd.grad(energy, y)
    assert slope.norm() < 1e-9


@pytest.mark.parametrize("beta", [1, 4])
def test_quantal_responses_are_best_against_entropy(beta: int) -> None:
    # The equilibrium is the saddle point of pᵀAq + (H(p) − H(q)) / β.
    p, q = answer(f"quantal-response-{beta}").squeeze(0).chunk(2)
    payoff = normal(8, 8, seed=3)
    ascent = payoff @ q - torch.log(p) / beta
    descent = p @ payoff + torch.log(q) / beta
    torch.testing.assert_close(p.sum() + q.sum(), torch.tensor(2.0, dtype=torch.float64))
    assert ascent.std() < 1e-9 and descent.std() < 1e-9


@pytest.mark.parametrize("c", [0.5, 0.9, 0.99])
def test_integral_of_chandrasekhars_function(c: float) -> None:
    # Summed against H, the discrete equation is a quadratic in the mean of H.
    expected = 2 / c * (1 - math.sqrt(1 - c))
    assert answer(f"chandrasekhar-{c}").mean().item() == pytest.approx(expected, rel=1e-10)


def test_conservative_chandrasekhar_is_singular() -> None:
    assert radius("chandrasekhar-1.0") == pytest.approx(1, abs=1e-4)
    assert answer("chandrasekhar-1.0").mean().item() == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "sign", "d"), [("plus-1", 1, 1.0), ("minus-0.1", -1, 0.1), ("plus-0.1", 1, 0.1)]
)
def test_loves_equation_by_another_rule(name: str, sign: int, d: float) -> None:
    t = linspace(-1, 1, 2001)  # trapezoidal rule
    weights = torch.full_like(t, 1e-3)
    weights[[0, -1]] /= 2
    kernel = sign / math.pi * d / (d**2 + (t[:, None] - t) ** 2) * weights
    y = torch.linalg.solve(torch.eye(2001, dtype=torch.float64) - kernel, torch.ones_like(t))
    # The middle pair of Gauss's 60 nodes lies about the centre, where y is flat.
    found = answer(f"love-{name}").squeeze(0)[29:31].mean()
    assert found.item() == pytest.approx(y[1000].item(), rel=2e-3)


def test_discrete_integral_as_its_source_prints_it() -> None:
    # Moré, Garbow and Hillstrom, 29
    n, y = 40, normal(1, 40, seed=0)
    t = [j / (n + 1) for j in range(1, n + 1)]
    cubes = [(x + s + 1) ** 3 for x, s in zip(y.squeeze(0).tolist(), t, strict=True)]
    system = [
        y[0, i].item()
        + (1 - t[i]) / (2 * (n + 1)) * sum(t[j] * cubes[j] for j in range(i + 1))
        + t[i] / (2 * (n + 1)) * sum((1 - t[j]) * cubes[j] for j in range(i + 1, n))
        for i in range(n)
    ]
    expected = torch.tensor([system], dtype=torch.float64)
    torch.testing.assert_close(y - PROBLEMS["discrete-integral"].f(y), expected)


def test_picard_follows_the_logistic_curve() -> None:
    t = torch.linspace(0, 2, 81).double()
    close("picard", 1 / (1 + 9 * torch.exp(-4 * t)), atol=1e-3)


@pytest.mark.parametrize(("size", "lam", "atol"), [(50, 1.0, 1e-4), (100, 3.0, 1e-3)])
def test_bratu(size: int, lam: float, atol: float) -> None:
    # u = −2 log(cosh(θ(x − ½)/2) / cosh(θ/4)) with θ = √(2λ) cosh(θ/4)
    theta = 1.0
    for _ in range(200):
        theta = math.sqrt(2 * lam) * math.cosh(theta / 4)
    x = torch.arange(1, size + 1).double() / (size + 1)
    exact = -2 * torch.log(torch.cosh(theta * (x - 0.5) / 2) / math.cosh(theta / 4))
    close(f"bratu-green-{size}", exact, atol=atol)
    close(f"bratu-jacobi-{size}", answer(f"bratu-green-{size}").squeeze(0), atol=1e-7)


def test_poisson_boltzmann_satisfies_its_differences() -> None:
    u = torch.nn.functional.pad(answer("poisson-boltzmann").squeeze(0), (1, 1))
    u[0] = 2
    second = (u[2:] - 2 * u[1:-1] + u[:-2]) * 31**2
    torch.testing.assert_close(second, 25 * torch.sinh(u[1:-1]), rtol=1e-7, atol=1e-7)


def test_bratu_on_the_square_satisfies_its_differences() -> None:
    u = torch.nn.functional.pad(answer("bratu-square").view(12, 12), (1, 1, 1, 1))
    inner, h = slice(1, -1), 1 / 13
    across = u[inner, 2:] - 2 * u[inner, inner] + u[inner, :-2]
    down = u[2:, inner] - 2 * u[inner, inner] + u[:-2, inner]
    expected = -6 * u[inner, inner].exp()
    torch.testing.assert_close((across + down) / h**2, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("name", "ratio", "force"),
    [("heat-0.2", 0.2, 0.0), ("heat-5", 5.0, 0.0), ("allen-cahn", 4.805, 0.5)],
)
def test_implicit_steps_of_diffusion(name: str, ratio: float, force: float) -> None:
    before = PROBLEMS[name].y0.squeeze(0)
    u = torch.nn.functional.pad(answer(name).squeeze(0), (1, 1))
    second, u = u[2:] - 2 * u[1:-1] + u[:-2], u[1:-1]
    torch.testing.assert_close(u - before, ratio * second + force * (u - u**3))


def test_systems_as_their_source_prints_them() -> None:
    # Moré, Garbow and Hillstrom, 30, 31 and 27; indices from 1, terms out of range are zero.
    y = normal(1, 9, seed=0)
    x = dict(enumerate(y.squeeze(0).tolist(), start=1))
    tridiagonal = [
        (3 - 2 * x[i]) * x[i] - x.get(i - 1, 0) - 2 * x.get(i + 1, 0) + 1 for i in range(1, 10)
    ]
    near = {i: [j for j in range(max(1, i - 5), min(9, i + 1) + 1) if j != i] for i in x}
    banded = [x[i] * (2 + 5 * x[i] ** 2) + 1 - sum(x[j] * (1 + x[j]) for j in near[i]) for i in x]
    brown = [x[i] + sum(x.values()) - 10 for i in range(1, 9)] + [math.prod(x.values()) - 1]
    for name, omega, system in (
        ("tridiagonal", 1, tridiagonal),
        ("banded-fifth", 0.2, banded),
        ("brown", 1, brown),
    ):
        expected = torch.tensor([system], dtype=torch.float64)
        torch.testing.assert_close((y - PROBLEMS[name].f(y)) / omega, expected)


def test_powell_vanishes_at_zero_with_half_the_rank() -> None:
    f, zero = PROBLEMS["powell"].f, torch.zeros(1, 4, dtype=torch.float64)
    assert torch.equal(f(zero), zero)
    system = torch.eye(4, dtype=torch.float64) - jacobian(f, zero)
    assert torch.linalg.matrix_rank(system) == 2


@pytest.mark.parametrize("name", ["robertson-0.001", "robertson-0.1", "robertson-later"])
def test_robertson_keeps_the_mass(name: str) -> None:
    y = answer(name)
    assert y.sum().item() == pytest.approx(1, abs=1e-10)
    assert (y >= 0).all()


def test_rates_of_the_stiff_systems() -> None:
    x, v = 0.7, -1.3
    y = torch.tensor([[x, v]], dtype=torch.float64)
    moved = (PROBLEMS["van-der-pol"].f(y) - PROBLEMS["van-der-pol"].y0) / 0.01
    torch.testing.assert_close(moved, y.new_tensor([[v, 100 * (1 - x**2) * v - x]]))

    a, b, c = 0.9, 2e-5, 0.1
    y = torch.tensor([[a, b, c]], dtype=torch.float64)
    moved = (PROBLEMS["robertson-0.1"].f(y) - PROBLEMS["robertson-0.1"].y0) / 0.1
    first, last = -0.04 * a + 1e4 * b * c, 3e7 * b**2
    torch.testing.assert_close(moved, y.new_tensor([[first, -first - last, last]]))

    # With A = 1 and B = 3 at the walls and within, (u, v) = (A, B/A) is at rest.
    rest = torch.tensor([1.0, 3.0], dtype=torch.float64).repeat_interleave(20)[None]
    brusselator = PROBLEMS["brusselator"]
    torch.testing.assert_close(brusselator.f(rest), brusselator.y0)
    # Away from the walls, nothing diffuses out of (2, 2) everywhere: 1 + 8 − 8 and 6 − 8.
    moved = (brusselator.f(torch.full_like(rest, 2.0)) - brusselator.y0) / 0.1
    inner = moved.view(2, 20)[:, 1:-1]
    torch.testing.assert_close(inner, inner.new_tensor([[1.0], [-2.0]]).expand(2, 18))


@pytest.mark.parametrize("lam", [1.0, 0.1])
def test_lasso_is_optimal(lam: float) -> None:
    a, y = normal(40, 100, seed=9), answer(f"lasso-{lam:g}").squeeze(0)
    b = a[:, :5] @ normal(5, seed=10)
    slope = a.T @ (b - a @ y) / lam
    assert (slope.abs() <= 1 + 1e-6).all()
    support = y.abs() > 1e-9
    assert 5 <= support.sum() < 40
    torch.testing.assert_close(slope[support], y.sign()[support], rtol=0, atol=1e-6)


def test_douglas_rachford_solves_the_same_lasso() -> None:
    y = shrink(answer("douglas-rachford"), 0.02)
    torch.testing.assert_close(y, answer("lasso-1"), rtol=0, atol=1e-7)


def test_nonnegative_least_squares_is_optimal() -> None:
    a, b = normal(60, 30, seed=11), normal(60, seed=12)
    y = answer("nonnegative-least-squares").squeeze(0)
    slope = a.T @ (a @ y - b)
    assert (y >= -1e-12).all() and (slope >= -1e-7).all()
    assert (y > 1e-6).any() and (slope > 1e-6).any()
    assert (y * slope).abs().max() < 1e-7


def test_logistic_regression_is_stationary() -> None:
    a, label = normal(60, 30, seed=11), (normal(60, seed=12) > 0).double()
    y = answer("logistic-regression").squeeze(0).requires_grad_()
    logits = a @ y
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, label, reduction="sum")
    (slope,) = torch.autograd.grad(loss + 0.25 * y.square().sum(), y)
    assert slope.norm() < 1e-7


@pytest.mark.parametrize("epsilon", [0.1, 0.02])
def test_sinkhorns_plan_has_its_marginals(epsilon: float) -> None:
    place, other = torch.rand(2, 20, 2, generator=torch.Generator().manual_seed(13)).double()
    cost = (place[:, None] - other).square().sum(dim=2)
    first = answer(f"sinkhorn-{epsilon}").mT
    second = -epsilon * torch.logsumexp((first - cost) / epsilon - math.log(20), dim=0)
    plan = torch.exp((first + second - cost) / epsilon) / 400
    uniform = torch.full((20,), 0.05, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(dim=0), uniform)
    torch.testing.assert_close(plan.sum(dim=1), uniform)


def test_mixture_is_stationary_for_the_likelihood() -> None:
    half = normal(100, seed=14)
    data = torch.cat([half[:50] - 1, half[50:] + 1])
    means = answer("mixture").mT.clone().requires_grad_()
    likelihood = torch.logsumexp(-0.5 * (data - means) ** 2, dim=0).sum()
    (slope,) = torch.autograd.grad(likelihood, means)
    assert slope.norm() < 1e-7
    assert means[1] - means[0] > 1


@pytest.mark.parametrize("alpha", [0.85, 0.99])
def test_pagerank_is_a_distribution_of_that_contraction(alpha: float) -> None:
    ranks = answer(f"pagerank-{alpha}")
    assert ranks.sum().item() == pytest.approx(1) and (ranks > 0).all()
    assert radius(f"pagerank-{alpha}") == pytest.approx(alpha)


def test_ring_walk_stays_in_proportion_to_the_weights() -> None:
    weight = 0.5 + torch.rand(24, generator=torch.Generator().manual_seed(21)).double()
    degree = weight + weight.roll(1)  # of a node, the edges to both of its neighbours
    solved = implicit.fixed_point(
        PROBLEMS["ring-walk"].f,
        PROBLEMS["ring-walk"].y0,
        stop=implicit.Tolerance(rtol=1e-12, atol=0.0),
    )
    torch.testing.assert_close(solved.value.squeeze(0), degree / degree.sum(), rtol=1e-6, atol=0)


def test_values_are_those_of_the_best_policy() -> None:
    reward = torch.rand(3, 40, generator=torch.Generator().manual_seed(22)).double()
    move = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(23)).double() ** 12
    move = move / move.sum(dim=2, keepdim=True)
    policy = torch.zeros(40, dtype=torch.int64)
    state = torch.arange(40)
    for _ in range(20):  # Howard's policy iteration
        system = torch.eye(40, dtype=torch.float64) - 0.95 * move[policy, state]
        value = torch.linalg.solve(system, reward[policy, state])
        policy = (reward + 0.95 * move @ value).argmax(dim=0)
    close("value-iteration", value)


@pytest.mark.parametrize(("name", "load"), [("light", 0.08 + 0.04j), ("heavy", 0.23 + 0.115j)])
def test_power_flow_balances_at_every_bus(name: str, load: complex) -> None:
    real, imaginary = answer(f"power-flow-{name}").squeeze(0).chunk(2)
    v = torch.complex(real, imaginary)
    drops = torch.cat([torch.ones(1, dtype=v.dtype), v[:-1]]) - v
    line = drops / (0.01 + 0.02j)  # the current from the bus before
    drawn = line - torch.cat([line[1:], torch.zeros(1, dtype=v.dtype)])
    torch.testing.assert_close(v * drawn.conj(), torch.full_like(v, load))


# -- solvers crossed with problems ---------------------------------------------------------------

SOLVERS: dict[str, implicit.Solver] = {
    "Naive": implicit.Naive(),
    "Anderson": implicit.Anderson(),
    "Broyden": implicit.Broyden(),
}

EXPANDS = {
    *("reflection", "lambert", "logistic-cycle", "expanding"),
    *("rotation-60", "rotation-90", "rotation-170", "tanh-100-3.0", "quantal-response-4"),
    *("chandrasekhar-1.0", "poisson-boltzmann", "heat-5", "allen-cahn"),
    *("tridiagonal", "tridiagonal-third", "banded", "brown", "powell"),
    *("robertson-0.001", "robertson-0.1", "robertson-later", "van-der-pol", "brusselator"),
}
"""Plain iteration cannot settle: the Jacobian at the solution has radius 1 or more."""

SLOW = {
    *("kepler-0.99", "symmetric-50-0.99", "general-50-0.99", "symmetric-200-0.99"),
    *("symmetric-50-0.999", "general-50-0.999", "symmetric-100-0.999", "general-100-0.999"),
    *("general-200-0.99", "rotations-ten", "bratu-jacobi-50", "bratu-jacobi-100"),
    "policy-evaluation",
}
"""Plain iteration would settle, after more than the budget."""

FAILURES: dict[str, dict[str, str]] = {
    "Naive": {
        **dict.fromkeys(EXPANDS, "the map expands at its fixed point"),
        **dict.fromkeys(SLOW, "the contraction is too weak for 1000 evaluations"),
        "lasso-0.1": "the support of the answer is found only after 1000 evaluations",
    },
    "Anderson": {},
    "Broyden": dict.fromkeys(
        ("lasso-1", "douglas-rachford"),
        "runs off; a restart stays at the far point and takes its residual for the best",
    ),
}
"""What each solver is known to fail, and why."""

UNSETTLED = {
    ("Anderson", "lasso-0.1"),
    ("Broyden", "bratu-jacobi-100"),
    ("Broyden", "banded-fifth"),
    ("Broyden", "lasso-0.1"),
    ("Broyden", "general-200-0.99"),
}
"""Here rounding decides: a multiple of the same problem is solved or not."""


@pytest.mark.parametrize("solver", SOLVERS)
@EACH
def test_solvers_solve_all_but_what_is_listed(solver: str, name: str) -> None:
    f = Counted(PROBLEMS[name].f)
    stop = implicit.Tolerance(atol=TOLERANCE, rtol=0.0, max_steps=BUDGET)
    with torch.no_grad():
        solution = implicit.fixed_point(f, PROBLEMS[name].y0, solver=SOLVERS[solver], stop=stop)
    z = solution.value
    within = (PROBLEMS[name].f(z) - z).norm().item() <= TOLERANCE
    assert within == bool(solution.converged), "the status does not tell the truth"
    assert int(solution.evaluations) == f.calls
    if (solver, name) not in UNSETTLED:
        solved = within and f.calls <= BUDGET
        assert solved == (name not in FAILURES[solver]), FAILURES[solver].get(name, "not listed")


def test_lists_name_problems_that_exist() -> None:
    assert set(FAILURES) == set(SOLVERS)
    assert all(set(listed) <= set(PROBLEMS) for listed in FAILURES.values())
    assert all(solver in SOLVERS and name in PROBLEMS for solver, name in UNSETTLED)


@pytest.mark.parametrize("name", sorted(EXPANDS))
def test_plain_iteration_cannot_settle(name: str) -> None:
    assert radius(name) > 1 - 1e-4


@pytest.mark.parametrize("name", sorted(SLOW))
def test_plain_iteration_is_slow(name: str) -> None:
    assert 0.985 < radius(name) < 1
