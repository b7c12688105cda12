"""Classical fixed-point problems, each a map ``f`` and its usual start, in float64.

What the robustness benchmark counts on and the tests solve.  A problem treats the rows of a batch
apart; its start is one row, ``(1, D)``.  Whatever is random comes from a seeded generator, so a
problem is the same on every machine up to rounding.  Each family names its equations and sources.

MGH: J. Moré, B. Garbow, K. Hillstrom, *Testing unconstrained optimization software*, ACM TOMS
7(1), 1981, whose systems ``F(y) = 0`` are iterated as ``y ← y − ωF(y)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Find ``y = f(y)`` from ``y0``.

    Attributes:
        name: what tables and tests call it; unique.
        f: the map ``(B, D) -> (B, D)``, row by row.
        y0: ``(1, D)`` float64, the usual start.
        family: the kind of problem, which is the name of the function that builds it.

    Example:
        >>> cosine = problem("cosine")
        >>> cosine.family, cosine.f(cosine.y0).shape
        ('componentwise', torch.Size([1, 1]))
    """

    name: str
    f: Map
    y0: Tensor
    family: str


def problems() -> tuple[Problem, ...]:
    """Every problem, by family.

    Example:
        >>> len(problems()) == len({p.name for p in problems()})
        True
    """
    return tuple(
        Problem(name, f, y0.reshape(1, -1), family.__name__)
        for family in FAMILIES
        for name, f, y0 in family()
    )


def problem(name: str) -> Problem:
    """The problem of that name; `KeyError` if there is none."""
    return {p.name: p for p in problems()}[name]


Named = Iterator[tuple[str, Map, Tensor]]


def componentwise() -> Named:
    """Scalar equations, many at a time.

    ``cos y``; ``e^−y``; ``√(1 + y)``, whose solution is the golden ratio; Heron's
    ``½(y + a/y)`` for ``√a``; ``½ + sin y``; ``2 arctan y + 0.1``; ``log(3 + |y|)``; a relaxed
    cubic; ``3 − 2y``, which expands; and ``x e^−y``, solved by Lambert's W.
    """
    a = tensor(2.0, 3.0, 5.0, 7.0)
    x = torch.linspace(0.5, 10, 12).double()
    yield "cosine", torch.cos, ones(1)
    yield "cosine-20", torch.cos, linspace(0, 2, 20)
    yield "decay", lambda y: torch.exp(-y), zeros(10)
    yield "golden-ratio", lambda y: torch.sqrt(1 + y), zeros(8)
    yield "heron", lambda y: 0.5 * (y + a / y), ones(4)
    yield "sine", lambda y: 0.5 + torch.sin(y), zeros(5)
    yield "arctangent", lambda y: 2 * torch.atan(y) + 0.1, 0.5 * ones(5)
    yield "logarithm", lambda y: torch.log(3 + y.abs()), zeros(6)
    yield "cubic", lambda y: y - 0.5 * (y**3 + y - 1), zeros(5)
    yield "reflection", lambda y: 3 - 2 * y, 5 * ones(3)
    yield "lambert", lambda y: x * torch.exp(-y), zeros(12)


def science() -> Named:
    """Scalar equations of the sciences, over a range of their parameter.

    Kepler's equation ``E = M + e sin E``; the equilibrium of the logistic map ``r y (1 − y)``,
    stable up to ``r = 3`` and then amid a cycle (R. May, Nature 261, 1976); the final size of an
    epidemic ``y = 1 − exp(−R₀ y)`` (Kermack and McKendrick, Proc. R. Soc. A 115, 1927); the
    magnetisation ``m = tanh(βm + h)`` of Curie and Weiss about its critical ``β = 1``; Colebrook's
    friction of a rough pipe, ``x = −2 log₁₀(ε/3.7 + 2.51 x/Re)`` with ``λ = x⁻²`` (J. Inst. Civil
    Engineers 11, 1939).
    """
    mean_anomaly = linspace(0.05, 3.1, 16)
    reproduction, coupling = linspace(1.1, 4, 12), linspace(0.5, 1.5, 11)

    def kepler(y: Tensor, e: float) -> Tensor:
        return mean_anomaly + e * torch.sin(y)

    def logistic(y: Tensor, growth: Tensor) -> Tensor:
        return growth * y * (1 - y)

    for e in (0.5, 0.9, 0.99):
        yield f"kepler-{e}", partial(kepler, e=e), mean_anomaly
    yield "logistic-stable", partial(logistic, growth=linspace(1.5, 2.95, 8)), 0.5 * ones(8)
    yield "logistic-cycle", partial(logistic, growth=linspace(3.1, 3.5, 8)), 0.5 * ones(8)
    yield "epidemic", lambda y: 1 - torch.exp(-reproduction * y), ones(12)
    yield "magnet", lambda y: torch.tanh(coupling * y + 0.01), ones(11)
    reynolds = 10 ** linspace(4, 8, 9)
    yield "colebrook", lambda y: -2 * torch.log10(1e-4 / 3.7 + 2.51 * y / reynolds), 5 * ones(9)


