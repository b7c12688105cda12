"""Tying a solution into autograd's graph through one application of ``f``.

The value is ``f(y*)`` with a graph; gradients that come in are turned by a given linear map before
they go through that graph, and tangents after they have come through it.  So whatever ``f`` closes
over is reached as by any other operation, without being listed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from implicit.gradients.base import Map
from implicit.gradients.graph import Start, leaves_of
from implicit.transforms import derivatives, is_pushing_forward, is_transforming, no_forward_mode

Solve = Callable[[Map, Tensor], Tensor]
"""``solve(product, v)``: the solution of ``w = v + product(w)``, or what stands for it."""


def attach(f: Map, value: Tensor, solve: Solve, twice: bool, waits: bool) -> Tensor:
    """``f(value)``, whose derivative is ``(I − J)⁻¹ ∂f/∂(·)`` with the inverse by ``solve``.

    Args:
        twice: whether that derivative may be differentiated again.
        waits: whether ``solve`` waits for the device, so that `torch.compile` cannot trace it.
    """
    if torch.compiler.is_compiling():
        value = value.detach()
        image = f(value)
        if not image.requires_grad:
            return image
        if not waits:
            traced: Tensor = _Traced.apply(image, value, f, solve)
            return traced
    if is_transforming():
        return _attach_transformed(f, value, solve)
    start = Start.of(value)
    closed = _Closed(start)
    with closed:
        image = f(start)
    plain, tangent = forward_ad.unpack_dual(image) if is_pushing_forward() else (image, None)
    if tangent is not None:
        with no_forward_mode():
            tangent = solve(lambda t: _forward_product(f, value, t), tangent.detach())
    if next(leaves_of(image), None) is None:
        attached = plain.detach()
    else:
        # Some are met out of sight: the parameters of what torch.jit has compiled.
        closed_over = (*closed.met, *leaves_of(image, known=closed.met))
        rule = _Rule(f, value, start, image, solve, twice)
        attached = _Attached.apply(rule, plain, *closed_over)
    return attached if tangent is None else forward_ad.make_dual(attached, tangent)


class _Rule:
    """What the backward pass needs to know."""

    def __init__(
        self, f: Map, value: Tensor, start: Tensor, image: Tensor, solve: Solve, twice: bool
    ) -> None:
        self.f, self.value, self.solve, self.twice = f, value, solve, twice
        self.start, self.image = start, image

    def transposed(self, w: Tensor) -> Tensor:
        """``Jᵀ w``."""
        return _product(self.image, self.start, w)


class _Attached(torch.autograd.Function):
    """The image; its gradient is solved for before it goes on through the graph of ``f``.

    When the gradient is to be differentiated again, it does not go there but straight to what
    ``f`` closed over, by `_Differentiable`.
    """

    @staticmethod
    def forward(ctx: Any, rule: _Rule, image: Tensor, *closed: Tensor) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(*closed)
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        closed = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return (None, ctx.rule.solve(ctx.rule.transposed, v), *(None for _ in closed))
        if not ctx.rule.twice:
            raise RuntimeError(
                "This gradient cannot be differentiated again (create_graph=True), since it is "
                "no derivative of a function: use Implicit, or RAG, Phantom or BPTT."
            )
        return (None, None, *_Differentiable.apply(ctx.rule, v, *closed))


class _Differentiable(torch.autograd.Function):
    """``g = (∂f/∂θ)ᵀ w`` with ``w = (I − Jᵀ)⁻¹ v``, and the derivative of ``⟨c, g⟩``.

    With ``λ = (I − J)⁻¹ (∂f/∂θ) c`` and the scalar ``h = ⟨w, (∂f/∂θ) c + J λ⟩`` as a function of
    ``y`` and ``θ``, the derivative by ``v`` is ``λ`` and that by ``θ`` is
    ``∂h/∂θ + (∂f/∂θ)ᵀ (I − Jᵀ)⁻¹ ∂h/∂y`` (method of Lagrange multipliers).
    """

    @staticmethod
    def forward(ctx: Any, rule: _Rule, v: Tensor, *closed: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            y = rule.value.detach().requires_grad_()
            image = rule.f(y)
        w = rule.solve(lambda w: _product(image, y, w), v)
        ctx.rule = rule
        ctx.save_for_backward(w, *closed)
        return torch.autograd.grad(image, closed, w, allow_unused=True)

    @staticmethod
    def backward(ctx: Any, *c: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Implicit can be differentiated twice, not three times: use BPTT, or the "
                "transforms of torch.func."
            )
        rule: _Rule = ctx.rule
        saved, *closed = ctx.saved_tensors
        with torch.enable_grad():
            y = rule.value.detach().requires_grad_()
            w = saved.detach().requires_grad_()
            image = rule.f(y)
            found = torch.autograd.grad(
                image, (y, *closed), w, create_graph=True, allow_unused=True
            )
        back = found[0] if found[0] is not None else torch.zeros_like(y)
        pairs = [
            (g, d) for g, d in zip(found[1:], c, strict=True) if g is not None and d is not None
        ]
        pushed = _combined([g for g, _ in pairs], [w], [d for _, d in pairs])[0]
        if pushed is None:
            pushed = torch.zeros_like(w)
        multiplier = rule.solve(lambda t: _product(back, w, t), pushed)
        sums = _combined(
            [back, *(g for g, _ in pairs)], [y, *closed], [multiplier, *(d for _, d in pairs)]
        )
        by_y, by_closed = sums[0], list(sums[1:])
        if by_y is not None:
            through = rule.solve(lambda u: _product(image, y, u), by_y)
            further = torch.autograd.grad(image, closed, through, allow_unused=True)
            for i, part in enumerate(further):
                old = by_closed[i]
                by_closed[i] = part if old is None else old if part is None else old + part
        return (None, multiplier, *by_closed)


def _attach_transformed(f: Map, value: Tensor, solve: Solve) -> Tensor:
    """The same under the transforms of `torch.func`: one of derivatives, any number of vmaps."""
    if derivatives() > 1:
        raise RuntimeError(
            "Implicit, Auto and Neumann know first derivatives under torch.func. For second ones "
            "use torch.autograd (Implicit: create_graph=True, torch.autograd.functional.hessian), "
            "or RAG, Phantom or BPTT."
        )
    value = value.detach()
    vjp: Any = torch.func.vjp  # whose annotation is of three results, for has_aux
    image, transpose = vjp(f, value)

    def transposed(w: Tensor) -> Tensor:
        product: Tensor = transpose(w)[0]
        return product

    def forward(t: Tensor) -> Tensor:
        product: Tensor = vjp(transposed, torch.zeros_like(t))[1](t)[0]
        return product

    attached: Tensor = _Inverse.apply(
        image, lambda v: solve(transposed, v), lambda t: solve(forward, t)
    )
    return attached


class _Traced(torch.autograd.Function):
    """The image, in a form that `torch.compile` traces whole; with a second application of ``f``.

    It has first derivatives alone, as all that is compiled.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, value: Tensor, f: Map, solve: Solve) -> Tensor:
        ctx.f, ctx.solve = f, solve
        ctx.save_for_backward(value)
        return image.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None, None]:
        (value,) = ctx.saved_tensors
        transpose: Any = torch.func.vjp(ctx.f, value)[1]
        return ctx.solve(lambda w: transpose(w)[0], v), None, None, None


