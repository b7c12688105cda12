"""Train, evaluate and draw DEQDet.

Without arguments this composes the embedded digits data set, trains DEQDet on it from random
weights on whatever the machine has, evaluates it and draws what it found:

    python examples/deqdet_coco.py

Pointed at a folder laid out as COCO 2017 it does the same there, on one GPU or several:

    python examples/deqdet_coco.py --data /path/to/coco --recipe deqdet_r50_1x
    torchrun --nproc_per_node 8 examples/deqdet_coco.py --data /path/to/coco --recipe deqdet_r50_1x

Two options do only a part of it:

    python examples/deqdet_coco.py --evaluate runs/…/checkpoints/best.safetensors
    python examples/deqdet_coco.py --predict a.jpg b.jpg --checkpoint runs/…/best.safetensors

These are `deqdet train`, `deqdet evaluate` and `deqdet predict` in one file; `deqdet` has more.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from detection.commands.base import Command
from detection.commands.console import FAILED, told
from detection.commands.evaluate import Evaluate
from detection.commands.options import read
from detection.commands.predict import Predict
from detection.commands.running import execute
from detection.commands.train import Train
from detection.recipes import recipe, recipe_names


@dataclass(frozen=True)
class Options(Train):
    """Train a detector, or only evaluate (--evaluate) or apply (--predict) one.

    Args:
        evaluate: only evaluate this checkpoint.
        predict: only detect objects in these images, with --checkpoint.
        checkpoint: what to detect with.
    """

    evaluate: Path | None = None
    predict: tuple[str, ...] = ()
    checkpoint: Path | None = None

    def command(self) -> Command:
        """What these options ask for.

        Raises:
            ValueError: if they contradict each other.
        """
        if self.evaluate and self.predict:
            raise ValueError("--evaluate and --predict exclude each other: give one of them.")
        if self.predict and self.checkpoint is None:
            raise ValueError("--predict needs --checkpoint: the .safetensors file of a run.")
        if self.checkpoint and not self.predict:
            raise ValueError(
                "--checkpoint goes with --predict IMAGES; to score it use --evaluate CHECKPOINT."
            )
        if self.resume and (self.evaluate or self.predict):
            raise ValueError("--resume goes with training alone.")
        if self.predict and self.checkpoint:
            return Predict(
                self.predict, self.checkpoint, self.output, self.threshold, device=self.device
            )
        if self.evaluate:
            # What was not changed is as in the recipe of the checkpoint, not in that of --recipe.
            mine, named = self.settings, recipe(self.recipe)
            batch, usual = mine.optimization.batch_size, named.optimization.batch_size
            return Evaluate(
                self.evaluate,
                self.data,
                batch_size=None if batch == usual else batch,
                workers=None if mine.workers == named.workers else mine.workers,
                device=self.device,
                digits=self.digits,
            )
        return self


def main(arguments: list[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        with told(by_all=True):
            default = Options.begun(given)
            description = f"{__doc__}\nRecipes: {', '.join(recipe_names())}"
            options = read(
                Options, given, prog=Path(__file__).name, default=default, description=description
            )
            command = options.command()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED
    return execute(command, Console())


if __name__ == "__main__":
    sys.exit(main())
