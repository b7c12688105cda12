"""Training runs that are killed (SIGKILL) and resumed until they end: are they the same to the bit?

    python -m tests.kill_runs --kills 20

A tiny training on composed digits, on the CPU, which saves after every step, is run once without
interruption.  Then again and again, each time killed at another moment: at a random time, after
half of a file has been written, just before a file takes its place, or just after.  It is resumed,
killed once more at a random time, and resumed until it ends.  Compared are the
log as text, and the weights, the best weights and the training state (model, average, optimiser,
schedule, position, random generators, best score) number by number.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from detection import checkpoints, files
from detection.checkpoints import load_training_state, load_weights
from detection.data import compose_digits, load_coco_folder
from detection.data.transforms import eval_transform, train_transform
from detection.recipes import recipe
from detection.training.loop import train
from detection.training.recipe import Recipe

EPOCHS = 4
KINDS = ("time", "half a file", "before rename", "after rename")


def small_recipe(epochs: int = 2, **changes: Any) -> Recipe:
    """Three steps an epoch, of some tenths of a second, with all there is to be resumed."""
    base = recipe("deqdet_digits")
    decoder = replace(
        base.model.decoder, train_steps=3, multiples=1, spacing=2, steps=3, initial_points=4
    )
    sizes = {"content_dim": 32, "feature_channels": 32, "heads": 2, "groups": 2, "points": 4}
    layer = replace(base.model.layer, **sizes, out_points=8, ffn_channels=64)
    return replace(
        base,
        model=replace(base.model, layer=layer, decoder=decoder, num_queries=6),
        augmentation=replace(
            base.augmentation, short_sides=(48, 64), max_size=64, horizontal_flip=0.5
        ),
        optimization=replace(
            base.optimization, epochs=epochs, batch_size=8, warmup_steps=2, accumulate=2
        ),
        evaluate_every=1,
        save_minutes=0.0,
        **changes,
    )


@dataclass(frozen=True)
class Kill:
    """When a process is to kill itself, or be killed: ``place`` in seconds, or as a count."""

    kind: str
    place: float


def begin(settings: Recipe, root: Path, folder: Path, kill: Kill | None = None) -> bool:
    """Begin or resume a run in a process of its own; whether it came to its end."""
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(settings, root, folder, kill)
    )
    process.start()
    if kill is not None and kill.kind == "time":
        process.join(kill.place)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"The run in {folder} ended with {process.exitcode}.")
    return process.exitcode == 0


def _work(settings: Recipe, root: Path, folder: Path, kill: Kill | None) -> None:
    torch.set_num_threads(1)
    random.seed(os.getpid())  # what a process finds must not matter
    np.random.seed(os.getpid())  # noqa: NPY002
    if kill is not None and kill.kind != "time":
        _arm(kill)
    sets = load_coco_folder(
        root, train_transform(settings.augmentation), eval_transform(settings.augmentation)
    )
    with open(folder.with_suffix(".console"), "a", encoding="utf-8") as output:
        train(
            settings,
            *sets,
            folder,
            resume=any(folder.glob("checkpoints/step_*.training.pt")),
            console=Console(file=output),
        )
    os._exit(0)


def _arm(kill: Kill) -> None:
    """Let this process kill itself at its ``place``-th file."""
    count = 0

    def now() -> bool:
        nonlocal count
        count += 1
        return count == kill.place

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    rename, save, save_weights = os.replace, torch.save, checkpoints.save_file

    def replacing(source: Any, target: Any) -> None:
        last = now()
        if last and kill.kind == "before rename":
            die()
        rename(source, target)
        if last:
            die()

    def saving(stored: Any, file: Any) -> None:
        if not now():
            return save(stored, file)
        whole = io.BytesIO()
        save(stored, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()

    def saving_weights(tensors: Any, file: Path, header: Any) -> None:
        save_weights(tensors, file, header)
        if now():
            os.truncate(file, file.stat().st_size // 2)
            die()

    if kill.kind == "half a file":
        torch.save, checkpoints.save_file = saving, saving_weights  # type: ignore[assignment]
    else:
        files.os.replace = replacing  # type: ignore[assignment]


def differences(whole: Path, resumed: Path) -> list[str]:
    """What two folders of runs differ in; nothing of times and of who ran them."""
    found = []
    names = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        for folder in (whole, resumed)
    ]
    if names[0] != names[1]:
        found.append(f"files {set(names[0]) ^ set(names[1])}")
    for name in sorted(set(names[0]) & set(names[1])):
        if name.endswith(".training.pt"):
            weights = name.replace(".training.pt", ".safetensors")
            states = [load_training_state(folder / weights) for folder in (whole, resumed)]
            found += [f"{name}: {place}" for place in _unequal(*states)]
        elif name.endswith(".safetensors"):  # whose header is written in no fixed order
            contents = [load_weights(folder / name) for folder in (whole, resumed)]
            found += [f"{name}: {place}" for place in _unequal(*contents)]
        elif (whole / name).is_file() and name != "run.json":
            same = (whole / name).read_bytes() == (resumed / name).read_bytes()
            found += [] if same else [name]
    return found


def _unequal(a: Any, b: Any, place: str = "") -> Iterator[str]:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
        if not same:
            yield place
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _unequal(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for n, pair in enumerate(zip(a, b, strict=True)):
            yield from _unequal(*pair, f"{place}[{n}]")
    elif a != b:
        yield place


def kill_and_resume(
    settings: Recipe, root: Path, folder: Path, first: Kill, seconds: float, chance: random.Random
) -> int:
    """Kill a run, resume it, kill it again at a random time, resume it to its end: the kills."""
    while begin(settings, root, folder, first):  # it was sooner done than thought: once more
        shutil.rmtree(folder)
        halved = first.place / 2 if first.kind == "time" else first.place // 2
        first = replace(first, place=halved)
    again = Kill("time", chance.uniform(0, 0.8 * seconds))
    if begin(settings, root, folder, again):
        return 1
    assert begin(settings, root, folder)
    return 2


def moment(kind: str, epochs: int, seconds: float, chance: random.Random) -> Kill:
    """A moment of this kind within a run that takes so long."""
    # Two files for each of four checkpoints an epoch, and for that of the beginning.
    if kind == "time":
        return Kill(kind, chance.uniform(0, 0.8 * seconds))
    return Kill(kind, chance.randint(1, 2 + 8 * epochs))


def main(say: Callable[[str], None] = print) -> int:
    """Run, print the table, and return the number of runs that differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20, help="runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    table = Table("run", "killed", "at", "kills", "workers", "differs in")
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        where, chance = Path(name), random.Random(options.seed)
        root = compose_digits(where / "digits", train_images=24, val_images=8, size=64)
        wholes = {}
        for workers in (0, 2):
            start = time.monotonic()
            wholes[workers] = where / f"whole{workers}"
            assert begin(small_recipe(EPOCHS, workers=workers), root, wholes[workers])
            seconds = time.monotonic() - start
            say(f"An uninterrupted run with {workers} workers: {seconds:.1f} s.")
        for run in range(options.kills):
            workers, kill = 2 * (run % 5 == 4), moment(KINDS[run % 4], EPOCHS, seconds, chance)
            settings, folder = small_recipe(EPOCHS, workers=workers), where / f"run{run}"
            kills = kill_and_resume(settings, root, folder, kill, seconds, chance)
            found = differences(wholes[workers], folder)
            bad += bool(found)
            unit = "s" if kill.kind == "time" else "."
            at = f"{kill.place:.2f} s" if unit == "s" else f"file {kill.place:.0f}"
            table.add_row(
                str(run + 1), kill.kind, at, str(kills), str(workers), ", ".join(found) or "nothing"
            )
    Console(width=100).print(table)
    say(f"{options.kills - bad} of {options.kills} runs ended bit-identical.")
    return bad


if __name__ == "__main__":
    sys.exit(main())
