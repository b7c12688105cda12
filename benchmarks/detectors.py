"""AP of AdaMixer, RNNDet and DEQDet, and of DEQDet around Sparse R-CNN's layer, on the digits.

    python -m benchmarks.detectors

Every detector gets the same data, backbone, queries, epochs, batches and schedule (the recipes
``…_digits``; AdaMixer and RNNDet have six layer calls, as in the paper) and is trained from three
seeds, but for Sparse R-CNN's layer from one.  Two runs go on at a time, of one thread each.  They
are kept below ``runs/detectors``: one that is finished is not repeated, one that was cut off goes
on from its last epoch.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import device, output_folder, wide_console, write_results
from detection.configuration import to_json
from detection.data import compose_digits, eval_transform, load_coco_folder, train_transform
from detection.recipes import recipe
from detection.training.loop import train
from detection.training.recipe import Recipe

ARMS = {
    "AdaMixer": "adamixer_digits",
    "RNNDet": "rnndet_digits",
    "DEQDet": "deqdet_digits",
    "DEQDet, Sparse R-CNN's layer": "deqdet_sparsercnn_digits",
}
SEEDS = (0, 1, 2)
ONE_SEED = ("DEQDet, Sparse R-CNN's layer",)
"""Arms that are shown to work, not compared: RoIAlign is slow on a CPU."""
EPOCHS = 4
JOBS = 2
CRITICAL = 4.303
"""Of Student's distribution with two degrees of freedom, for an interval of 95 %."""


@dataclass(frozen=True)
class Result:
    """One finished run; AP in [0, 1].

    Attributes:
        config: the whole recipe, to know whether a kept result is of this code.
    """

    arm: str
    seed: int
    AP: float
    AP50: float
    AP_small: float
    AP_medium: float
    parameters: int
    minutes: float
    config: dict[str, Any]


def runs() -> Iterator[tuple[str, Recipe]]:
    """Every arm and seed; all first seeds come first."""
    for seed in SEEDS:
        for arm, name in ARMS.items():
            if seed != SEEDS[0] and arm in ONE_SEED:
                continue
            made = recipe(name)
            optimization = replace(made.optimization, epochs=EPOCHS)
            yield arm, replace(made, optimization=optimization, seed=seed, evaluate_every=EPOCHS)


def run(data: Path, folder: Path, job: tuple[str, Recipe]) -> Result:
    """Train and evaluate one detector, or read what an earlier call found."""
    arm, settings = job
    torch.set_num_threads(1)
    mine = folder / f"{settings.name}-seed{settings.seed}"
    config = json.loads(json.dumps(to_json(settings)))
    kept = mine / "result.json"
    if kept.exists() and (found := json.loads(kept.read_text()))["config"] == config:
        return Result(**found)
    begun = mine / "config.json"
    resume = begun.exists() and json.loads(begun.read_text()) == config
    resume = resume and any((mine / "checkpoints").glob("step_*.safetensors"))
    if not resume:
        shutil.rmtree(mine, ignore_errors=True)
    sets = load_coco_folder(
        data, train_transform(settings.augmentation), eval_transform(settings.augmentation)
    )
    started = time.monotonic()
    trained = train(settings, *sets, mine, resume=resume, console=Console(quiet=True))
    scores = trained.scores
    result = Result(
        arm,
        settings.seed,
        scores.AP,
        scores.AP50,
        scores.AP_small,
        scores.AP_medium,
        sum(p.numel() for p in trained.model.parameters()),
        (time.monotonic() - started) / 60,
        config,
    )
    kept.write_text(json.dumps(asdict(result)) + "\n")
    return result


def table(results: list[Result]) -> Table:
    """Mean and 95 % interval of each arm."""
    table = Table("detector", "parameters", "AP", "AP50", "AP small", "AP medium", "AP by seed")
    for arm in ARMS:
        mine = [result for result in results if result.arm == arm]
        cells = []
        for name in ("AP", "AP50", "AP_small", "AP_medium"):
            values = [100 * getattr(result, name) for result in mine]
            cells.append(f"{np.mean(values):.1f}")
            if len(values) > 1:
                half = CRITICAL * np.std(values, ddof=1) / len(values) ** 0.5
                cells[-1] += f" ± {half:.1f}"
        each = ", ".join(f"{100 * result.AP:.1f}" for result in mine)
        table.add_row(arm, f"{mine[0].parameters / 1e6:.2f} M", *cells, each)
    return table


def tables(results: list[dict[str, Any]]) -> tuple[str, Table]:
    """What is shown of the results that were written."""
    title = f"AP in per cent after {EPOCHS} epochs: mean over the seeds, and its 95 % interval."
    return title, table([Result(**found) for found in results])


def main() -> None:
    """Print the table; write the results."""
    folder, console = output_folder(__doc__), wide_console()
    root = Path("runs") / "detectors"
    data = compose_digits(Path("data") / "digits-4000-500-128px-seed0")
    jobs, results = list(runs()), []
    with multiprocessing.get_context("spawn").Pool(JOBS) as pool:
        for result in pool.imap_unordered(partial(run, data, root), jobs):
            results.append(result)
            console.print(
                f"{len(results)} of {len(jobs)}: {result.arm}, seed {result.seed}: "
                f"AP {100 * result.AP:.1f}, {result.minutes:.1f} minutes"
            )
    results.sort(key=lambda result: (list(ARMS).index(result.arm), result.seed))
    found = [asdict(result) for result in results]
    console.print(*tables(found))
    write_results(folder, "detectors", found, place=device())


if __name__ == "__main__":
    main()
