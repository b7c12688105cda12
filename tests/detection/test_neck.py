"""The channel mapper against its definition, written out."""

from __future__ import annotations

import math

import fake_cuda
import pytest
import torch
from torch import Tensor, nn

from detection.models.neck import ChannelMapper, channels_last_norm


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def feature_maps() -> list[Tensor]:
    return [torch.randn(2, c, s, s + 1, dtype=torch.float64) for c, s in ((6, 8), (10, 4), (3, 2))]


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Every group of channels of every sample standardised over its channels and places."""
    parts = [
        (part - part.mean((1, 2, 3), keepdim=True))
        / torch.sqrt(part.var((1, 2, 3), correction=0, keepdim=True) + 1e-5)
        for part in x.chunk(groups, dim=1)
    ]
    return torch.cat(parts, dim=1) * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("activation", [False, True])
def test_convolution_then_activation_then_the_shared_norm(
    kernel_size: int, activation: bool
) -> None:
    neck = ChannelMapper(
        [6, 10, 3], 16, kernel_size=kernel_size, activation=activation, norm_groups=4
    ).double()
    with torch.no_grad():
        for parameter in neck.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = feature_maps()
    for output, convolution, feature in zip(neck(inputs), neck.convolutions, inputs, strict=True):
        assert output.shape == (2, 16, *feature.shape[2:]) and output.is_contiguous()
        x = convolution(feature)
        x = torch.relu(x) if activation else x
        wanted = group_norm(x, 4, neck.norm.weight, neck.norm.bias)
        torch.testing.assert_close(output, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [(8, 5), (1, 3), (1, 1)])
def test_the_norm_that_keeps_channels_last(size: tuple[int, int]) -> None:
    norm = nn.GroupNorm(4, 12).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = 3 + 2 * torch.randn(2, 12, *size, dtype=torch.float64)
    found = channels_last_norm(x.to(memory_format=torch.channels_last), norm)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, norm(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "weights", "result"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32, torch.float32),
    ],
)
def test_the_norm_that_keeps_channels_last_computes_in_float32(
    dtype: torch.dtype, weights: torch.dtype, result: torch.dtype
) -> None:
    """As CUDA's autocast has it; a mean far from zero takes nothing from what is around it."""
    norm, x = nn.GroupNorm(2, 8).to(weights), (100 + torch.randn(1, 8, 16, 16)).to(dtype)
    found = channels_last_norm(x.to(memory_format=torch.channels_last), norm)
    assert found.dtype == result
    wanted = norm.double()(x.double())
    tolerance = 1e-4 if result == torch.float32 else 2.0**-7
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_on_a_gpu_maps_keep_channels_last_at_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dtype that autocast gives them, too; CUDA's own norm gives back contiguous maps."""
    with fake_cuda.pretend(monkeypatch), torch.autocast("cuda", torch.bfloat16):
        neck = ChannelMapper([8], 8, norm_groups=2)
        neck.convolutions = nn.ModuleList([nn.Identity()])  # a library decides their layout
        x = torch.zeros(2, 8, 4, 6, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        (trained,) = neck([x])
        with torch.no_grad():
            (inferred,) = neck([x])
            (contiguous,) = neck([x.contiguous()])
    assert inferred.is_contiguous(memory_format=torch.channels_last)
    assert {m.dtype for m in (inferred, trained, contiguous)} == {torch.float32}
    assert trained.requires_grad and trained.is_contiguous() and contiguous.is_contiguous()


def test_one_norm_for_all_levels() -> None:
    neck = ChannelMapper([6, 10, 3], 64)
    norms = [module for module in neck.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 1 and norms[0].num_groups == 32


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_initialisation(kernel_size: int) -> None:
    neck = ChannelMapper([128, 256], 256, kernel_size=kernel_size)
    for convolution, channels in zip(neck.convolutions, (128, 256), strict=True):
        assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
        assert not convolution.bias.any()
        bound = math.sqrt(6 / ((channels + 256) * kernel_size**2))
        assert 0.99 * bound < float(convolution.weight.detach().abs().max()) <= bound
    assert bool((neck.norm.weight == 1).all()) and not neck.norm.bias.any()


def test_no_parameter_is_dead() -> None:
    neck = ChannelMapper([6, 10, 3], 16, activation=True, norm_groups=4).double()
    torch.stack([(output + output.sin()).sum() for output in neck(feature_maps())]).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in neck.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    neck = ChannelMapper([6, 10, 3], 32).to(dtype)
    assert {m.dtype for m in neck([feature.to(dtype) for feature in feature_maps()])} == {dtype}


def test_levels_must_agree() -> None:
    neck = ChannelMapper([6, 10, 3], 32).double()
    with pytest.raises(ValueError, match="shorter"):
        neck(feature_maps()[:2])
