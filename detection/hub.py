"""Models to hand over: a folder with a checkpoint and a model card, on the disk or on the hub.

The checkpoint is an ordinary one, with its recipe and its classes inside; so what the Hugging Face
hub holds is what a run writes, and a card that says what it is.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from detection.checkpoints import CheckpointError
from detection.data.types import Categories
from detection.files import replacing

if TYPE_CHECKING:
    from detection.training.recipe import Recipe

MODEL_FILE = "model.safetensors"
CARD_FILE = "README.md"
_IN_FOLDERS = (MODEL_FILE, "best.safetensors", "checkpoints/best.safetensors")
"""Where the checkpoint lies: in a folder that was saved, in a run's checkpoints, in a run."""
_FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".pkl")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_SHOWN = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")
_NEEDS_HUB = 'pip install "implicit[hub]"'

Model = TypeVar("Model", bound="HubMixin")


class HubMixin(ABC):
    """What can be saved with a model card and loaded again, from a folder or from the hub."""

    recipe: Recipe
    categories: Categories
    metrics: Mapping[str, Any]

    @classmethod
    @abstractmethod
    def from_checkpoint(cls: type[Model], path: Path) -> Model:
        """The model of a ``.safetensors`` file, on the CPU."""

    @abstractmethod
    def save_checkpoint(self, path: Path | str) -> Path:
        """Write a ``.safetensors`` file."""

    @abstractmethod
    def to(self: Model, device: torch.device | str) -> Model:
        """Move the model."""

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_id: Path | str,
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
    ) -> Model:
        """The model of a file, of a folder, or of the Hugging Face hub.

        Args:
            path_or_id: as for `detection.load`.
            device: where to compute.
            revision: branch, tag or commit on the hub.

        Raises:
            CheckpointError: if there is no such file or model, or it cannot be used.
        """
        return cls.from_checkpoint(find_checkpoint(path_or_id, revision)).to(device)

    def save_pretrained(
        self, folder: Path | str, *, licence: str | None = None, repo_id: str | None = None
    ) -> Path:
        """Write the checkpoint and its model card into a folder.

        Args:
            folder: is made; a checkpoint and a card that lie there are replaced.
            licence: of the weights, as the hub names it (``"apache-2.0"``); the card says that
                none is stated if there is none.
            repo_id: the name that the card tells people to load; by default the folder.

        Returns:
            The folder.

        Raises:
            CheckpointError: if the disk is full or refuses.
        """
        folder = Path(folder)
        self.save_checkpoint(folder / MODEL_FILE)
        with replacing(folder / CARD_FILE) as temporary:
            temporary.write_text(
                model_card(
                    self.recipe,
                    self.categories,
                    self.metrics,
                    licence=licence,
                    name=repo_id or str(folder),
                ),
                encoding="utf-8",
            )
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        licence: str | None = None,
        private: bool = False,
        message: str = "Add the detector",
    ) -> str:
        """Upload the checkpoint and its card; who you are, `huggingface_hub` knows (``hf login``).

        Args:
            repo_id: ``owner/name``; made if it does not exist.
            licence: of the weights, as the hub names it.
            private: of a repository that is made.
            message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            ImportError: if huggingface_hub is not installed.
        """
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ImportError(f"push_to_hub() needs a package: {_NEEDS_HUB}.") from error
        import tempfile

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, licence=licence, repo_id=repo_id)
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
        return str(commit.commit_url)


def find_checkpoint(path_or_id: Path | str, revision: str | None = None) -> Path:
    """The ``.safetensors`` file that a path or the name of a model on the hub stands for.

    What lies on the disk comes first, and where there is a folder ``owner`` the hub is not asked.

    Args:
        path_or_id: a file; a folder that was saved, or of a run; or ``owner/name``.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: if a folder has no checkpoint, or the hub no such model.
    """
    path = Path(path_or_id)
    if path.is_dir():
        for name in _IN_FOLDERS:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(
            f"{path} is a folder without a checkpoint: there is no {', no '.join(_IN_FOLDERS)} "
            "in it. Give the .safetensors file itself."
        )
    name = str(path_or_id)
    is_name = isinstance(path_or_id, str) and _HUB_ID.fullmatch(name)
    if not is_name or path.suffix in _FILE_ENDINGS or path.exists() or path.parent.exists():
        return path
    return download(name, revision)


def download(repo_id: str, revision: str | None = None) -> Path:
    """The checkpoint of a model on the hub, from the cache if it is there.

    Raises:
        CheckpointError: if the hub cannot be asked, or has no such model.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError(
            f"{repo_id} does not exist here. If it is a model on the Hugging Face hub: "
            f"{_NEEDS_HUB}."
        ) from error
    try:
        return Path(hf_hub_download(repo_id, MODEL_FILE, revision=revision))
    except (OSError, ValueError) as error:  # what huggingface_hub raises is one or the other
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{repo_id} does not exist here, and could not be had from the Hugging Face hub "
            f"either ({reason}). Check the path, or the name."
        ) from error


def model_card(
    recipe: Recipe,
    categories: Categories,
    metrics: Mapping[str, Any],
    *,
    licence: str | None,
    name: str,
) -> str:
    """The text of a model card: what the model is, how well it does, and how it is used.

    Example:
        >>> from detection.recipes import recipe
        >>> card = model_card(
        ...     recipe("deqdet_digits"), Categories(("cat",), (1,)), {"AP": 0.5}, licence="mit",
        ...     name="me/cats",
        ... )
        >>> card.splitlines()[:3]
        ['---', 'license: mit', 'library_name: implicit']
        >>> "| AP | 0.500 |" in card
        True
    """
    model = recipe.model
    header = [f"license: {licence}"] if licence else []
    header += ["library_name: implicit", "pipeline_tag: object-detection"]
    header += ["tags:", "- object-detection", "- deep-equilibrium", f"- {recipe.name}"]
    rows = [
        f"| {key} | {metrics[key]:.3f} |"
        for key in _SHOWN
        if isinstance(metrics.get(key), (int, float)) and math.isfinite(metrics[key])
    ]
    scores = "No scores were saved with the weights."
    if rows:
        scores = "\n".join(["COCO box metrics on the validation data:", ""])
        scores += "\n".join(["", "| metric | value |", "| --- | --- |", *rows])
    classes = ", ".join(f"{n} ({i})" for n, i in zip(categories.names, categories.ids, strict=True))
    return f"""---
{chr(10).join(header)}
---

# {recipe.name}

An object detector of the Python package `detection`, which comes with `implicit`. It began as the
recipe `{recipe.name}`: backbone {model.backbone.name}, {model.num_queries} queries,
{type(model.decoder).__name__.removesuffix("Config").lower()} decoder. The whole recipe is in the
header of `{MODEL_FILE}`.

## How to use it

```python
import detection

model = detection.load("{name}")
found = model.predict("image.jpg").above(0.5)
print(found.class_names, found.boxes)
found.save("found.png")
```

## Scores

{scores}

## Classes

{len(categories)}, with their ids in the data: {classes}.

## Licence

{f"Of the weights: {licence}." if licence else "None is stated for the weights."}
"""
