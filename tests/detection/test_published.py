"""Published checkpoints: every tensor accounted for, the same numbers out, and refusals by name."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from published_models import LAYER, MODELS, model, published, saved
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging

import implicit
from detection.checkpoints import CheckpointError
from detection.models.config import (
    BackboneConfig,
    ModelConfig,
)
from detection.models.decoders import EquilibriumDecoder
from detection.models.detector import Detector
from detection.pretrained import (
    coco_categories,
    convert_published,
    load_detector,
    load_published,
)
from detection.published import START_BOXES, Plan, convert, plan
from detection.recipes import recipe

LISTS = {
    "r50_1x": "published_r50_1x",
    "r50_2x": "published_r50_2x",
    "r101_2x": "published_r101_2x",
    "swins_2x": "published_swins_2x",
    "ffndet_r50_1x": "published_adamixer_r50_1x",
}
"""State dicts of the published configurations, and our recipes of them."""


def listed(name: str) -> dict[str, Tensor]:
    """Tensors of the shapes of a list, without contents."""
    weights = {}
    for line in (reference.FIXTURES / "state_dicts" / f"{name}.tsv").read_text().splitlines():
        tensor, sizes, dtype = line.split("\t")[:3]
        shape = () if sizes == "scalar" else tuple(int(size) for size in sizes.split("x"))
        weights[tensor] = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    return weights


def images() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=draw)
    return pixels, torch.tensor([[64, 90]])


# -- every tensor is accounted for ---------------------------------------------------------------


@pytest.mark.parametrize("name", LISTS)
def test_every_tensor_of_the_published_lists_is_explained(name: str) -> None:
    weights = listed(name)
    found = plan(weights)
    assert found.recipe == recipe(LISTS[name])
    assert set(found.sources.values()).isdisjoint(found.unused)
    assert set(found.sources.values()) | set(found.unused) == set(weights)
    assert len(set(found.sources.values())) == len(found.sources)
    assert all("instance_interactive" in name or name == START_BOXES for name in found.unused)
    assert all(found.unused.values())


@pytest.mark.parametrize("name", LISTS)
def test_the_published_lists_fill_our_models(name: str) -> None:
    weights = {
        tensor: torch.zeros((), dtype=meta.dtype).expand(meta.shape)
        for tensor, meta in listed(name).items()
    }
    weights[START_BOXES] = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(weights[START_BOXES].shape)
    swin = Detector(ModelConfig(BackboneConfig("swin_s", False), layer=LAYER)).backbone
    index = next(v for k, v in swin.state_dict().items() if k.endswith("position_index"))
    for tensor in weights:
        if tensor.endswith("relative_position_index"):
            weights[tensor] = index.view(49, 49)
    loaded = load_published({"state_dict": weights, "meta": {}})
    assert loaded.config == recipe(LISTS[name]).without_pretraining().model
    assert not loaded.training
    assert not any(p.any() for p in loaded.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_is_what_was_saved(name: str) -> None:
    loaded = load_published(published(name))
    assert loaded.config == MODELS[name]
    for ours, theirs in zip(
        loaded.state_dict().items(), model(name).state_dict().items(), strict=True
    ):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    with torch.no_grad():
        assert torch.equal(loaded(*images()).boxes, model(name)(*images()).boxes)


def test_the_published_schedule_is_the_default_and_not_the_only_one() -> None:
    loaded = load_published(published("DEQDet"))
    decoder = loaded.decoder
    assert isinstance(decoder, EquilibriumDecoder)
    with torch.no_grad():
        features, queries = loaded.encode(*images())
        calls = len(list(decoder.trajectory(features, queries)))
        first = decoder(features, queries, stop=implicit.Steps(3)).boxes
        third = list(decoder.trajectory(features, queries))[3].boxes
    assert calls == 1 + 20 + 1
    torch.testing.assert_close(first, third)


def test_precision_is_that_of_the_weights_and_at_least_float32() -> None:
    for dtype, wanted in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
    ):
        weights = {
            k: v.to(dtype) if v.is_floating_point() else v for k, v in published("DEQDet").items()
        }
        assert {p.dtype for p in load_published(weights).parameters()} == {wanted}


def test_patch_merging_of_swin_is_rearranged() -> None:
    """There a channel's four pixels are neighbours, as `nn.Unfold` lays them."""
    torch.manual_seed(0)
    theirs = nn.ModuleDict({"norm": nn.LayerNorm(12), "reduction": nn.Linear(12, 6, bias=False)})
    nn.init.normal_(theirs["norm"].weight)
    nn.init.normal_(theirs["norm"].bias)
    ours = PatchMerging(3, nn.LayerNorm)
    names = {name: f"backbone.features.2.{name}" for name in theirs.state_dict()}

    mapping = Plan(recipe("published_swins_2x"), {ours: name for name, ours in names.items()})
    weights: Any = {**theirs.state_dict(), START_BOXES: torch.tensor([[0.5, 0.5, 1.0, 1.0]])}
    state = convert(weights, mapping)
    ours.load_state_dict({k.rsplit("features.2.")[1]: v for k, v in state.items()})
    x = torch.randn(2, 6, 8, 3)
    unfolded = nn.functional.unfold(x.permute(0, 3, 1, 2), 2, stride=2).mT
    wanted = theirs["reduction"](theirs["norm"](unfolded)).view(2, 3, 4, 6)
    torch.testing.assert_close(ours(x), wanted)


