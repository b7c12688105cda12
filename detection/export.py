"""A detector as one graph without Python: `torch.export` (``.pt2``) and ONNX.

Pixels go in as they are, boxes and scores come out; normalisation, padding and a fixed number of
refinements are in the graph.  The feature maps are read there by ``grid_sample``, which every
runtime has, whatever reads them fastest in Python.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from torch.utils._pytree import tree_map

import implicit
from detection.data.loading import padded_size
from detection.decoder.queries import Queries, QueryLayer
from detection.decoder.sparse_rcnn import SparseRCNNLayer
from detection.files import replacing
from detection.models.decoders import EquilibriumDecoder, RecurrentDecoder, StackedDecoder
from detection.models.detector import Detector
from detection.predictor import Predictor

INPUT, OUTPUTS = "images", ("boxes", "scores")
METADATA = "metadata.json"
"""Name of the description inside a ``.pt2`` file."""


class ExportError(ValueError):
    """A detector that cannot be exported; says what stands against it."""


class Start(nn.Module):
    """From images to queries of the first layer, and the feature maps that they are refined by.

    Args:
        detector: in evaluation mode.
        size: ``(height, width)`` of the images.
    """

    def __init__(self, detector: Detector, size: tuple[int, int]) -> None:
        super().__init__()
        self.detector, self.size = detector, size

    def forward(self, images: Tensor) -> tuple[Queries, list[Tensor]]:
        """Queries and maps of ``images (B, 3, H, W)`` uint8."""
        height, width = self.size
        below, right = (p - s for p, s in zip(padded_size(self.size), self.size, strict=True))
        sizes = torch.tensor([[height, width]], device=images.device).expand(images.shape[0], -1)
        pixels = self.detector.normalise(pad(images.float(), (0, right, 0, below)), sizes)
        features = self.detector.neck(self.detector.backbone(pixels))
        # Not in the layout that Python reads fastest, which has operators of its own.
        features = [feature.contiguous() for feature in features]
        return self.detector.decoder.first(self.detector.queries(sizes), features), features


class Refine(nn.Module):
    """One refinement of queries, given one by one."""

    def __init__(self, layer: QueryLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, position: Tensor, content: Tensor, boxes: Tensor, features: list[Tensor]
    ) -> Queries:
        """The refined queries."""
        refined: Queries = self.layer(Queries(position, content, boxes), features)
        return refined


class Read(nn.Module):
    """Scores of contents."""

    def __init__(self, layer: QueryLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, content: Tensor) -> Tensor:
        """``(B, N, K)`` of ``(B, N, C)``."""
        return self.layer.classify(content).sigmoid()


class Exportable(nn.Module):
    """What is exported: ``images (B, 3, H, W)`` uint8 RGB of one size to boxes and scores.

    Returns ``boxes (B, N, 4)``, xyxy in pixels of these images, and ``scores (B, N, K)``, the
    sigmoid of every query's classes.

    Args:
        detector: in evaluation mode.
        size: ``(height, width)`` of the images.
        layers: what refines the first layer's queries, one after the other.

    Example:
        >>> from detection.recipes import recipe
        >>> detector = Detector(recipe("deqdet_digits").model).eval()
        >>> model = Exportable(detector, (40, 64), [detector.decoder.refinement] * 2)
        >>> boxes, scores = model(torch.zeros(1, 3, 40, 64, dtype=torch.uint8))
        >>> boxes.shape, scores.shape
        (torch.Size([1, 20, 4]), torch.Size([1, 20, 10]))
    """

    def __init__(
        self, detector: Detector, size: tuple[int, int], layers: Sequence[QueryLayer]
    ) -> None:
        super().__init__()
        self.start = Start(detector, size)
        self.refine = nn.ModuleList(Refine(layer) for layer in layers)
        self.read = Read(layers[-1] if layers else detector.decoder.first)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and scores."""
        queries, features = self.start(images)
        for refine in self.refine:
            queries = refine(*queries, features)
        return queries.boxes, self.read(queries.content)


def export_program(
    predictor: Predictor,
    path: Path | str,
    *,
    size: tuple[int, int],
    steps: int | None = None,
) -> Path:
    """Write a detector as a program of `torch.export`, to be run without this library.

    The program takes ``images (B, 3, H, W)`` uint8 RGB for any batch, and gives ``boxes`` and
    ``scores`` as `export_onnx` describes them.  Its description lies in the file as
    ``metadata.json``.

    Args:
        predictor: what to export; it is left as it is.
        path: ends in ``.pt2``; folders are made.
        size: ``(height, width)`` of the images that it will be given.
        steps: refinements; by default as many as the recipe takes at most.

    Returns:
        The path.

    Raises:
        ExportError: naming the part that cannot be exported.
        ValueError: if the ending is another, or a number out of its range.
    """
    path = _checked(path, ".pt2")
    layers = layers_of(predictor, size, steps)
    program = _traced(Exportable(predictor.detector, size, layers), _images(predictor, size))
    about = json.dumps(_about(predictor, size, layers))
    with replacing(path) as temporary:
        torch.export.save(program, temporary, extra_files={METADATA: about})
    return path


