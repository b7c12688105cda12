"""How the weights move: parameter groups, AdamW, the learning-rate schedules, the average.

The groups and schedules are those of the published configurations of DEQDet: a small rate for
backbone and neck, a larger one with a stronger decay for the decoder; a linear warm-up; ten times
less after two thirds and eleven twelfths of the epochs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class OptimizationConfig:
    """Everything about the optimisation of a run.

    Args:
        lr: learning rate of backbone, neck and queries.
        decoder_lr_multiplier: of ``lr``, for the decoder.
        weight_decay: of backbone, neck and queries, biases and norms included.
        decoder_weight_decay: of the decoder, biases and norms included.
        spare_norms: for Swin: norms and relative-position tables of the backbone learn at a tenth
            of ``lr``, and neither they nor the norm of the neck decay.
        betas: of AdamW.
        clip_norm: largest L2 norm of the whole gradient.
        schedule: ``"step"``, ten times less after each milestone; or ``"one_cycle"``, half a
            cosine from the end of the warm-up down to 0.
        warmup_steps: linear warm-up from a thousandth; a shorter run never leaves it.
        milestones: as fractions of the epochs: epochs 8 and 11 of 12, or 16 and 22 of 24.
        epochs: passes through the training data.
        batch_size: images per step, over all processes.
        accumulate: parts that each process does its images of a step in, one after the other,
            for less memory; the step is the same.
        precision: of the layers' products.  Boxes, matching, losses and weights are always in
            float32.  ``"float16"`` scales the loss, and leaves out steps that overflow.

    Example:
        >>> OptimizationConfig(lr=0.0)
        Traceback (most recent call last):
            ...
        ValueError: OptimizationConfig(lr=0.0): must be positive and finite.
    """

    lr: float = 2.5e-5
    decoder_lr_multiplier: float = 4.0
    weight_decay: float = 0.01
    decoder_weight_decay: float = 0.1
    spare_norms: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0
    schedule: Literal["step", "one_cycle"] = "step"
    warmup_steps: int = 500
    milestones: tuple[float, ...] = (8 / 12, 11 / 12)
    epochs: int = 12
    batch_size: int = 16
    accumulate: int = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "accumulate")
        positive = ("lr", "decoder_lr_multiplier", "clip_norm", *counts)
        for name in (*positive, "weight_decay", "decoder_weight_decay", "warmup_steps"):
            value, strict = getattr(self, name), name in positive
            if not math.isfinite(value) or value < 0 or (strict and value == 0):
                wanted = "positive and finite" if strict else "finite and not negative"
                raise ValueError(f"OptimizationConfig({name}={value}): must be {wanted}.")
        if self.schedule not in ("step", "one_cycle"):
            raise ValueError(
                f"OptimizationConfig(schedule={self.schedule!r}): use 'step' or 'one_cycle'."
            )
        if self.precision not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"OptimizationConfig(precision={self.precision!r}): use 'float32', 'bfloat16' or "
                "'float16'."
            )
        if not all(0 < m <= 1 for m in self.milestones):
            raise ValueError(
                f"OptimizationConfig(milestones={self.milestones}): fractions of the epochs, "
                "in (0, 1]."
            )


def parameter_groups(model: nn.Module, config: OptimizationConfig) -> list[dict[str, Any]]:
    """Every trainable parameter of the model once, in groups of one learning rate and decay.

    Parameters below ``model.decoder`` form the group ``decoder``, all others ``base``;
    ``spare_norms`` takes ``backbone_norms`` and ``neck_norms`` out of ``base``.

    Raises:
        ValueError: if the model has no ``decoder``, or nothing to train.

    Example:
        >>> model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
        >>> groups = parameter_groups(model, OptimizationConfig())
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('base', 2.5e-05, 0.01), ('decoder', 0.0001, 0.1)]
    """
    children = [name for name, _ in model.named_children()]
    if "decoder" not in children:
        raise ValueError(
            f"parameter_groups: the model has no part named 'decoder', only {children}. "
            "Give the detector itself, without a wrapper such as DistributedDataParallel."
        )
    settings = {
        "base": (config.lr, config.weight_decay),
        "backbone_norms": (0.1 * config.lr, 0.0),
        "neck_norms": (config.lr, 0.0),
        "decoder": (config.lr * config.decoder_lr_multiplier, config.decoder_weight_decay),
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in settings}
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                part = f"{path}.{name}".split(".")[0]
                spared = isinstance(module, _NORMS) or name == "relative_position_bias_table"
                if config.spare_norms and spared and part in ("backbone", "neck"):
                    members[f"{part}_norms"].append(parameter)
                else:
                    members["decoder" if part == "decoder" else "base"].append(parameter)
    if not seen:
        raise ValueError("parameter_groups: no parameter of the model requires a gradient.")
    return [
        {"name": name, "params": members[name], "lr": lr, "weight_decay": decay}
        for name, (lr, decay) in settings.items()
        if members[name]
    ]


def make_optimizer(model: nn.Module, config: OptimizationConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) over `parameter_groups`.

    Example:
        >>> model = nn.ModuleDict({"decoder": nn.Linear(2, 2)})
        >>> len(make_optimizer(model, OptimizationConfig()).param_groups)
        1
    """
    return AdamW(parameter_groups(model, config), lr=config.lr, betas=config.betas, fused=True)