# -- files ---------------------------------------------------------------------------------------


def test_a_file_with_mmengines_records_is_read(tmp_path: Path) -> None:
    """Of past losses, as numpy arrays in objects of mmengine, which need not be installed."""
    module = type(pickle)("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self.values = {"loss": np.arange(3.0), "last": np.float64(2.0), "n": np.int64(3)}

    HistoryBuffer.__module__ = module.__name__
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    import sys

    names = ("mmengine", "mmengine.logging", module.__name__)
    try:
        for name in names:
            sys.modules[name] = module
        path = saved(tmp_path / "a.pth", published("DEQDet"), message_hub={"loss": HistoryBuffer()})
    finally:
        for name in names:
            sys.modules.pop(name, None)
    assert load_published(path).config == MODELS["DEQDet"]


def test_a_file_in_the_old_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(published("DEQDet"), path, _use_new_zipfile_serialization=False)
    assert load_published(path).config == MODELS["DEQDet"]


def test_conversion_keeps_weights_recipe_and_classes(tmp_path: Path) -> None:
    source = tmp_path / "a.pth"
    meta = {"dataset_meta": {"classes": ("cat", "dog", "emu")}}
    torch.save({"meta": meta, "state_dict": published("DEQDet")}, source)
    target = convert_published(source, tmp_path / "b.safetensors")
    loaded, made, categories = load_detector(target)
    assert made.model == MODELS["DEQDet"]
    assert (categories.names, categories.ids) == (("cat", "dog", "emu"), (1, 2, 3))
    with torch.no_grad():
        assert torch.equal(loaded(*images()).logits, model("DEQDet")(*images()).logits)


def test_names_given_come_before_those_of_the_file(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pth", published("DEQDet"))
    target = convert_published(source, tmp_path / "b.safetensors", ["x", "y", "z"])
    assert load_detector(target)[2].names == ("x", "y", "z")


def test_coco_has_80_classes_and_90_ids() -> None:
    coco = coco_categories()
    assert len(coco) == 80 and coco.ids[:12] == (*range(1, 12), 13) and coco.ids[-1] == 90
    assert (coco.names[0], coco.names[79]) == ("person", "toothbrush")


# -- refusals ------------------------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        del weights[name]

    return change


def with_(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        weights[name] = value

    return change


OF = "roi_head.bbox_head.1."


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without("backbone.layer4.1.bn2.weight"), r"missing: backbone\.layer4\.1\.bn2\.weight"),
        (without(f"{OF}fc_cls.bias"), r"missing: roi_head\.bbox_head\.1\.fc_cls\.bias"),
        (without(f"{OF}iof_tau"), r"missing: roi_head\.bbox_head\.1\.iof_tau"),
        (without(START_BOXES), r"missing: rpn_head\.init_proposal_bboxes"),
        (without("neck.gn_out.bias"), r"missing: neck\.gn_out\.bias"),
        (without("neck.convs.0.conv.weight"), r"missing: neck\.convs\.0\.conv\.weight"),
        (with_("mask_head.weight", torch.ones(1)), r"unknown: mask_head\.weight"),
        (with_(f"{OF}fc_mask.weight", torch.ones(1)), r"unknown: .*fc_mask\.weight"),
        (with_("neck.gn_out.bias", torch.ones(3)), r"other shape: neck\.gn_out\.bias \(3,\) where"),
        (with_(f"{OF}iof_tau", torch.ones(3)), r"32 channels cannot be shared by 3 heads"),
        (with_(f"{OF}iof_tau", torch.ones(3, 3)), r"iof_tau \(3, 3\) where 1 dim"),
        (
            with_(f"{OF}fc_cls.weight", torch.ones(9, 32)),
            r"other shape: .*0\.fc_cls\.weight \(3",
        ),
        (
            with_(f"{OF}sampling_n_mixing.adaptive_mixing.out_proj.weight", torch.ones(32, 77)),
            r"sampling_n_mixing: sizes that do not fit",
        ),
        (with_("neck.convs.0.conv.weight", torch.ones(64, 64, 5, 5)), r"a kernel of 5"),
        (with_("roi_head.bbox_head.3.iof_tau", torch.ones(4)), r"missing: .*bbox_head\.2\.\*"),
        (with_("neck.gn_out.bias", torch.ones(64, dtype=torch.int64)), r"gn_out\.bias torch.int64"),
        (with_("neck.gn_out.bias", torch.ones(64).to_sparse()), r"gn_out.* no dense tensor"),
        (with_("neck.gn_out.bias", torch.ones(64, device="meta")), r"gn_out.* no dense tensor"),
        (with_("neck.gn_out.bias", 3), r"gn_out.* is no tensor"),  # type: ignore[arg-type]
        (dict.clear, r"holds no tensors"),
        (with_("backbone.conv1.weight", torch.full((64, 3, 7, 7), torch.nan)), r"conv1.* NaN"),
        (with_(START_BOXES, torch.rand(5, 4)), r"start from other boxes"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], None], match: str
) -> None:
    weights = published("DEQDet")
    change(weights)
    with pytest.raises(CheckpointError, match=match):
        load_published(weights)