def export_onnx(
    predictor: Predictor,
    path: Path | str,
    *,
    size: tuple[int, int],
    steps: int | None = None,
    opset: int = 18,
) -> Path:
    """Write a detector as an ONNX file, to be run by onnxruntime and its like.

    - Input ``images``: ``(batch, 3, H, W)`` uint8, RGB, not normalised, of exactly ``size``; any
      batch.
    - Output ``boxes``: ``(batch, N, 4)`` float32, xyxy in pixels of these images.
    - Output ``scores``: ``(batch, N, K)`` float32, of every query and class.  No suppression of
      overlaps is needed: the detections are the highest of them.

    The file's metadata tell ``class_names`` and ``category_ids`` (JSON lists), ``size``,
    ``steps`` (JSON) and ``recipe``.

    Args:
        predictor: what to export; it is left as it is.
        path: ends in ``.onnx``; folders are made.
        size: ``(height, width)`` of the images that it will be given.
        steps: refinements; by default as many as the recipe takes at most.
        opset: version of ONNX's operators.

    Returns:
        The path.

    Raises:
        ExportError: naming the part that cannot be exported.
        ImportError: if onnx or onnxscript is not installed.
        ValueError: if the ending is another, or a number out of its range.
    """
    path = _checked(path, ".onnx")
    if opset < 18:
        raise ValueError(f"opset={opset}: the graph needs at least 18.")
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'export_onnx() needs packages: pip install "implicit[export]".'
        ) from error
    layers = layers_of(predictor, size, steps)
    model = _onnx_model(predictor, size, layers, opset)
    about = _about(predictor, size, layers)
    onnx.helper.set_model_props(
        model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    )
    onnx.checker.check_model(model)
    with replacing(path) as temporary:
        onnx.save(model, str(temporary))
    return path


def layers_of(predictor: Predictor, size: tuple[int, int], steps: int | None) -> list[QueryLayer]:
    """The layers to call after the first one, in order.

    Raises:
        ExportError: naming the part that cannot be exported.
        ValueError: if a number is out of its range.
    """
    name, decoder = predictor.recipe.name, predictor.detector.decoder
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size={size}: give (height, width) in pixels.")
    if isinstance(decoder.first, SparseRCNNLayer):
        raise ExportError(
            f"{name} cannot be exported: its layer is that of Sparse R-CNN, whose pooling "
            "(torchvision.ops.MultiScaleRoIAlign) chooses the level of each box by its values, "
            "which a graph cannot. Export a detector with the layer of AdaMixer."
        )
    if isinstance(decoder, EquilibriumDecoder):
        solver = decoder.config.eval_solver or decoder.config.solver
        if solver != implicit.Naive():
            raise ExportError(
                f"{name} cannot be exported as it is: it is solved by {solver}, whose steps are no "
                "part of the graph. Set eval_solver to implicit.Naive() in its decoder's "
                "configuration, and see that its AP stays."
            )
        if steps is not None and steps < 1:
            raise ValueError(f"steps={steps}: must be at least 1.")
        return [decoder.refinement] * (steps or decoder.config.most_steps)
    if steps is not None:
        raise ValueError(
            f"steps={steps}: the decoder of {name} has a fixed number of layers. Leave it out."
        )
    if isinstance(decoder, RecurrentDecoder):
        return [decoder.refinement] * (decoder.steps - 1)
    assert isinstance(decoder, StackedDecoder)
    return [cast(QueryLayer, layer) for layer in decoder.layers][1:]


def _images(predictor: Predictor, size: tuple[int, int]) -> tuple[Tensor]:
    # Two: of one image torch.export would take the batch for a constant.
    return (torch.zeros(2, 3, *size, dtype=torch.uint8, device=predictor.device),)


def _about(
    predictor: Predictor, size: tuple[int, int], layers: Sequence[QueryLayer]
) -> dict[str, Any]:
    """What a user of the file has to know."""
    return {
        "recipe": predictor.recipe.name,
        "class_names": list(predictor.categories.names),
        "category_ids": list(predictor.categories.ids),
        "size": list(size),
        "steps": len(layers),
        "version": implicit.__version__,
    }


