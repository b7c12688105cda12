"""The GPU's sampling kernel, run by Triton's interpreter where there is no GPU.

The interpreter must be chosen before Triton is imported, so each test is a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton comes with CUDA builds of torch"
)

SETUP = """
import torch
from detection.decoder.sampling import _read_maps
from detection.decoder.triton_sampling import fits, sample

STRIDES = (4, 8, 16, 32)
torch.manual_seed(0)
maps = [
    torch.randn(2, 32, 96 // s, 128 // s).contiguous(memory_format=torch.channels_last)
    for s in STRIDES
]
unit = torch.rand(2, 3, 2, 5, 3)
points = unit * torch.tensor([170.0, 140.0, 8.0]) - torch.tensor([21.0, 22.0, 1.0])
assert fits(points, maps, 2)
"""


def run(body: str) -> None:
    script = SETUP + body
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr[-3000:]


def test_values_and_gradients_are_those_of_the_reference() -> None:
    """Points inside, at the borders and far outside; gradients of points and of every map."""
    run("""
leaves = [points.requires_grad_(), *(m.requires_grad_() for m in maps)]
ours, theirs = sample(points, maps, STRIDES, 2), _read_maps(points, STRIDES, *maps)
torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
weights = torch.randn_like(ours)
for a, b in zip(torch.autograd.grad(ours, leaves, weights),
                torch.autograd.grad(theirs, leaves, weights)):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
""")


def test_maps_that_need_no_gradient_get_none() -> None:
    run("""
points.requires_grad_()
sample(points, maps, STRIDES, 2).sum().backward()
assert points.grad.abs().sum() > 0 and all(m.grad is None for m in maps)
""")


def test_bfloat16_is_read_and_written_but_not_computed_in() -> None:
    run("""
narrow = [m.bfloat16() for m in maps]
ours = sample(points, narrow, STRIDES, 2)
assert ours.dtype == torch.bfloat16
wanted = _read_maps(points, STRIDES, *(m.float() for m in narrow))
torch.testing.assert_close(ours, wanted.bfloat16(), rtol=8e-3, atol=1e-3)
""")


def test_places_that_are_nowhere_read_zero_and_harm_only_themselves() -> None:
    run("""
wanted = sample(points, maps, STRIDES, 2)
for place in (float("nan"), float("inf"), -float("inf"), 1e30):
    lost = points.clone()
    lost[0, 0, 0, 0, 0] = place
    found = sample(lost, maps, STRIDES, 2)
    assert not found[0, 0, 0, 0].any()
    assert torch.equal(found.flatten(0, 3)[1:], wanted.flatten(0, 3)[1:])
""")


def test_where_results_must_repeat_maps_are_read_as_rows_or_refused() -> None:
    """Atomic additions come in an order of chance; a gradient of the points alone has none."""
    run("""
import warnings
from detection.decoder import sampling

onto = [m.requires_grad_() for m in maps]
begun = sample(points, onto, STRIDES, 2).sum()
torch.use_deterministic_algorithms(True)
assert sampling._must_repeat(onto) and not sampling._must_repeat([m.detach() for m in onto])
with torch.no_grad():
    assert not sampling._must_repeat(onto)
leaf = points.clone().requires_grad_()
sample(leaf, [m.detach() for m in onto], STRIDES, 2).sum().backward()
try:
    begun.backward(retain_graph=True)
except RuntimeError as error:
    assert "has no deterministic implementation" in str(error)
else:
    raise AssertionError("not refused")
torch.use_deterministic_algorithms(True, warn_only=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    begun.backward()
assert any("has no deterministic implementation" in str(w.message) for w in caught)
""")


def test_no_points_and_what_does_not_fit() -> None:
    run("""
assert sample(points[:, :0], maps, STRIDES, 2).shape == (2, 0, 2, 5, 16)
assert not fits(points, maps[:3], 2) and not fits(points.double(), maps, 2)
assert not fits(points, maps, 4)  # eight channels
""")