def affine() -> Named:
    """``y ↦ yA + b``.

    Symmetric with eigenvalues evenly in ``[−ρ, ρ]``; general, of Gaussian entries scaled to
    spectral radius ρ; a chain of Jordan's kind, whose powers grow by far before they shrink; a
    spectrum in ``[−5, 0.9]``, on which plain iteration expands; and alternating projections on
    two subspaces (von Neumann, 1933), which contract by the squared cosine of their angle.
    """
    for size, rho in ((20, 0.5), (20, 0.9), (50, 0.99), (50, 0.999), (100, 0.999), (200, 0.99)):
        b = normal(size, seed=size)
        q, _ = torch.linalg.qr(normal(size, size, seed=size + 1))
        symmetric = q * linspace(-rho, rho, size) @ q.T
        general = normal(size, size, seed=size + 2)
        general = general * (rho / torch.linalg.eigvals(general).abs().max())
        yield f"symmetric-{size}-{rho}", linear(symmetric, b), zeros(size)
        yield f"general-{size}-{rho}", linear(general, b), zeros(size)
    yield "jordan", lambda y: 0.5 * y + pad(y, (1, 0))[:, :-1] + 1, zeros(10)
    q, _ = torch.linalg.qr(normal(20, 20, seed=3))
    yield "expanding", linear(q * linspace(-5, 0.9, 20) @ q.T, ones(20)), zeros(20)
    first, second = (torch.linalg.qr(normal(40, 12, seed=s))[0] for s in (4, 5))
    both, common = second @ second.T @ first @ first.T, normal(40, seed=6)
    yield "alternating-projections", linear(both, common - common @ both), zeros(40)


def rotations() -> Named:
    """Turns of the plane about a point, of radius 1 and never contracting; ten of radius 0.99."""
    for degrees in (60, 90, 170):
        turn = rotation(math.radians(degrees))
        yield f"rotation-{degrees}", linear(turn, tensor(1.0, 2.0)), zeros(2)
    ten = torch.block_diag(*(rotation(angle) for angle in torch.linspace(0.3, 3, 10).tolist()))
    yield "rotations-ten", linear(0.99 * ten, ones(20)), zeros(20)


