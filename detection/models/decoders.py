"""One refinement layer, iterated in three ways: the argument of the paper (Fig. 1) as code.

- `StackedDecoder` (AdaMixer): layers with weights of their own, ``y_t = f_t(x, y_{t-1})`` (Eq. 1).
- `RecurrentDecoder` (RNNDet): one tied layer, trained through its whole path (Eq. 4).
- `EquilibriumDecoder` (DEQDet): the fixed point of that layer, ``y* = f(x, y*)`` (Eq. 6).

Solving, gradients, supervision and perturbation of the last are those of `implicit`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

import implicit
from detection.decoder.layer import LayerConfig, RefinementLayer
from detection.decoder.movement import Settled
from detection.decoder.noise import BoxNoise, ContentNoise
from detection.decoder.queries import Queries, QueryLayer
from detection.decoder.sparse_rcnn import SparseRCNNLayer
from detection.models.config import (
    AnyLayerConfig,
    DecoderConfig,
    EquilibriumConfig,
    PerturbationConfig,
    RecurrentConfig,
    StackedConfig,
)
from implicit.perturbation import RandomSource

Features = Sequence[Tensor]
"""Feature maps ``(B, C, H/s, W/s)`` for the strides ``s`` of the layer."""


class Criterion(Protocol):
    """The loss of an output (`detection.training.losses.Criterion`).

    Every output is scored by a call.  What it is scored against is asked for before, for all
    outputs that are known at one time, since the host must wait for the device to know it.
    """

    def matches(self, predictions: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Any]:
        """What each of some pairs of logits and boxes is scored against."""

    def __call__(
        self, logits: Tensor, boxes: Tensor, matches: Any = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss and its parts, the latter detached."""


class Output(NamedTuple):
    """What a decoder says of a batch.

    Attributes:
        logits: ``(B, N, K)`` class logits (sigmoid, no background).
        boxes: ``(B, N, 4)`` xyxy in pixels of the input image; not clipped to it.
        residual: ``(T, B)`` relative residual at each refinement; `None` unless asked for.
        steps: ``(B,)`` solver steps that an image took; `None` where nothing is solved.
        queries: the refined queries that this was read from, where a fixed point was solved for:
            the start for the next frame of a film.
        relative_residual: ``(B,)`` that of an image's last refinement; `None` where nothing is
            solved.
    """

    logits: Tensor
    boxes: Tensor
    residual: Tensor | None = None
    steps: Tensor | None = None
    queries: Queries | None = None
    relative_residual: Tensor | None = None

    @classmethod
    def joined(cls, outputs: Sequence[Output]) -> Output:
        """The output of a batch from those of its parts; without their residuals over time."""

        def join(parts: Iterable[Tensor | None]) -> Tensor | None:
            known = [part for part in parts if part is not None]
            return torch.cat(known) if known else None

        queries = [output.queries for output in outputs if output.queries is not None]
        return cls(
            torch.cat([output.logits for output in outputs]),
            torch.cat([output.boxes for output in outputs]),
            steps=join(output.steps for output in outputs),
            queries=Queries(*map(torch.cat, zip(*queries, strict=True))) if queries else None,
            relative_residual=join(output.relative_residual for output in outputs),
        )


@dataclass
class Supervised:
    """The loss of a batch: the sum to differentiate, and what each supervised output gave.

    Attributes:
        total: scalar.
        losses: detached loss of each supervised output, by name (``init``, ``init+1``, ``iter3``).
        parts: detached loss parts (class, l1, giou), summed over the outputs.
        residual: ``(B,)`` relative residual at the end of the path, where there is one.
    """

    total: Tensor
    losses: dict[str, Tensor]
    parts: dict[str, Tensor]
    residual: Tensor | None = None


class Decoder(nn.Module, ABC):
    """Refines queries against image features."""

    @property
    @abstractmethod
    def first(self) -> QueryLayer:
        """The layer that is called first; all are of its kind."""

    @abstractmethod
    def trajectory(self, features: Features, queries: Queries) -> Iterator[Output]:
        """The output after every layer call, first to last."""

    @abstractmethod
    def losses(
        self,
        features: Features,
        queries: Queries,
        criterion: Criterion,
        generator: RandomSource | None = None,
        loss_scale: float = 1.0,
    ) -> Supervised:
        """The training loss.

        Args:
            features: maps of the batch.
            queries: where refinement starts.
            criterion: loss of one output.
            generator: source of perturbation noise, where there is any.
            loss_scale: that of gradient scaling, see `implicit.supervise`.
        """

    def forward(self, features: Features, queries: Queries) -> Output:
        """The last output."""
        output = None
        for output in self.trajectory(features, queries):  # noqa: B007
            pass
        assert output is not None
        return output


