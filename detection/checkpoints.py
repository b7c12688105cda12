"""Checkpoints: weights anyone may load, and beside them the state a run needs to go on.

``NAME.safetensors`` holds the weights with their description (configuration, classes, step,
metrics) as JSON in its header; it cannot carry code.  ``NAME.training.pt`` holds everything that a
resumed run needs (weights, optimiser, schedule, average, random states, counters) and is read with
``weights_only=True``.  A file is written beside its destination, flushed to the disk and then
renamed, so that a crash or a full disk never damages a file that was there.

A run resumes from the newest training state that is whole.  It is written first and needs no
other file: what was to follow it (the weights, the best weights) is made up for on resuming, so a
run may be killed between any two writes.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from detection.files import replacing

FORMAT_VERSION = 1
TRAINING_VERSION = 2
REQUIRED_METADATA = ("config", "class_names", "category_ids", "step", "metrics")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; names the file and the remedy."""


def save_checkpoint(
    path: Path | str,
    *,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    training_state: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``path`` and, if there is a training state, its `training_path`.

    Args:
        path: ends in ``.safetensors``; folders are made.
        weights: a state dict; tensors may lie on any device and may share memory.
        metadata: JSON types, with at least the keys of `REQUIRED_METADATA`.
        training_state: tensors, numbers, strings, lists, tuples and dictionaries.

    Raises:
        ValueError: if the name or the metadata do not fit.
        CheckpointError: if the disk is full or refuses; what was there before is untouched.

    Example:
        >>> import tempfile
        >>> metadata = {key: None for key in REQUIRED_METADATA}
        >>> path = Path(tempfile.mkdtemp()) / "step_000007.safetensors"
        >>> path = save_checkpoint(path, weights={"w": torch.ones(2)}, metadata=metadata)
        >>> load_weights(path)[0]
        {'w': tensor([1., 1.])}
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_checkpoint(path={str(path)!r}): must end in '.safetensors'.")
    if absent := [key for key in REQUIRED_METADATA if key not in metadata]:
        raise ValueError(f"save_checkpoint: the metadata lacks {', '.join(absent)}.")
    header = {"format_version": str(FORMAT_VERSION), "metadata": json.dumps(metadata)}
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in weights.items()}
    # First, since a run can go on from it alone.
    if training_state is not None:
        with _replacing(training_path(path)) as temporary, open(temporary, "wb") as file:
            torch.save({"format_version": TRAINING_VERSION, "state": dict(training_state)}, file)
    with _replacing(path) as temporary:
        save_file(tensors, temporary, header)
    return path


def training_path(path: Path | str) -> Path:
    """The file of the training state that belongs to a file of weights.

    Example:
        >>> training_path("run/step_100.safetensors").name
        'step_100.training.pt'
    """
    return Path(path).with_suffix(".training.pt")