def networks() -> Named:
    """Equilibria of networks.

    ``tanh(yW + u)`` with Gaussian ``W`` of spectral radius about ``s`` (chaotic above 1:
    Sompolinsky, Crisanti, Sommers, PRL 61, 1988); retrieval ``softmax(βyXᵀ)X`` in a modern
    Hopfield network (Ramsauer et al., ICLR 2021); the quantal-response equilibrium of a zero-sum
    game, ``p = softmax(βAq)``, ``q = softmax(−βAᵀp)`` (McKelvey and Palfrey, 1995).
    """

    def perceptron(y: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(y @ w + u)

    for size, scale in ((50, 0.8), (200, 0.95), (100, 1.5), (100, 3.0)):
        w, u = normal(size, size, seed=size) * scale / math.sqrt(size), normal(size, seed=size + 1)
        yield f"tanh-{size}-{scale}", partial(perceptron, w=w, u=u), zeros(size)
    patterns = normal(10, 30, seed=1)
    noisy = patterns[0] + 0.5 * normal(30, seed=2)
    yield "hopfield", lambda y: torch.softmax(0.1 * y @ patterns.T, dim=1) @ patterns, noisy
    payoff = normal(8, 8, seed=3)

    def respond(y: Tensor, beta: float) -> Tensor:
        p, q = y.chunk(2, dim=1)
        mine, theirs = torch.softmax(beta * q @ payoff.T, 1), torch.softmax(-beta * p @ payoff, 1)
        return torch.cat([mine, theirs], dim=1)

    for beta in (1.0, 4.0):
        yield f"quantal-response-{beta:g}", partial(respond, beta=beta), ones(16) / 8


def integral_equations() -> Named:
    """Discretised integral equations.

    Chandrasekhar's ``H(μ) = 1 / (1 − (c/2) ∫₀¹ μ H(ν) / (μ + ν) dν)`` by the midpoint rule at 100
    nodes (Kelley, *Iterative Methods for Linear and Nonlinear Equations*, SIAM 1995, §5.6), whose
    Jacobian has the eigenvalue 1 at ``c = 1``; Love's ``y(s) = 1 ± (1/π) ∫₋₁¹ d y(t) / (d² +
    (s − t)²) dt`` for a condenser of distance ``d`` (Q. J. Mech. Appl. Math. 2, 1949) by Gauss's
    rule; Picard's iteration ``y(t) = 0.1 + ∫₀ᵗ 4y(1 − y) ds`` by the trapezoidal rule; and MGH 29.
    """
    mu = (torch.arange(100).double() + 0.5) / 100
    kernel = mu[:, None] / (mu[:, None] + mu) / 200

    def chandrasekhar(y: Tensor, c: float) -> Tensor:
        return 1 / (1 - c * y @ kernel.T)

    for c in (0.5, 0.9, 0.99, 1.0):
        yield f"chandrasekhar-{c}", partial(chandrasekhar, c=c), ones(100)

    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(60))
    for name, sign, d in (("plus-1", 1, 1.0), ("minus-0.1", -1, 0.1), ("plus-0.1", 1, 0.1)):
        poisson = sign / math.pi * d / (d**2 + (nodes[:, None] - nodes) ** 2) * weights
        yield f"love-{name}", linear(poisson.T, ones(60)), ones(60)

    def picard(y: Tensor) -> Tensor:
        slope = 4 * y * (1 - y)
        return 0.1 + pad(torch.cumsum((slope[:, 1:] + slope[:, :-1]) / 2, dim=1), (1, 0)) * 2 / 80

    yield "picard", picard, 0.1 * ones(81)

    t = torch.arange(1, 41).double() / 41
    green = torch.minimum(t[:, None], t) * (1 - torch.maximum(t[:, None], t)) / (2 * 41)
    yield "discrete-integral", lambda y: -((y + t + 1) ** 3) @ green, t * (t - 1)


def boundary_values() -> Named:
    """Differential equations on a grid, zero at the boundary.

    Bratu's ``u'' + λeᵘ = 0`` (solvable up to ``λ = 3.5138``; on the square to ``6.81``), by the
    iteration of Jacobi and by Green's function; a potential with ``u'' = κ² sinh u``, ``u(0) = 2``
    (Poisson–Boltzmann) by Jacobi; an implicit Euler step of the heat equation, ``y = u + rΔy``,
    a contraction only for ``r < 1/4``, and of Allen and Cahn's ``u̇ = ε²u'' + u − u³``.
    """

    def jacobi(y: Tensor, force: float) -> Tensor:
        return (neighbours(y) + force * torch.exp(y)) / 2

    def by_green(y: Tensor, green: Tensor) -> Tensor:
        return torch.exp(y) @ green

    for size, lam in ((50, 1.0), (100, 3.0)):
        force, identity = lam / (size + 1) ** 2, torch.eye(size).double()
        green = force * torch.linalg.inv(2 * identity - neighbours(identity))
        yield f"bratu-jacobi-{size}", partial(jacobi, force=force), zeros(size)
        yield f"bratu-green-{size}", partial(by_green, green=green), zeros(size)

    def square(y: Tensor) -> Tensor:
        grid = pad(y.view(-1, 12, 12), (1, 1, 1, 1))
        around = grid[:, :-2, 1:-1] + grid[:, 2:, 1:-1] + grid[:, 1:-1, :-2] + grid[:, 1:-1, 2:]
        return (around.flatten(1) + 6 / 13**2 * torch.exp(y)) / 4

    yield "bratu-square", square, zeros(144)

    left = pad(2 * ones(1), (0, 29))
    yield (
        "poisson-boltzmann",
        lambda y: (neighbours(y) + left - (5 / 31) ** 2 * torch.sinh(y)) / 2,
        zeros(30),
    )

    x = torch.arange(1, 31).double() / 31
    before = torch.sin(math.pi * x) + 0.3 * normal(30, seed=1)
    laplacian = neighbours(torch.eye(30).double()) - 2 * torch.eye(30).double()
    yield "heat-0.2", linear(0.2 * laplacian, before), before
    yield "heat-5", linear(5 * laplacian, before), before
    yield (
        "allen-cahn",
        lambda y: before + 0.5 * (0.01 * 31**2 * y @ laplacian + y - y**3),
        before,
    )


