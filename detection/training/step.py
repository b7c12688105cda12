"""One step of the optimiser: the same however its batch is divided.

Processes share a batch, and each may do its share in parts (`OptimizationConfig.accumulate`).  The
losses of all are divided by the number of objects of the whole batch, and the noise of an image is
that of its place in the whole batch, at this step; so losses and gradients are those of the batch
done at once, but for the rounding of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import implicit
from detection.checkpoints import restore
from detection.data.types import Batch
from detection.distributed import Distributed
from detection.models.decoders import EquilibriumDecoder, Supervised
from detection.models.detector import Detector
from detection.training.errors import TrainingError
from detection.training.losses import Criterion, matched_queries
from detection.training.matching import NonFiniteCost
from detection.training.optimization import (
    ExponentialAverage,
    clip_gradients,
    make_optimizer,
    make_schedule,
)
from detection.training.recipe import Recipe

MOST_OVERFLOWS = 20
"""Steps on end that may overflow in float16: the loss scale is then a millionth of what it was."""
FIRST_SCALE = 1024.0
"""Of the loss in float16: its gradient is in the hundreds, and torch's 65536 would overflow."""


class Objective(nn.Module):
    """The loss of a batch as a module, so that DistributedDataParallel can wrap it."""

    def __init__(self, detector: Detector, recipe: Recipe) -> None:
        super().__init__()
        self.detector, self.recipe = detector, recipe

    def forward(
        self, batch: Batch, normaliser: Tensor, noise: implicit.BatchPart, loss_scale: float
    ) -> Supervised:
        settings = self.recipe.optimization
        criterion = Criterion(
            batch.targets, batch.sizes, self.recipe.loss, self.recipe.cost, normaliser
        )
        with torch.autocast(
            batch.images.device.type,
            getattr(torch, settings.precision),
            enabled=settings.precision != "float32",
        ):
            return self.detector.losses(batch.images, batch.sizes, criterion, noise, loss_scale)


