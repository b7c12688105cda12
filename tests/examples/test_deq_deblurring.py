from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib.image import imread

import implicit


@pytest.fixture(scope="module")
def deq(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("deq_deblurring")


def test_blur_and_its_transpose_are_adjoint(deq: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 1, 20, 24, generator=generator) for _ in range(2))
    torch.testing.assert_close((deq.blur(x) * y).sum(), (x * deq.blur_transposed(y)).sum())


def test_blur_keeps_the_light_and_does_not_amplify(deq: ModuleType) -> None:
    kernel = deq.motion()
    assert kernel.min() >= 0 and float(kernel.sum()) == pytest.approx(1)
    point = torch.zeros(1, 1, 21, 21)
    point[..., 10, 10] = 1
    assert float(deq.blur(point).sum()) == pytest.approx(1)
    x = torch.randn(1, 1, 40, 40, generator=torch.Generator().manual_seed(1))
    assert deq.blur(x).norm() < x.norm()


def test_photographs_for_training_and_testing_are_others(deq: ModuleType) -> None:
    assert not set(deq.TRAIN) & set(deq.TEST)
    crops = deq.crops_for_testing()
    assert crops.shape == (8, 1, deq.CROP, deq.CROP)
    patches = deq.training_patches(6, torch.Generator().manual_seed(0))
    assert patches.shape == (6, 1, deq.PATCH, deq.PATCH)
    for pictures in (crops, patches):
        assert pictures.min() >= 0 and pictures.max() <= 1
        assert bool((pictures.std(dim=(1, 2, 3)) > 0.005).all())


def test_peers_have_equally_many_parameters(deq: ModuleType) -> None:
    counts = {sum(p.numel() for p in deq.Deblurring(n).parameters()) for n in deq.MODELS.values()}
    assert len(counts) == 1 and counts.pop() > 5000


def test_peers_walk_the_same_path(deq: ModuleType) -> None:
    torch.manual_seed(0)
    model = deq.Deblurring(deq.UNROLLED).eval()
    b = deq.observe(deq.crops_for_testing()[:2, :, :32, :32], torch.Generator().manual_seed(0))
    y = b
    with torch.no_grad():
        for _ in range(deq.UNROLLED):
            y = model.step(y, b)
        torch.testing.assert_close(model.solve(b).value, y)


def test_the_estimate_is_a_fixed_point(deq: ModuleType) -> None:
    torch.manual_seed(0)
    model = deq.Deblurring(None).eval()
    b = deq.observe(deq.crops_for_testing()[:2, :, :32, :32], torch.Generator().manual_seed(0))
    exactly = implicit.Tolerance(rtol=1e-3, atol=0.0, max_steps=300)
    with torch.no_grad():
        solution = model.solve(b, solver=implicit.Anderson(), stop=exactly)
        again = model.step(solution.value, b)
    assert solution.converged.all()
    assert (again - solution.value).norm() <= 1.001e-3 * again.norm()


def test_psnr_of_a_known_error(deq: ModuleType) -> None:
    truth = torch.rand(2, 1, 20, 20)
    error = torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(
        deq.psnr(truth + error, truth), torch.tensor([20.0, 40.0]), rtol=1e-3, atol=0
    )


def test_a_small_run_sharpens_and_draws(
    deq: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deq, "CROP", 48)
    monkeypatch.setattr(deq, "TEST_STEPS", (1, 6))
    found = deq.main(updates=4, output=tmp_path / "new" / "sharp.png")
    assert set(found) == {"blurred", "Wiener", *deq.MODELS}
    assert all(10 < quality < 60 for quality in found.values())
    picture = imread(tmp_path / "new" / "sharp.png")
    assert picture.shape[0] > 300 and picture[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--updates", 0), "updates=0"),
        (("--output", "picture.txt"), r"\.png"),
        (("--output", "/dev/null/a.png"), "/dev/null"),
    ],
)
def test_bad_arguments_are_told(
    refusal: Callable[..., str], arguments: tuple[object, ...], message: str
) -> None:
    assert re.search(message, refusal("deq_deblurring", *arguments))
