"""Deep supervision along the solver path, in the memory of one position.

Wang, Teng and Wang, *Deep Equilibrium Object Detection*, ICCV 2023, §3.3, Eq. 12.  A loss is
taken at several positions of the path, each through a few tracked steps from the detached state
there.  The gradients of a position are computed as soon as its loss is known and its graph is
freed at once; only their sums are kept, and are handed to autograd when the gradient of the total
loss arrives.  So peak memory depends neither on the number of positions nor on the length of the
path, and the loss is still an ordinary scalar: its ``backward()`` works under
DistributedDataParallel, gradient scaling, accumulation, clipping and hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicit.arguments import (
    check_args,
    check_count,
    check_kind,
    check_number,
    check_positions,
)
from implicit.autocast import forget_casts
from implicit.gradients import RAG, Gradient
from implicit.gradients.base import check_differentiable
from implicit.gradients.graph import leaves_of
from implicit.per_solve import renew
from implicit.perturbation import Perturbation, RandomSource
from implicit.problem import Problem
from implicit.solve import Visit, iterate
from implicit.solvers import Naive, Solver
from implicit.state import FlatMap, Layout, State
from implicit.transforms import has_tangent, is_transforming

_DEFAULT_GRADIENT = RAG(2)
_DEFAULT_SOLVER = Naive()

Loss = Callable[[State, int], Any]
"""``loss(y, position)`` returns a scalar tensor, or a pair of it and anything to hand back."""


def positions(m: int, C: int, T: int) -> tuple[int, ...]:
    """Supervision positions ``Ω = {1, C, 2C, …, mC, T}`` (Eq. 12), rising and without repeats.

    Args:
        m: number of multiples of ``C``.
        C: their spacing, in solver steps.
        T: length of the path, which is always supervised.

    Raises:
        ValueError: if ``m`` is negative, ``C`` or ``T`` below 1, or ``mC`` lies beyond ``T``.

    Example:
        >>> positions(m=4, C=3, T=20)
        (1, 3, 6, 9, 12, 20)
    """
    for name, value, least in (("m", m, 0), ("C", C, 1), ("T", T, 1)):
        check_count("positions", name, value, least)
    if m * C > T:
        raise ValueError(
            f"positions(m={m}, C={C}, T={T}): the last multiple, {m * C}, lies beyond the path of "
            f"{T} steps. Use m ≤ {T // C}, a smaller C, or a longer path."
        )
    return tuple(sorted({1, *(i * C for i in range(1, m + 1)), T}))


@dataclass
class Supervision:
    """What `supervise` returns.

    Attributes:
        loss: the sum of the losses; a scalar to call ``backward()`` on.
        losses: ``(len(at),)``, the loss at each position, detached.
        aux: what ``loss`` returned beside each scalar, tensors in it detached.
        value: the state at the end of the path, detached.
        residual: ``(B,)``, relative residual of each sample at the last step of the path, noise
            included; detached.
    """

    loss: Tensor
    losses: Tensor
    aux: tuple[Any, ...]
    value: State
    residual: Tensor


def supervise(
    f: Callable[..., State],
    y0: State,
    loss: Loss,
    *,
    at: Sequence[int],
    gradient: Gradient = _DEFAULT_GRADIENT,
    solver: Solver = _DEFAULT_SOLVER,
    perturbation: Sequence[Perturbation] = (),
    args: tuple[Any, ...] = (),
    parameters: Iterable[Tensor] = (),
    generator: RandomSource | None = None,
    loss_scale: float = 1.0,
) -> Supervision:
    """Run the solver path from ``y0`` and take the gradient of a loss at some of its positions.

    At a position ``n`` the loss sees the state that the gradient mode computes from the ``n``-th
    state ``y_n``: with ``RAG(k)``, ``f`` applied ``k`` times.  These applications do not advance
    the path.

    With `BPTT` the loss sees ``y_n`` itself, and its gradient goes back through all the steps to
    the start: the exact derivative of the path, noise included, in memory that grows with its
    length.

    Args:
        f: ``f(y, *args) -> y``.
        y0: start of the path; it is detached.
        loss: ``loss(y, position)``; a scalar, or ``(scalar, aux)``.
        at: positions, step numbers from 1, rising; the path ends at the last.
        gradient: of each position.
        solver: what walks the path.
        perturbation: noise, in the order in which it is added (see `Perturbation`).
        args: further arguments of ``f``; tensors in it (also inside pytrees) that require
            gradient receive it.
        parameters: every tensor that ``f`` or ``loss`` close over and that is to receive
            gradient.  One that is reached and not named raises an error, so none is lost.  What
            was itself computed from parameters goes through ``args``.  (`BPTT` needs no names.)
        generator: source of the noise, for runs that repeat; a `BatchPart` where the samples are
            part of a larger batch.
        loss_scale: factor on the losses while their gradients are taken, which is taken off again.
            In float16 small gradients vanish before a `torch.amp.GradScaler` can scale the loss
            that is returned: pass ``scaler.get_scale()``.

    Returns:
        A `Supervision`.  Its loss can be differentiated once, not twice; with `BPTT` any number
        of times.

    Raises:
        ValueError: if ``at`` is empty, not rising or not positive, if the solver has no derivative
            for `BPTT`, or if a tensor that requires gradient was reached and is neither in
            ``args`` nor named.
        TypeError: if an argument is of another kind.
        RuntimeError: under the transforms of `torch.func` or in forward mode, but with `BPTT`.

    Example:
        >>> import torch, implicit
        >>> W = torch.nn.Parameter(0.1 * torch.eye(3))
        >>> x = torch.randn(4, 3, requires_grad=True)
        >>> s = implicit.supervise(
        ...     lambda y, x: torch.tanh(y @ W + x), torch.zeros(4, 3),
        ...     lambda y, position: (y - 1).square().mean(),
        ...     at=implicit.positions(m=2, C=3, T=10), args=(x,), parameters=[W],
        ... )
        >>> s.loss.backward()
        >>> W.grad.shape, x.grad.shape, len(s.losses)
        (torch.Size([3, 3]), torch.Size([4, 3]), 4)
    """
    _check(f, loss, at, gradient, solver, perturbation, generator)
    check_args(args)
    check_number("supervise", "loss_scale", loss_scale, above=0)
    renew(f)
    leaves = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    given = dict.fromkeys([*leaves, *_tensors(parameters)])
    if not gradient.tracks_path and (is_transforming() or any(map(has_tangent, given))):
        raise RuntimeError(
            "supervise takes its gradients as it walks, for backward() alone: under torch.func and "
            "in forward mode use gradient=BPTT()."
        )
    sources = [t for t in given if t.requires_grad]
    walk = _Walk(
        f, y0, loss, tuple(at), gradient, solver, tuple(perturbation), generator, args, loss_scale
    )
    if gradient.tracks_path:
        total = walk.through_path()
    elif torch.is_grad_enabled() and sources:
        total = _Supervise.apply(walk, *sources)
    else:
        total, _ = walk.run((), tracked=torch.is_grad_enabled())
    return Supervision(total, torch.stack(walk.losses), tuple(walk.aux), walk.value, walk.residual)


class _Walk:
    """One run along the path: collects losses and, if they are wanted, sums of gradients."""

    def __init__(
        self,
        f: Callable[..., State],
        y0: State,
        loss: Loss,
        at: tuple[int, ...],
        gradient: Gradient,
        solver: Solver,
        perturbation: tuple[Perturbation, ...],
        generator: RandomSource | None,
        args: tuple[Any, ...],
        loss_scale: float,
    ) -> None:
        self.y0, self.loss, self.at = y0, loss, at
        self.loss_scale = loss_scale
        self.gradient, self.solver = gradient, solver
        self.perturbation, self.generator = perturbation, generator
        self.layout = Layout(y0)
        # Inside, arguments are leaves: gradients end at them, whatever they were made from.
        self.inside: dict[Tensor, Tensor] = {}
        self.f = FlatMap(
            f, self.layout, args if gradient.tracks_path else pytree.tree_map(self._as_leaf, args)
        )
        self.losses: list[Tensor] = []
        self.aux: list[Any] = []
        self.value: State = None
        self.residual = torch.empty(0)

    def run(self, sources: Sequence[Tensor], tracked: bool) -> tuple[Tensor, list[Tensor | None]]:
        """Total loss, and the gradient of it, scaled, with respect to each of ``sources``."""
        # A source may be met as an argument, as itself (closed over), or as both.
        places = [(i, self.inside[t]) for i, t in enumerate(sources) if t in self.inside]
        places += enumerate(sources)
        targets = [tensor for _, tensor in places]
        sums: list[Tensor | None] = [None] * len(targets)

        def visit(n: int, before: Tensor, after: Tensor) -> None:
            if n not in self.at:
                return
            if n == self.at[0]:
                self.f.hold()
            start = self._disturbed(before, after)
            forget_casts(start.device)
            with torch.set_grad_enabled(tracked):
                scalar = self._score(self.gradient.attach(self.f, start.detach()), n)
            if tracked and scalar.requires_grad:
                _check_named(scalar, targets)
                sums[:] = _add_gradients(scalar, targets, self.loss_scale, sums)

        with torch.no_grad():
            self._walk(visit)
        total = torch.stack(self.losses).sum()
        by_source: list[Tensor | None] = [None] * len(sources)
        for (i, _), found in zip(places, sums, strict=True):
            old = by_source[i]
            by_source[i] = old if found is None else found if old is None else old + found
        return total, by_source

    def through_path(self) -> Tensor:
        """Total loss, in the graph of the whole path."""
        scalars: list[Tensor] = []

        def visit(n: int, before: Tensor, after: Tensor) -> None:
            if n in self.at:
                scalars.append(self._score(self._disturbed(before, after), n))

        self._walk(visit)
        return torch.stack(scalars).sum()

    def _walk(self, visit: Visit) -> None:
        """Take the path, noise included."""
        outcome = iterate(
            Problem(self.f),
            self.layout.pack(self.y0).detach(),
            self.solver,
            self.at[-1],
            perturb=lambda y: self._perturbed("multi-step", y),
            visit=visit,
        )
        self.value = self.layout.unpack(outcome.value.detach())
        self.residual = outcome.relative_residual

    def _score(self, y: Tensor, n: int) -> Tensor:
        """The loss at a state, which is recorded."""
        result = self.loss(self.layout.unpack(y), n)
        scalar, aux = result if isinstance(result, tuple) else (result, None)
        self._check_scalar(scalar, n)
        self.losses.append(scalar.detach().reshape(()))
        self.aux.append(pytree.tree_map_only(Tensor, Tensor.detach, aux))
        return scalar.reshape(())

    def _as_leaf(self, x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()):
            return x
        return self.inside.setdefault(x, x.detach().requires_grad_())

    def _disturbed(self, before: Tensor, after: Tensor) -> Tensor:
        """The state to supervise: ``after``, or what noise for this position alone makes of it."""
        pushed = self._perturbed("one-step", before)
        return self._perturbed("zero-step", after if pushed is before else self.f(pushed))

    def _perturbed(self, entry: str, flat: Tensor) -> Tensor:
        chosen = [p for p in self.perturbation if p.entry == entry]
        if not chosen:
            return flat
        state = clean = self.layout.unpack(flat)
        for perturbation in chosen:
            state = perturbation(state, self.generator)
            self.layout.check(state, name=f"the noise of {perturbation}")
        return flat if state is clean else self.layout.pack(state)

    @staticmethod
    def _check_scalar(scalar: Any, n: int) -> None:
        if not isinstance(scalar, Tensor) or scalar.numel() != 1:
            shape = tuple(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__
            raise ValueError(
                f"loss(y, {n}) returned {shape}: it must be a scalar tensor, or (scalar, aux)."
            )


class _Supervise(torch.autograd.Function):
    """Runs the walk in its forward pass; its backward pass hands out the gradients it kept."""

    @staticmethod
    def forward(ctx: Any, walk: _Walk, *sources: Tensor) -> Tensor:
        total, sums = walk.run(sources, tracked=True)
        ctx.loss_scale = walk.loss_scale
        ctx.present = [s is not None for s in sums]
        ctx.save_for_backward(*(s for s in sums if s is not None))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The loss of supervise cannot be differentiated twice (create_graph=True): what "
                "it would need is freed position by position. For higher derivatives use BPTT()."
            )
        kept, factor = iter(ctx.saved_tensors), grad / ctx.loss_scale
        return (None, *(next(kept) * factor if present else None for present in ctx.present))


class _Carry(torch.autograd.Function):
    """Nothing that depends on ``targets``, but whose gradients with respect to them are ``sums``.

    The backward pass adds to them what else it finds, in place where nobody else holds them; so
    the sum over positions needs no memory beside the sum.  The list is emptied for that.
    """

    @staticmethod
    def forward(ctx: Any, sums: list[Tensor | None], *targets: Tensor) -> Tensor:
        ctx.sums = sums
        return targets[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        sums = tuple(ctx.sums)
        ctx.sums.clear()
        return (None, *sums)


def _add_gradients(
    loss: Tensor, targets: Sequence[Tensor], scale: float, sums: list[Tensor | None]
) -> Sequence[Tensor | None]:
    """``sums``, which is emptied, plus the scaled gradients of ``loss``.

    Hooks of the tensors are left out: these see the gradient of all positions, once.
    """
    if not targets:
        return []
    losses, factors = [loss], [torch.full_like(loss, scale)]
    reached = [target for target, found in zip(targets, sums, strict=True) if found is not None]
    if reached:
        carried_on = [found for found in sums if found is not None]
        sums.clear()
        for i, found in enumerate(carried_on):
            if found._base is not None:  # it would be kept as it is, for the tensor behind it
                carried_on[i] = found.clone()
            del found
        with torch.enable_grad():
            carried = _Carry.apply(carried_on, *reached)
        losses.append(carried)
        factors.append(torch.ones_like(carried))
    hooks = [(t._backward_hooks, dict(t._backward_hooks)) for t in targets if t._backward_hooks]
    for registered, _ in hooks:
        registered.clear()
    try:
        return torch.autograd.grad(losses, targets, factors, allow_unused=True)
    finally:
        for registered, kept in hooks:
            registered.update(kept)


def _check(
    f: Any,
    loss: Any,
    at: Sequence[int],
    gradient: Any,
    solver: Any,
    perturbation: Any,
    generator: Any,
) -> None:
    for name, function in (("f", f), ("loss", loss)):
        if not callable(function):
            raise TypeError(f"{name} must be callable, not {function!r}.")
    check_kind("solver", solver, Solver, "implicit.Naive()")
    check_kind("gradient", gradient, Gradient, "implicit.RAG(2)")
    check_positions("at", at)
    if not at:
        raise ValueError("at=(): at least one position to supervise.")
    check_differentiable(solver, gradient)
    if not isinstance(perturbation, Sequence):
        raise TypeError(f"perturbation={perturbation!r}: pass a sequence of them, (it,).")
    for one in perturbation:
        check_kind("perturbation", one, Perturbation, "implicit.Perturbation(noise, 0.2)")
    if generator is not None:
        check_kind("generator", generator, RandomSource, "torch.Generator()")


def _tensors(parameters: Any) -> Iterator[Tensor]:
    """What was named, if it is tensors."""
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"parameters is a {type(parameters).__name__}: pass the tensors, such as "
            "parameters=module.parameters()."
        )
    for one in parameters:
        if not isinstance(one, Tensor):
            raise TypeError(
                f"parameters holds a {type(one).__name__}: pass the tensors, such as "
                "parameters=module.parameters()."
            )
        yield one


def _check_named(loss: Tensor, targets: Sequence[Tensor]) -> None:
    """Raise if ``loss`` depends on a tensor that would silently receive no gradient."""
    for leaf in leaves_of(loss, known=targets):
        raise ValueError(
            f"supervise: a tensor of shape {tuple(leaf.shape)} that requires gradient is "
            "reached by f or loss and is neither in args nor in parameters, so it would get "
            "no gradient. Pass parameters=module.parameters(), and inputs through args."
        )
