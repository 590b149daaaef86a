"""Which frames of a video the model sees, and how large: the numbers of both published helpers.

"1.0" is keye-vl-utils 1.0.0 (Keye-VL-8B-Preview), "1.5" is keye-vl-utils 1.5.x (Keye-VL-1.5).
Nothing here touches a pixel.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from keye_model.processing.image import MAX_PIXELS, MIN_PIXELS, helper_size

FACTOR = 28  # pixels of one token's side: patch 14, merged 2x2
TOKEN_PIXELS = FACTOR * FACTOR
DEFAULT_FPS = 2.0
MAX_FRAMES = 4096  # more than any context holds at the smallest frame; refused before decoding
MAX_VIDEO_TOKENS = 1 << 20  # eight times the longest context; 2.5 GB of pixels

PREVIEW_MIN_PIXELS = 128 * TOKEN_PIXELS
PREVIEW_MAX_PIXELS = 768 * TOKEN_PIXELS
PREVIEW_TOTAL_PIXELS = 128000 * TOKEN_PIXELS * 0.9  # the environment's VIDEO_MAX_PIXELS overrides
PREVIEW_MIN_FRAMES = 4
PREVIEW_MAX_FRAMES = 768

V1_5_MIN_PIXELS = 48 * TOKEN_PIXELS
V1_5_MAX_PIXELS = 768 * TOKEN_PIXELS
V1_5_TOTAL_PIXELS = 65536 * TOKEN_PIXELS

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


def frame_count(total: int, rate: float, options: Mapping[str, Any], version: str) -> int:
    """How many of ``total`` frames at ``rate`` frames per second are sampled.

    "1.0": an even number; ``nframes``, or ``fps`` within ``min_frames`` and ``max_frames``.
    "1.5": ``fps`` up to the video's own rate, at most ``max_frames`` and what the token budget
    holds at the smallest frame size; at least 1, where the published helper gives 0 and fails.
    ``nframes``, which that helper does not have, is taken as it is.

    Raises:
        ValueError: ``nframes`` or the bounds ask for more frames than there are, or for none, or
            more than 4096.
    """
    least = 2 if version == "1.0" else 1
    if total < least:
        hint = " (a picture is an image item)" if total == 1 else ""
        raise ValueError(f"a clip must have at least {least} frames, got {total}{hint}")
    count = (_preview_count if version == "1.0" else _count_1_5)(total, rate, options)
    if not least <= count <= total:
        if "nframes" not in options:  # only this bound can ask for too few
            raise ValueError(f"max_frames must be at least {least}, got {options['max_frames']}")
        most = total - total % least  # an even number for "1.0"
        raise ValueError(
            f"nframes must be from {least} to {most} in a clip of {total} frames, got "
            f"{options['nframes']}"
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


def preview_frame_size(
    height: int, width: int, count: int, options: Mapping[str, Any]
) -> tuple[int, int]:
    """Size of each frame of a video of ``count`` frames (keye-vl-utils 1.0.0).

    The token budget is ``total_pixels``, else the environment's VIDEO_MAX_PIXELS, else 115 200
    tokens; a frame gets twice its share of it, at most 768 tokens. ``max_pixels`` can only lower
    this. ``resized_height`` with ``resized_width`` overrides all of it.

    Raises:
        ValueError: As `helper_size` and `check_video_tokens`.
    """
    if "resized_height" in options and "resized_width" in options:
        height, width = options["resized_height"], options["resized_width"]
        size = helper_size(height, width, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS["1.0"])
    else:
        min_pixels = options.get("min_pixels", PREVIEW_MIN_PIXELS)
        total = options.get("total_pixels") or _preview_total()
        max_pixels = max(min(PREVIEW_MAX_PIXELS, total / count * 2), int(min_pixels * 1.05))
        max_pixels = min(options.get("max_pixels", max_pixels), max_pixels)
        size = bounded_size(height, width, min_pixels, max_pixels)
    check_video_tokens(count * size[0] * size[1] / TOKEN_PIXELS)
    return size


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


def _preview_count(total: int, rate: float, options: Mapping[str, Any]) -> int:
    if "nframes" in options:
        return 2 * round(options["nframes"] / 2)
    low = 2 * math.ceil(options.get("min_frames", PREVIEW_MIN_FRAMES) / 2)
    high = 2 * math.floor(options.get("max_frames", min(PREVIEW_MAX_FRAMES, total)) / 2)
    count = total / rate * options.get("fps", DEFAULT_FPS)
    return 2 * math.floor(min(max(count, low), high, total) / 2)


def _count_1_5(total: int, rate: float, options: Mapping[str, Any]) -> int:
    if "nframes" in options:
        return round(options["nframes"])
    budget = options.get("video_total_pixels", V1_5_TOTAL_PIXELS)
    most = int(budget / options.get("min_pixels", V1_5_MIN_PIXELS))
    count = int(total / rate * min(options.get("fps", DEFAULT_FPS), rate))
    return max(1, int(min(count, options.get("max_frames", most), most)))


def _preview_total() -> int:
    text = os.environ.get("VIDEO_MAX_PIXELS")
    if text is None:
        return int(PREVIEW_TOTAL_PIXELS)
    try:
        value = int(float(text))
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise ValueError(f"VIDEO_MAX_PIXELS must be a positive number, got {text!r}")
    return value
