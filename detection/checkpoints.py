"""Checkpoints: weights anyone may load, and beside them the state a run needs to go on.

``NAME.safetensors`` holds the weights with their description (configuration, classes, step,
metrics) as JSON in its header; it cannot carry code.  ``NAME.training.pt`` holds what a resumed
run needs (optimiser, schedule, average, random states, counters) and is read with
``weights_only=True``.  A file is written beside its destination, flushed to the disk and then
renamed, so that a crash or a full disk never damages a file that was there.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from detection.files import replacing

FORMAT_VERSION = 1
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
    # The weights come last: a checkpoint that has them is complete.
    if training_state is not None:
        with _replacing(training_path(path)) as temporary, open(temporary, "wb") as file:
            torch.save({"format_version": FORMAT_VERSION, "state": dict(training_state)}, file)
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
    _check_version(path, stored.get("format_version") if isinstance(stored, dict) else None)
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


class CheckpointFolder:
    """The checkpoints of a run: the last few, ``step_000100.safetensors``, and ``best``.

    Args:
        folder: where they lie; made when first written to.
        keep: how many of the last are kept.

    Attributes:
        best_score: highest score so far, read from the folder where one is kept already.
    """

    def __init__(self, folder: Path | str, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"CheckpointFolder(keep={keep}): at least 1.")
        self.folder, self.keep = Path(folder), keep
        self.best = self.folder / "best.safetensors"
        self.best_score = float("-inf")
        if self.best.exists():
            self.best_score = float(load_weights(self.best)[1].get("score", "-inf"))

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
        save_checkpoint(path, weights=weights, metadata=metadata, training_state=training_state)
        if score is not None and score > self.best_score:
            save_checkpoint(self.best, weights=weights, metadata=metadata)
            self.best_score = score
        for old in set(self._all()[: -self.keep]) - {path}:
            old.unlink()
            training_path(old).unlink(missing_ok=True)
        return path

    def latest(self) -> Path | None:
        """The checkpoint of the highest step, or ``None``."""
        return next(reversed(self._all()), None)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.safetensors"), key=lambda p: int(p.stem[5:]))


def random_states() -> dict[str, Tensor | None]:
    """State of PyTorch's global random generators, on the CPU and on the current CUDA device."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` gave.

    Example:
        >>> states = random_states()
        >>> first = torch.rand(())
        >>> set_random_states(states)
        >>> bool(first == torch.rand(()))
        True
    """
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


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
    _check_version(path, header.get("format_version"))
    return metadata


def _check_version(path: Path, version: object) -> None:
    if str(version) != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {version}; this version of the library reads "
            f"{FORMAT_VERSION}. Install the version that wrote it."
        )


def first_few(names: Sequence[str]) -> str:
    """Some of a list of names, and how many there are in all."""
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
