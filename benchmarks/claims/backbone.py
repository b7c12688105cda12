"""What all arms begin from where there are no ImageNet weights: a backbone that knows the classes.

The paper's detectors begin from ImageNet weights.  A small backbone has none, and from random
weights a short training learns where things are long before what they are.  So the objects of the
training images are cut out and classified, once, and every arm and seed begins from that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from detection.data import eval_transform, load_coco_folder
from detection.data.coco import CocoDataset
from detection.files import replacing
from detection.models.backbones import Backbone, build_backbone
from detection.models.detector import PIXEL_MEAN, PIXEL_STD
from detection.training.recipe import Recipe

SIDE = 64
"""Of the cut-outs, pixels."""
AROUND = 1.4
"""Side of a cut-out over the longer side of its object."""
SHIFT, STRETCH = 0.15, 0.35
"""Largest shift of a cut-out, over its side, and largest logarithm of how it is stretched."""
COPIES = 2
"""Cut-outs of each training object."""
BATCH, RATE, DECAY, SMOOTHING = 64, 2e-3, 0.05, 0.1


def prepare_backbone(
    root: Path, recipe: Recipe, epochs: int, path: Path, device: torch.device, console: Console
) -> Path:
    """Train the backbone of a recipe to name the objects of a data set, or find it trained.

    Args:
        root: of the data.
        recipe: with that backbone.
        epochs: passes over the cut-outs of the training objects.
        path: where the weights are, or will be.

    Returns:
        ``path``.
    """
    if path.exists():
        return path
    console.print(f"Teaching a backbone the classes, once for all arms ({epochs} epochs) …")
    torch.manual_seed(0)
    plain = eval_transform(recipe.augmentation)
    train_set, val_set = load_coco_folder(root, plain, plain)
    network = Classifier(build_backbone(recipe.model.backbone.name), len(train_set.categories)).to(
        device
    )
    crops, classes = cut_out(train_set, COPIES)
    fit(network, crops, classes, epochs)
    right = accuracy(network, *cut_out(val_set, 0))
    console.print(f"It names {100 * right:.0f} % of the validation objects.")
    with replacing(path) as temporary:
        save_file(network.backbone.state_dict(), temporary)
    return path


class Classifier(nn.Module):
    """Names a cut-out by what all four levels of a backbone say of it."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(sum(backbone.channels), classes)
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN)[:, None, None])
        self.register_buffer("deviation", torch.tensor(PIXEL_STD)[:, None, None])

    def forward(self, crops: Tensor) -> Tensor:
        """Logits ``(n, K)`` of cut-outs ``(n, 3, SIDE, SIDE)`` uint8."""
        levels = self.backbone((crops - self.mean) / self.deviation)
        return self.head(torch.cat([level.mean(dim=(2, 3)) for level in levels], dim=1))


def fit(network: Classifier, crops: Tensor, classes: Tensor, epochs: int) -> None:
    """Minimise the cross entropy, on one cycle of the learning rate."""
    steps = max(1, len(crops) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=epochs * steps, pct_start=0.1
    )
    device = network.head.weight.device
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(crops))
        for batch in order.split(BATCH)[:steps]:
            logits = network(crops[batch].to(device))
            loss = F.cross_entropy(logits, classes[batch].to(device), label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(network: Classifier, crops: Tensor, classes: Tensor) -> float:
    """Share of cut-outs that are named right."""
    network.eval()
    device = network.head.weight.device
    named = torch.cat([network(part.to(device)).argmax(dim=1).cpu() for part in crops.split(256)])
    return float((named == classes).float().mean())


def cut_out(dataset: CocoDataset, copies: int) -> tuple[Tensor, Tensor]:
    """Squares around all objects ``(n, 3, SIDE, SIDE)`` uint8, and their classes ``(n,)``.

    Args:
        copies: of each object, shifted and stretched at random; 0 for one that is neither.
    """
    found = list(_cut_out(dataset, copies))
    return torch.cat([crops for crops, _ in found]), torch.cat([classes for _, classes in found])


def _cut_out(dataset: CocoDataset, copies: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for number in range(len(dataset)):
        image, target = dataset[number]
        boxes = target.boxes.repeat(max(copies, 1), 1)
        if not len(boxes):
            continue
        low, high = boxes[:, :2], boxes[:, 2:]
        centre, side = (low + high) / 2, AROUND * (high - low).amax(dim=1, keepdim=True)
        if copies:
            drawn = 2 * torch.rand(len(boxes), 3, generator=generator) - 1
            centre = centre + SHIFT * side * drawn[:, :2]
            side = side * (STRETCH * drawn[:, 2:]).exp()
        squares = torch.cat([centre - side / 2, centre + side / 2], dim=1)
        crops = roi_align(image[None].float(), [squares], SIDE, sampling_ratio=2, aligned=True)
        classes = target.labels.repeat(max(copies, 1))
        yield crops.round().clamp(0, 255).to(torch.uint8), classes
