"""Videos of a prompt before they are decoded: their tokens, and what of them fits."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from keye_model.processing import video_file
from keye_model.processing.budget import TokenBudget
from keye_model.processing.slow_fast import frame_sizes
from keye_model.processing.video_file import VideoFile
from tests.model.processing.messages import image, text_item, user

FEW = settings(max_examples=15, deadline=None, suppress_health_check=[*HealthCheck])


@pytest.fixture
def film(make_video, tmp_path):
    """Twelve seconds: 24 frames at the default rate."""
    path = tmp_path / "film.mp4"
    path.write_bytes(make_video(60, size=(96, 160), rate=5))
    return {"type": "video", "video": str(path)}


@pytest.fixture
def undecoded(monkeypatch):
    monkeypatch.setattr(video_file, "decode", lambda *_: pytest.fail("decoded"))


def _frames(request):
    return sum(row[0] for row in request.video_grid_thw)


def _noise(make_video, seconds=12):
    """A film of which every sampled frame is unlike the last."""
    return make_video(5 * seconds, size=(96, 160), rate=5, options={"g": "1"})


@FEW
@given(limit=st.integers(300, 3000), behind=st.integers(0, 200))
def test_preview_takes_the_most_frames_that_fit(preview, film, limit, behind):
    """Text and pictures count wherever they stand, after the video, too."""
    said = []
    messages = user(film, image(56, 84), text_item("word " * behind))
    whole = len(preview.request(messages, shapes_only=True).input_ids)
    try:
        request = preview.request(messages, max_tokens=limit, fit_videos=said.append)
    except ValueError:  # not even two frames fit
        pair = user({**film, "nframes": 2}, *messages[0]["content"][1:])
        assert len(preview.request(pair, shapes_only=True).input_ids) > limit
        return
    count = _frames(request)
    assert len(request.input_ids) <= limit
    assert bool(said) == (count < 24) == (whole > limit)
    if said:
        more = user({**film, "nframes": count + 2}, *messages[0]["content"][1:])
        assert len(preview.request(more, shapes_only=True).input_ids) > limit
        each = (request.video_grid_thw[0][1] * request.video_grid_thw[0][2]) // 4
        assert said == [
            f"video '{film['video']}': {count} frames instead of 24, at most {each} tokens each, "
            f"to fit a prompt of {limit:,} tokens"
        ]


def test_fitted_preview_equals_as_many_frames_asked_for(preview, film):
    fitted = preview.request(user(film), max_tokens=1500, fit_videos=lambda _: None)
    asked = preview.request(user({**film, "nframes": _frames(fitted)}))
    assert torch.equal(fitted.pixel_values_videos, asked.pixel_values_videos)
    assert fitted.second_per_grid_ts == asked.second_per_grid_ts


@pytest.mark.parametrize("key", ["fps", "nframes", "max_frames", "min_frames"])
def test_a_number_of_frames_that_was_asked_for_is_not_changed(preview, film, key):
    value = {"fps": 2.0}.get(key, 24)
    with pytest.raises(ValueError, match="with 24 frames"):
        preview.request(user({**film, key: value}), max_tokens=1500, fit_videos=pytest.fail)


def test_smaller_frames_are_fitted_too(preview, film):
    """A bound on pixels says nothing about the number of frames."""
    said = []
    small = {**film, "max_pixels": 30000, "min_pixels": 4 * 784}
    request = preview.request(user(small), max_tokens=300, fit_videos=said.append)
    assert len(said) == 1
    assert len(request.input_ids) <= 300


def test_without_a_limit_nothing_is_fitted(processor, film):
    request = processor.request(user(film), fit_videos=pytest.fail)
    assert _frames(request) == 24


def test_lists_of_frames_are_not_fitted(preview):
    frames = [Image.new("RGB", (160, 96))] * 24
    with pytest.raises(ValueError, match="must have at most 400 tokens"):
        preview.request(
            user({"type": "video", "video": frames}), max_tokens=400, fit_videos=pytest.fail
        )


@pytest.mark.parametrize("line", ["preview", "1.5"])
def test_several_videos_share_what_is_left(processors, make_video, line):
    """The short one has all it needs and the long ones the rest, in equal parts."""
    processor = processors[line]
    short, long = (_noise(make_video, seconds) for seconds in (2, 30))
    items = [{"type": "video", "video": data} for data in (long, short, long)]
    limit = 4000 if line == "preview" else 2500
    said = []
    request = processor.request(user(*items), max_tokens=limit, fit_videos=said.append)
    assert limit * 0.8 < len(request.input_ids) <= limit
    assert len(said) == 2
    if line == "preview":
        first, middle, last = (row[0] for row in request.video_grid_thw)
        assert middle == 4
        assert abs(first - last) <= 2


def test_a_video_with_its_number_of_frames_goes_first(preview, film):
    """Wherever it stands, it has what was asked for; the grids stay in reading order."""
    asked = {**film, "nframes": 8}
    for items, place in (((film, asked), 1), ((asked, film), 0)):
        request = preview.request(user(*items), max_tokens=2500, fit_videos=lambda _: None)
        assert request.video_grid_thw[place][0] == 8
        assert 2000 < len(request.input_ids) <= 2500


def test_a_share_goes_by_what_others_leave():
    budget = TokenBudget(1000)
    budget.take(100, "text")
    assert budget.share([2000]) == 900
    assert budget.share([2000, 100]) == 800
    assert budget.share([100, 2000]) == 100
    assert budget.share([2000, 300, 2000]) == 300
    assert budget.share([200, 300, 400]) == 200
    assert TokenBudget().share([5]) is None


@pytest.mark.parametrize("limit", [120, 400, 700, 1200, 1e4])
@pytest.mark.parametrize("alike", [True, False], ids=["fast", "slow"])
def test_1_5_lowers_its_total_first_and_then_takes_fewer_frames(
    processors, make_video, limit, alike
):
    processor, limit, said = processors["1.5"], int(limit), []
    item = {"type": "video", "video": _noise(make_video), "min_frame_similarity": 0 if alike else 2}
    request = processor.request(user(item), max_tokens=limit, fit_videos=said.append)
    published = processor.request(user(item))
    assert len(request.input_ids) <= limit
    if len(published.input_ids) <= limit:
        assert not said
        assert torch.equal(request.pixel_values_videos, published.pixel_values_videos)
        return
    assert len(said) == 1
    count = _frames(request)
    assert (f"{count} frames instead of 24" in said[0]) == (count < 24)
    # One more might not fit at its smallest: slow and fast are not known before.
    more = {**item, "nframes": min(count + 1, 24), "video_total_pixels": 1}
    kinds = [0] if alike else [0, 2]
    more = [user({**more, "min_frame_similarity": kind}) for kind in kinds]
    least = max(len(processor.request(one).input_ids) for one in more)
    assert (least > limit) == (count < 24)


def test_1_5_that_cannot_be_fitted(processors, film):
    with pytest.raises(ValueError, match=r"at most 60 tokens, got \d+ left for video .* none of"):
        processors["1.5"].request(user(film), max_tokens=60, fit_videos=pytest.fail)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"fps": 0.7},
        {"nframes": 6},
        {"max_frames": 5},
        {"video_start": 1.1, "video_end": 7.7},
        {"resized_height": 100, "resized_width": 200},
        {"total_pixels": 24 * 30 * 784, "min_pixels": 784},
        {"max_pixels": 90000},
    ],
    ids=lambda keys: "-".join(keys) or "default",
)
def test_shapes_of_preview_are_those_of_the_decoded_video(preview, film, monkeypatch, keys):
    messages = user(image(), {**film, **keys}, film, text_item("Why?"))
    decoded = preview.request(messages)
    monkeypatch.setattr(VideoFile, "read", lambda *_: pytest.fail("decoded"))
    shapes = preview.request(messages, shapes_only=True)
    assert torch.equal(shapes.input_ids, decoded.input_ids)
    assert shapes.video_grid_thw == decoded.video_grid_thw
    assert shapes.image_grid_thw == decoded.image_grid_thw
    assert shapes.second_per_grid_ts == decoded.second_per_grid_ts
    assert shapes.pixel_values_videos.shape == decoded.pixel_values_videos.shape
    assert shapes.pixel_values_videos.nbytes == decoded.pixel_values_videos.nbytes
    assert shapes.pixel_values_videos.is_meta


def test_shapes_of_a_turned_film_are_those_of_the_file(preview, make_video):
    """As many tokens; rows and columns change places, which only a decoded frame tells."""
    item = {"type": "video", "video": make_video(60, size=(96, 160), rate=5, rotation=90)}
    shapes, decoded = (preview.request(user(item), shapes_only=only) for only in (True, False))
    assert torch.equal(shapes.input_ids, decoded.input_ids)
    [(frames, rows, columns)] = shapes.video_grid_thw
    assert decoded.video_grid_thw == ((frames, columns, rows),)
    fitted = preview.request(user(item), max_tokens=1500, fit_videos=lambda _: None)
    assert 1000 < len(fitted.input_ids) <= 1500


@pytest.mark.usefixtures("undecoded")
def test_shapes_are_not_refused_for_their_length(processor, film):
    assert len(processor.request(user(film), max_tokens=10, shapes_only=True).input_ids) > 10
    fitted = processor.request(
        user(film), max_tokens=10, shapes_only=True, fit_videos=lambda _: None
    )
    assert len(fitted.input_ids) > 10


def test_fitted_shapes_are_those_of_the_fitted_video(preview, film):
    said, told = [], []
    shapes = preview.request(
        user(film, film), max_tokens=2000, fit_videos=told.append, shapes_only=True
    )
    decoded = preview.request(user(film, film), max_tokens=2000, fit_videos=said.append)
    assert shapes.video_grid_thw == decoded.video_grid_thw
    assert torch.equal(shapes.input_ids, decoded.input_ids)
    assert said == told


@pytest.mark.parametrize("similarity", [0, 0.9, 2])
@pytest.mark.parametrize(
    "keys", [{}, {"nframes": 1}, {"video_total_pixels": 24 * 60 * 784}], ids=str
)
def test_shapes_of_1_5_are_the_costliest(processors, film, similarity, keys):
    item = {**film, "min_frame_similarity": similarity, **keys}
    shapes = processors["1.5"].request(user(item), shapes_only=True)
    decoded = processors["1.5"].request(user(item))
    assert len(shapes.input_ids) >= len(decoded.input_ids)
    assert shapes.pixel_values_videos.shape[0] >= decoded.pixel_values_videos.shape[0]
    assert _frames(shapes) == _frames(decoded)
    if similarity == 0 or keys == {"nframes": 1}:  # slow and fast do not depend on what is shown
        assert torch.equal(shapes.input_ids, decoded.input_ids)
        assert shapes.video_grid_thw == decoded.video_grid_thw


def test_the_costliest_split_of_a_long_720p_video_is_not_all_slow(processors, film, monkeypatch):
    """SPEC's sizes: 600 slow frames have 54 600 tokens, 128 slow and 472 fast ones 56 480."""
    monkeypatch.setattr(VideoFile, "frame_size", (720, 1280))
    monkeypatch.setattr(VideoFile, "__len__", lambda _: 600)
    monkeypatch.setattr(VideoFile, "_set_times", _half_seconds)
    request = processors["1.5"].request(user(film), shapes_only=True)
    pixels = request.pixel_values_videos.shape[0] // 4
    splits = [frame_sizes(720, 1280, slow, 600 - slow) for slow in range(1, 601)]
    totals = [
        (slow * s.height * s.width + (600 - slow) * s.fast_height * s.fast_width) // 784
        for slow, s in enumerate(splits, start=1)
    ]
    assert totals[127] == 56480
    assert totals[599] == 54600
    assert pixels >= 59400
    assert pixels >= max(totals) - 600  # two marks for each fast frame weigh as well


def _half_seconds(video, *_):
    video.times, video.rate, video.constant_rate = np.arange(600) / 2, 2.0, True
    video.coded_size = (720, 1280)


@pytest.mark.parametrize("frames", ["file", "list"])
def test_progress_counts_the_frames(processor, film, frames):
    told = []
    if frames == "list":
        film = {"type": "video", "video": [Image.new("RGB", (160, 96))] * 24}
    processor.request(user(film), progress=lambda *what: told.append(what))
    assert told == [("frames", done, 24) for done in range(1, 25)]


@pytest.mark.usefixtures("undecoded")
def test_a_broken_file_is_found_before_others_are_decoded(preview, film):
    broken = {"type": "video", "video": b"no film at all" * 99}
    with pytest.raises(ValueError, match="FFmpeg can read"):
        preview.request(user(film, broken))


def test_normalised_pixels_keep_their_width(preview, film, monkeypatch):
    """Bytes on the meta device are those that the model would be given."""
    monkeypatch.setattr(preview.image_processor, "image_mean", (0.4, 0.5, 0.6))
    shapes = preview.request(user({**film, "nframes": 2}), shapes_only=True)
    assert shapes.pixel_values_videos.dtype == torch.float32
    assert shapes.pixel_values_videos.is_meta
