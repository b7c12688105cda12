"""Exported graphs say what the detector says, for any batch; what cannot be exported is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from small_predictor import CATEGORIES, picture, small_predictor
from torch import Tensor

import implicit
from detection.decoder.sparse_rcnn import SparseRCNNLayerConfig
from detection.export import (
    METADATA,
    Exportable,
    ExportError,
    export_onnx,
    export_program,
    layers_of,
)
from detection.models.config import EquilibriumConfig, RecurrentConfig, StackedConfig
from detection.predictor import Predictor

SIZE = (50, 70)
"""No multiple of 32: the graph has to pad."""


def images(count: int) -> Tensor:
    return torch.stack(
        [torch.from_numpy(picture(*SIZE, seed)).permute(2, 0, 1) for seed in range(count)]
    )


def eager(predictor: Predictor, pixels: Tensor, steps: int | None) -> tuple[Tensor, Tensor]:
    """What the detector itself says, by the way that prediction takes."""
    padded = torch.nn.functional.pad(pixels, (0, 96 - SIZE[1], 0, 64 - SIZE[0]))
    stop = None if steps is None else implicit.Steps(steps)
    with torch.inference_mode():
        output = predictor.detector(padded, torch.tensor([SIZE] * len(pixels)), stop=stop)
    return output.boxes, output.logits.sigmoid()


def assert_agree(found: Any, expected: tuple[Tensor, Tensor]) -> None:
    boxes, scores = (torch.as_tensor(part) for part in found)
    torch.testing.assert_close(boxes, expected[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(scores, expected[1], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "steps"),
    [(EquilibriumConfig(), 5), (StackedConfig(layers=2), None)],
)
def test_onnxruntime_agrees(decoder: Any, steps: int | None, tmp_path: Path) -> None:
    predictor = small_predictor(decoder)
    path = export_onnx(predictor, tmp_path / "below" / "a.onnx", size=SIZE, steps=steps)
    assert [file.name for file in path.parent.iterdir()] == ["a.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("images", ["batch", 3, *SIZE], "tensor(uint8)")
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [
        ("boxes", ["batch", 6, 4]),
        ("scores", ["batch", 6, 3]),
    ]
    for count in (1, 3):
        pixels = images(count)
        found = session.run(["boxes", "scores"], {"images": pixels.numpy()})
        assert_agree(found, eager(predictor, pixels, steps))
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == list(CATEGORIES.names)
    assert json.loads(about["category_ids"]) == list(CATEGORIES.ids)
    assert json.loads(about["size"]) == list(SIZE)
    assert json.loads(about["steps"]) == (1 if steps is None else steps)
    assert about["recipe"] == "small"
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()


@pytest.mark.slow
def test_a_program_agrees(tmp_path: Path) -> None:
    predictor = small_predictor(RecurrentConfig(steps=3))
    path = export_program(predictor, tmp_path / "a.pt2", size=SIZE)
    extra = {METADATA: ""}
    program = torch.export.load(path, extra_files=extra).module()
    for count in (1, 3):
        pixels = images(count)
        with torch.no_grad():
            assert_agree(program(pixels), eager(predictor, pixels, None))
    about = json.loads(extra[METADATA])
    assert about["class_names"] == list(CATEGORIES.names) and about["size"] == list(SIZE)


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    pooled = SparseRCNNLayerConfig(
        content_dim=16, feature_channels=32, heads=2, pooled=3, dynamic_dim=4,
        ffn_channels=32, num_classes=3,
    )  # fmt: skip
    anderson = small_predictor(EquilibriumConfig(eval_solver=implicit.Anderson(memory=3)))
    for predictor, words in (
        (small_predictor(layer=pooled), "small cannot be exported.*MultiScaleRoIAlign"),
        (anderson, r"solved by Anderson\(memory=3.*eval_solver"),
    ):
        with pytest.raises(ExportError, match=words):
            export_onnx(predictor, tmp_path / "a.onnx", size=SIZE)
        with pytest.raises(ExportError, match=words):
            export_program(predictor, tmp_path / "a.pt2", size=SIZE)
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = small_predictor()
    bad: list[tuple[str, dict[str, Any], str]] = [
        ("a.pb", {}, r"must end in \.onnx"),
        ("a.onnx", {"steps": 0}, "steps=0"),
        ("a.onnx", {"size": (0, 64)}, "size="),
        ("a.onnx", {"size": (64,)}, "size="),
        ("a.onnx", {"opset": 11}, "opset=11"),
    ]
    for name, options, words in bad:
        with pytest.raises(ValueError, match=words):
            export_onnx(predictor, tmp_path / name, **{"size": SIZE, **options})
    with pytest.raises(ValueError, match=r"must end in \.pt2"):
        export_program(predictor, tmp_path / "a.onnx", size=SIZE)
    fixed = small_predictor(StackedConfig(layers=1))
    with pytest.raises(ValueError, match="steps=3.*fixed number of layers"):
        export_program(fixed, tmp_path / "a.pt2", size=SIZE, steps=3)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"implicit\[export\]"):
        export_onnx(predictor, tmp_path / "a.onnx", size=SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "decoder", [EquilibriumConfig(steps=3), RecurrentConfig(steps=3), StackedConfig(layers=3)]
)
def test_the_highest_scores_of_a_graph_are_the_detections(decoder: Any) -> None:
    """Read as the documentation reads them, and before any conversion."""
    predictor = small_predictor(decoder, most=5)
    size = (64, 90)  # which prediction leaves as it is
    image = picture(*size)
    found = predictor.predict(image)
    model = Exportable(predictor.detector, size, layers_of(predictor, size, None)).eval()
    with torch.no_grad():
        output = model(torch.from_numpy(image).permute(2, 0, 1)[None])
    boxes, scores = (part[0].numpy() for part in output)
    best = scores.ravel().argsort()[::-1][:5]
    query, label = np.divmod(best, scores.shape[1])
    assert label.tolist() == found.labels.tolist()
    np.testing.assert_allclose(scores[query, label], found.scores, atol=1e-4)
    np.testing.assert_allclose(boxes[query], found.boxes, atol=1e-3)
