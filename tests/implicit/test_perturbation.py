"""Refinement-aware perturbation: the noise's statistics, the coin, and where it enters.

The three entries are compared with loops written out here from Eq. 13–15, number for number: the
loops draw from a generator of the same seed in the order of the equations (coin, then noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import implicit
from implicit import GaussianNoise, Naive, NormScaledNoise, Perturbation, standard_normal, supervise
from implicit.perturbation import Entry

AT = (1, 3, 4, 7)
ENTRIES: tuple[Entry, ...] = ("multi-step", "one-step", "zero-step")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the noise -----------------------------------------------------------------------------------


def test_gaussian_noise_has_its_mean_and_variance() -> None:
    """Over n draws the mean is off by ``σ/√n`` and the variance by ``σ²√(2/n)``: five of these."""
    n, sigma = 400_000, 0.3
    state = torch.full((400, 1000), 1.5, dtype=torch.float64)
    noise = GaussianNoise(sigma)(state, generator()) - state
    assert abs(float(noise.mean())) < 5 * sigma / math.sqrt(n)
    assert abs(float(noise.var()) - sigma**2) < 5 * sigma**2 * math.sqrt(2 / n)
    # Normal: the fourth moment is three times the squared variance (off by √(96/n)).
    assert abs(float((noise / sigma).pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)


def test_gaussian_noise_does_not_look_at_the_state() -> None:
    one = GaussianNoise(0.3)(torch.zeros(4, 5), generator(1))
    other = GaussianNoise(0.3)(torch.full((4, 5), 8.0), generator(1)) - 8
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_norm_scaled_noise_is_its_equation() -> None:
    q = torch.randn(3, 4, 16, generator=generator(1), dtype=torch.float64)
    n = torch.randn(3, 4, 16, generator=generator(7), dtype=torch.float64)
    length = q.pow(2).sum(-1, keepdim=True).sqrt()
    found = NormScaledNoise(0.2)(q, generator(7))
    torch.testing.assert_close(found, 0.8 * q + 0.2 * length * n)


@pytest.mark.parametrize("channels", [16, 256])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_length_of_norm_scaled_noise(channels: int, scale: float) -> None:
    """``‖noise‖ ≈ σ √C ‖q‖``: exact in the mean square, whatever the length of q."""
    queries, sigma = 4000, 0.1
    q = scale * torch.randn(queries, channels, generator=generator(2), dtype=torch.float64)
    noise = NormScaledNoise(sigma)(q, generator(3)) - (1 - sigma) * q
    ratio = (noise.norm(dim=-1) / q.norm(dim=-1)).square() / (sigma**2 * channels)
    assert abs(float(ratio.mean()) - 1) < 5 * math.sqrt(2 / (queries * channels))
    unit = noise / (sigma * q.norm(dim=-1, keepdim=True))
    assert abs(float(unit.mean())) < 5 / math.sqrt(queries * channels)


def test_sigma_of_one_leaves_nothing_of_the_state_but_its_length() -> None:
    q = torch.tensor([[3.0, 4.0]])
    found = NormScaledNoise(1.0)(q, generator(1))
    torch.testing.assert_close(found, 5 * torch.randn(1, 2, generator=generator(1)))


@pytest.mark.parametrize("noise", [GaussianNoise(0.1), NormScaledNoise(0.1)], ids=repr)
def test_noise_keeps_structure_and_dtype_and_is_not_shared(noise: Any) -> None:
    state = {
        "a": torch.ones(2, 8, dtype=torch.bfloat16),
        "b": (torch.ones(2, 8), torch.ones(2, 8, dtype=torch.float64)),
    }
    found = noise(state, generator())
    leaves, spec = torch.utils._pytree.tree_flatten(found)
    wanted, wanted_spec = torch.utils._pytree.tree_flatten(state)
    assert spec == wanted_spec
    for leaf, before in zip(leaves, wanted, strict=True):
        assert leaf.dtype == before.dtype and leaf.shape == before.shape
        assert not torch.equal(leaf, before)
        assert torch.equal(before, torch.ones_like(before)), "the given state is not written to"
    assert not torch.allclose(leaves[1].double(), leaves[2], atol=1e-3), "each leaf its own draw"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**40), st.floats(0, 1))
def test_noise_repeats_with_its_generator(seed: int, sigma: float) -> None:
    state = torch.ones(3, 4)
    for noise in (GaussianNoise(sigma), NormScaledNoise(sigma)):
        one, other = noise(state, generator(seed)), noise(state, generator(seed))
        assert torch.equal(one, other)


def test_standard_normal_comes_from_its_generator_alone() -> None:
    like = torch.zeros(3, 4, dtype=torch.float64)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = standard_normal(like, generator(5))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert torch.equal(one, torch.randn(3, 4, generator=generator(5), dtype=torch.float64))
    assert one.dtype == like.dtype
    torch.manual_seed(9)
    free = standard_normal(like)
    torch.manual_seed(9)
    assert torch.equal(free, standard_normal(like))


# -- the coin ------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.9])
def test_coin_falls_as_often_as_it_should(probability: float) -> None:
    n, rng = 4000, generator(11)
    perturbation = Perturbation(GaussianNoise(1.0), probability)
    state = torch.zeros(1, 1)
    taken = sum(perturbation(state, rng) is not state for _ in range(n))
    spread = math.sqrt(probability * (1 - probability) / n)
    assert abs(taken / n - probability) < 4 * spread


def test_coin_is_one_for_the_whole_batch() -> None:
    rng, state = generator(3), torch.zeros(64, 2)
    perturbation = Perturbation(GaussianNoise(1.0), 0.5)
    moved = [(perturbation(state, rng) != 0).any(dim=1) for _ in range(20)]
    assert all(m.all() or not m.any() for m in moved)
    assert 0 < sum(bool(m.all()) for m in moved) < 20


def test_probability_zero_and_one_are_certain() -> None:
    rng, state = generator(3), torch.zeros(2, 2)
    assert all(Perturbation(GaussianNoise(1.0), 0.0)(state, rng) is state for _ in range(500))
    assert all(Perturbation(GaussianNoise(1.0), 1.0)(state, rng) is not state for _ in range(500))


# -- the three entries, against literal loops -----------------------------------------------------


def problem() -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    w = torch.randn(5, 5, generator=generator(1), dtype=torch.float64)
    w = (0.6 * w / torch.linalg.matrix_norm(w, 2)).requires_grad_()
    x = torch.randn(3, 5, generator=generator(2), dtype=torch.float64)
    y0 = torch.randn(3, 5, generator=generator(3), dtype=torch.float64)
    return (lambda y, w: torch.tanh(y @ w + x)), w, y0


def literal(
    entry: str, probability: float, sigma: float, seed: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Losses by position, the end of the path, and the parameter; with RAG(2), written out."""
    f, w, y = problem()
    rng = generator(seed)

    def chance(y: Tensor) -> Tensor:
        if float(torch.rand((), generator=rng)) >= probability:
            return y
        return y + sigma * torch.randn(y.shape, generator=rng, dtype=y.dtype)

    losses = []
    for n in range(1, AT[-1] + 1):
        if entry == "multi-step":  # Eq. 15: noise enters the path and is refined on
            y = chance(y)
        before = y
        y = f(before, w).detach()
        if n not in AT:
            continue
        start = y
        if entry == "one-step":  # Eq. 14: one refinement of a noisy state, for this position only
            noisy = chance(before)
            start = f(noisy, w).detach()
        if entry == "zero-step":  # Eq. 13: noise on the supervised state itself
            start = chance(y)
        losses.append(f(f(start, w), w).square().mean())
    return losses, y, w


