"""From the folder of a run to its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from detection.data.errors import DataError
from detection.data.folders import load_split
from detection.data.transforms import eval_transform
from detection.files import replacing
from detection.predictor import load
from detection.report.analysis import analyse
from detection.report.page import render
from detection.training.progress import read_json_lines
from detection.training.provenance import read_provenance, recorded_data


def write_report(
    folder: Path | str,
    data: Path | str | None = None,
    *,
    threshold: float = 0.3,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> Path:
    """Write ``report.html`` into the folder of a run; it is whole in itself and loads nothing.

    The best checkpoint detects in every image of the validation set once; from that come COCO's
    metrics, AP by class, the confusion matrix, the images with the most mistakes.  Beside them
    stand the curves of the training, films of the refinement, residuals, and how it was run.

    Args:
        folder: of a run: ``checkpoints/``, ``log.jsonl``, ``run.json``.
        data: folder of its data set; by default where it lay when the run was begun.
        threshold: lowest score that is drawn, and that counts in the confusion matrix.
        device: where to compute.
        console: for a bar of progress; none by default.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: if the folder holds no checkpoint that can be used.
        DataError: if the data set is not where it was, or is another.
        ValueError: if ``threshold`` is not in [0, 1], or the log is damaged.

    Example:
        >>> try:
        ...     write_report("runs/nothing")
        ... except DataError as error:
        ...     print(error)
        runs/nothing: there is no such folder. Give the folder of a run.
    """
    folder = Path(folder)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}: must lie in [0, 1].")
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder. Give the folder of a run.")
    console = console or Console(quiet=True)
    model = load(folder, device=device)
    log = _log(folder)
    about = read_provenance(folder / "run.json")
    root = Path(data) if data is not None else _recorded(folder, about)
    dataset = load_split(
        root, "val", eval_transform(model.recipe.augmentation), categories=model.categories
    )
    analysis = analyse(model, dataset, threshold, console)
    page = render(
        folder=folder,
        model=model,
        dataset=dataset,
        analysis=analysis,
        log=log,
        about=about,
        threshold=threshold,
    )
    path = folder / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _log(folder: Path) -> list[dict[str, Any]]:
    path = folder / "log.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: there is no such file. Give the folder of a run, with its log.")
    return read_json_lines(path)


def _recorded(folder: Path, about: dict[str, Any]) -> Path:
    """Where the data lay when the run was begun, and lies still."""
    root = recorded_data(about)
    if root is None:
        raise DataError(f"{folder}: the run does not say where its data lies. Name the folder.")
    if not root.is_dir():
        raise DataError(f"{root}: the data of the run is no longer there. Name its folder.")
    return root
