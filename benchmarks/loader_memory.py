"""Memory of the processes that load images, over 1000 batches: it must not grow.

    python -m benchmarks.loader_memory

Told is what all workers together hold from the hundredth batch on, when each has done all that it
does (Linux): in all, and of that what is theirs alone.  Objects of Python that a worker shares with
its parent become its own as soon as they are looked at (their counts of references change), so a
data set that is kept as a list of records seems to leak; the second column would show it.
"""

from __future__ import annotations

import multiprocessing
import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from benchmarks.measure import machine, output_folder, wide_console, write_results
from detection.data import compose_digits, load_coco_split, make_loader, train_transform
from detection.recipes import recipe

BATCHES, EVERY, FIRST, WORKERS, BATCH = 1000, 50, 100, 2, 8
IMAGES = 400
GOAL = 0.02


def memory_of_workers() -> tuple[int, int]:
    """Bytes that all child processes hold, and those that they share with no other process."""
    found = {"Rss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    for child in multiprocessing.active_children():
        for line in Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] += 1024 * int(rest.split()[0])
    return found["Rss"], found["Private_Clean"] + found["Private_Dirty"]


def measure(root: Path) -> list[tuple[int, int, int]]:
    """The batches done, the bytes that the workers hold then, and those that are theirs alone."""
    augmentation = replace(recipe("deqdet_digits").augmentation, horizontal_flip=0.5)
    dataset = load_coco_split(root, "train", train_transform(augmentation))
    loader = make_loader(dataset, BATCH, training=True, workers=WORKERS, seed=0)
    found, done, epoch = [], 0, 0
    while done < BATCHES:
        loader.set_epoch(epoch)
        for _ in loader:
            done += 1
            if done >= FIRST and done % EVERY == 0:
                found.append((done, *memory_of_workers()))
            if done == BATCHES:
                break
        epoch += 1
    return found


def growth(found: list[tuple[int, int, int]]) -> float:
    """Relative difference of the medians of the last and of the first five measurements."""
    first, last = (
        statistics.median(size for _, size, _ in some) for some in (found[:5], found[-5:])
    )
    return last / first - 1


def main() -> None:
    """Print the table; write the results; end with status 1 where the goal is missed."""
    folder, console = output_folder(__doc__), wide_console()
    with TemporaryDirectory() as name:
        root = compose_digits(Path(name) / "digits", train_images=IMAGES, val_images=1, size=128)
        found = measure(root)
    table = Table("batches", "MiB of the workers", "theirs alone")
    for done, *sizes in found:
        table.add_row(str(done), *(f"{size / 2**20:.1f}" for size in sizes))
    console.print(f"{WORKERS} workers, batches of {BATCH}, {IMAGES} images. {machine()}.")
    console.print(table)
    grown = growth(found)
    console.print(f"Growth: {100 * grown:+.2f} % (goal: at most {100 * GOAL:.0f} %).")
    results: dict[str, Any] = {"memory": found, "growth": grown}
    write_results(folder, "loader_memory", results, console)
    if grown > GOAL:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