@pytest.mark.parametrize("entry", ["zero-step", "one-step", "multi-step"])
@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_entries(entry: Any, probability: float) -> None:
    f, w, y0 = problem()
    noise = Perturbation(GaussianNoise(0.5), probability, entry)
    found = supervise(
        f,
        y0,
        lambda y, n: y.square().mean(),
        at=AT,
        args=(w,),
        solver=Naive(),
        perturbation=[noise],
        generator=generator(17),
    )
    losses, end, own = literal(entry, probability, 0.5, seed=17)
    torch.testing.assert_close(found.losses, torch.stack(losses).detach())
    torch.testing.assert_close(found.value, end)
    (gradient,) = torch.autograd.grad(found.loss, w)
    (wanted,) = torch.autograd.grad(torch.stack(losses).sum(), own)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("entry", ["zero-step", "one-step"])
def test_noise_for_a_position_stays_off_the_path(entry: Any) -> None:
    f, w, y0 = problem()
    plain, noisy = (
        supervise(
            f,
            y0,
            lambda y, n: y.square().mean(),
            at=AT,
            args=(w,),
            perturbation=perturbation,
            generator=generator(4),
        )
        for perturbation in ((), (Perturbation(GaussianNoise(2.0), 1.0, entry),))
    )
    assert torch.equal(plain.value, noisy.value)
    assert not torch.allclose(plain.losses, noisy.losses)


