"""What keeps a fixed point stable: penalties to train with, and figures of the Jacobian.

Jacobian regularisation after S. Bai, V. Koltun and J. Z. Kolter, *Stabilizing equilibrium models
by Jacobian regularization*, ICML 2021; fixed-point correction after S. Bai, Z. Geng, Y. Savani and
J. Z. Kolter, *Deep equilibrium optical flow estimation*, CVPR 2022.  The spectral radius is that of
W. E. Arnoldi's projection, *The principle of minimized iterations*, Quart. Appl. Math. 9(1), 1951.

With ``J = ∂f/∂y`` at ``y``, sample by sample: the naive iteration converges near a fixed point if
the spectral radius ``ρ(J)`` is below one, and from anywhere if the Lipschitz constant of ``f`` is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit.arguments import check_count, check_number
from implicit.krylov import new_direction
from implicit.solution import Solution
from implicit.state import FlatMap, Layout, State
from implicit.transforms import is_transforming

Product = Callable[[Tensor], Tensor]


def jacobian_penalty(
    f: Callable[..., State],
    y: State,
    *,
    args: tuple[Any, ...] = (),
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Unbiased estimate of ``‖J‖_F² / D`` per sample (Bai, Koltun and Kolter 2021).

    ``‖J‖_F² = E ‖Jᵀv‖²`` for probes ``v`` with ``E vvᵀ = I`` (Hutchinson).  The probes are random
    signs: they have the same mean as the normal ones of the paper and less variance, none at all
    where the rows of ``J`` are orthogonal.  Costs one tracked application of ``f`` and one
    vector–Jacobian product per probe; its backward pass differentiates ``f`` twice.

    Args:
        f: ``f(y, *args) -> y``, treating samples apart.
        y: where, usually ``solution.value``: a tensor or a pytree, batch first.  It is taken as a
            constant, as in the paper: the penalty moves what ``f`` depends on, not the point.
        args: further arguments of ``f``.
        samples: number of probes, averaged over.
        generator: source of the probes, for runs that repeat.

    Returns:
        ``(B,)``, float32 or better; differentiable with respect to ``args`` and whatever ``f``
        closes over.  Add a small multiple of its mean to the loss.

    Raises:
        StateError: if ``y`` is no state, or ``f`` does not return one of the same form.
        ValueError: if ``samples`` is not a positive integer.
        RuntimeError: inside ``torch.inference_mode``; from torch, if an operation of ``f`` has no
            second derivative (fused attention: use its ``SDPBackend.MATH``).

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> penalty = jacobian_penalty(lambda y: w * y, torch.zeros(3, 2))
        >>> penalty.tolist()  # (1² + 2²) / 2
        [2.5, 2.5, 2.5]
        >>> torch.autograd.grad(penalty.mean(), w)[0].tolist()  # 2w / D
        [1.0, 2.0]
    """
    check_count("jacobian_penalty", "samples", samples)
    tracked = torch.is_grad_enabled()
    jacobian = _Jacobian("jacobian_penalty", f, y, args)
    total = jacobian.image.new_zeros(len(jacobian.image))
    for _ in range(samples):
        signs = _random_signs(jacobian.image, generator)
        product = jacobian.transposed(signs, create_graph=tracked)
        total = total + product.square().sum(dim=1)
    return total / (samples * max(1, jacobian.image.shape[1]))


def spectral_radius(
    f: Callable[..., State],
    y: State,
    *,
    args: tuple[Any, ...] = (),
    iterations: int = 30,
) -> Tensor:
    """Largest ``|λ|`` of the eigenvalues of ``J``, per sample, by Arnoldi's method.

    ``Jᵀ``, which has the eigenvalues of ``J``, is projected on a Krylov space, and the radius is
    that of the small Hessenberg matrix.  Complex pairs count with their modulus: a rotation by 90°
    has radius 1, where the power method sees 0.

    Accuracy: exact up to rounding once ``iterations`` reaches the elements ``D`` of a sample, or
    the number of distinct eigenvalues if that is less.  Below that it is an estimate that is best
    for eigenvalues apart from the others; it never exceeds ``‖J‖₂``, nor ``ρ(J)`` itself if ``J``
    is normal.  Rounding: eigenvalues of a defective ``J`` move by the ``n``-th root of the rounding
    error for a Jordan block of size ``n``, whatever computes them.

    Args:
        f: ``f(y, *args) -> y``, treating samples apart.
        y: where: a tensor or a pytree, batch first.
        args: further arguments of ``f``.
        iterations: dimension of the Krylov space; each is a vector–Jacobian product, over a
            single application of ``f``, and keeps a copy of the state.

    Returns:
        ``(B,)``, float32 or better, without gradient; NaN where ``J`` is not finite.  The start of
        the Krylov space is fixed: the same call gives the same answer, in any batch.

    Raises:
        StateError: if ``y`` is no state, or ``f`` does not return one of the same form.
        ValueError: if ``iterations`` is not a positive integer.
        RuntimeError: inside ``torch.inference_mode``.

    Example:
        >>> import torch
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        >>> y = torch.ones(1, 2, dtype=torch.float64)
        >>> round(spectral_radius(lambda y: y @ turn, y).item(), 12)
        1.0
    """
    check_count("spectral_radius", "iterations", iterations)
    jacobian = _Jacobian("spectral_radius", f, y, args)
    return _krylov_radius(jacobian.transposed, jacobian.image.detach(), iterations)


