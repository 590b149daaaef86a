"""Which frames, and the bounds of a video: the published formulas written a second time."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye_model.processing.video_sampling import (
    check_video_tokens,
    clip_range,
    frame_indices,
    video_options,
)


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


def test_tokens_of_a_video_that_there_may_be():
    check_video_tokens(1048576)
    with pytest.raises(ValueError, match=r"at most 1048576 tokens .*, got 1048577: lower min_"):
        check_video_tokens(1048577)


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