def test_later_entries_are_refined_more() -> None:
    """Under a contraction, noise that was refined moves the loss less than noise that was not."""
    a = 0.3
    size = {}
    for entry in ("zero-step", "one-step", "multi-step"):
        found = supervise(
            lambda y, a: a * y,
            torch.zeros(4000, 4, dtype=torch.float64),
            lambda y, n: y.square().mean(),
            at=(1, 30),
            gradient=implicit.JFB(),
            args=(torch.tensor(a, dtype=torch.float64, requires_grad=True),),
            perturbation=[Perturbation(GaussianNoise(1.0), 1.0, entry)],
            generator=generator(5),
        )
        size[entry] = float(found.losses[-1])
    # From y* = 0, one tracked application: noise of variance 1 arrives with a², a⁴ and
    # a² Σ_{i≥1} a²ⁱ = a⁴ / (1 − a²) of its variance (spread of the mean: √(2/16000) ≈ 1 %).
    assert size["zero-step"] == pytest.approx(a**2, rel=0.06)
    assert size["one-step"] == pytest.approx(a**4, rel=0.06)
    assert size["multi-step"] == pytest.approx(a**4 / (1 - a**2), rel=0.06)


def test_several_perturbations_enter_in_their_order() -> None:
    """The paper's: norm-scaled noise on the contents, box noise on the positions; here two maps."""
    w = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    seen: list[str] = []

    def named(name: str) -> Callable[[Any, Any], Any]:
        def noise(state: Any, generator: torch.Generator | None) -> Any:
            seen.append(name)
            return state + 1 if name == "add" else 2 * state

        return noise

    found = supervise(
        lambda y, w: y + y @ w,
        torch.ones(3, 5, dtype=torch.float64),
        lambda y, n: y.mean(),
        at=(1,),
        args=(w,),
        perturbation=[
            Perturbation(named("add"), 1.0),
            Perturbation(named("double"), 1.0),
        ],
    )
    assert seen == ["add", "double"]
    assert float(found.losses[0]) == pytest.approx(4.0)


