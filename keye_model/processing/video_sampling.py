"""Which frames of a video the model sees, and how large: what both published helpers compute alike.

The numbers of each line are in `rules`. Nothing here touches a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from keye_model.processing.image import helper_size

FACTOR = 28  # pixels of one token's side: patch 14, merged 2x2
TOKEN_PIXELS = FACTOR * FACTOR
DEFAULT_FPS = 2.0
MAX_FRAMES = 4096  # more than any context holds at the smallest frame; refused before decoding
MAX_VIDEO_TOKENS = 1 << 20  # eight times the longest context; 2.5 GB of pixels

_NUMBERS = ("fps", "video_start", "video_end", "min_frame_similarity")
_SIZES = ("nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
_SIZES += ("video_total_pixels", "resized_height", "resized_width")


def video_options(item: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a video item that steer sampling, checked; a key with None counts as absent.

    Raises:
        ValueError: A value that is not a positive number (``video_start``, ``video_end`` and
            ``min_frame_similarity`` may be any), or both ``fps`` and ``nframes``.
    """
    options = {key: item[key] for key in _NUMBERS + _SIZES if item.get(key) is not None}
    for key, value in options.items():
        kind = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not kind or not math.isfinite(value):
            raise ValueError(f"{key} must be a number, got {value!r}")
        if (key in _SIZES or key == "fps") and value <= 0:
            raise ValueError(f"{key} must be a positive number, got {value!r}")
    if "fps" in options and "nframes" in options:
        raise ValueError(
            f"fps and nframes must not both be given, got {options['fps']} and {options['nframes']}"
        )
    return options


def clip_range(
    times: Sequence[float], rate: float, constant_rate: bool, options: Mapping[str, Any]
) -> tuple[int, int]:
    """First and last frame (both included) between ``video_start`` and ``video_end`` seconds.

    At a constant rate these are ``ceil(start * rate)`` and ``floor(end * rate)``, each time first
    clamped to the video (keye-vl-utils 1.0.0). Otherwise they are the first frame shown at or
    after the start and the last one at or before the end.

    Raises:
        ValueError: The range holds fewer than two frames.
    """
    last = len(times) - 1
    if "video_start" not in options and "video_end" not in options:
        return 0, last
    duration = len(times) / rate
    start = min(max(0.0, options.get("video_start", 0.0)), duration)
    end = min(max(0.0, options.get("video_end", duration)), duration)
    if constant_rate:
        first, final = math.ceil(start * rate), min(math.floor(end * rate), last)
    else:
        first = int(np.searchsorted(times, start, side="left"))
        final = int(np.searchsorted(times, end, side="right")) - 1
    if first >= final:
        raise ValueError(
            f"video_start and video_end must enclose at least two frames of {duration:g} seconds, "
            f"got {options.get('video_start', 0.0)} and {options.get('video_end', duration)}"
        )
    return first, final


def checked_count(count: int, total: int, options: Mapping[str, Any], *, step: int) -> int:
    """``count`` frames of ``total``, if they can be sampled.

    Args:
        step: What a line's counts are multiples of, and so the least.

    Raises:
        ValueError: ``nframes`` or the bounds ask for more frames than there are, or for none, or
            more than 4096.
    """
    if total < step:
        hint = " (a picture is an image item)" if total == 1 else ""
        raise ValueError(f"a clip must have at least {step} frames, got {total}{hint}")
    if not step <= count <= total:
        if "nframes" not in options:  # only this bound can ask for too few
            raise ValueError(f"max_frames must be at least {step}, got {options['max_frames']}")
        raise ValueError(
            f"nframes must be from {step} to {total - total % step} in a clip of {total} frames, "
            f"got {options['nframes']}"
        )
    if count > MAX_FRAMES:
        raise ValueError(
            f"a video must give at most {MAX_FRAMES} frames, got {count}: lower nframes, fps, "
            "min_frames or max_frames"
        )
    return count


def frame_indices(first: int, last: int, count: int) -> list[int]:
    """``count`` indices spread evenly from ``first`` to ``last``, both included if count > 1.

    An fp32 linspace rounded half to even, as both helpers compute it.
    """
    return torch.linspace(first, last, count).round().long().tolist()


def bounded_size(height: int, width: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """`helper_size` for bounds that may cross, as they do in the helpers' video branches.

    A frame larger than ``max_pixels`` shrinks to it, whatever ``min_pixels`` says; any other one
    smaller than ``min_pixels`` grows to it.
    """
    rounded = helper_size(height, width, min_pixels=1, max_pixels=math.inf)
    if rounded[0] * rounded[1] > max_pixels:
        min_pixels = min(min_pixels, max_pixels)
    else:
        max_pixels = max(min_pixels, max_pixels)
    return helper_size(height, width, min_pixels=min_pixels, max_pixels=max_pixels)


def check_video_tokens(tokens: float) -> None:
    """Refuse a video that could only exhaust the memory, before its frames are decoded.

    Raises:
        ValueError: ``tokens`` (frames times their area) exceed `MAX_VIDEO_TOKENS`.
    """
    if tokens > MAX_VIDEO_TOKENS:
        raise ValueError(
            f"a video must have at most {MAX_VIDEO_TOKENS} tokens (many times what any context "
            f"holds), got {int(tokens)}: lower min_pixels or the number of frames"
        )
