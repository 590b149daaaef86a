"""How many frames, and how large, for 8B-Preview: the published formulas written a second time."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye_model.processing.rules.preview import frame_count, frame_size

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
        assert frame_count(total, rate, options) == count
    else:
        with pytest.raises(ValueError, match="max_frames must be at least 2"):
            frame_count(total, rate, options)


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
def test_frame_size_of_720p(count, size, monkeypatch):
    monkeypatch.delenv("VIDEO_MAX_PIXELS", raising=False)
    assert frame_size(720, 1280, count, {}) == size


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
def test_frame_size_at_its_bounds(size, count, expected, monkeypatch):
    monkeypatch.delenv("VIDEO_MAX_PIXELS", raising=False)
    assert frame_size(*size, count, {}) == expected


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
def test_frame_size_options(options, size):
    assert frame_size(720, 1280, 16, options) == size


def test_frame_size_environment(monkeypatch):
    monkeypatch.setenv("VIDEO_MAX_PIXELS", str(32000 * TOKEN * 0.9))
    assert frame_size(720, 1280, 144, {}) == frame_size(
        720, 1280, 144, {"total_pixels": 28800 * TOKEN}
    )
    assert frame_size(720, 1280, 144, {}) < (560, 1008)
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "plenty")
    with pytest.raises(ValueError, match="VIDEO_MAX_PIXELS must be a positive number, got"):
        frame_size(720, 1280, 144, {})


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (4, {"min_pixels": 1e12}, r"at most 131072 tokens \(a whole context\) .* lower min_pixels"),
        (4, {"resized_height": 10**6, "resized_width": 10**9}, "at most 200 times"),
        (768, {"min_pixels": 10**7}, r"a video must have at most 1048576 tokens \(many times"),
        (768, {"resized_height": 2800, "resized_width": 2800}, "tokens .* got 7680000: lower min"),
    ],
)
def test_frame_size_that_could_only_exhaust_the_memory(count, options, message):
    with pytest.raises(ValueError, match=message):
        frame_size(720, 1280, count, options)
