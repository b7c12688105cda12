"""The state of a fixed-point problem and its flat view.

A state is a tensor or any pytree of tensors (tuples, lists, dicts, named tuples) whose first
dimension is the batch.  Solvers and gradients know nothing of pytrees: they work on a single
matrix of shape ``(B, D)``, one row per sample, in float32 or better.  `Layout` holds what is
needed to go from one view to the other and refuses, by name, whatever does not fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicit.autocast import autocast_dtype
from implicit.per_solve import holding

State = Any
"""A tensor or a pytree of tensors, batch first."""

Select = Callable[[tuple[Any, ...], Tensor], tuple[Any, ...]]
"""``select(args, rows)``: the arguments of ``f`` for the samples ``rows (k,)`` alone."""


class StateError(ValueError):
    """A state that cannot be solved for, or a map that does not return what it was given."""


class Layout:
    """Structure, shapes, dtypes and device of a state; packs it to ``(B, D)`` and back.

    The matrix has the widest dtype of the leaves, and never less than float32: half-precision
    states are solved in float32 and handed to ``f`` in their own dtype.

    Raises:
        StateError: if the state holds no tensor, leaves that are not real floating point,
            zero-dimensional leaves, an empty batch, or leaves that disagree about batch or device.

    Example:
        >>> import torch
        >>> layout = Layout({"a": torch.zeros(2, 3), "b": torch.ones(2, 4, 5)})
        >>> layout.pack({"a": torch.zeros(2, 3), "b": torch.ones(2, 4, 5)}).shape
        torch.Size([2, 23])
    """

    def __init__(self, y0: State) -> None:
        leaves, self.spec = pytree.tree_flatten_with_path(y0)
        self.bare = isinstance(y0, Tensor)
        self.names = [pytree.keystr(path) for path, _ in leaves]
        tensors = [leaf for _, leaf in leaves]
        if not tensors:
            raise StateError("y0 holds no tensor: pass a tensor, or a pytree of tensors.")
        for name, leaf in zip(self.names, tensors, strict=True):
            _check_leaf(name, leaf)
        self.batch = tensors[0].shape[0]
        self.device = tensors[0].device
        for name, leaf in zip(self.names, tensors, strict=True):
            if leaf.shape[0] != self.batch:
                raise StateError(
                    f"y0{name} has {leaf.shape[0]} samples and y0{self.names[0]} has {self.batch}: "
                    "the first dimension of every leaf is the batch and must be the same."
                )
            if leaf.device != self.device:
                raise StateError(
                    f"y0{name} is on {leaf.device} and y0{self.names[0]} on {self.device}: "
                    "move the whole state to one device."
                )
        self.shapes = [leaf.shape for leaf in tensors]
        self.dtypes = [leaf.dtype for leaf in tensors]
        self.sizes = [leaf[0].numel() for leaf in tensors]
        self.dtype = torch.float32
        for dtype in self.dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype)
        self.narrows = any(dtype != self.dtype for dtype in self.dtypes)
        self.eps = max(torch.finfo(dtype).eps for dtype in self.dtypes)

    def part(self, batch: int) -> Layout:
        """The layout of the same state with fewer samples."""
        fewer = copy.copy(self)
        fewer.batch = batch
        fewer.shapes = [torch.Size((batch, *shape[1:])) for shape in self.shapes]
        return fewer

    def pack(self, y: State) -> Tensor:
        """The state as a ``(B, D)`` matrix in the working dtype (differentiable)."""
        if self.bare:
            flat = y if y.dim() == 2 else y.reshape(self.batch, self.sizes[0])
            return flat if flat.dtype == self.dtype else flat.to(self.dtype)
        leaves = zip(pytree.tree_leaves(y), self.sizes, strict=True)
        rows = [leaf.reshape(self.batch, size).to(self.dtype) for leaf, size in leaves]
        return torch.cat(rows, dim=1)

    def unpack(self, flat: Tensor) -> State:
        """The state that a ``(B, D)`` matrix stands for, each leaf in its own shape and dtype."""
        if self.bare:
            y = flat if len(self.shapes[0]) == 2 else flat.reshape(self.shapes[0])
            return y.to(self.dtypes[0]) if self.narrows else y
        rows = flat.split(self.sizes, dim=1)
        leaves = [
            row.reshape(shape).to(dtype)
            for row, shape, dtype in zip(rows, self.shapes, self.dtypes, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.spec)

    def check(self, fy: State, name: str = "f", advice: str = "") -> None:
        """Raise `StateError` unless ``fy``, what ``name`` returned, has the form of the state."""
        if self.bare and self._fits(fy):
            return
        leaves, spec = pytree.tree_flatten(fy)
        if spec != self.spec:
            raise StateError(
                f"{name} returned another structure than it was given: {_shown(spec)} instead of "
                f"{_shown(self.spec)}. Dictionaries keep the order of their keys. {advice}"
            )
        for leaf_name, leaf, shape, dtype in zip(
            self.names, leaves, self.shapes, self.dtypes, strict=True
        ):
            if not isinstance(leaf, Tensor):
                raise StateError(f"{name}(y){leaf_name} is a {type(leaf).__name__}, not a tensor.")
            if leaf.shape != shape:
                raise StateError(
                    f"{name}(y){leaf_name} has shape {tuple(leaf.shape)} where y0{leaf_name} has "
                    f"{tuple(shape)}: {name} must map a state to a state of the same shape."
                )
            if leaf.device != self.device:
                raise StateError(
                    f"{name}(y){leaf_name} is on {leaf.device} and y0{leaf_name} on {self.device}: "
                    f"move y0, or what is behind {name}, to one device."
                )
            if leaf.dtype not in (dtype, autocast_dtype(self.device)):
                other = f"start from y0 in {leaf.dtype}, or cast"
                advice = other if leaf.is_floating_point() else "return real floating point"
                raise StateError(
                    f"{name}(y){leaf_name} is {leaf.dtype} where y0{leaf_name} is {dtype}: "
                    f"{advice} inside {name}."
                )

    def _fits(self, fy: Any) -> bool:
        return (
            isinstance(fy, Tensor)
            and fy.shape == self.shapes[0]
            and fy.dtype == self.dtypes[0]
            and fy.device == self.device
        )


class FlatMap:
    """``f`` as a map of ``(B, D)`` matrices; checks what it returns and keeps its last aux."""

    def __init__(
        self,
        f: Callable[..., Any],
        layout: Layout,
        args: tuple[Any, ...] = (),
        has_aux: bool = False,
        select: Select | None = None,
    ) -> None:
        self.f, self.layout, self.args, self.has_aux = f, layout, args, has_aux
        self.select = select
        self.aux: Any = None
        # Kept, because later evaluations (in the backward pass) are to be like the first.
        self.autocast = autocast_dtype(layout.device)

    @property
    def eps(self) -> float:
        """Machine epsilon of the narrowest dtype that ``f`` is known to compute in."""
        narrow = 0.0 if self.autocast is None else torch.finfo(self.autocast).eps
        return max(self.layout.eps, narrow)

    def __call__(self, flat: Tensor) -> Tensor:
        device = self.layout.device
        if autocast_dtype(device) == self.autocast:
            return self._image(flat)
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            return self._image(flat)

    def _image(self, flat: Tensor) -> Tensor:
        counts = not (torch.compiler.is_compiling() or flat.is_inference())  # its writes
        version = flat._version if counts else 0
        result = self.f(self.layout.unpack(flat), *self.args)
        if counts and flat._version != version:
            raise StateError(
                "f wrote to the state that it was given: by an operation in place "
                "(ReLU(inplace=True), y.add_), or because it returns a buffer that it uses again "
                "(out=), which has become the state. Use the other form, or return a clone."
            )
        if self.has_aux:
            if not isinstance(result, tuple) or len(result) != 2:
                raise StateError("has_aux=True: f must return a pair (state, aux).")
            result, self.aux = result
        self.layout.check(
            result, advice="Return the state first, and set has_aux=True if f returns (state, aux)."
        )
        return self.layout.pack(result)

    def hold(self) -> None:
        """Keep what is the same throughout a solve as it is now, whatever else is solved later."""
        if not torch.compiler.is_compiling():
            self.f = holding(self.f)

    def part(self, rows: Tensor) -> FlatMap:
        """The map for the samples ``rows (k,)`` alone."""
        if self.select is not None:
            args = self.select(self.args, rows)
            if not isinstance(args, tuple):
                raise TypeError(
                    f"select returned {type(args).__name__}: it must return the tuple of "
                    "arguments for the samples asked for."
                )
        else:
            args = pytree.tree_map(lambda leaf: self._rows_of(leaf, rows), self.args)
        return FlatMap(self.f, self.layout.part(len(rows)), args, self.has_aux, self.select)

    def _rows_of(self, leaf: Any, rows: Tensor) -> Any:
        belongs = (
            isinstance(leaf, Tensor)
            and not isinstance(leaf, torch.nn.Parameter)
            and leaf.dim() > 0
            and leaf.shape[0] == self.layout.batch
        )
        if not belongs:
            return leaf
        kept = leaf.index_select(0, rows.to(leaf.device))
        # Which forgets the layout of maps, and readers of maps may be slower on another.
        if leaf.dim() == 4 and leaf.is_contiguous(memory_format=torch.channels_last):
            kept = kept.contiguous(memory_format=torch.channels_last)
        return kept


def _shown(spec: Any) -> str:
    return " ".join(str(spec).split())


def _check_leaf(name: str, leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise StateError(f"y0{name} is a {type(leaf).__name__}; every leaf must be a tensor.")
    if not leaf.is_floating_point():
        raise StateError(
            f"y0{name} is {leaf.dtype}: fixed points are solved over the real numbers. "
            "Cast it (y0.float()), or view a complex state as real (torch.view_as_real)."
        )
    if leaf.dtype.itemsize < 2:
        raise StateError(f"y0{name} is {leaf.dtype}, which has no arithmetic: use y0.float().")
    if leaf.layout is not torch.strided:
        raise StateError(f"y0{name} is {leaf.layout}: a state must be dense (y0.to_dense()).")
    if leaf.dim() == 0:
        raise StateError(
            f"y0{name} has no dimension: the first one is the batch. Use y0.reshape(1)."
        )
    if leaf.shape[0] == 0:
        raise StateError(f"y0{name} has shape {tuple(leaf.shape)}: the batch is empty.")