class Step:
    """Moves the weights by one batch at a time.

    Args:
        detector: on its device.
        recipe: how.
        distributed: the processes that share each batch.
        steps_per_epoch: for the schedule.

    Attributes:
        count: steps done.
        average: of the weights, if the recipe has one.
    """

    def __init__(
        self, detector: Detector, recipe: Recipe, distributed: Distributed, steps_per_epoch: int
    ) -> None:
        settings, device = recipe.optimization, distributed.device
        self.detector, self.recipe, self.distributed = detector, recipe, distributed
        self.optimizer = make_optimizer(detector, settings)
        self.schedule = make_schedule(self.optimizer, settings, steps_per_epoch)
        self.average = ExponentialAverage(detector, recipe.average) if recipe.average else None
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=FIRST_SCALE, enabled=settings.precision == "float16"
        )
        self.objective: Callable[..., Supervised] = Objective(detector, recipe).train()
        if distributed.world_size > 1:
            self.objective = DistributedDataParallel(
                Objective(detector, recipe).train(),
                device_ids=[device.index] if device.type == "cuda" else None,
            )
        self.generator = torch.Generator(device)
        self.count = self.overflows = 0

    def __call__(self, batch: Batch) -> dict[str, float]:
        """Forward, backward and update.

        Args:
            batch: of this process, on its device.

        Returns:
            ``loss``, its parts, the ``residual`` where there is a path, ``gradient_norm``, ``lr``,
            the decay of the average, and in float16 the ``loss_scale``: all of the whole batch,
            the same on every process.  A gradient norm that is not finite means that the step
            overflowed in float16 and was left out.

        Raises:
            TrainingError: if a loss or a gradient is not finite, if memory does not suffice, or
                if float16 overflows again and again.
        """
        try:
            return self._step(batch)
        except NonFiniteCost as error:
            raise TrainingError(
                f"Step {self.count + 1}: {error} {self._residuals([self._images(batch)])}"
            ) from error
        except torch.OutOfMemoryError as error:
            settings, (height, width) = self.recipe.optimization, batch.images.shape[-2:]
            raise TrainingError(
                f"Step {self.count + 1}: the memory of {self.distributed.device} does not suffice "
                f"for batch_size={settings.batch_size} on {self.distributed.world_size} processes "
                f"with accumulate={settings.accumulate} and precision={settings.precision!r}, "
                f"images of {height}×{width}. What helps: (a) accumulate="
                f"{2 * settings.accumulate}, with which the result is the same, (b) precision="
                "'bfloat16', (c) a smaller batch_size, (d) smaller images."
            ) from error

    def _step(self, batch: Batch) -> dict[str, float]:
        settings, rate = self.recipe.optimization, self.optimizer.param_groups[-1]["lr"]
        parts = [self._backward(*part) for part in self._divided(batch)]
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.optimizer, settings.clip_norm)
        record = self._record(parts, norm)
        finite = math.isfinite(record["gradient_norm"])
        if not math.isfinite(record["loss"]) or not (finite or self.scaler.is_enabled()):
            self._refuse(batch, record, parts)
        self.overflows = 0 if finite else self.overflows + 1
        if self.overflows > MOST_OVERFLOWS:
            raise TrainingError(
                f"Step {self.count + 1}: the gradient has overflowed float16 in "
                f"{self.overflows} steps on end, down to a loss scale of "
                f"{self.scaler.get_scale():g}. Use precision 'bfloat16' or 'float32'."
            )
        scaled = {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        averaged = {}
        if self.average:
            if finite:
                self.average.update(self.detector)
            averaged["average_decay"] = self.average.current_decay
        self.count += 1
        return {**record, "lr": rate, **averaged, **scaled}

    def _divided(self, batch: Batch) -> list[tuple[Batch, Tensor, int, bool]]:
        """The parts, each with the normaliser of all, its place in the whole batch, and its end."""
        model, settings = self.recipe.model, self.recipe.optimization
        normaliser = matched_queries(batch.targets, model.num_queries, self.distributed)
        parts, first = [], self.distributed.rank * len(batch)
        for n, part in enumerate(batch.split(settings.accumulate), start=1):
            parts.append((part, normaliser, first, n == settings.accumulate))
            first += len(part)
        return parts

    def _backward(self, part: Batch, normaliser: Tensor, first: int, last: bool) -> Supervised:
        """Add to the gradients; they travel between processes with the last part."""
        waiting: AbstractContextManager[None] = nullcontext()
        if isinstance(self.objective, DistributedDataParallel) and not last:
            waiting = self.objective.no_sync()
        # For every part anew: each draws for the whole batch.
        self.generator.manual_seed(_seed(self.recipe.seed, self.count))
        noise = implicit.BatchPart(self.generator, self.recipe.optimization.batch_size, first)
        with waiting:
            found = self.objective(part, normaliser, noise, self.scaler.get_scale())
            self.scaler.scale(found.total).backward()
        return Supervised(found.total.detach(), found.losses, found.parts, found.residual)

    def _record(self, parts: Sequence[Supervised], norm: Tensor) -> dict[str, float]:
        """Of the whole batch, in one transfer to the host."""
        values = {"loss": torch.stack([part.total for part in parts]).sum()}
        for name in parts[0].parts:
            values[name] = torch.stack([part.parts[name] for part in parts]).sum()
        residuals = [part.residual for part in parts if part.residual is not None]
        if residuals:
            values["residual"] = torch.cat(residuals).mean()
        values["gradient_norm"] = norm
        stacked = torch.stack([value.float().reshape(()) for value in values.values()])
        return dict(zip(values, self.distributed.all_reduce_mean(stacked).tolist(), strict=True))

    def _refuse(
        self, batch: Batch, record: Mapping[str, float], parts: Sequence[Supervised]
    ) -> None:
        images = self.distributed.gather_objects(self._images(batch))
        sums = {name: sum(float(part.losses[name]) for part in parts) for name in parts[0].losses}
        outputs = ", ".join(f"{name} {value:.3g}" for name, value in sums.items())
        raise TrainingError(
            f"Step {self.count + 1}: loss {record['loss']:.4g}, gradient norm "
            f"{record['gradient_norm']:.4g}; losses by output: {outputs}. "
            f"{self._residuals(images)} What helps: a lower learning rate, a longer warm-up, or "
            "looking at the annotations of these images."
        )

    def _images(self, batch: Batch) -> tuple[list[int], list[float]]:
        """Ids of the images, and how far from a fixed point each is, where one is sought."""
        ids = [target.image_id for target in batch.targets]
        decoder = self.detector.decoder
        if not isinstance(decoder, EquilibriumDecoder):
            return ids, []
        with torch.no_grad():
            encoded = self.detector.encode(batch.images, batch.sizes)
            stop = implicit.Steps(decoder.config.train_steps)
            residual = decoder(*encoded, stop=stop, trace=True).residual
        return ids, residual[-1].tolist()

    @staticmethod
    def _residuals(images: Sequence[tuple[list[int], list[float]]]) -> str:
        ids = ", ".join(str(i) for some, _ in images for i in some)
        residuals = ", ".join(f"{r:.2g}" for _, some in images for r in some)
        return f"Image ids: {ids}." + (
            f" Their relative residuals at the end of the path: {residuals}." if residuals else ""
        )

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on."""
        return {
            "model": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "scaler": self.scaler.state_dict(),
            "overflows": self.overflows,
            "count": self.count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a stored state of the same recipe."""
        restore(self.detector, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average:
            self.average.load_state_dict(state["average"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.overflows, self.count = int(state["overflows"]), int(state["count"])


def _seed(seed: int, step: int) -> int:
    """Of the noise of a step: all parts and processes, and a resumed run, have the same."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])
