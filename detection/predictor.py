"""A trained detector with all that is needed to use it: ``detection.load(path).predict(image)``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast, overload

import torch

import implicit
from detection.checkpoints import CheckpointError, load_weights, save_checkpoint
from detection.configuration import to_json
from detection.data.coco import CocoDataset
from detection.data.loading import collate
from detection.data.transforms import eval_transform
from detection.data.types import Categories
from detection.detections import Detections
from detection.distributed import DeviceError, Distributed
from detection.evaluation import CocoScores
from detection.hub import HubMixin
from detection.models.config import MOST_STEPS
from detection.models.decoders import EquilibriumDecoder, Output
from detection.models.detector import Detector
from detection.prediction import evaluate, predict, read_output, sample
from detection.pretrained import build_detector
from detection.sources import ImageLike, NamedImage
from detection.training.recipe import Recipe

Steps = int | Literal["auto"]


def load(path_or_id: Path | str, *, device: torch.device | str = "cpu") -> Predictor:
    """The predictor of a checkpoint.

    Args:
        path_or_id: a ``.safetensors`` file of a run, the folder of a run (its best checkpoint is
            taken), a folder that ``save_pretrained`` wrote, or the name of a model on the
            Hugging Face hub, ``owner/name``, where nothing of that name lies on the disk.
        device: where to compute.

    Raises:
        CheckpointError: if there is no such file or model, or it is damaged or of another kind.
        DeviceError: if there is no such device.

    Example:
        >>> try:
        ...     load("nowhere.safetensors")
        ... except CheckpointError as error:
        ...     print(error)
        nowhere.safetensors does not exist. Check the path, and that the run has saved.
    """
    return Predictor.from_pretrained(path_or_id, device=device)


class Predictor(HubMixin):
    """A detector, the recipe that it was trained by, and the classes that it knows.

    Args:
        detector: put in evaluation mode.
        recipe: decides how images are resized and how many detections are kept.
        categories: the classes.
        metrics: scores on validation data, by name (``"AP"``, …), if there are any.
        step: training steps that were taken.

    Raises:
        CheckpointError: if the detector has another number of classes.

    Example:
        >>> import numpy as np
        >>> from detection.data import digits_categories
        >>> from detection.recipes import recipe
        >>> chosen = recipe("deqdet_digits")
        >>> model = Predictor(Detector(chosen.model), chosen, digits_categories)
        >>> found = model.predict(np.zeros((96, 128, 3), np.uint8), steps=3)
        >>> len(found), found.steps, model.predict([])
        (100, 3, [])
    """

    def __init__(
        self,
        detector: Detector,
        recipe: Recipe,
        categories: Categories,
        *,
        metrics: Mapping[str, Any] | None = None,
        step: int = 0,
    ) -> None:
        classes = detector.config.layer.num_classes
        if classes != len(categories):
            raise CheckpointError(
                f"The detector knows {classes} classes and there are {len(categories)} names: "
                "give those that it was trained on."
            )
        self.detector, self.recipe, self.categories = detector.eval(), recipe, categories
        self.metrics, self.step = dict(metrics or {}), step

    def __repr__(self) -> str:
        names = list(self.categories.names)
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        return f"Predictor({self.recipe.name}, {len(names)} classes: {shown}; {self.device})"

    @property
    def device(self) -> torch.device:
        """Where the detector computes."""
        return self.detector.pixel_mean.device

    def to(self, device: torch.device | str) -> Predictor:
        """Move the detector; returns the predictor itself.

        Raises:
            DeviceError: if there is no such device.
        """
        try:
            self.detector.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
            reason = str(error).partition("\n")[0]
            raise DeviceError(f"The device {device!r} cannot be used: {reason}") from error
        return self

    @overload
    def predict(
        self,
        source: list[Any] | tuple[Any, ...],
        *,
        steps: Steps | None = None,
        tolerance: float | None = None,
        max_detections: int | None = None,
        batch_size: int = 1,
    ) -> list[Detections]: ...

    @overload
    def predict(
        self,
        source: ImageLike | NamedImage,
        *,
        steps: Steps | None = None,
        tolerance: float | None = None,
        max_detections: int | None = None,
        batch_size: int = 1,
    ) -> Detections: ...

    def predict(
        self,
        source: ImageLike | NamedImage | Sequence[ImageLike | NamedImage],
        *,
        steps: Steps | None = None,
        tolerance: float | None = None,
        max_detections: int | None = None,
        batch_size: int = 1,
    ) -> Detections | list[Detections]:
        """What is in an image, or in each of several.

        What is found in an image does not depend on the others, nor on ``batch_size``.

        Args:
            source: a path, an address, a Pillow image, an array, a tensor (all as
                `detection.sources.read_image_of` takes them), or a list or tuple of these.
            steps: refinements of each image: a number, or ``"auto"``, which goes on until the
                detections have settled and 25 times at most; by default as the recipe says.
            tolerance: pixels, of the image as it was resized for the detector, that a box may
                still move in one more refinement, times its score; an image that has come so far
                is done, before its ``steps`` have been taken, but after the recipe's
                ``settled.least_steps`` at the soonest.
            max_detections: kept per image, the surest; by default as the recipe says.
            batch_size: images that go through the detector together.

        Returns:
            `Detections` of an image, or a list of them in the order of the images.

        Raises:
            DataError: if there is no image to be had from a source; says which and why.
            ValueError: if a number is out of its range, or ``steps`` or ``tolerance`` are given
                to a detector whose decoder is not solved for a fixed point.
        """
        sources = list(source) if _are_many(source) else [cast(ImageLike, source)]
        found = predict(
            self.detector,
            sources,
            self.recipe.augmentation,
            self._most(max_detections),
            batch_size=batch_size,
            stop=self._stop(steps, tolerance),
        )
        found = [replace(detections, categories=self.categories) for detections in found]
        return found if _are_many(source) else found[0]

    def evaluate(
        self,
        dataset: CocoDataset,
        *,
        batch_size: int | None = None,
        workers: int | None = None,
        steps: Steps | None = None,
        tolerance: float | None = None,
        distributed: Distributed | None = None,
    ) -> CocoScores:
        """COCO's metrics on a data set.

        Args:
            dataset: its transform must be that of the recipe, and its classes those of the model.
            batch_size: images at a time; by default as the recipe says.
            workers: processes that load images; by default as the recipe says.
            steps: as for `predict`.
            tolerance: as for `predict`.
            distributed: processes that share the images; all get the scores of the whole.

        Raises:
            ValueError: if a number is out of its range, or the classes are others.
        """
        if dataset.categories != self.categories:
            raise ValueError("The data set's classes are not those of the model.")
        return evaluate(
            self.detector,
            dataset,
            batch_size=self.recipe.optimization.batch_size if batch_size is None else batch_size,
            workers=self.recipe.workers if workers is None else workers,
            max_detections=self.recipe.max_detections,
            stop=self._stop(steps, tolerance),
            distributed=distributed,
        )

    @torch.no_grad()
    def stream(
        self,
        frames: Iterable[ImageLike | NamedImage],
        *,
        warm: bool | None = None,
        steps: Steps | None = None,
        tolerance: float | None = None,
        max_detections: int | None = None,
    ) -> Iterator[Detections]:
        """Detections frame by frame, while the frames come.

        With a warm start a frame is refined from the queries that the frame before has ended
        with, which takes fewer refinements where little has changed.  A frame of another size or
        of another video starts anew.

        Args:
            frames: as for `predict`, from any iterator: `detection.find_sources`, a camera.
            warm: start warm; by default where a fixed point is solved for.
            steps: as for `predict`.
            tolerance: as for `predict`.
            max_detections: as for `predict`.

        Yields:
            `Detections` of each frame.  They hold on to their frame (``source``), to be drawn
            upon: to keep those of a long film, keep them without it,
            ``dataclasses.replace(found, source=None)``.

        Raises:
            DataError, ValueError: as `predict` does.

        Example:
            >>> import numpy as np
            >>> from detection.data import digits_categories
            >>> from detection.recipes import recipe
            >>> chosen = recipe("deqdet_digits")
            >>> model = Predictor(Detector(chosen.model), chosen, digits_categories)
            >>> film = (np.full((64, 64), level, np.uint8) for level in (90, 91))
            >>> [len(found) for found in model.stream(film, steps=2)]
            [100, 100]
        """
        solved = isinstance(self.detector.decoder, EquilibriumDecoder)
        if warm and not solved:
            raise ValueError(f"warm=True: {self._is_not_solved()}")
        stops = [self._stop(steps, tolerance, warm=again) for again in (False, True)]
        most, transform = self._most(max_detections), eval_transform(self.recipe.augmentation)
        last: tuple[Any, Output] | None = None
        for place, frame in enumerate(frames):
            image = NamedImage.of(frame, place)
            pixels, target = sample(image, transform)
            batch = collate([(pixels, target)]).to(self.device)
            scene = image.video, pixels.shape
            start = None
            if last is not None and last[0] == scene and (solved if warm is None else warm):
                start = last[1].queries
            stop = stops[start is not None]
            output = self.detector(batch.images, batch.sizes, stop=stop, start=start)
            last = scene, output
            (found,) = read_output(output, batch, most)
            yield replace(found, categories=self.categories, source=image)

    @classmethod
    def from_checkpoint(cls, path: Path) -> Predictor:
        """The predictor of a ``.safetensors`` file, on the CPU.

        Raises:
            CheckpointError: if it is missing, damaged, or of another kind.
        """
        if path.suffix in (".pt", ".pth", ".pkl"):
            raise CheckpointError(
                f"{path} is a pickled file, which is not loaded, for it may carry code. A run's "
                "weights lie in its .safetensors files; a published checkpoint is converted by: "
                f"deqdet convert {path} {path.with_suffix('.safetensors').name}"
            )
        weights, metadata = load_weights(path)
        model, recipe, categories = build_detector(weights, metadata, path)
        return cls(
            model,
            recipe,
            categories,
            metrics=metadata["metrics"],
            step=int(metadata["step"] or 0),
        )

    def save_checkpoint(self, path: Path | str) -> Path:
        """Write a ``.safetensors`` file that `load` reads, recipe, classes and metrics inside.

        Raises:
            ValueError: if the name does not end in ``.safetensors``.
            CheckpointError: if the disk is full or refuses; what was there before is untouched.
        """
        return save_checkpoint(
            path,
            weights=self.detector.state_dict(),
            metadata={
                "config": to_json(self.recipe),
                "class_names": list(self.categories.names),
                "category_ids": list(self.categories.ids),
                "step": self.step,
                "metrics": self.metrics,
            },
        )

    def _most(self, max_detections: int | None) -> int:
        most = self.recipe.max_detections if max_detections is None else max_detections
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"max_detections={most!r}: must be a whole number of at least 1.")
        return most

    def _stop(
        self, steps: Steps | None, tolerance: float | None, *, warm: bool = False
    ) -> implicit.Steps | implicit.Tolerance | None:
        """When to stop refining; `None` for what the recipe says."""
        decoder = self.detector.decoder
        if steps is None and tolerance is None:
            return None
        if not isinstance(decoder, EquilibriumDecoder):
            given = f"tolerance={tolerance}" if steps is None else f"steps={steps}"
            raise ValueError(f"{given}: {self._is_not_solved()}")
        if (
            steps != "auto"
            and steps is not None
            and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1)
        ):
            raise ValueError(f'steps={steps!r}: give a whole number of at least 1, or "auto".')
        if isinstance(steps, int) and tolerance is None:
            return implicit.Steps(steps)
        settled = decoder.config.settled
        if tolerance is not None:
            if not 0 < tolerance < math.inf:
                raise ValueError(f"tolerance={tolerance}: give a number of pixels above 0.")
            settled = replace(settled, pixels=tolerance)
        most = steps if isinstance(steps, int) else MOST_STEPS
        return decoder.until(settled, most, warm=warm)

    def _is_not_solved(self) -> str:
        return (
            f"the decoder of {self.recipe.name} is not solved for a fixed point, but has a fixed "
            "number of layers. Leave it out."
        )


def _are_many(source: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(source, (list, tuple))
