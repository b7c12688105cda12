"""Where images come from: files, folders, patterns, the web, films and memory."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from small_predictor import picture, small_predictor

from detection.data import DataError, DataWarning
from detection.data.fetching import fetch
from detection.data.video import read_frames
from detection.sources import NamedImage, find_sources, read_image_of


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a hundred bytes that says it has 3.6 billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A web server of this machine."""
    never = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            contents = {"/a.png": png(picture()), "/bomb.png": bomb(), "/page.html": b"<html>"}
            if path == "/silent":
                never.wait(30)
            elif path == "/elsewhere":
                self.send_response(302)
                self.send_header("Location", "/a.png")
                self.end_headers()
            elif path == "/cut.png":
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                self.wfile.write(contents["/a.png"])
            elif path in contents:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(contents[path])
            else:
                self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        never.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, three other files, a hidden one, and a folder with another image."""
    (tmp_path / "below").mkdir()
    for name in ("b.PNG", "a.jpg", "below/c.png", ".hidden.png"):
        Image.fromarray(picture()).save(tmp_path / name)
    for name in ("notes.txt", "labels.json", "noending"):
        (tmp_path / name).write_text("text")
    return tmp_path


def film(path: Path, frames: int = 5, codec: str = "mpeg4") -> list[np.ndarray]:
    """Write a film in which a square moves; returns its pictures."""
    pictures = []
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(5))
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.bit_rate = 4_000_000
        for n in range(frames):
            image = np.full((64, 96, 3), 40, np.uint8)
            image[8:24, 8 + 8 * n : 24 + 8 * n] = (220, 30, 60)
            pictures.append(image)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return pictures


def names(sources: Any) -> list[str]:
    return [source.name for source in sources]


def test_a_folder_gives_its_images_and_tells_what_it_skips(folder: Path) -> None:
    with pytest.warns(DataWarning, match="3 files that are neither images nor videos") as told:
        found = find_sources([folder])
    assert len(told) == 1 and found.skipped == 3
    assert names(found) == [str(folder / "a.jpg"), str(folder / "b.PNG")] == names(found)
    assert [tuple(source.read().shape) for source in found] == [(3, 50, 70)] * 2


def test_patterns_match_as_in_a_shell(folder: Path) -> None:
    assert [Path(n).name for n in names(find_sources([f"{folder}/*.jpg"]))] == ["a.jpg"]
    assert [Path(n).name for n in names(find_sources([f"{folder}/**/*.png"]))] == ["c.png"]
    assert [Path(n).name for n in names(find_sources([f"{folder}/?.[jP]*"]))] == ["a.jpg", "b.PNG"]
    with pytest.warns(DataWarning, match="3 files"):
        everything = find_sources([f"{folder}/**"])
    assert [Path(n).name for n in names(everything)] == ["a.jpg", "b.PNG", "c.png"]


def test_a_file_whose_name_is_a_pattern_is_found(folder: Path) -> None:
    os.rename(folder / "a.jpg", folder / "a[1].jpg")
    assert names(find_sources([folder / "a[1].jpg"])) == [str(folder / "a[1].jpg")]


def test_order_is_kept_and_nothing_comes_twice(folder: Path) -> None:
    places = [folder / "b.PNG", f"{folder}/*.jpg", str(folder / "b.PNG"), "https://x.org/d.png"]
    assert [NamedImage(n, n).stem for n in names(find_sources(places))] == ["b", "a", "d"]
    assert names(find_sources(folder / "a.jpg")) == [str(folder / "a.jpg")]


def test_what_matches_nothing_is_named(folder: Path) -> None:
    (folder / "empty").mkdir()
    for place, words in (
        (f"{folder}/*.tif", r"\*\.tif: nothing matches this pattern"),
        (f"{folder}/absent.png", "absent.png: there is no such image file"),
        (folder / "empty", "empty: none of the 0 files there is an image"),
        (f"{folder}/be*w", "only folders match"),
    ):
        with pytest.raises(DataError, match=words):
            find_sources([folder / "a.jpg", place])
    with pytest.raises(DataError, match="no images to detect in"):
        find_sources([])


def test_nothing_is_read_before_its_turn(folder: Path) -> None:
    (folder / "b.PNG").write_text("no image")
    first, second = find_sources([folder / "a.jpg", folder / "b.PNG"])
    assert first.read().shape == (3, 50, 70)
    with pytest.raises(DataError, match=r"b\.PNG: the image cannot be read"):
        second.read()


def test_frames_of_a_film(tmp_path: Path) -> None:
    pictures = film(tmp_path / "film.mp4")
    found = list(find_sources([tmp_path]))
    assert [source.frame for source in found] == [0, 1, 2, 3, 4]
    assert found[3].name == f"{tmp_path / 'film.mp4'}, frame 3" and found[3].stem == "film_000003"
    for source, wanted in zip(found, pictures, strict=True):
        shown = source.read().permute(1, 2, 0).numpy()
        assert np.abs(shown.astype(int) - wanted).mean() < 6  # compression
    predictor = small_predictor()
    detections = list(predictor.stream(found, steps=2))
    assert [len(one) for one in detections] == [10] * 5
    assert detections[4].source is found[4]


def test_a_film_that_lies_on_its_side_is_turned(tmp_path: Path) -> None:
    pictures = film(tmp_path / "film.mp4", frames=1)
    content = (tmp_path / "film.mp4").read_bytes()
    one, w = 1 << 16, 1 << 30
    before = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, w)
    place = content.index(before, content.index(b"tkhd"))
    # The matrix of a telephone that was held upright: to be shown turned by 90° clockwise.
    after = struct.pack(">9i", 0, one, 0, -one, 0, 0, 64 << 16, 0, w)
    (tmp_path / "turned.mp4").write_bytes(content[:place] + after + content[place + 36 :])
    (frame,) = read_frames(tmp_path / "turned.mp4")
    wanted = np.rot90(pictures[0], -1)
    assert frame.shape == wanted.shape and np.abs(frame.astype(int) - wanted).mean() < 6


def test_what_is_no_film_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no film")
    film(tmp_path / "whole.mp4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:300])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        sound: Any = container.add_stream("aac", rate=8000)
        for packet in sound.encode():
            container.mux(packet)
    for name in ("text.mp4", "cut.mp4", "sound.mp4"):
        with pytest.raises(DataError, match=name):
            list(find_sources([tmp_path / name]))
    with pytest.raises(DataError, match="no such video"):
        list(read_frames(tmp_path / "absent.mp4"))


def test_an_address_is_fetched_once(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.from_numpy(picture()).permute(2, 0, 1)
    for path in ("/a.png", "/a.png?size=2", "/elsewhere"):
        assert torch.equal(read_image_of(server + path), expected)
    found = small_predictor().predict(f"{server}/a.png")
    monkeypatch.setattr("detection.sources.fetch", lambda url: pytest.fail("fetched again"))
    assert found.plot(scale=1).size == (70, 50)


def test_what_the_web_does_not_give_is_told(server: str) -> None:
    predictor = small_predictor()
    for path, words in (
        ("/absent.png", r"absent\.png: the server answered 404 \(Not Found\)"),
        ("/page.html", "page.html: the image cannot be read"),
        ("/bomb.png", "bomb.png: the image cannot be read"),
        ("/cut.png", "could not be fetched .cut short"),
    ):
        with pytest.raises(DataError, match=words):
            predictor.predict(server + path)
    for address in ("ftp://example.org/a.png", "file:///etc/passwd"):
        with pytest.raises(DataError, match="only http:// and https:// are fetched"):
            predictor.predict(address)
    for address in ("http://127.0.0.1:9/a.png", "http://[/a.png", "http://"):
        with pytest.raises(DataError, match="could not be fetched"):
            predictor.predict(address)


def test_a_server_is_given_neither_all_memory_nor_all_time(server: str) -> None:
    with pytest.raises(DataError, match="too much"):
        fetch(f"{server}/a.png", largest=100)
    with pytest.raises(DataError, match="could not be fetched .*timed out"):
        fetch(f"{server}/silent", patience=0.2)


def array(shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (array((3, 8, 8)), r"\(3, 8, 8\).*transpose\(1, 2, 0\)"),
        (array((8, 8, 2)), r"\(8, 8, 2\)"),
        (array((8,)), r"\(8,\)"),
        (array((2, 8, 8, 3)), r"list\(array\)"),
        (array((0, 8, 3)), "no pixels"),
        (array((8, 8), np.uint16), "of uint16"),
        (array((8, 8), np.int64), "of int64"),
        (array((8, 8), bool), "of bool"),
        (array((8, 8), complex), "of complex128"),
        (array((8, 8), object), "of object"),
        (array((8, 8, 3), np.float32) + 255, r"from 255 to 255; they must lie in \[0, 1\]"),
        (array((8, 8, 3), np.float32) - 1, r"from -1 to -1"),
        (array((8, 8, 3), np.float64) + np.nan, "not finite"),
        (torch.full((3, 8, 8), float("nan")), "not finite"),
        (torch.full((3, 8, 8), float("inf")), "not finite"),
        (torch.zeros(8, 8, 3), r"permute\(2, 0, 1\)"),
        (torch.zeros(1, 3, 8, 8), r"list\(tensor\)"),
        (torch.zeros(3, 0, 8), "no pixels"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "of torch.int32"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "of torch.complex64"),
        (b"bytes", "is a bytes"),
        ({"image": 1}, "is a dict"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_image_of(image)
    with pytest.raises(DataError, match=words):
        small_predictor().predict([picture(), image])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    Image.fromarray(picture(300, 300)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-600])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "bomb.png").write_bytes(bomb())
    for name in ("cut.jpg", "empty.jpg", "bomb.png"):
        with pytest.raises(DataError, match=f"{name}: the image cannot be read"):
            read_image_of(tmp_path / name)
    cut, closed = Image.open(tmp_path / "cut.jpg"), Image.open(tmp_path / "whole.jpg")
    closed.close()
    with cut:
        for opened in (cut, closed):
            with pytest.raises(DataError, match="Pillow image: the image cannot be read"):
                read_image_of(opened)


def test_writing_to_the_result_leaves_the_image_alone() -> None:
    mine = picture()
    before = mine.copy()
    read_image_of(mine).zero_()
    assert (mine == before).all()
    tensor = torch.from_numpy(before).permute(2, 0, 1).contiguous()
    read_image_of(tensor).zero_()
    assert tensor.any()