def systems() -> Named:
    """Systems of MGH: Broyden tridiagonal (30), banded (31), Brown almost-linear (27).

    And Powell's singular function (13), whose Jacobian has rank 2 of 4 at the solution.
    """

    def tridiagonal(y: Tensor) -> Tensor:
        padded = pad(y, (1, 1))
        return (3 - 2 * y) * y - padded[:, :-2] - 2 * padded[:, 2:] + 1

    def banded(y: Tensor) -> Tensor:
        s = pad(y * (1 + y), (5, 1))
        size = y.shape[1]
        others = sum(s[:, k : k + size] for k in (0, 1, 2, 3, 4, 6))
        return y * (2 + 5 * y * y) + 1 - others

    def brown(y: Tensor) -> Tensor:
        total = y + y.sum(dim=1, keepdim=True) - (y.shape[1] + 1)
        return torch.cat([total[:, :-1], y.prod(dim=1, keepdim=True) - 1], dim=1)

    def powell(y: Tensor) -> Tensor:
        a, b, c, d = y.unbind(dim=1)
        parts = (a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2)
        return torch.stack(parts, dim=1)

    def relaxed(y: Tensor, system: Map, omega: float) -> Tensor:
        return y - omega * system(y)

    for name, system, omega, y0 in (
        ("tridiagonal", tridiagonal, 1.0, -ones(50)),
        ("tridiagonal-third", tridiagonal, 1 / 3, -ones(50)),
        ("banded", banded, 1.0, -ones(50)),
        ("banded-fifth", banded, 0.2, -ones(50)),
        ("brown", brown, 1.0, 0.5 * ones(8)),
        ("powell", powell, 0.1, tensor(3.0, -1.0, 0.0, 1.0)),
    ):
        yield name, partial(relaxed, system=system, omega=omega), y0


def stiff_steps() -> Named:
    """One implicit Euler step ``y = u + h g(y)`` of a stiff system, from ``u``.

    Robertson's reaction (*The solution of a set of reaction rate equations*, 1966) from its start
    and amid its course; van der Pol's oscillator with ``μ = 100``; the Brusselator with diffusion
    on 20 cells (Prigogine and Lefever, J. Chem. Phys. 48, 1968).
    """

    def robertson(y: Tensor) -> Tensor:
        a, b, c = y.unbind(dim=1)
        slow, middle, fast = 0.04 * a, 1e4 * b * c, 3e7 * b * b
        return torch.stack([middle - slow, slow - middle - fast, fast], dim=1)

    def van_der_pol(y: Tensor) -> Tensor:
        x, v = y.unbind(dim=1)
        return torch.stack([v, 100 * (1 - x * x) * v - x], dim=1)

    def brusselator(y: Tensor) -> Tensor:
        u, v = y.chunk(2, dim=1)
        wall_u, wall_v = pad(ones(1), (0, 19)), pad(3 * ones(1), (0, 19))
        wall_u, wall_v = wall_u + wall_u.flip(0), wall_v + wall_v.flip(0)
        diffuse = 0.02 * 21**2
        du = 1 + u * u * v - 4 * u + diffuse * (neighbours(u) + wall_u - 2 * u)
        dv = 3 * u - u * u * v + diffuse * (neighbours(v) + wall_v - 2 * v)
        return torch.cat([du, dv], dim=1)

    def euler(y: Tensor, u: Tensor, h: float, rate: Map) -> Tensor:
        return u + h * rate(y)

    start = tensor(1.0, 0.0, 0.0)
    later = tensor(0.9, 2.2e-5, 0.1 - 2.2e-5)
    cells = torch.arange(1, 21).double() / 21
    waves = torch.cat([1 + torch.sin(2 * math.pi * cells), 3 * ones(20)])
    for name, h, rate, u in (
        ("robertson-0.001", 1e-3, robertson, start),
        ("robertson-0.1", 0.1, robertson, start),
        ("robertson-later", 0.01, robertson, later),
        ("van-der-pol", 1e-2, van_der_pol, tensor(2.0, 0.0)),
        ("brusselator", 0.1, brusselator, waves),
    ):
        yield name, partial(euler, u=u, h=h, rate=rate), u


