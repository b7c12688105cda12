"""Weights whose Lipschitz constant is held below a bound, through torch's parametrizations.

Spectral normalisation after T. Miyato et al., *Spectral normalization for generative adversarial
networks*, ICLR 2018, and weight normalisation after T. Salimans and D. P. Kingma, NeurIPS 2016,
both as a cap: a weight within its bound is left as it is.  For a convolution the norm of the kernel
as a matrix is not that of the map, but ``‖conv‖₂ ≤ √(k₁k₂…) ‖K‖₂``, as each input element meets
each element of the kernel once at most (Y. Tsuzuku, I. Sato and M. Sugiyama, *Lipschitz-margin
training*, NeurIPS 2018).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from implicit.arguments import check_number
from implicit.per_solve import PerSolve
from implicit.transforms import is_transforming

Method = Literal["spectral", "weight"]
Module = TypeVar("Module", bound=nn.Module)

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_POWER_STEPS = 3


def contract(module: Module, bound: float = 0.9, *, method: Method = "spectral") -> Module:
    """Hold the Lipschitz constant of every linear and convolutional layer at ``bound`` or below.

    The bound is that of each layer in the l2 norm.  What it makes of the whole of ``f`` depends on
    what lies between: ``tanh(Wy + x)`` is a contraction for ``bound < 1``, ``y + tanh(Wy)`` is not,
    and attention has no Lipschitz constant at all.  `lipschitz_estimate` measures it.

    ``"spectral"``: ``W · min(1, bound / ‖W‖₂)``, with the norm by power iteration.  It starts from
    the exact singular vector and moves by three steps in the first training call of each solve (see
    `renew`), never within one: throughout a solve ``f`` is the same map.  Where no solve was ever
    announced it moves at every training call, as torch's ``spectral_norm`` does.  The norm is
    found from below, so a weight that changes fast may exceed its bound by a little for a while.

    ``"weight"``: torch's ``weight_norm``, ``W = g v / ‖v‖`` row by row, times
    ``min(1, bound / ‖W‖_F)``.  The bound is certain, as ``‖W‖₂ ≤ ‖W‖_F``, there is nothing to
    track, and it is the narrower by up to the square root of the rank.

    Args:
        module: changed in place, all its ``Linear``, ``Conv`` and ``ConvTranspose`` layers.
        bound: of each layer, above 0.
        method: ``"spectral"`` or ``"weight"``.  The latter replaces parameters (``g`` and ``v`` for
            ``W``): make the optimiser afterwards.

    Returns:
        The module itself; `uncontract` takes the normalisation away again.

    Raises:
        ValueError: if there is no such layer, ``bound`` or ``method`` is none, or if a layer is
            parametrized already, has no weight yet (lazy), or pads with copies of its input
            (``"reflect"``, ``"replicate"``), which the bound does not cover.  Nothing is changed.

    Example:
        >>> import torch
        >>> layer = contract(torch.nn.Linear(3, 3, bias=False), bound=0.5)
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) < 0.5 + 1e-6)
        True
    """
    check_number("contract", "bound", bound, above=0)
    if not isinstance(module, nn.Module):
        raise TypeError(f"contract: {module!r} is no torch.nn.Module and has no weights.")
    if method not in ("spectral", "weight"):
        raise ValueError(f"contract(method={method!r}): use 'spectral' or 'weight'.")
    layers = {name: m for name, m in module.named_modules() if isinstance(m, _LAYERS)}
    if not layers:
        raise ValueError(
            f"contract: {type(module).__name__} has nothing to normalise: no linear or "
            "convolutional layer."
        )
    for name, layer in layers.items():
        _check(f"{type(layer).__name__} {name!r}" if name else type(layer).__name__, layer)
    for layer in layers.values():
        cap: _Cap
        if method == "spectral":
            cap = _SpectralCap(layer, bound)
        else:
            parametrizations.weight_norm(layer, "weight", dim=0)
            cap = _FrobeniusCap(layer, bound)
        parametrize.register_parametrization(layer, "weight", cap)
    return module


def uncontract(module: Module) -> Module:
    """Undo `contract`: every weight becomes an ordinary parameter, with the value it had last.

    Raises:
        ValueError: if no layer of ``module`` was contracted.

    Example:
        >>> import torch
        >>> layer = uncontract(contract(torch.nn.Linear(3, 3)))
        >>> [name for name, _ in layer.named_parameters()]
        ['bias', 'weight']
    """
    capped = [
        layer
        for layer in module.modules()
        if parametrize.is_parametrized(layer, "weight")
        and any(
            isinstance(m, _Cap) for m in layer.get_submodule("parametrizations.weight").children()
        )
    ]
    if not capped:
        raise ValueError(f"uncontract: nothing in {type(module).__name__} was contracted.")
    for layer in capped:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return module


class _Cap(nn.Module):
    """``W · min(1, limit / norm)`` for each group of a layer, whose map is their block diagonal."""

    def __init__(self, layer: nn.Module, bound: float) -> None:
        super().__init__()
        self.groups: int = getattr(layer, "groups", 1)
        self.bound = bound
        self.limit = bound / math.sqrt(math.prod(getattr(layer, "kernel_size", ())))

    def matrices(self, weight: Tensor) -> Tensor:
        """``(groups, rows, columns)``, in float32 or better."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1).to(dtype)

    @abstractmethod
    def norm(self, matrices: Tensor) -> Tensor:
        """``(groups,)``."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrices = self.matrices(weight)
            scale = self.limit / self.norm(matrices).clamp(min=self.limit)
            return (matrices * scale[:, None, None]).reshape(weight.shape).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What to store for a weight that is assigned: a weight within the bound is itself."""
        return weight

    def extra_repr(self) -> str:
        return f"bound={self.bound}"