class _Inverse(torch.autograd.Function):
    """The identity, with linear maps that are applied to gradients and tangents."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, backward: Map, forward: Map) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.solve_backward, ctx.solve_forward = inputs

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        return ctx.solve_backward(v), None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:
        return ctx.solve_forward(t)


class _Closed(TorchFunctionMode):
    """Collects the tensors from outside that require gradient, as ``f`` meets them."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        assert start.grad_fn is not None
        self.began = start.grad_fn._sequence_nr()
        self.found: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad and self._is_from_outside(leaf):
                self.found[id(leaf)] = leaf
        return func(*args, **kwargs)

    def _is_from_outside(self, x: Tensor) -> bool:
        # Autograd numbers its nodes as they are made, out of sight of this mode as well.
        return x.grad_fn is None or x.grad_fn._sequence_nr() < self.began

    @property
    def met(self) -> tuple[Tensor, ...]:
        """The tensors, in the order in which they were met."""
        return tuple(self.found.values())


def _product(image: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """``(∂image/∂y)ᵀ w``; zero where there is no dependence."""
    if not image.requires_grad:
        return torch.zeros_like(w)
    (product,) = torch.autograd.grad(image, y, w, retain_graph=True, allow_unused=True)
    return torch.zeros_like(w) if product is None else product


def _combined(
    outputs: list[Tensor], inputs: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``Σ ⟨weight, output⟩``; None where there is no dependence."""
    reached = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not reached:
        return tuple(None for _ in inputs)
    return torch.autograd.grad(
        [o for o, _ in reached],
        inputs,
        [w for _, w in reached],
        retain_graph=True,
        allow_unused=True,
    )


def _forward_product(f: Map, value: Tensor, t: Tensor) -> Tensor:
    """``J t`` as the derivative of ``u ↦ Jᵀu``, since forward mode does not nest."""
    with torch.enable_grad():
        y = value.detach().requires_grad_()
        image = f(y)
        u = torch.zeros_like(image, requires_grad=True)
        (back,) = torch.autograd.grad(image, y, u, create_graph=True, allow_unused=True)
    return torch.zeros_like(t) if back is None else _product(back, u, t)