def lipschitz_estimate(
    f: Callable[..., State],
    y: State,
    *,
    args: tuple[Any, ...] = (),
    iterations: int = 30,
) -> Tensor:
    """``‖J‖₂`` per sample: the local Lipschitz constant of ``f`` at ``y``, in the l2 norm.

    A lower bound of the global one, which is the supremum of this over all ``y``: a figure above 1
    proves that ``f`` is no contraction, one below 1 proves nothing elsewhere.

    The largest singular value is found by Lanczos' method on ``JᵀJ``, which is Golub and Kahan's
    bidiagonalisation (*Calculating the singular values and pseudo-inverse of a matrix*, SIAM J.
    Numer. Anal. 2(2), 1965).  It comes from below and is exact up to rounding once ``iterations``
    reaches the elements ``D`` of a sample.

    Args:
        f: ``f(y, *args) -> y``, treating samples apart; twice differentiable, as ``Jv`` is taken
            as the derivative of ``Jᵀu`` along ``v``.
        y: where: a tensor or a pytree, batch first.
        args: further arguments of ``f``.
        iterations: of Lanczos' method; each is a product with ``J`` and one with ``Jᵀ``, over a
            single application of ``f``, and keeps a copy of the state.

    Returns:
        ``(B,)``, float32 or better, without gradient; NaN where ``J`` is not finite.

    Raises:
        StateError: if ``y`` is no state, or ``f`` does not return one of the same form.
        ValueError: if ``iterations`` is not a positive integer.
        RuntimeError: inside ``torch.inference_mode``; from torch, if an operation of ``f`` has no
            second derivative.

    Example:
        >>> import torch
        >>> shear = torch.tensor([[0.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
        >>> y = torch.ones(1, 2, dtype=torch.float64)
        >>> round(lipschitz_estimate(lambda y: y @ shear, y).item(), 12)  # though its radius is 0
        3.0
    """
    check_count("lipschitz_estimate", "iterations", iterations)
    jacobian = _Jacobian("lipschitz_estimate", f, y, args)

    def gram(v: Tensor) -> Tensor:
        return jacobian.transposed(jacobian.forward(v))

    return _krylov_radius(gram, jacobian.image.detach(), iterations).sqrt()


