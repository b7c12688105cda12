"""Where the records of a run go beside its own log: TensorBoard, Weights & Biases, or yours.

A record is that of a training step, ``{"step", "epoch", "loss", "lr", …}``, or of an evaluation,
``{"step", "epoch", "scores": {"AP", …, "per_class": {…}}}``: the lines of ``log.jsonl``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Takes the records of a run, on the main process alone."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record."""

    def close(self) -> None:
        """The run has ended, well or not."""


class TensorBoard:
    """Writes event files for ``tensorboard --logdir FOLDER``.

    What a run that was killed wrote after the checkpoint from which it is resumed is hidden there.

    Args:
        folder: of the event files.

    Raises:
        ImportError: if TensorBoard is not installed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> tracker = TensorBoard(folder)
        >>> tracker.write({"step": 1, "epoch": 0, "loss": 2.5})
        >>> tracker.close()
        >>> len(list(folder.glob("events.*")))
        1
    """

    def __init__(self, folder: Path | str) -> None:
        _require("tensorboard")
        self.folder = Path(folder)
        self._writer: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        step = int(record["step"])
        if self._writer is None:  # at the first record, which says where the run begins
            board = import_module("torch.utils.tensorboard")
            self._writer = board.SummaryWriter(str(self.folder), purge_step=step)
        for name, value in _numbers(record):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases:
    """Sends the records to Weights & Biases; ``WANDB_MODE=offline`` keeps them in the folder.

    A resumed run goes on as the same one: its id is kept in ``folder/wandb.txt``.

    Args:
        project: name of the project.
        folder: of the run.
        config: settings to show beside it, as `detection.configuration.to_json` gives them.

    Raises:
        ImportError: if wandb is not installed.
    """

    def __init__(
        self, project: str, folder: Path | str, config: Mapping[str, Any] | None = None
    ) -> None:
        self._wandb = _require("wandb")
        self.project, self.folder, self.config = project, Path(folder), config
        self._run: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        if self._run is None:
            self._run = self._begin()
        self._run.log(dict(_numbers(record)), step=int(record["step"]))

    def _begin(self) -> Any:
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.folder / "wandb.txt"
        run = self._wandb.init(
            project=self.project,
            dir=str(self.folder),
            config=None if self.config is None else dict(self.config),
            id=known.read_text(encoding="utf-8").strip() if known.exists() else None,
            resume="allow",
        )
        known.write_text(f"{run.id}\n", encoding="utf-8")
        return run

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def _require(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package} is not installed: pip install 'implicit[{package}]'."
        ) from error


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What is to be plotted, by name: ``train/loss``, ``AP``, ``class/cat``."""
    scores = record.get("scores")
    if scores is None:
        named = {f"train/{k}": v for k, v in record.items() if k not in ("step", "epoch")}
    else:
        named = {f"val/{k}": v for k, v in scores.items() if isinstance(v, float)}
        named |= {f"class/{k}": v for k, v in scores.get("per_class", {}).items()}
    for name, value in {"epoch": record["epoch"], **named}.items():
        if math.isfinite(value):
            yield name, float(value)
