"""How many frames, which ones, how large: the published formulas written a second time."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye_model.processing.video_sampling import (
    check_video_tokens,
    clip_range,
    frame_count,
    frame_indices,
    preview_frame_size,
    video_options,
)

TOKEN = 784


def _even_down(number):
    return math.floor(number / 2) * 2


@given(
    total=st.integers(2, 100_000),
    rate=st.sampled_from([1.0, 7.5, 24000 / 1001, 25.0, 30000 / 1001, 60.0]),
    fps=st.sampled_from([None, 0.1, 0.7, 1, 2, 5.0]),
    least=st.sampled_from([None, 1, 4, 5, 16]),
    most=st.sampled_from([None, 2, 7, 64, 768]),
)
def test_frame_count_preview(total, rate, fps, least, most):
    """Steps of keye-vl-utils 1.0.0, from the wish to the bounds."""
    given_keys = {"fps": fps, "min_frames": least, "max_frames": most}
    options = {key: value for key, value in given_keys.items() if value is not None}
    count = total / rate * (fps or 2.0)
    count = max(count, math.ceil((least or 4) / 2) * 2)
    count = min(count, _even_down(most or min(768, total)))
    count = _even_down(min(count, total))
    if count >= 2:
        assert frame_count(total, rate, options, "1.0") == count
    else:
        with pytest.raises(ValueError, match="max_frames must be at least 2"):
            frame_count(total, rate, options, "1.0")


@given(
    total=st.integers(1, 100_000),
    rate=st.sampled_from([0.5, 1.0, 7.5, 25.0, 30000 / 1001, 60.0]),
    fps=st.sampled_from([None, 0.1, 1, 2, 120.0]),
    most=st.sampled_from([None, 1, 7, 5000]),
    pixels=st.sampled_from([None, 64 * TOKEN]),
)
def test_frame_count_1_5(total, rate, fps, most, pixels):
    given_keys = {"fps": fps, "max_frames": most, "min_pixels": pixels}
    options = {key: value for key, value in given_keys.items() if value is not None}
    bound = int(65536 * TOKEN / (pixels or 48 * TOKEN))
    count = min(int(total / rate * min(fps or 2.0, rate)), bound, most or bound)
    assert frame_count(total, rate, options, "1.5") == max(1, count)


@pytest.mark.parametrize(
    ("total", "rate", "options", "version", "count"),
    [
        (300, 30.0, {}, "1.0", 20),
        (10, 30.0, {}, "1.0", 4),  # two thirds of a second: the least
        (100_000, 30.0, {}, "1.0", 768),
        (100, 30.0, {"nframes": 7}, "1.0", 8),  # 3.5 to even: 4 pairs
        (100, 30.0, {"nframes": 5}, "1.0", 4),  # 2.5 to even: 2 pairs
        (100_000, 30.0, {}, "1.5", 1365),
        (10, 30.0, {}, "1.5", 1),  # published: none
        (3, 0.7, {"fps": 0.7}, "1.5", 2),  # 3 / 0.7 * 0.7 is less than 3 in double
        (100, 30.0, {"nframes": 7}, "1.5", 7),
        (9000, 30.0, {"nframes": 4096}, "1.5", 4096),
    ],
)
def test_frame_count_known(total, rate, options, version, count):
    assert frame_count(total, rate, options, version) == count


@pytest.mark.parametrize(
    ("total", "options", "version", "message"),
    [
        (1, {}, "1.0", "a clip must have at least 2 frames, got 1"),
        (10, {"nframes": 1}, "1.0", "nframes must be from 2 to 10 in a clip of 10 frames, got 1$"),
        (11, {"nframes": 11}, "1.0", "nframes must be from 2 to 10 in a clip of 11 frames, got 11"),
        (10, {"nframes": 12}, "1.5", "nframes must be from 1 to 10 in a clip of 10 frames, got 12"),
        (10, {"max_frames": 1}, "1.0", "max_frames must be at least 2, got 1$"),
        (9000, {"nframes": 5000}, "1.0", "give at most 4096 frames, got 5000: lower nframes, fps"),
        (9000, {"nframes": 4097}, "1.5", "give at most 4096 frames, got 4097: lower nframes, fps"),
        (9000, {"min_frames": 5000, "max_frames": 6000}, "1.0", "4096 frames, got 5000: .*max_fr"),
    ],
)
def test_frame_count_errors(total, options, version, message):
    with pytest.raises(ValueError, match=message):
        frame_count(total, 30.0, options, version)


@given(first=st.integers(0, 1000), span=st.integers(0, 100_000), count=st.integers(1, 768))
def test_frame_indices(first, span, count):
    """Ends included, steps of equal length up to rounding, none twice unless there are too few."""
    indices = frame_indices(first, first + span, count)
    exact = np.linspace(first, first + span, count)
    assert len(indices) == count
    assert np.abs(indices - exact).max() <= 0.5 + 1e-6 * (first + span)
    if count <= span + 1:
        assert len(set(indices)) == count
        assert indices == sorted(indices)


def test_frame_indices_round_half_to_even():
    assert frame_indices(0, 5, 11) == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5]
    assert frame_indices(0, 99, 1) == [0]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, (0, 99)),
        (1.0, None, (10, 99)),
        (1.01, 1.99, (11, 19)),
        (None, 2.0, (0, 20)),
        (-5, 99, (0, 99)),  # clamped to the ten seconds of the clip
        (9.75, 10.0, (98, 99)),
    ],
)
def test_clip_range_constant_rate(start, end, expected):
    options = video_options({"video_start": start, "video_end": end})
    assert clip_range(np.arange(100) / 10, 10.0, True, options) == expected


@pytest.mark.parametrize(
    ("start", "end", "expected"), [(0.12, 1.0, (2, 4)), (0.1, 0.99, (1, 3)), (0, 9, (0, 5))]
)
def test_clip_range_variable_rate(start, end, expected):
    times = np.array([0, 0.1, 0.15, 0.4, 1.0, 1.5])
    assert clip_range(times, 5 / 1.5, False, {"video_start": start, "video_end": end}) == expected


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(("start", "end"), [(5, 5), (6, 5), (10, None), (None, 0), (3.01, 3.05)])
def test_clip_range_empty(constant, start, end):
    options = video_options({"video_start": start, "video_end": end})
    with pytest.raises(ValueError, match="must enclose at least two frames of 10 seconds, got"):
        clip_range(np.arange(100) / 10, 10.0, constant, options)


@pytest.mark.parametrize(
    ("count", "size"),
    [
        (8, (560, 1008)),
        (300, (560, 1008)),
        (316, (560, 1008)),
        (512, (420, 784)),
        (768, (336, 644)),
    ],
)
def test_preview_frame_size_of_720p(count, size, monkeypatch):
    monkeypatch.delenv("VIDEO_MAX_PIXELS", raising=False)
    assert preview_frame_size(720, 1280, count, {}) == size


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [
        ((224, 448), 16, (224, 448)),  # 128 tokens
        ((71, 80), 16, (308, 364)),  # sqrt(128 x 80 / 71) is 12.01, sqrt(127 x 80 / 71) is 11.96
        ((672, 896), 16, (672, 896)),  # 768 tokens
        ((10201, 10000), 16, (756, 756)),  # sqrt(768 x 1.0201) is 27.99, sqrt(769 x 1.0201) 28.01
        ((560, 896), 360, (560, 896)),  # 640 tokens, twice the share of 115 200
        ((504, 1008), 360, (476, 980)),  # 648
    ],
    ids=str,
)
def test_preview_frame_size_at_its_bounds(size, count, expected, monkeypatch):
    monkeypatch.delenv("VIDEO_MAX_PIXELS", raising=False)
    assert preview_frame_size(*size, count, {}) == expected


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"max_pixels": 200 * TOKEN}, (280, 504)),
        ({"max_pixels": 10_000_000}, (560, 1008)),  # can only lower
        ({"max_pixels": 64 * TOKEN}, (168, 280)),  # below the least: still shrinks to it
        ({"total_pixels": 1000 * TOKEN}, (224, 420)),  # 1.05 of the least beats the share
        ({"resized_height": 200, "resized_width": 300}, (196, 308)),
        ({"min_pixels": 900 * TOKEN}, (644, 1120)),
    ],
    ids=["max", "max too large", "crossed", "total", "resized", "min"],
)
def test_preview_frame_size_options(options, size):
    assert preview_frame_size(720, 1280, 16, options) == size


def test_tokens_of_a_video_that_there_may_be():
    check_video_tokens(1048576)
    with pytest.raises(ValueError, match=r"at most 1048576 tokens .*, got 1048577: lower min_"):
        check_video_tokens(1048577)


def test_preview_frame_size_environment(monkeypatch):
    monkeypatch.setenv("VIDEO_MAX_PIXELS", str(32000 * TOKEN * 0.9))
    assert preview_frame_size(720, 1280, 144, {}) == preview_frame_size(
        720, 1280, 144, {"total_pixels": 28800 * TOKEN}
    )
    assert preview_frame_size(720, 1280, 144, {}) < (560, 1008)
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "plenty")
    with pytest.raises(ValueError, match="VIDEO_MAX_PIXELS must be a positive number, got"):
        preview_frame_size(720, 1280, 144, {})


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (4, {"min_pixels": 1e12}, r"at most 131072 tokens \(a whole context\) .* lower min_pixels"),
        (4, {"resized_height": 10**6, "resized_width": 10**9}, "at most 200 times"),
        (768, {"min_pixels": 10**7}, r"a video must have at most 1048576 tokens \(many times"),
        (768, {"resized_height": 2800, "resized_width": 2800}, "tokens .* got 7680000: lower min"),
    ],
)
def test_preview_frame_size_that_could_only_exhaust_the_memory(count, options, message):
    with pytest.raises(ValueError, match=message):
        preview_frame_size(720, 1280, count, options)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"fps": 0}, "fps must be a positive number, got 0"),
        ({"fps": "2"}, "fps must be a number, got '2'"),
        ({"nframes": -4}, "nframes must be a positive number, got -4"),
        ({"max_frames": True}, "max_frames must be a number, got True"),
        ({"video_start": math.nan}, "video_start must be a number, got nan"),
        ({"fps": 1, "nframes": 4}, "fps and nframes must not both be given, got 1 and 4"),
    ],
)
def test_video_options_errors(item, message):
    with pytest.raises(ValueError, match=message):
        video_options(item)


def test_video_options_leaves_out_none_and_strangers():
    item = {"type": "video", "video": "a.mp4", "fps": None, "nframes": 4}
    assert video_options(item) == {"nframes": 4}