def fixed_point_correction(
    f: Callable[..., State],
    solution: Solution,
    loss: Callable[[State], Tensor],
    *,
    args: tuple[Any, ...] = (),
    gamma: float = 0.8,
    k: int = 1,
) -> Tensor:
    """``Σ_{i<n} γ^{n−i} loss(fᵏ(y_i))`` over the ``n`` states of ``solution.path``.

    The correction of Bai et al. (2022).  A loss at the answer alone says nothing of the way there;
    this asks the states on the way to be good answers too, the more the nearer they are to the end.
    The loss at the answer itself, whose weight would be ``γ⁰``, is not in the sum: add it.  Each
    state is a constant, and the gradient passes through ``k`` tracked applications of ``f``
    (``k = 1`` is `JFB`).

    `supervise` walks a path of its own, of a fixed length and for training alone, in the memory of
    one position.  This takes its states from a solve that is made anyway, with any solver, stop
    and gradient of the answer, and keeps ``n·k`` applications of ``f`` for the backward pass: use
    it for a few positions beside an implicit gradient, and `supervise` for many.

    Args:
        f: the map that was solved, ``f(y, *args) -> y``.
        solution: of ``fixed_point(..., path=positions)``.
        loss: ``loss(y)``, a scalar tensor.
        args: further arguments of ``f``.
        gamma: ``γ`` in (0, 1].
        k: tracked applications of ``f`` to each state.

    Returns:
        A scalar tensor, differentiable with respect to ``args`` and whatever ``f`` and ``loss``
        close over, any number of times.

    Raises:
        ValueError: if the solution has no path, ``gamma`` is out of range, or ``k`` is not a
            positive integer.

    Example:
        >>> import torch, implicit
        >>> w = torch.tensor(0.5, requires_grad=True)
        >>> f = lambda y: w * y + 1
        >>> s = implicit.fixed_point(f, torch.zeros(1, 1), solver=implicit.Naive(), path=(1, 2))
        >>> [y.item() for y in s.path]
        [1.0, 1.5]
        >>> fixed_point_correction(f, s, torch.sum, gamma=0.5).item()  # 1.5 / 4 + 1.75 / 2
        1.25
    """
    check_count("fixed_point_correction", "k", k)
    check_number("fixed_point_correction", "gamma", gamma, above=0, most=1)
    if not solution.path:
        raise ValueError(
            "fixed_point_correction: the solution has no path. Ask for some of its states, as in "
            "fixed_point(..., path=(2, 4, 8))."
        )
    terms = []
    for distance, y in zip(range(len(solution.path), 0, -1), solution.path, strict=True):
        for _ in range(k):
            y = f(y, *args)
        terms.append(gamma**distance * loss(y))
    return torch.stack(terms).sum()


class _Jacobian:
    """``∂f/∂y`` at ``y`` as products with rows ``(B, D)``, over one application of ``f``."""

    def __init__(
        self, owner: str, f: Callable[..., State], y: State, args: tuple[Any, ...]
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{owner} differentiates f, which torch.inference_mode() forbids: call it under "
                "torch.no_grad(), or under neither."
            )
        if is_transforming():
            raise RuntimeError(
                f"{owner} differentiates f by torch.autograd and knows no torch.func: call it "
                "outside of vmap, grad and jvp, with the samples as a batch."
            )
        layout = Layout(y)
        with torch.enable_grad():
            self.point = layout.pack(y).detach().requires_grad_()
            self.image = FlatMap(f, layout, args)(self.point)
        self.pulled: tuple[Tensor, Tensor] | None = None

    def transposed(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """``Jᵀv``."""
        return _pull(self.image, self.point, v, create_graph)

    def forward(self, v: Tensor) -> Tensor:
        """``Jv``: the derivative along ``v`` of ``u ↦ Jᵀu``, which is linear."""
        if self.pulled is None:
            u = torch.zeros_like(self.image, requires_grad=True)
            self.pulled = u, _pull(self.image, self.point, u, create_graph=True)
        u, product = self.pulled
        return _pull(product, u, v)


def _pull(image: Tensor, point: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    if not image.requires_grad:
        return torch.zeros_like(point)
    (product,) = torch.autograd.grad(
        image, point, v, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(point) if product is None else product


def _random_signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    coins = torch.randint(2, like.shape, generator=generator, device=device)
    return (2 * coins - 1).to(like)


def _krylov_radius(product: Product, like: Tensor, iterations: int) -> Tensor:
    """Spectral radius ``(B,)`` of a linear map of rows ``(B, D)``, by Arnoldi's method."""
    batch, size = like.shape
    if size == 0:
        return like.new_zeros(batch)
    dimension = min(iterations, size)
    # One start for all samples and calls, and the caller's random numbers are left alone.
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=like.dtype)
    q = (start / torch.linalg.vector_norm(start)).to(like.device).expand(batch, size)
    basis = like.new_zeros(batch, dimension, size)
    hessenberg = like.new_zeros(batch, dimension + 1, dimension)
    for j in range(dimension):
        basis[:, j] = q
        # Zeros, where the space is exhausted, add eigenvalues 0 and stand for the vectors that
        # other samples of the batch still need.
        q, hessenberg[:, : j + 2, j] = new_direction(product(q), basis[:, : j + 1])
    hessenberg = hessenberg[:, :-1]
    finite = torch.isfinite(hessenberg).all(dim=2).all(dim=1)
    small = torch.where(finite[:, None, None], hessenberg, 0).cpu().double()
    radius = torch.linalg.eigvals(small).abs().amax(dim=1)
    return torch.where(finite, radius.to(like), torch.nan)
