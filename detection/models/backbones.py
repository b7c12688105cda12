"""Image backbones with features of strides 4, 8, 16 and 32.

ResNet and Swin are torchvision's, without their classifiers; `SmallBackbone` is for images of
some hundred pixels on a CPU, trained from random weights.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


class PretrainedUnavailable(RuntimeError):
    """Weights to start from are neither at hand nor to be fetched, or do not fit."""


class Backbone(nn.Module, ABC):
    """Images ``(B, 3, H, W)`` in, four feature maps out; ``channels`` says how wide each is."""

    channels: tuple[int, int, int, int]

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps ``(B, channels[i], H/s, W/s)`` for ``s`` = 4, 8, 16, 32."""


class ResNetBackbone(Backbone):
    """torchvision's ResNet; its batch norms always use their stored statistics.

    Args:
        name: ``resnet18``, ``resnet50`` or ``resnet101``.
        pretrained: with ImageNet weights.
        frozen_stages: stages without gradient; the stem goes with the first.
    """

    def __init__(self, name: str, *, pretrained: bool, frozen_stages: int) -> None:
        super().__init__()
        if not 0 <= frozen_stages <= 4:
            raise ValueError(f"frozen_stages={frozen_stages}: a ResNet has 4 stages.")
        weights = {"resnet18": "ResNet18_Weights", "resnet50": "ResNet50_Weights"}
        enum = getattr(torchvision.models, weights.get(name, "ResNet101_Weights"))
        network = _torchvision(name, enum.IMAGENET1K_V1 if pretrained else None)
        self.conv1, self.bn1, self.relu = network.conv1, network.bn1, network.relu
        self.maxpool = network.maxpool
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        width = network.fc.in_features
        self.channels = (width // 8, width // 4, width // 2, width)
        frozen = [self.conv1, self.bn1, *stages[:frozen_stages]] if frozen_stages else []
        for module in frozen:
            module.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> ResNetBackbone:
        """As always, but for the batch norms, which keep their statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features


class SwinBackbone(Backbone):
    """torchvision's Swin-S with stochastic depth 0.3 and a LayerNorm on each stage's output."""

    def __init__(self, *, pretrained: bool) -> None:
        super().__init__()
        weights = torchvision.models.Swin_S_Weights.IMAGENET1K_V1 if pretrained else None
        network = _torchvision("swin_s", weights)  # its stochastic depth is 0.3
        self.features = network.features
        width = network.head.in_features
        self.channels = (width // 8, width // 4, width // 2, width)
        # Only the last is among ImageNet's weights: the others have none there.
        self.norms = nn.ModuleList([*(nn.LayerNorm(c) for c in self.channels[:3]), network.norm])

    def forward(self, images: Tensor) -> list[Tensor]:
        x, outputs = images, []
        for i, block in enumerate(self.features):
            x = block(x)
            if i % 2 == 1:  # stages lie between patch embedding and patch mergings
                outputs.append(self.norms[i // 2](x).permute(0, 3, 1, 2).contiguous())
        return outputs


class SmallBackbone(Backbone):
    """A residual network of 3×3 convolutions with group norms, for CPUs.

    Args:
        channels: of the four stages.
    """

    def __init__(self, channels: tuple[int, int, int, int] = (32, 64, 96, 128)) -> None:
        super().__init__()
        self.channels = channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 4, stride=4, bias=False), _norm(channels[0]), nn.ReLU()
        )
        widths = (channels[0], *channels)
        self.stages = nn.ModuleList(
            nn.Sequential(
                _Residual(before, after, stride=1 if i == 0 else 2),
                _Residual(after, after, stride=1),
            )
            for i, (before, after) in enumerate(pairwise(widths))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = _norm(after)
        self.shortcut = (
            nn.Identity()
            if before == after and stride == 1
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), _norm(after))
        )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + residual)


def build_backbone(name: str, *, pretrained: bool = False, frozen_stages: int = 1) -> Backbone:
    """The backbone of a name: ``resnet18``, ``resnet50``, ``resnet101``, ``swin_s``, ``small``.

    Args:
        name: which.
        pretrained: with torchvision's ImageNet weights, fetched on first use.
        frozen_stages: of a ResNet; ignored by the others, which train whole.

    Raises:
        ValueError: if there is no such backbone, or ``small`` is asked for with weights.
        PretrainedUnavailable: if the weights cannot be fetched.

    Example:
        >>> build_backbone("small").channels
        (32, 64, 96, 128)
    """
    if name in ("resnet18", "resnet50", "resnet101"):
        return ResNetBackbone(name, pretrained=pretrained, frozen_stages=frozen_stages)
    if name == "swin_s":
        return SwinBackbone(pretrained=pretrained)
    if name == "small":
        if pretrained:
            raise ValueError("The backbone 'small' has no pretrained weights: pretrained=False.")
        return SmallBackbone()
    raise ValueError(
        f"There is no backbone {name!r}: use resnet18, resnet50, resnet101, swin_s or small."
    )


def load_backbone(backbone: Backbone, path: str | Path) -> None:
    """Load a backbone's weights.

    Args:
        backbone: to load them into.
        path: of a ``.safetensors`` file with its state dict.

    Raises:
        PretrainedUnavailable: if the file cannot be read, or is that of another backbone.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> path = Path(tempfile.mkdtemp()) / "backbone.safetensors"
        >>> save_file(build_backbone("small").state_dict(), path)
        >>> load_backbone(build_backbone("small"), path)
    """
    try:
        backbone.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise PretrainedUnavailable(
            f"{path} holds no weights for this backbone ({type(backbone).__name__}): {error}. Give "
            "a .safetensors file of its state dict, or none (--model.backbone.weights '')."
        ) from error


def _torchvision(name: str, weights: Any) -> Any:
    build: Callable[..., nn.Module] = getattr(torchvision.models, name)
    if weights is None:
        return build(weights=None)
    try:
        return build(weights=weights)
    except (OSError, HTTPException, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        what = "read" if file.exists() else "fetched"
        raise PretrainedUnavailable(
            f"The ImageNet weights of {name} could not be {what} ({error}). Either download "
            f"{weights.url} by hand and put it at {file}, or train from random weights "
            "(--model.backbone.no-pretrained)."
        ) from error


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)