def test_noise_may_touch_a_part_of_the_state() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}

    def noise(y: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        return {**y, "b": y["b"] + 1}

    found = supervise(
        lambda y: y,
        state,
        lambda y, n: y["b"].mean() - y["a"].mean(),
        at=(3,),
        perturbation=[Perturbation(noise, 1.0)],
    )
    assert float(found.losses[0]) == 3  # one for each of three steps
    assert torch.equal(found.value["a"], state["a"])
    assert torch.equal(state["b"], torch.zeros(2, 3))


@pytest.mark.parametrize("solver", [implicit.Anderson(), implicit.Broyden()], ids=repr)
def test_secant_solvers_learn_from_where_the_noise_put_them(solver: implicit.Solver) -> None:
    """A kick before every step must not break a solve: pairs are of the states evaluated."""
    a = torch.tensor([0.9, -0.5, 0.2], dtype=torch.float64)
    found = supervise(
        lambda y: a * y + 1,
        torch.zeros(2, 3, dtype=torch.float64),
        lambda y, n: y.mean(),
        at=(30,),
        solver=solver,
        perturbation=[Perturbation(GaussianNoise(1e-8), 1.0)],
        generator=generator(1),
    )
    torch.testing.assert_close(found.value, (1 / (1 - a)).expand(2, 3), rtol=1e-5, atol=1e-5)


def test_entries_go_together() -> None:
    """Noise on the path, before the last step and on the supervised state, all at once."""
    f, w, y = problem()
    tables = {
        name: torch.randn(10, 3, 5, generator=generator(i), dtype=y.dtype)
        for i, name in enumerate(ENTRIES)
    }
    taken = dict.fromkeys(tables, 0)

    def from_table(name: Entry) -> Callable[[Tensor, Any], Tensor]:
        def noise(state: Tensor, generator: torch.Generator | None) -> Tensor:
            taken[name] += 1
            return state + tables[name][taken[name] - 1]

        return noise

    found = supervise(
        f,
        y,
        lambda y, n: y.square().mean(),
        at=AT,
        args=(w,),
        solver=Naive(0.7),
        perturbation=[Perturbation(from_table(name), 1.0, name) for name in ENTRIES],
    )
    assert taken == {"multi-step": AT[-1], "one-step": len(AT), "zero-step": len(AT)}
    losses: list[Tensor] = []
    for n in range(1, AT[-1] + 1):
        y = y + tables["multi-step"][n - 1]
        before = y
        y = (0.3 * y + 0.7 * f(y, w)).detach()
        if n in AT:
            start = (
                f(before + tables["one-step"][len(losses)], w) + tables["zero-step"][len(losses)]
            )
            losses.append(f(f(start.detach(), w), w).square().mean())
    torch.testing.assert_close(found.losses, torch.stack(losses).detach())
    torch.testing.assert_close(found.value, y)
    (gradient,) = torch.autograd.grad(found.loss, w)
    (wanted,) = torch.autograd.grad(torch.stack(losses).sum(), w)
    torch.testing.assert_close(gradient, wanted)


def test_noise_is_not_differentiated() -> None:
    """With ``f(y) = w y`` and noise that depends on ``w`` the gradient is ``2 w y₂``, y₂ fixed."""
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    found = supervise(
        lambda y: w * y,
        torch.ones(1, 1, dtype=torch.float64),
        lambda y, n: y.sum(),
        at=(2,),
        perturbation=[Perturbation(lambda state, generator: state + w + 1, 1.0)],
        parameters=[w],
    )
    y = 0.5 * (0.5 * (1 + 1.5) + 1.5)
    (gradient,) = torch.autograd.grad(found.loss, w)
    assert float(gradient) == pytest.approx(2 * 0.5 * y)


def test_noise_receives_the_state_in_its_structure_and_the_generator() -> None:
    received = []

    def noise(state: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        received.append(({k: (v.shape, v.dtype) for k, v in state.items()}, generator))
        return state

    rng = generator()
    y0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 2, 2, dtype=torch.bfloat16)}
    supervise(
        lambda y: y,
        y0,
        lambda y, n: y["a"].sum(),
        at=(1, 2),
        perturbation=[Perturbation(noise, 1.0)],
        generator=rng,
    )
    assert received == [({k: (v.shape, v.dtype) for k, v in y0.items()}, rng)] * 2


def test_noise_that_orders_its_keys_otherwise_does_not_swap_leaves() -> None:
    """Refused or understood; but never the noise of one leaf on the other."""
    zero = torch.zeros(1, 2)

    def noise(y: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        return {"b": y["b"] + 1, "a": y["a"]}

    try:
        found = supervise(
            lambda y: y,
            {"a": zero, "b": zero},
            lambda y, n: y["a"].mean(),
            at=(1,),
            perturbation=[Perturbation(noise, 1.0)],
        )
    except ValueError:
        return
    assert float(found.losses[0]) == 0


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda: GaussianNoise(-0.1), ValueError, r"GaussianNoise\(sigma=-0\.1\).*at least 0"),
        (lambda: GaussianNoise(math.nan), ValueError, r"GaussianNoise\(sigma=nan\)"),
        (lambda: NormScaledNoise(-0.1), ValueError, r"NormScaledNoise\(sigma=-0\.1\).*\[0, 1\]"),
        (lambda: NormScaledNoise(1.1), ValueError, r"NormScaledNoise\(sigma=1\.1\).*\[0, 1\]"),
        (lambda: NormScaledNoise(math.nan), ValueError, r"NormScaledNoise\(sigma=nan\)"),
        (
            lambda: Perturbation(GaussianNoise(0.1), 1.5),
            ValueError,
            r"Perturbation\(probability=1\.5\).*\[0, 1\]",
        ),
        (
            lambda: Perturbation(GaussianNoise(0.1), -0.5),
            ValueError,
            r"Perturbation\(probability=-0\.5\).*\[0, 1\]",
        ),
        (
            lambda: Perturbation(GaussianNoise(0.1), entry="two-step"),  # type: ignore[arg-type]
            ValueError,
            r"entry='two-step'.*'zero-step', 'one-step' or 'multi-step'",
        ),
        (
            lambda: Perturbation(0.1),  # type: ignore[arg-type]
            TypeError,
            r"Perturbation: noise must be callable, not 0\.1",
        ),
        (lambda: GaussianNoise(std=0.1), TypeError, "std"),  # type: ignore[call-arg]
        (
            lambda: Perturbation(GaussianNoise(0.1), p=0.1),  # type: ignore[call-arg]
            TypeError,
            "'p'",
        ),
    ],
)
def test_options_out_of_range(make: Callable[[], Any], kind: Any, match: str) -> None:
    with pytest.raises(kind, match=match):
        make()