def optimisation() -> Named:
    """Iterations that minimise.

    With ``A`` of 40×100 and a sparse truth: proximal gradient (Daubechies, Defrise, De Mol, 2004)
    and Douglas–Rachford splitting (Lions and Mercier, 1979) for the lasso ``½‖Ay − b‖² + λ‖y‖₁``.
    Projected gradient for nonnegative least squares; gradient descent on the logistic loss with a
    ridge; Sinkhorn's scaling in the logarithmic domain for optimal transport (Peyré and Cuturi,
    *Computational Optimal Transport*, 2019, §4.4), fixed up to a constant; and EM for the means of
    two overlapping Gaussians (Dempster, Laird, Rubin, 1977).
    """
    a, truth = normal(40, 100, seed=9), pad(normal(5, seed=10), (0, 95))
    b, step = a @ truth, 1 / torch.linalg.matrix_norm(a, 2).item() ** 2

    def lasso(y: Tensor, lam: float) -> Tensor:
        return shrink(y - step * (y @ a.T - b) @ a, lam * step)

    for lam in (1.0, 0.1):
        yield f"lasso-{lam:g}", partial(lasso, lam=lam), zeros(100)
    resolvent = torch.linalg.inv(torch.eye(100).double() + 0.02 * a.T @ a)

    def splitting(z: Tensor) -> Tensor:
        y = shrink(z, 0.02)
        return z + (2 * y - z + 0.02 * b @ a) @ resolvent - y

    yield "douglas-rachford", splitting, zeros(100)

    tall, observed = normal(60, 30, seed=11), normal(60, seed=12)
    rate = 1 / torch.linalg.matrix_norm(tall, 2).item() ** 2
    yield (
        "nonnegative-least-squares",
        lambda y: (y - rate * (y @ tall.T - observed) @ tall).clamp(min=0),
        zeros(30),
    )
    label = (observed > 0).double()
    yield (
        "logistic-regression",
        lambda y: y - 4 * rate * ((torch.sigmoid(y @ tall.T) - label) @ tall + 0.5 * y),
        zeros(30),
    )

    place, other = torch.rand(2, 20, 2, generator=seeded(13)).double()
    cost = torch.cdist(place, other) ** 2
    for epsilon in (0.1, 0.02):
        yield f"sinkhorn-{epsilon}", partial(sinkhorn, cost=cost, epsilon=epsilon), zeros(20)

    half = normal(100, seed=14)
    data = torch.cat([half[:50] - 1, half[50:] + 1])

    def expectation_maximisation(means: Tensor) -> Tensor:
        share = torch.softmax(-0.5 * (data - means[:, :, None]) ** 2, dim=1)
        return (share * data).sum(dim=2) / share.sum(dim=2)

    yield "mixture", expectation_maximisation, tensor(-2.0, 1.0)