class _FrobeniusCap(_Cap):
    def norm(self, matrices: Tensor) -> Tensor:
        return torch.linalg.vector_norm(matrices, dim=(1, 2))


class _SpectralCap(_Cap, PerSolve):
    """``‖Mv‖`` for the leading right singular vector ``v`` of each group, which is followed."""

    per_solve = ("announced", "due", "vector")
    vector: Tensor

    def __init__(self, layer: nn.Module, bound: float) -> None:
        super().__init__(layer, bound)
        matrices = self.matrices(layer.get_parameter("weight").detach())
        _, _, rows = torch.linalg.svd(matrices, full_matrices=False)
        self.register_buffer("vector", rows[:, 0].contiguous())
        self.announced, self.due = False, True

    def renew(self) -> None:
        self.announced = self.due = True

    def norm(self, matrices: Tensor) -> Tensor:
        # What torch.func computes must not outlive its transform in a buffer.
        if self.training and self.due and not is_transforming():
            self.vector = self._followed(matrices.detach())
            self.due = not self.announced
        # A copy: DistributedDataParallel writes into buffers that a backward pass may still need.
        vector = self.vector.to(matrices.dtype, copy=True)
        return torch.linalg.vector_norm(torch.einsum("grc,gc->gr", matrices, vector), dim=1)

    @torch.no_grad()
    def _followed(self, matrices: Tensor) -> Tensor:
        vector = self.vector.to(matrices.dtype)
        for _ in range(_POWER_STEPS):
            step = torch.einsum(
                "grc,gr->gc", matrices, torch.einsum("grc,gc->gr", matrices, vector)
            )
            length = torch.linalg.vector_norm(step, dim=1, keepdim=True)
            # A weight of zeros would leave no direction to go on from.
            vector = torch.where(length > 0, step / length, vector)
        return vector.to(self.vector.dtype)


def _check(name: str, layer: nn.Module) -> None:
    """Raise `ValueError` if the cap of ``layer`` would not hold, or could not be put on."""
    if parametrize.is_parametrized(layer, "weight"):
        raise ValueError(
            f"contract: the weight of {name} is parametrized already. Remove that first "
            "(implicit.uncontract, or torch.nn.utils.parametrize.remove_parametrizations)."
        )
    if nn.parameter.is_lazy(layer.get_parameter("weight")):
        raise ValueError(f"contract: {name} has no weight yet. Call the module once before.")
    padding = getattr(layer, "padding_mode", "zeros")
    if padding not in ("zeros", "circular"):
        raise ValueError(
            f"contract: {name} pads with padding_mode={padding!r}, which repeats elements of its "
            "input, and the bound does not hold for it. Use 'zeros' or 'circular'."
        )
