"""Pictures: what is drawn where, that nothing leaves the picture, and that files come whole."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from detection.curves import smoothed
from detection.data.types import Categories
from detection.detections import Detections
from detection.drawing import Canvas, as_picture, class_colour, fitted, font
from detection.files import replacing
from detection.visualization import (
    contact_sheet,
    draw_detections,
    plot_training,
    refinement_film,
    save_image,
)

CATEGORIES = Categories(("cat", "dog", "a class with a long name"), (3, 17, 90))
GREY = torch.full((3, 96, 128), 90, dtype=torch.uint8)


def found(*boxes: tuple[float, ...], scores: list[float], labels: list[int]) -> Detections:
    return Detections(
        torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels)
    )


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# --- detections on an image ------------------------------------------------------------------


def test_boxes_have_the_colour_of_their_class_on_their_edges() -> None:
    drawn = draw_detections(
        GREY, found((20, 40, 100, 80), scores=[0.9], labels=[1]), CATEGORIES, scale=2
    )
    assert drawn.size == (256, 192)
    colour = class_colour(1)
    for point in ((40, 120), (199, 120), (120, 80), (120, 159)):
        assert drawn.getpixel(point) == colour
    assert drawn.getpixel((120, 120)) == (90, 90, 90)  # inside the box
    assert drawn.getpixel((10, 185)) == (90, 90, 90)  # far from it


def test_only_scores_from_the_threshold_on_are_drawn() -> None:
    detections = found((9, 9, 40, 40), (50, 50, 90, 90), scores=[0.5, 0.3], labels=[0, 1])
    plain = as_picture(GREY, 2)
    nothing = draw_detections(GREY, detections, CATEGORIES, threshold=0.51, scale=2)
    assert (pixels(nothing) == pixels(plain)).all()
    one = draw_detections(GREY, detections, CATEGORIES, threshold=0.5, scale=2)
    two = draw_detections(GREY, detections, CATEGORIES, scale=2)
    assert one.getpixel((100, 140)) == plain.getpixel((100, 140))
    assert two.getpixel((100, 140)) == class_colour(1)


def test_tensors_and_pillow_images_are_drawn_alike_and_left_as_they_are() -> None:
    tensor = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    image = Image.fromarray(tensor.permute(1, 2, 0).numpy())
    before = tensor.clone()
    detections = found((5, 5, 30, 30), scores=[0.9], labels=[0])
    a = draw_detections(tensor, detections, CATEGORIES)
    b = draw_detections(image, detections, CATEGORIES)
    assert (pixels(a) == pixels(b)).all()
    assert (tensor == before).all()
    assert (pixels(image) == before.permute(1, 2, 0).numpy()).all()


def test_truth_is_dashed_in_white() -> None:
    truth = torch.tensor([[20.0, 20.0, 100.0, 80.0]]), torch.tensor([0])
    nothing = found(scores=[], labels=[])
    drawn = pixels(draw_detections(GREY, nothing, CATEGORIES, truth=truth, scale=4))
    top, bottom = drawn[80, 80:400], drawn[319, 80:400]
    left, right = drawn[80:320, 80], drawn[80:320, 399]
    for edge in (top, bottom, left, right):
        white = (edge == 255).all(-1)
        assert 0.4 < white.mean() < 0.7
        assert white[0]
        assert white[-1]  # corners are closed
    assert (drawn[200, 200] == 90).all()


@pytest.mark.parametrize(
    ("box", "label", "named"),
    [
        ((20, 20, 100, 80), 0, ["cat"]),  # found: only the detection is named
        ((20, 20, 100, 80), 1, ["dog", "cat"]),  # another class
        ((70, 20, 120, 80), 0, ["cat", "cat"]),  # another place
    ],
)
def test_objects_that_are_missed_are_named(
    box: tuple[float, ...], label: int, named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    monkeypatch.setattr(Canvas, "tag", lambda self, place, name, *more: names.append(name))
    truth = torch.tensor([[22.0, 20.0, 100.0, 82.0]]), torch.tensor([0])
    detections = found(box, scores=[0.9], labels=[label])
    draw_detections(GREY, detections, CATEGORIES, truth=truth)
    assert names == named


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(40, 300), st.integers(40, 300)),
    boxes=st.lists(st.tuples(*[st.floats(-400, 700, width=32)] * 4), min_size=1, max_size=12),
    scale=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_labels_never_leave_the_picture(
    size: tuple[int, int], boxes: list[tuple[float, ...]], scale: float
) -> None:
    canvas = Canvas(as_picture(Image.new("RGB", size), scale), scale)
    width, height = canvas.picture.size
    for n, box in enumerate(boxes):
        canvas.outline(torch.tensor(box), class_colour(n))
        canvas.dashed(torch.tensor(box))
        canvas.tag(torch.tensor(box), CATEGORIES.names[n % 3], class_colour(n), "")
    for left, top, right, bottom in canvas.tags:
        assert 0 <= left < right <= max(width, right - left)
        assert 0 <= top < bottom <= max(height, bottom - top)
        # A label fits wherever an ellipsis and its margins do.
        assert right <= width or width < 24


def test_labels_keep_clear_of_each_other_where_there_is_room() -> None:
    canvas = Canvas(Image.new("RGB", (400, 400)), 1)
    for n in range(8):  # eight boxes with the same corner
        box = torch.tensor([100.0, 100.0, 160.0 + 10 * n, 150.0 + 10 * n])
        canvas.tag(box, "name", class_colour(n), "0.50")
    for a, b in itertools.combinations(canvas.tags, 2):
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


@pytest.mark.parametrize("box", [(math.nan,) * 4, (-math.inf, 5, math.inf, 9), (500, 5, 600, 9)])
def test_boxes_that_cannot_be_seen_do_no_harm(box: tuple[float, ...]) -> None:
    detections = found(box, scores=[0.9], labels=[0])
    assert draw_detections(GREY, detections, CATEGORIES).size == (128, 96)


def test_long_names_are_shortened() -> None:
    letters = font(14)
    assert fitted("cat", letters, 400) == "cat"
    short = fitted("a class with a long name", letters, 60)
    assert short.endswith("…")
    assert letters.getlength(short) <= 60


def test_thirty_classes_have_thirty_colours() -> None:
    assert len({class_colour(label) for label in range(30)}) == 30


def test_unsuitable_images_are_refused() -> None:
    nothing = found(scores=[], labels=[])
    with pytest.raises(ValueError, match=r"\(3, 96, 128\) of torch.float32"):
        draw_detections(GREY.float(), nothing, CATEGORIES)
    with pytest.raises(ValueError, match=r"\(1, 3, 96, 128\)"):
        draw_detections(GREY[None], nothing, CATEGORIES)
    with pytest.raises(ValueError, match="scale=0"):
        draw_detections(GREY, nothing, CATEGORIES, scale=0)


# --- a page of images ------------------------------------------------------------------------


@pytest.mark.parametrize("title", [None, "A title", "A title that is far too long " * 20])
def test_a_page_shows_every_image_whole(title: str | None) -> None:
    colours = [(250, 0, 10 * n) for n in range(5)]
    sizes = [(60, 40), (50, 70), (60, 70), (20, 20), (60, 70)]
    images = [Image.new("RGB", size, colour) for size, colour in zip(sizes, colours, strict=True)]
    page = pixels(contact_sheet(images, 2, title))
    centres = []
    for (width, height), colour in zip(sizes, colours, strict=True):
        rows, columns = np.nonzero((page == colour).all(-1))
        assert len(rows) == width * height
        assert np.ptp(rows) == height - 1
        assert np.ptp(columns) == width - 1
        centres.append((rows.mean(), columns.mean()))
    for n in (0, 2):  # neighbours in a row, then in a column
        assert abs(centres[n][0] - centres[n + 1][0]) <= 1
        assert abs(centres[n][1] - centres[n + 2][1]) <= 1
        assert centres[n][1] < centres[n + 1][1]
        assert centres[n][0] < centres[n + 2][0]


def test_a_page_needs_images_and_columns() -> None:
    with pytest.raises(ValueError, match="0 images in 2 columns"):
        contact_sheet([], 2)
    with pytest.raises(ValueError, match="1 images in 0 columns"):
        contact_sheet([Image.new("RGB", (4, 4))], 0)


# --- a film ----------------------------------------------------------------------------------


def film(path: Path, boxes: list[Tensor], image: Tensor = GREY) -> list[tuple[np.ndarray, int]]:
    count = len(boxes[0])
    scores, labels = torch.linspace(0.9, 0.05, count), torch.arange(count) % 3
    refinement_film(
        image, boxes, [scores] * len(boxes), [labels] * len(boxes), CATEGORIES, path, scale=2
    )
    with Image.open(path) as gif:
        frames = []
        for number in range(gif.n_frames):
            gif.seek(number)
            frames.append((pixels(gif.convert("RGB")), gif.info["duration"]))
        assert gif.info["loop"] == 0
    return frames


def test_a_film_has_a_frame_for_each_step_and_the_last_stays(tmp_path: Path) -> None:
    still = [torch.tensor([[10.0, 10.0, 60.0, 60.0]])] * 6  # a fixed point: nothing moves
    frames = film(tmp_path / "film.gif", still)
    assert len(frames) == 6
    durations = [duration for _, duration in frames]
    assert durations[-1] > 3 * durations[1]
    assert frames[0][0].shape[1] == 256
    assert len(film(tmp_path / "one.gif", still[:1])) == 1


def test_a_film_shows_the_boxes_where_they_are(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    boxes = [torch.tensor([[8.0 + 4 * n, 20.0, 60.0 + 4 * n, 80.0]]) for n in range(5)]
    frames = film(tmp_path / "film.gif", boxes, noise)
    for n, (picture, _) in enumerate(frames):
        edge = picture[60:140, 2 * (8 + 4 * n)]
        assert np.abs(edge - class_colour(0)).max() < 40
    # What no box touches does not flicker.
    for picture, _ in frames:
        assert (picture[170:190, 200:] == frames[0][0][170:190, 200:]).all()


def test_a_film_needs_as_many_of_each(tmp_path: Path) -> None:
    boxes, scores, labels = torch.zeros(1, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    path = tmp_path / "film.gif"
    with pytest.raises(ValueError, match="2 steps of boxes, 1 of scores and 2"):
        refinement_film(GREY, [boxes] * 2, [scores], [labels] * 2, CATEGORIES, path)
    with pytest.raises(ValueError, match="0 steps"):
        refinement_film(GREY, [], [], [], CATEGORIES, path)
    assert not path.exists()


# --- curves ----------------------------------------------------------------------------------


def training_log(steps: int) -> list[dict[str, object]]:
    return [{"step": n, "loss": 9 / n, "gradient_norm": 2.0 + n % 3} for n in range(1, steps + 1)]


def test_plots_have_three_panels_or_two(tmp_path: Path) -> None:
    log = training_log(40)
    log.insert(20, {"step": 20, "scores": {"AP": 0.4, "AP50": 0.6}})
    log.append({"step": 40, "epoch": 2, "scores": {"AP": math.nan}})
    plot_training(log, 0.5 ** torch.arange(20.0)[:, None] * torch.rand(1, 7), tmp_path / "3.png")
    plot_training(training_log(1), None, tmp_path / "2.png")
    sizes = []
    for name in ("3.png", "2.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            sizes.append(picture.size)
    assert sizes[0][0] == pytest.approx(1.5 * sizes[1][0], abs=2)
    assert sizes[0][1] == sizes[1][1]


def test_images_that_diverged_do_not_stop_the_plot(tmp_path: Path) -> None:
    residuals = torch.rand(6, 4) + 0.1
    residuals[2:, 0], residuals[4:, 1:] = math.inf, math.nan
    plot_training(training_log(3), residuals, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_gaps_in_the_log_do_not_stop_the_plot(tmp_path: Path) -> None:
    log = training_log(90)
    log[10]["loss"], log[30]["loss"], log[50]["gradient_norm"] = math.nan, math.inf, 0.0
    log += [{"step": 90, "epoch": 1, "scores": {"AP": value}} for value in (None, math.nan)]
    residuals = torch.tensor([[1.0], [0.1], [0.0]], requires_grad=True)
    plot_training(log, residuals, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_smoothing_bridges_gaps() -> None:
    values = np.full(300, 7.0)
    values[[0, 100, 101, 299]] = math.nan
    np.testing.assert_allclose(smoothed(values), 7.0)
    assert np.isnan(smoothed(np.full(5, math.nan))).all()


def test_plots_need_a_log_and_a_table_of_residuals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training record"):
        plot_training([{"step": 1, "scores": {"AP": 0.1}}], None, tmp_path / "plot.png")
    for residuals in (torch.rand(5), torch.rand(0, 3)):
        with pytest.raises(ValueError, match=r"\(steps, images\)"):
            plot_training(training_log(2), residuals, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 400), rate=st.floats(-0.02, 0.02))
def test_smoothing_keeps_exponentials(length: int, rate: float) -> None:
    values = 5 * np.exp(rate * np.arange(length))
    result = smoothed(values)
    assert result.shape == values.shape
    reach = min(math.ceil(3 * max(length / 60, 1)), (length - 1) // 2)
    inner = slice(reach, length - reach)
    np.testing.assert_allclose(result[inner], values[inner], rtol=1e-9)
    assert (result >= values.min() * (1 - 1e-9)).all()
    assert (result <= values.max() * (1 + 1e-9)).all()


def test_smoothing_takes_noise_away() -> None:
    noise = np.exp(0.5 * np.random.default_rng(0).normal(size=1200))
    assert np.log(smoothed(noise)).std() < 0.2 * np.log(noise).std()


def test_matplotlib_is_imported_only_to_plot_and_never_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; from detection.visualization import plot_training\n"
        "assert 'matplotlib' not in sys.modules\n"
        "log = [{'step': 1, 'loss': 1.0, 'gradient_norm': 1.0}]\n"
        f"plot_training(log, None, {str(tmp_path / 'plot.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- files -----------------------------------------------------------------------------------


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    save_image(Image.new("RGB", (4, 4)), path)
    before = path.read_bytes()

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    save_image(Image.new("RGB", (8, 8)), path)
    assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]