class _Scores:
    """Adds up the losses of several outputs."""

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion
        self.totals: list[Tensor] = []
        self.losses: dict[str, Tensor] = {}
        self.parts: dict[str, Tensor] = {}

    def add(self, outputs: Mapping[str, Output]) -> None:
        """Score outputs whose losses go into the total."""
        matches = self.criterion.matches([(x.logits, x.boxes) for x in outputs.values()])
        for (name, output), matched in zip(outputs.items(), matches, strict=True):
            loss, parts = self.criterion(output.logits, output.boxes, matched)
            self.totals.append(loss)
            self.note(name, loss.detach(), parts)

    def note(self, name: str, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Record a loss whose gradient is taken care of elsewhere."""
        self.losses[name] = loss
        for part, value in parts.items():
            self.parts[part] = self.parts[part] + value if part in self.parts else value

    def supervised(self, *more: Tensor) -> Supervised:
        return Supervised(torch.stack([*self.totals, *more]).sum(), self.losses, self.parts)


class StackedDecoder(Decoder):
    """AdaMixer: every layer has its own weights and is supervised."""

    def __init__(self, layer: AnyLayerConfig, config: StackedConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(build_layer(layer) for _ in range(config.layers))

    @property
    def first(self) -> QueryLayer:
        return cast(QueryLayer, self.layers[0])

    def trajectory(self, features: Features, queries: Queries) -> Iterator[Output]:
        for layer in self.layers:
            queries = layer(queries, features)
            yield _read(layer, queries)

    def losses(
        self,
        features: Features,
        queries: Queries,
        criterion: Criterion,
        generator: RandomSource | None = None,
        loss_scale: float = 1.0,
    ) -> Supervised:
        outputs = enumerate(self.trajectory(features, queries), start=1)
        scores = _Scores(criterion)
        scores.add({f"layer{n}": output for n, output in outputs})
        return scores.supervised()


class RecurrentDecoder(Decoder):
    """RNNDet: an initialisation layer, then one layer again and again; BPTT, all supervised."""

    def __init__(self, layer: AnyLayerConfig, config: RecurrentConfig) -> None:
        super().__init__()
        self.steps = config.steps
        self.initial = build_layer(layer, config.initial_points)
        self.refinement = build_layer(layer)

    @property
    def first(self) -> QueryLayer:
        return self.initial

    def trajectory(self, features: Features, queries: Queries) -> Iterator[Output]:
        queries = self.initial(queries, features)
        yield _read(self.initial, queries)
        for _ in range(self.steps - 1):
            queries = self.refinement(queries, features)
            yield _read(self.refinement, queries)

    def losses(
        self,
        features: Features,
        queries: Queries,
        criterion: Criterion,
        generator: RandomSource | None = None,
        loss_scale: float = 1.0,
    ) -> Supervised:
        outputs = enumerate(self.trajectory(features, queries))
        scores = _Scores(criterion)
        scores.add({"init" if n == 0 else f"iter{n}": output for n, output in outputs})
        return scores.supervised()


class EquilibriumDecoder(Decoder):
    """DEQDet: an initialisation layer ``g``, then the fixed point of the refinement layer ``f``.

    Training (paper, §3.3): losses on ``g``, on ``h`` applications of ``f`` chained to it, and on
    the perturbed path that starts at the detached output of ``g``, at the positions ``Ω``.

    The first of these are matched with one wait for the device, and each position of the path with
    another: its output is made and differentiated before the next one is there, which is why the
    memory does not grow with their number.  To match all at once, each of them would have to be
    computed without gradient before, and that takes longer than waiting
    (`benchmarks.training_step`).
    """

    def __init__(self, layer: AnyLayerConfig, config: EquilibriumConfig) -> None:
        super().__init__()
        self.config = config
        own = config.initial == "own"
        self.initial = build_layer(layer, config.initial_points) if own else None
        self.refinement = build_layer(layer)
        self.perturbation = _perturbations(config.perturbation)

    @property
    def first(self) -> QueryLayer:
        """The initialisation layer, if there is one of its own."""
        return self.refinement if self.initial is None else self.initial

    def default_stop(self, *, warm: bool = False) -> implicit.Steps | implicit.Tolerance:
        """When refinement ends at inference; ``warm`` as for `until`."""
        config = self.config
        if config.steps != "auto" or config.tolerance is not None:
            return config.eval_stop
        return self.until(config.settled, config.most_steps, warm=warm)

    def until(self, settled: Settled, most_steps: int, *, warm: bool = False) -> implicit.Tolerance:
        """The stop that ends the refinement of an image when it has settled.

        Args:
            settled: when that is.
            most_steps: after so many refinements it ends in any case.
            warm: for images that start from the frame before, and may be done at once.
        """
        least = 0 if warm else min(settled.least_steps, most_steps)

        def movement(before: Queries, after: Queries) -> Tensor:
            return settled.movement(before, after, self.refinement.classify)

        return implicit.Tolerance(
            rtol=0.0,
            atol=1.0,
            max_steps=most_steps,
            norm=movement,
            min_steps=least,
        )

    def forward(
        self,
        features: Features,
        queries: Queries,
        *,
        stop: implicit.Steps | implicit.Tolerance | None = None,
        solver: implicit.Solver | None = None,
        start: Queries | None = None,
        trace: bool = False,
    ) -> Output:
        """The detections at the fixed point.

        Args:
            features: maps of the batch.
            queries: where refinement starts.
            stop: when to stop refining; by default as the configuration says.
            solver: by default the one of the configuration; of another than `implicit.Naive` the
                best iterate counts (`implicit.Best`).
            start: where to start instead of at the first layer's output: at ``output.queries`` of
                the frame before, in a film.
            trace: also return the relative residual of every refinement.
        """
        solution = implicit.fixed_point(
            self.refinement,
            self.first(queries, features) if start is None else start,
            solver=self._safe(solver or self.config.eval_solver or self.config.solver),
            stop=stop or self.default_stop(warm=start is not None),
            gradient=implicit.JFB(),
            args=(features,),
            trace=trace,
        )
        output = _read(self.refinement, solution.value)
        return output._replace(
            residual=solution.trace,
            steps=solution.steps,
            queries=solution.value,
            relative_residual=solution.relative_residual,
        )

    def trajectory(self, features: Features, queries: Queries) -> Iterator[Output]:
        start = self.first(queries, features)
        yield _read(self.first, start)
        solution = implicit.fixed_point(
            self.refinement,
            start,
            solver=self._safe(self.config.eval_solver or self.config.solver),
            stop=self.default_stop(),
            gradient=implicit.JFB(),
            args=(features,),
            path=range(1, self.config.most_steps + 1),
        )
        for queries in (*solution.path[:-1], solution.value):  # which `Best` may have chosen
            yield _read(self.refinement, queries)

    @staticmethod
    def _safe(solver: implicit.Solver) -> implicit.Solver:
        """Quasi-Newton steps may leave what the layer was trained on: the best iterate counts."""
        plain = isinstance(solver, (implicit.Naive, implicit.Best))
        return solver if plain else implicit.Best(solver)

    def losses(
        self,
        features: Features,
        queries: Queries,
        criterion: Criterion,
        generator: RandomSource | None = None,
        loss_scale: float = 1.0,
    ) -> Supervised:
        chained = start = self.first(queries, features)
        outputs = {"init": _read(self.first, start)}
        for n in range(1, self.config.extra_supervision + 1):
            chained = self.refinement(chained, features)
            outputs[f"init+{n}"] = _read(self.refinement, chained)
        scores = _Scores(criterion)
        scores.add(outputs)

        def loss(state: Queries, position: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            output = _read(self.refinement, state)
            return criterion(output.logits, output.boxes)

        path = implicit.supervise(
            self.refinement,
            start,
            loss,
            at=self.config.positions,
            gradient=self.config.gradient,
            solver=self.config.solver,
            perturbation=self.perturbation,
            args=(features,),
            parameters=self.refinement.parameters(),
            generator=generator,
            loss_scale=loss_scale,
        )
        for n, value, parts in zip(self.config.positions, path.losses, path.aux, strict=True):
            scores.note(f"iter{n}", value, parts)
        return replace(scores.supervised(path.loss), residual=path.residual)


def build_layer(config: AnyLayerConfig, points: int | None = None) -> QueryLayer:
    """The layer that a configuration stands for; AdaMixer's with other ``points`` if given."""
    if isinstance(config, LayerConfig):
        return RefinementLayer(config if points is None else replace(config, points=points))
    return SparseRCNNLayer(config)


def build_decoder(layer: AnyLayerConfig, config: DecoderConfig) -> Decoder:
    """The decoder that a configuration stands for."""
    if isinstance(config, StackedConfig):
        return StackedDecoder(layer, config)
    if isinstance(config, RecurrentConfig):
        return RecurrentDecoder(layer, config)
    return EquilibriumDecoder(layer, config)


def _read(layer: nn.Module, queries: Queries) -> Output:
    assert isinstance(layer, QueryLayer)
    return Output(layer.classify(queries.content), queries.boxes)


def _perturbations(config: PerturbationConfig) -> tuple[implicit.Perturbation, ...]:
    """Content first, then boxes, each with a coin of its own."""
    noises: list[tuple[float, implicit.Noise]] = [
        (config.content, ContentNoise(config.content)),
        (config.position, BoxNoise(config.position)),
    ]
    return tuple(
        implicit.Perturbation(noise, config.probability, config.entry)
        for sigma, noise in noises
        if sigma > 0
    )