def load_weights(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights (on the CPU) and metadata of a checkpoint.

    Raises:
        CheckpointError: if the file is missing, damaged, of another kind or of another version.
    """
    path = existing(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _read_header(path, file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a .safetensors file, or is cut short or damaged ({error}). Pickled "
            "files (.pt, .pth, .pkl) are not read as weights, for they may carry code. Copy the "
            "file again, or use another checkpoint of the run."
        ) from error


def load_training_state(path: Path | str) -> dict[str, Any]:
    """The training state that was saved with the weights at ``path``, on the CPU.

    Raises:
        CheckpointError: if there is none, or it is damaged, of another version, or holds code.
    """
    path = existing(training_path(path))
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is cut short or damaged, or holds Python objects that could run code, which "
            f"are not loaded ({str(error).partition(chr(10))[0]}). Resume from another checkpoint."
        ) from error
    version = stored.get("format_version") if isinstance(stored, dict) else None
    _check_version(path, version, TRAINING_VERSION)
    return dict(stored["state"])


def restore(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a model, all of them or none.

    Raises:
        CheckpointError: naming the tensors that are missing, unknown or of another shape.

    Example:
        >>> try:
        ...     restore(nn.Linear(2, 3), {"weight": torch.zeros(3, 4), "offset": torch.zeros(3)})
        ... except CheckpointError as error:
        ...     print(str(error).split(": ", 1)[1].split(".")[0])
        missing: bias; unknown: offset; other shape: weight (3, 4) where the model has (3, 2)
    """
    mine = model.state_dict()
    problems = {
        "missing": [name for name in mine if name not in weights],
        "unknown": [name for name in weights if name not in mine],
        "other shape": [
            f"{name} {tuple(weights[name].shape)} where the model has {tuple(tensor.shape)}"
            for name, tensor in mine.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    if found := [f"{kind}: {first_few(names)}" for kind, names in problems.items() if names]:
        raise CheckpointError(
            f"The checkpoint does not fit the model: {'; '.join(found)}. "
            "Build the model from the configuration in the checkpoint."
        )
    model.load_state_dict(dict(weights))


@dataclass(frozen=True)
class Resumable:
    """What a run goes on from.

    Attributes:
        path: of the weights, beside which the training state lies.
        state: the training state.
        passed: newer ones that are missing or damaged, each with the reason.
    """

    path: Path
    state: dict[str, Any]
    passed: tuple[str, ...] = ()


class CheckpointFolder:
    """The checkpoints of a run: the last few, ``step_000100.safetensors``, and ``best``.

    Args:
        folder: where they lie; made when first written to.
        keep: how many of the last are kept.

    Attributes:
        best_score: highest score so far; `resume` brings it back.
    """

    def __init__(self, folder: Path | str, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"CheckpointFolder(keep={keep}): at least 1.")
        self.folder, self.keep = Path(folder), keep
        self.best = self.folder / "best.safetensors"
        self.best_score = float("-inf")

    def save(
        self,
        *,
        weights: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        training_state: Mapping[str, Any],
        score: float | None = None,
    ) -> Path:
        """Write a checkpoint; as ``best`` too if its score is the highest; remove old ones."""
        path = self.folder / f"step_{int(metadata['step']):06d}.safetensors"
        metadata = metadata if score is None else {**metadata, "score": score}
        is_best = score is not None and score > self.best_score
        best_score = score if score is not None and is_best else self.best_score
        ours = {"metadata": json.dumps(metadata), "best_score": best_score, "is_best": is_best}
        state = {**training_state, "folder": ours}
        save_checkpoint(path, weights=weights, metadata=metadata, training_state=state)
        if is_best:
            save_checkpoint(self.best, weights=weights, metadata=metadata)
        self.best_score = best_score
        # Those of later steps are none of this run's past: it was resumed from before them.
        past = [old for old in self._all() if _step(old) <= _step(path)]
        for old in past[: -self.keep]:
            old.unlink(missing_ok=True)
            training_path(old).unlink(missing_ok=True)
        return path

    def resume(self) -> Resumable | None:
        """The newest training state that is whole, or ``None`` where there is no checkpoint.

        Newer checkpoints that are not whole are set aside: ``.aside`` is added to their names.

        Raises:
            CheckpointError: if there are checkpoints, and none is whole.
        """
        passed: dict[Path, str] = {}
        for path in reversed(self._all()):
            try:
                found = Resumable(path, load_training_state(path), tuple(passed.values()))
            except CheckpointError as error:
                passed[path] = str(error)
                continue
            for damaged in passed:
                for file in filter(Path.exists, (damaged, training_path(damaged))):
                    file.rename(file.with_name(file.name + ".aside"))
            self.best_score = float(found.state["folder"]["best_score"])
            return found
        if passed:
            raise CheckpointError(
                f"No checkpoint in {self.folder} is whole: {' '.join(passed.values())} The weights "
                "that can be read can be begun from."
            )
        return None

    def complete(self, found: Resumable, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Write what a killed run did not come to write after its training state.

        Args:
            found: what `resume` gave.
            weights: that belong to it.

        Returns:
            What was amiss, to be told.
        """
        ours = found.state["folder"]
        metadata, told = json.loads(ours["metadata"]), []
        if not _describes(found.path, metadata):
            save_checkpoint(found.path, weights=weights, metadata=metadata)
            told.append(f"{found.path.name} was missing, damaged or outdated: written again.")
        if ours["is_best"] and not _describes(self.best, metadata):
            save_checkpoint(self.best, weights=weights, metadata=metadata)
            told.append(f"{self.best.name} was not of the best step yet: written again.")
        elif ours["best_score"] > float("-inf") and not _describes(self.best):
            told.append(f"{self.best} is missing or damaged, and its weights are not kept.")
        return tuple(told)

    def _all(self) -> list[Path]:
        """The weights of every checkpoint of which a file is there, by step."""
        states = [
            path.with_name(path.name.replace(".training.pt", ".safetensors"))
            for path in self.folder.glob("step_*.training.pt")
        ]
        return sorted({*states, *self.folder.glob("step_*.safetensors")}, key=_step)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _describes(path: Path, metadata: Mapping[str, Any] | None = None) -> bool:
    """Whether a file of weights is whole and, if that is asked for, has this description."""
    try:
        found = load_weights(path)[1]
    except CheckpointError:
        return False
    return metadata is None or found == metadata


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """`detection.files.replacing`, with an error that names the remedy."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} could not be written ({error}); what was there before is untouched. "
            "Make room on the disk, or choose a folder you may write to."
        ) from error


def existing(path: Path | str) -> Path:
    """The path of a file, or `CheckpointError` if it is none."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}. Check the path, and that the run has saved.")
    return path


def _read_header(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads(header.get("metadata", "{}"))
    if absent := [key for key in REQUIRED_METADATA if key not in metadata]:
        raise CheckpointError(
            f"{path} has weights, but its description lacks {', '.join(absent)}: it was not "
            "written by this library. Use a checkpoint of a run."
        )
    _check_version(path, header.get("format_version"), FORMAT_VERSION)
    return metadata


def _check_version(path: Path, version: object, known: int) -> None:
    if str(version) != str(known):
        raise CheckpointError(
            f"{path} has format version {version}; this version of the library reads "
            f"{known}. Install the version that wrote it."
        )


def first_few(names: Sequence[str]) -> str:
    """Some of a list of names, and how many there are in all."""
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