def _traced(model: nn.Module, inputs: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The program of a module, for any batch."""
    batch = torch.export.Dim("batch", min=1)
    shapes = tree_map(lambda _: {0: batch}, inputs)
    with torch.no_grad(), _plain_attention():
        return torch.export.export(model.eval(), inputs, dynamic_shapes=shapes, strict=False)


def _onnx_model(
    predictor: Predictor, size: tuple[int, int], layers: Sequence[QueryLayer], opset: int
) -> Any:
    """The ONNX model of an `Exportable`; a layer that is called again and again is a loop."""
    from onnx import helper

    detector = predictor.detector
    start, images = Start(detector, size), _images(predictor, size)
    with torch.no_grad():
        queries, features = start(*images)
    state, maps = Queries._fields, [f"map{level}" for level in range(len(features))]
    parts = _Parts(opset)
    parts.add("start", start, images, [INPUT], [*state, *maps])
    for number, (layer, calls) in enumerate(groupby(layers)):
        refine, example = Refine(layer), (*queries, features)
        parts.add(f"layer{number}", refine, example, [*state, *maps], state, len(list(calls)))
    read = Read(layers[-1] if layers else detector.decoder.first)
    parts.add("read", read, (queries.content,), ["content"], ["scores"])
    with torch.no_grad():
        outputs = dict(zip(OUTPUTS, (queries.boxes, read(queries.content)), strict=True))
    return helper.make_model(
        parts.graph(size, outputs),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=parts.ir_version,
        producer_name="implicit",
        producer_version=implicit.__version__,
    )


class _Parts:
    """Modules that are converted to ONNX one by one, and linked by the names of their results.

    So a layer that is called 25 times is converted once; conversion is slow.

    Args:
        opset: version of ONNX's operators.

    Attributes:
        ir_version: of the format that the converted parts have.
    """

    def __init__(self, opset: int) -> None:
        self.opset, self.ir_version = opset, 0
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._found = {INPUT: INPUT}
        """What the results so far are called in the graph."""

    def add(
        self,
        name: str,
        module: nn.Module,
        example: tuple[Any, ...],
        inputs: Sequence[str],
        outputs: Sequence[str],
        times: int = 1,
    ) -> None:
        """Append a module; called ``times`` times, it is given its own outputs again."""
        from onnx import helper

        with _plain_attention(), _without_notes_of_the_optimizer():
            written = torch.onnx.export(
                _traced(module, example),
                dynamo=True,
                opset_version=self.opset,
                input_names=inputs,
                output_names=[f"next_{key}" for key in outputs],
                verbose=False,
            )
        assert written is not None
        graph = written.model_proto.graph
        self.ir_version = max(self.ir_version, written.model_proto.ir_version)
        # What goes round in a loop is its own; all else is seen from without.
        feeds = {key: self._found[key] for key in inputs if times == 1 or key not in outputs}

        def called(old: str) -> str:
            return feeds.get(old, f"{name}/{old}") if old else ""

        nodes = []
        for old in graph.node:
            ins, outs = map(called, old.input), map(called, old.output)
            node = helper.make_node(old.op_type, list(ins), list(outs), f"{name}/{old.name}")
            node.attribute.extend(old.attribute)
            nodes.append(node)
        for weight in graph.initializer:
            weight.name = called(weight.name)
        self._weights += graph.initializer
        results = [called(f"next_{key}") for key in outputs]
        if times > 1:
            nodes, results = (
                [self._loop(name, nodes, results, outputs, times)],
                [f"{name}/last_{key}" for key in outputs],
            )
        self._nodes += nodes
        self._found.update(zip(outputs, results, strict=True))

    def _loop(
        self, name: str, nodes: list[Any], results: list[str], keys: Sequence[str], times: int
    ) -> Any:
        """A node that runs others ``times`` times; their results of the names ``keys`` go round."""
        from onnx import TensorProto, helper, numpy_helper

        def scalar(key: str, kind: int) -> Any:
            return helper.make_tensor_value_info(f"{name}/{key}", kind, [])

        def state(full_name: str) -> Any:
            return helper.make_tensor_value_info(full_name, TensorProto.FLOAT, None)

        # Nobody ends the loop early, but the standard has each round say that it may go on.
        body = helper.make_graph(
            [*nodes, helper.make_node("Identity", [f"{name}/go"], [f"{name}/going"])],
            name,
            [
                scalar("round", TensorProto.INT64),
                scalar("go", TensorProto.BOOL),
                *(state(f"{name}/{key}") for key in keys),
            ],
            [scalar("going", TensorProto.BOOL), *map(state, results)],
        )
        rounds = f"{name}/rounds"
        self._weights.append(numpy_helper.from_array(np.array(times, np.int64), rounds))
        return helper.make_node(
            "Loop",
            [rounds, "", *(self._found[key] for key in keys)],
            [f"{name}/last_{key}" for key in keys],
            name,
            body=body,
        )

    def graph(self, size: tuple[int, int], outputs: Mapping[str, Tensor]) -> Any:
        """The whole, for images of a size, with results under the names they were given."""
        from onnx import TensorProto, helper

        ends = [helper.make_node("Identity", [self._found[key]], [key]) for key in outputs]
        return helper.make_graph(
            [*self._nodes, *ends],
            "detector",
            [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", 3, *size])],
            [
                helper.make_tensor_value_info(key, TensorProto.FLOAT, ["batch", *value.shape[1:]])
                for key, value in outputs.items()
            ],
            self._weights,
        )


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as matrix products: the memory layouts of the other kinds are not ONNX's."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _without_notes_of_the_optimizer() -> Iterator[None]:
    """It tells of every normalisation that it leaves as it is, which says nothing to a user."""
    logger = logging.getLogger("onnxscript.optimizer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _checked(path: Path | str, ending: str) -> Path:
    path = Path(path)
    if path.suffix != ending:
        raise ValueError(f"{path}: the name must end in {ending}.")
    return path