def rate_factor(step: int, config: OptimizationConfig, total_steps: int) -> float:
    """What the learning rates are multiplied with at ``step``, counted from 0.

    Example:
        >>> config = OptimizationConfig(warmup_steps=100)
        >>> [rate_factor(step, config, 1200) for step in (0, 100, 799)]
        [0.001, 1.0, 1.0]
        >>> round(rate_factor(800, config, 1200), 6), round(rate_factor(1199, config, 1200), 6)
        (0.1, 0.01)
    """
    warmup = config.warmup_steps
    rise = 0.001 + 0.999 * step / warmup if step < warmup else 1.0
    if config.schedule == "step":
        return rise * 0.1 ** sum(step >= round(m * total_steps) for m in config.milestones)
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return rise * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def make_schedule(
    optimizer: Optimizer, config: OptimizationConfig, steps_per_epoch: int
) -> LambdaLR:
    """The schedule of the configuration, to be stepped after every optimiser step.

    Example:
        >>> model = nn.ModuleDict({"decoder": nn.Linear(2, 2)})
        >>> config = OptimizationConfig(warmup_steps=0, schedule="one_cycle")
        >>> make_schedule(make_optimizer(model, config), config, 100).get_last_lr()
        [0.0001]
    """
    if steps_per_epoch < 1:
        raise ValueError(f"make_schedule(steps_per_epoch={steps_per_epoch}): at least 1.")
    total_steps = config.epochs * steps_per_epoch
    return LambdaLR(optimizer, lambda step: rate_factor(step, config, total_steps))


def clip_gradients(optimizer: Optimizer, max_norm: float) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most ``max_norm``.

    Returns:
        The norm before that, a scalar on the device; not finite if a gradient is not.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients(torch.optim.SGD([weight]), max_norm=1.0)
        tensor(5.)
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, max_norm)


class ExponentialAverage:
    """Exponential moving average of a model's parameters and floating-point buffers.

    After update ``n = 1, 2, …`` the average is ``a ← a + (1 − d) (θ − a)`` with
    ``d = min(decay, n / (n + 9))``, so that early weights are forgotten quickly.  Integer
    buffers are copied.

    Args:
        model: what is averaged, without a wrapper; the average starts from its weights.
        decay: of the average once it has warmed up, in [0, 1).

    Attributes:
        average_model: a model of its own that holds the average, in evaluation mode.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> average = ExponentialAverage(model, decay=0.99)
        >>> _ = nn.init.constant_(model.bias, 10.0)
        >>> average.update(model)
        >>> average.average_model.bias.requires_grad
        False
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ExponentialAverage(decay={decay}): must lie in [0, 1).")
        self.decay = decay
        self.updates = 0
        self.average_model = copy.deepcopy(model).requires_grad_(False).eval()

    @property
    def current_decay(self) -> float:
        """What the last update kept of the average; 0 before the first."""
        return min(self.decay, self.updates / (self.updates + 9))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights; call it after every optimiser step."""
        self.updates += 1
        decay = self.current_decay
        pairs = list(zip(_tensors(self.average_model), _tensors(model), strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        averages, weights = map(list, zip(*floating, strict=True))
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on."""
        return {"updates": self.updates, "model": self.average_model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a stored average."""
        self.average_model.load_state_dict(state["model"])
        self.updates = int(state["updates"])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
