"""``deqdet export``: a checkpoint as one graph, to be run without this library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from detection.commands.base import Command
from detection.distributed import Distributed
from detection.export import export_onnx, export_program
from detection.predictor import load


@dataclass(frozen=True)
class Export(Command):
    """Write a checkpoint as ONNX (.onnx) or as a program of torch.export (.pt2).

    The number of refinements is fixed, and so is the size of the images.

    Args:
        checkpoint: a .safetensors file, the folder of a run, or a model on the Hugging Face hub.
        out: file to write, must not exist; its ending says which format.
        size: height and width of the images that it will be given.
        steps: refinements; by default as many as the recipe takes at most.
    """

    checkpoint: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    size: tuple[int, int]
    steps: int | None = None

    def check(self) -> None:
        if self.out.suffix not in (".onnx", ".pt2"):
            raise ValueError(f"{self.out}: the name must end in .onnx or .pt2.")
        if self.out.exists():
            raise ValueError(f"{self.out} exists and is left as it is. Choose another name.")

    def run(self, distributed: Distributed, console: Console) -> None:
        write = export_onnx if self.out.suffix == ".onnx" else export_program
        path = write(load(self.checkpoint), self.out, size=self.size, steps=self.steps)
        console.print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
