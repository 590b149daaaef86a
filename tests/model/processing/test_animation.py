"""Animated pictures given as videos."""

import io

import numpy as np
import pytest
from PIL import Image

from keye_model.processing import video_file
from keye_model.processing.animation import Animation
from keye_model.processing.video_file import VideoFile
from tests.model.processing.messages import user

DURATIONS = [100, 200, 50, 100, 100, 300]
TIMES = [0, 0.1, 0.3, 0.35, 0.45, 0.55]


def _frames(alpha=False):
    """A red square that moves over grey, or over nothing."""
    for number in range(6):
        frame = Image.new("RGBA", (64, 48), (0, 0, 0, 0) if alpha else (30 * number,) * 3)
        frame.paste((255, 0, 0, 255), (8 * number, 8, 8 * number + 16, 24))
        if alpha:  # at every edge, so that no frame is stored as an opaque part of itself
            frame.paste((10 * number, 0, 0, 255), (0, 0, 64, 1))
            frame.paste((10 * number, 0, 0, 255), (0, 47, 64, 48))
        yield frame if alpha else frame.convert("RGB")


def _saved(form, frames, **options):
    file = io.BytesIO()
    first, *rest = frames
    first.save(file, form, save_all=True, append_images=rest, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["WEBP", "GIF", "PNG", "AVIF"])
def test_frames_and_times(form):
    lossy = {"quality": 100} if form == "AVIF" else {"lossless": True} if form == "WEBP" else {}
    video = VideoFile(_saved(form, _frames(), duration=DURATIONS, **lossy))
    assert video.times == pytest.approx(TIMES)
    found = list(video.read(range(6)))
    for pixels, frame in zip(found, _frames(), strict=True):
        assert np.abs(pixels.astype(int) - np.asarray(frame)).max() <= (40 if form == "AVIF" else 0)
    assert np.array_equal(next(video.read([4])), found[4])
    assert [pixels.shape for pixels in video.read([1, 1, 5])] == [(48, 64, 3)] * 3


@pytest.mark.parametrize("options", [{}, {"disposal": 2}, {"disposal": 1}], ids=str)
@pytest.mark.parametrize("form", ["WEBP", "GIF"])
def test_transparent_frames_are_composed_over_white(form, options):
    options = {"lossless": True} if form == "WEBP" else options
    video = VideoFile(_saved(form, _frames(alpha=True), duration=100, **options))
    for number, pixels in enumerate(video.read(range(6))):
        assert pixels[16, 8 * number + 8].tolist() == [255, 0, 0]
        assert pixels[40, 60].tolist() == [255, 255, 255]
    assert len(video) == 6


def test_frames_without_a_duration_last_a_tenth_of_a_second():
    """As in browsers; a time that stands still would tell no frame from another."""
    video = VideoFile(_saved("WEBP", _frames(), duration=[0, 10, 11, 0, 0, 0]))
    assert video.times == pytest.approx([0, 0.1, 0.2, 0.211, 0.311, 0.411])


def test_webp_in_a_request(processor):
    """4 frames of 6 at the least for 8B-Preview; one a half-second for 1.5."""
    item = {"type": "video", "video": _saved("WEBP", _frames(), duration=500)}
    request = processor.request(user(item))
    assert sum(row[0] for row in request.video_grid_thw) == 6
    shapes = processor.request(user(item), shapes_only=True)
    assert len(shapes.input_ids) >= len(request.input_ids)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_truncated_animation_is_refused(share):
    data = _saved("WEBP", _frames(), duration=100)
    with pytest.raises(ValueError, match=r"video .* bytes must be a whole WebP file"):
        VideoFile(data[: int(share * len(data))])


def test_frames_up_to_a_broken_one_are_read(monkeypatch):
    data = _saved("WEBP", _frames(), duration=100)
    plugin = type(Image.open(io.BytesIO(data)))
    seek = plugin.seek

    def broken(picture, place):
        if place == 4:
            raise EOFError
        seek(picture, place)

    monkeypatch.setattr(plugin, "seek", broken)
    assert len(VideoFile(data)) == 4


def test_an_animation_of_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(video_file, "MAX_FRAME_PIXELS", 1000)
    with pytest.raises(ValueError, match="at most 1000 pixels a frame, got 64x48"):
        VideoFile(_saved("WEBP", _frames(), duration=100))


@pytest.mark.parametrize("form", ["WEBP", "PNG", "GIF", "JPEG"])
def test_a_still_picture_is_one_frame(processors, form):
    file = io.BytesIO()
    next(_frames()).save(file, form)
    assert len(VideoFile(file.getvalue())) == 1
    item = {"type": "video", "video": file.getvalue()}
    assert processors["1.5"].request(user(item)).video_grid_thw[0][0] == 1
    with pytest.raises(
        ValueError, match=r"at least 2 frames, got 1 \(a picture is an image item\)"
    ):
        processors["preview"].request(user(item))


def test_other_files_are_no_animations():
    assert Animation.find(io.BytesIO(b"no picture at all" * 9), "film", print) is None
    sheet = _saved("TIFF", _frames())  # pages, and Pillow's readers of documents are left alone
    assert Animation.find(io.BytesIO(sheet), "film", print) is None