@pytest.mark.parametrize("name", ["resnet50", "fcos"])
def test_another_architecture_is_refused(name: str) -> None:
    import torchvision

    if name == "resnet50":
        weights = torchvision.models.resnet50(weights=None).state_dict()
    else:
        build = torchvision.models.detection.fcos_resnet50_fpn
        weights = build(weights=None, weights_backbone=None).state_dict()
    with pytest.raises(CheckpointError, match="no published checkpoint of DEQDet or AdaMixer"):
        load_published(weights)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path.parent / "proof")))
    assert (tmp_path.parent / "proof").is_dir()  # that it would run
    evil = Payload(tmp_path.parent / "evil")
    whole = saved(tmp_path / "whole.pth", published("DEQDet")).read_bytes()
    files = {
        "cut.pth": whole[: len(whole) // 2],
        "text.pth": b"not a checkpoint",
        "empty.pth": b"",
        "code.pth": pickle.dumps({"state_dict": evil}),
    }
    torch.save({"state_dict": evil}, tmp_path / "zipcode.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    queries = "rpn_head.init_proposal_features.weight"
    endless = {**published("DEQDet"), queries: torch.zeros(1).expand(10**12, 32)}
    torch.save(endless, tmp_path / "endless.pth")
    torch.save({"state_dict": {"a": 3}}, tmp_path / "number.pth")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in before:
        if path.name == "whole.pth":
            continue
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_published(path)
    with pytest.raises(CheckpointError, match=r"nowhere\.pth does not exist"):
        load_published(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_published(tmp_path)
    assert not evil.folder.exists()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("target", "names", "match"),
    [
        ("b.safetensors", ["one"], "1 class names .* for a head of 3 classes"),
        ("b.safetensors", None, "3 classes and does not name them"),
        ("b.safetensors", ["x", "y", "x"], "'x' is there twice"),
        ("b.pth", ["x", "y", "z"], r"must end in \.safetensors"),
        ("there.safetensors", ["x", "y", "z"], "exists and is left as it is"),
    ],
)
def test_a_conversion_that_cannot_be_done_writes_nothing(
    tmp_path: Path, target: str, names: list[str] | None, match: str
) -> None:
    source = saved(tmp_path / "a.pth", published("DEQDet"))
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=match):
        convert_published(source, tmp_path / target, names)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_plan_of_wrong_weights_builds_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = published("DEQDet")
    del weights["neck.gn_out.bias"]
    built: list[torch.device] = []
    made = Detector.__init__

    def watched(self: Detector, config: ModelConfig) -> None:
        built.append(torch.empty(0).device)
        made(self, replace(config))

    monkeypatch.setattr(Detector, "__init__", watched)
    with pytest.raises(CheckpointError):
        load_published(weights)
    assert {device.type for device in built} <= {"meta"}
