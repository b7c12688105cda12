"""Backbones: torchvision's numbers, frozen parts that stay frozen, clear words without weights."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from detection.models import backbones
from detection.models.backbones import PretrainedUnavailable, build_backbone, load_backbone
from detection.models.config import BackboneConfig, ModelConfig
from detection.models.detector import Detector

NAMES = ["resnet18", "resnet50", "resnet101", "swin_s", "small"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and torch's folder of checkpoints empty; returns that folder."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network here")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def unsettle(module: nn.Module) -> None:
    """Statistics of batch norms as after training."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_strides_and_channels(name: str) -> None:
    backbone = build_backbone(name).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 96))
    wanted = [
        (1, c, 64 // s, 96 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]
    assert [tuple(feature.shape) for feature in features] == wanted


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_are_those_of_torchvision(name: str) -> None:
    network = getattr(torchvision.models, name)(weights=None)
    unsettle(network)
    backbone = build_backbone(name)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    backbone.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    stages = create_feature_extractor(network.eval(), [f"layer{i}" for i in (1, 2, 3, 4)])
    with torch.no_grad():
        wanted = stages(images)
        found = backbone.train()(images)
    for a, b in zip(found, wanted.values(), strict=True):
        torch.testing.assert_close(a, b)


def test_swin_features_are_those_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last norm, too: it is among ImageNet's weights."""
    network = torchvision.models.swin_s(weights=None)
    with torch.no_grad():
        network.norm.weight.uniform_(0.5, 1.5)
    monkeypatch.setattr(backbones.torchvision.models, "swin_s", lambda weights: network)
    backbone = build_backbone("swin_s").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = backbone(images)
        wanted = network.eval().norm(network.features(images)).permute(0, 3, 1, 2)
        first = network.features[:2](images)
    torch.testing.assert_close(found[3], wanted)
    normed = (first - first.mean(-1, keepdim=True)) / first.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(found[0], normed.permute(0, 3, 1, 2), rtol=0, atol=1e-3)


def test_stochastic_depth_of_swin_rises_to_three_tenths() -> None:
    with torch.device("meta"):
        modules = list(build_backbone("swin_s").modules())
    depths = [m.p for m in modules if isinstance(m, torchvision.ops.StochasticDepth)]
    assert max(depths) == pytest.approx(0.3) and min(depths) == 0


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_stages_of_a_resnet(frozen: int) -> None:
    backbone = build_backbone("resnet18", frozen_stages=frozen)
    prefixes = ["conv1", "bn1", *(f"layer{i}" for i in range(1, frozen + 1))] if frozen else []
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != (name.split(".")[0] in prefixes), name


@pytest.mark.parametrize("state", ["fresh", "train", "eval"])
def test_batch_norms_never_learn_statistics(state: str) -> None:
    backbone = build_backbone("resnet18")
    unsettle(backbone)
    if state != "fresh":
        nn.Sequential(backbone).train(state == "train")
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    images = torch.randn(2, 3, 64, 64) * 3 + 1
    with torch.no_grad():
        together, alone = backbone(images), backbone(images[:1])
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[:1], b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "swin_s", "small"])
def test_no_parameter_is_dead(name: str) -> None:
    backbone = build_backbone(name, frozen_stages=0).eval()
    torch.stack([f.square().mean() for f in backbone(torch.randn(1, 3, 64, 64))]).sum().backward()
    dead = [n for n, p in backbone.named_parameters() if p.grad is None or not bool(p.grad.any())]
    # Attention does not feel a shift of all its keys, so a part of each bias has no gradient, but
    # no whole tensor is without.
    assert not dead


def test_samples_do_not_see_each_other_in_the_small_backbone() -> None:
    backbone = build_backbone("small").double().train()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for together, alone in zip(backbone(images), backbone(images[1:2]), strict=True):
            torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("resnet18", torch.bfloat16),
        ("resnet18", torch.float64),
        ("small", torch.bfloat16),
        ("small", torch.float64),
        ("swin_s", torch.bfloat16),
    ],
)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    backbone = build_backbone(name).to(dtype).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 64, dtype=dtype))
    assert all(f.dtype == dtype and bool(f.isfinite().all()) for f in features)


def test_weights_are_taken_from_the_folder(no_network: Path) -> None:
    network = torchvision.models.resnet18(weights=None)
    file = Path(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url).name
    torch.save(network.state_dict(), no_network / file)
    backbone = build_backbone("resnet18", pretrained=True)
    wanted: dict[str, Tensor] = network.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101", "swin_s"])
def test_without_network_the_message_says_what_to_do(name: str, no_network: Path) -> None:
    with pytest.raises(PretrainedUnavailable) as caught:
        build_backbone(name, pretrained=True)
    message = str(caught.value)
    for part in (name, "no network here", "https://download.pytorch.org", str(no_network)):
        assert part in message
    assert "--model.backbone.no-pretrained" in message


def test_a_broken_file_of_weights_is_named(no_network: Path) -> None:
    file = no_network / Path(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url).name
    file.write_bytes(b"half a download")
    with pytest.raises(PretrainedUnavailable, match="could not be read") as caught:
        build_backbone("resnet18", pretrained=True)
    assert str(file) in str(caught.value)


def test_a_mistake_of_ours_is_not_blamed_on_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(backbones.torchvision.models, "resnet18", fail)
    with pytest.raises(RuntimeError, match="^something else$"):
        build_backbone("resnet18")


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no backbone 'vgg'.*resnet50.*small"):
        build_backbone("vgg")
    with pytest.raises(ValueError, match="'small' has no pretrained weights"):
        build_backbone("small", pretrained=True)
    with pytest.raises(ValueError, match="frozen_stages=5"):
        build_backbone("resnet18", frozen_stages=5)


def test_a_detector_begins_from_weights_of_ones_own(tmp_path: Path, no_network: Path) -> None:
    """Also where ImageNet's are asked for: they are not fetched then."""
    path = tmp_path / "backbone.safetensors"
    given = build_backbone("resnet18")
    save_file(given.state_dict(), path)
    config = ModelConfig(BackboneConfig("resnet18", weights=str(path)), num_queries=2)
    found = Detector(config).backbone.state_dict()
    assert all(torch.equal(found[name], value) for name, value in given.state_dict().items())


@pytest.mark.parametrize("what", ["nowhere", "damaged", "another"])
def test_weights_that_cannot_be_begun_from_are_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "backbone.safetensors"
    if what == "damaged":
        path.write_bytes(b"no weights")
    elif what == "another":
        save_file(build_backbone("small").state_dict(), path)
    with pytest.raises(PretrainedUnavailable, match=r"backbone.safetensors holds no weights"):
        load_backbone(build_backbone("resnet18"), path)