def chains() -> Named:
    """Markov chains and decisions.

    PageRank ``π = απP + (1 − α)/n`` on five random communities (Brin and Page, 1998); the
    stationary distribution of a lazy walk on a ring of unequal weights, from one node; the values
    ``v = maxₐ(rₐ + γPₐv)`` of a decision process (Bellman, 1957); and those of one policy.
    """
    links = (torch.rand(5, 20, 20, generator=seeded(20)) < 0.1).double() + 0.01
    web = torch.block_diag(*links) + 1e-3
    surf = web / web.sum(dim=1, keepdim=True)
    for alpha in (0.85, 0.99):
        jump = (1 - alpha) / 100 * ones(100)
        yield f"pagerank-{alpha}", linear(alpha * surf, jump), ones(100) / 100

    weight = 0.5 + torch.rand(24, generator=seeded(21)).double()
    ring = torch.diag(weight).roll(1, 1) + torch.diag(weight).roll(1, 1).T
    walk = (torch.eye(24).double() + ring / ring.sum(dim=1, keepdim=True)) / 2
    yield "ring-walk", linear(walk, zeros(24)), pad(ones(1), (0, 23))

    reward = torch.rand(3, 40, generator=seeded(22)).double()
    move = torch.rand(3, 40, 40, generator=seeded(23)).double() ** 12
    move = move / move.sum(dim=2, keepdim=True)
    yield (
        "value-iteration",
        lambda y: (reward + 0.95 * torch.einsum("ast,bt->bas", move, y)).amax(dim=1),
        zeros(40),
    )
    yield "policy-evaluation", linear(0.99 * move[0].T, reward[0]), zeros(40)


def power_flow() -> Named:
    """Voltages of a radial feeder with constant-power loads, ``V = 1 − Z conj(S / V)``.

    Ten buses in a row, so that ``Z_ij = z min(i, j)``; the state holds real parts, then imaginary
    ones (Chen et al., IEEE Trans. Power Delivery 6(3), 1991).  The heavier load is near the
    collapse of the voltage, at which the contraction is lost.
    """
    bus = torch.arange(1, 11).double()
    impedance = torch.minimum(bus[:, None], bus) * (0.01 + 0.02j)

    def voltages(y: Tensor, load: complex) -> Tensor:
        v = torch.complex(*y.chunk(2, dim=1))
        v = 1 - torch.conj(load / v) @ impedance.T
        return torch.cat([v.real, v.imag], dim=1)

    flat = torch.cat([ones(10), zeros(10)])
    for name, load in (("light", 0.08 + 0.04j), ("heavy", 0.23 + 0.115j)):
        yield f"power-flow-{name}", partial(voltages, load=load), flat


FAMILIES: tuple[Callable[[], Named], ...] = (
    componentwise,
    science,
    affine,
    rotations,
    networks,
    integral_equations,
    boundary_values,
    systems,
    stiff_steps,
    optimisation,
    chains,
    power_flow,
)


def linear(matrix: Tensor, offset: Tensor) -> Map:
    """``y ↦ yA + b``."""
    return lambda y: y @ matrix + offset


def sinkhorn(y: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """One round on the first potential, for uniform marginals."""
    rows, columns = cost.shape
    other = -epsilon * torch.logsumexp((y[:, :, None] - cost) / epsilon - math.log(rows), dim=1)
    scaled = (other[:, None, :] - cost) / epsilon - math.log(columns)
    return -epsilon * torch.logsumexp(scaled, dim=2)


def shrink(y: Tensor, threshold: float) -> Tensor:
    """Soft thresholding, the proximal map of ``threshold · ‖y‖₁``."""
    return y.sign() * (y.abs() - threshold).clamp(min=0)


def neighbours(y: Tensor) -> Tensor:
    """Sum of the left and the right neighbour, zero beyond the ends."""
    padded = pad(y, (1, 1))
    return padded[:, :-2] + padded[:, 2:]


def rotation(angle: float) -> Tensor:
    """The matrix that turns the plane by ``angle`` radians."""
    c, s = math.cos(angle), math.sin(angle)
    return tensor(c, -s, s, c).view(2, 2)


def tensor(*values: float) -> Tensor:
    """These values."""
    return torch.tensor(values, dtype=torch.float64)


def linspace(first: float, last: float, count: int) -> Tensor:
    """Even steps from ``first`` to ``last``."""
    return torch.linspace(first, last, count, dtype=torch.float64)


zeros = partial(torch.zeros, dtype=torch.float64)
ones = partial(torch.ones, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    """A generator of its own for each thing that is random."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)