@pytest.mark.parametrize(
    "noise",
    [lambda y, g: y[:, :1], lambda y, g: {"a": y}, lambda y, g: y[None], lambda y, g: None],
    ids=["narrower", "another structure", "one more dimension", "nothing"],
)
def test_noise_must_return_a_state_like_its_own(noise: Any) -> None:
    with pytest.raises(ValueError, match="noise|perturbation|Perturbation"):
        supervise(
            lambda y: 0.5 * y,
            torch.ones(2, 3),
            lambda y, n: y.mean(),
            at=(1,),
            perturbation=[Perturbation(noise, 1.0)],
        )


# -- a batch in parts ----------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("cuts", [(0, 6), (0, 2, 4, 6), (0, 1, 6)])
def test_parts_of_a_batch_walk_the_path_of_the_whole(entry: Entry, cuts: tuple[int, ...]) -> None:
    """Coins and noise are those of the whole batch, whatever the parts are."""
    w = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    y0 = torch.randn(6, 5, dtype=torch.float64, generator=generator(8))
    noise = [Perturbation(kind, 0.5, entry) for kind in (NormScaledNoise(0.2), GaussianNoise(0.3))]

    def walk(y0: Tensor, source: Any) -> implicit.Supervision:
        return supervise(
            lambda y: torch.tanh(w * y),
            y0,
            lambda y, n: y.square().sum(),
            at=AT,
            perturbation=noise,
            parameters=[w],
            generator=source,
        )

    whole = walk(y0, generator(4))
    parts = [
        walk(y0[first:end], implicit.BatchPart(generator(4), 6, first))
        for first, end in pairwise(cuts)
    ]
    torch.testing.assert_close(sum(part.losses for part in parts), whole.losses)
    torch.testing.assert_close(torch.cat([part.residual for part in parts]), whole.residual)
    (wanted,) = torch.autograd.grad(whole.loss, w)
    found = sum(torch.autograd.grad(part.loss, w)[0] for part in parts)
    torch.testing.assert_close(found, wanted)


def test_the_residual_is_that_of_the_last_step() -> None:
    y0 = torch.ones(2, 3, dtype=torch.float64)
    found = supervise(lambda y: 0.5 * y + 1, y0, lambda y, n: y.sum(), at=(1, 4))
    y = y0
    for _ in range(3):
        y = 0.5 * y + 1
    fy = 0.5 * y + 1
    torch.testing.assert_close(found.residual, (fy - y).norm(dim=1) / fy.norm(dim=1))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: implicit.BatchPart(generator(), 0), "BatchPart.*size=0"),
        (lambda: implicit.BatchPart(generator(), 4, 4), r"BatchPart\(first=4\).*from 0 to 3"),
        (lambda: implicit.BatchPart(generator(), 4, -1), r"BatchPart\(first=-1\)"),
        (
            lambda: standard_normal(torch.zeros(3, 2), implicit.BatchPart(generator(), 4, 2)),
            "3 samples from place 2 on are more than a batch of 4",
        ),
    ],
)
def test_parts_that_no_batch_has_are_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_noise_of_one_number_for_each_sample_knows_no_neighbours() -> None:
    noise = NormScaledNoise(0.3)
    few = noise(torch.tensor([1.0, 2.0]), torch.manual_seed(0))
    many = noise(torch.tensor([1.0, 2000.0]), torch.manual_seed(0))
    assert few[0] == many[0]
    torch.testing.assert_close(many[1], 1000 * few[1])
