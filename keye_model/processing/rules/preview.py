"""Keye-VL-8B-Preview: keye-vl-utils 1.0.0 and the checkpoint's image_processing_keye.py.

All frames of a video have one size. The helper package resizes them while it samples, the image
processor once more within its own bounds. A video's prompt is nothing but placeholders.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from keye_model.inputs.request import Progress
from keye_model.processing.budget import Fit
from keye_model.processing.film import Film
from keye_model.processing.image import MIN_PIXELS, helper_size
from keye_model.processing.patches import Frame, Sample, Size, VideoPatches
from keye_model.processing.rules.base import CLIP_KEYS, COMMON_KEYS, PICTURE_KEYS, Encode, Rules
from keye_model.processing.source import SOURCES
from keye_model.processing.tokenizer import TokenIds
from keye_model.processing.video_loading import channels_first, counted, listed_pictures
from keye_model.processing.video_sampling import (
    DEFAULT_FPS,
    TOKEN_PIXELS,
    bounded_size,
    check_video_tokens,
    checked_count,
)

MAX_PIXELS = 16384 * TOKEN_PIXELS  # of a picture
MIN_FRAME_PIXELS = 128 * TOKEN_PIXELS
MAX_FRAME_PIXELS = 768 * TOKEN_PIXELS
TOTAL_PIXELS = 128000 * TOKEN_PIXELS * 0.9  # the environment's VIDEO_MAX_PIXELS overrides
MIN_FRAMES = 4
MAX_FRAMES = 768


def frame_count(total: int, rate: float, options: Mapping[str, Any]) -> int:
    """How many of ``total`` frames at ``rate`` frames per second are sampled: an even number.

    ``nframes``, or ``fps`` within ``min_frames`` and ``max_frames``.

    Raises:
        ValueError: As `checked_count`.
    """
    if "nframes" in options:
        count = 2 * round(options["nframes"] / 2)
    else:
        low = 2 * math.ceil(options.get("min_frames", MIN_FRAMES) / 2)
        high = 2 * math.floor(options.get("max_frames", min(MAX_FRAMES, total)) / 2)
        count = total / rate * options.get("fps", DEFAULT_FPS)
        count = 2 * math.floor(min(max(count, low), high, total) / 2)
    return checked_count(count, total, options, step=2)


def frame_size(height: int, width: int, count: int, options: Mapping[str, Any]) -> Size:
    """Size of each frame of a video of ``count`` frames after the helper's resize.

    The token budget is ``total_pixels``, else the environment's VIDEO_MAX_PIXELS, else 115 200
    tokens; a frame gets twice its share of it, at most 768 tokens. ``max_pixels`` can only lower
    this. ``resized_height`` with ``resized_width`` overrides all of it.

    Raises:
        ValueError: As `helper_size` and `check_video_tokens`.
    """
    if "resized_height" in options and "resized_width" in options:
        height, width = options["resized_height"], options["resized_width"]
        size = helper_size(height, width, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    else:
        min_pixels = options.get("min_pixels", MIN_FRAME_PIXELS)
        total = options.get("total_pixels") or _total_pixels()
        max_pixels = max(min(MAX_FRAME_PIXELS, total / count * 2), int(min_pixels * 1.05))
        max_pixels = min(options.get("max_pixels", max_pixels), max_pixels)
        size = bounded_size(height, width, min_pixels, max_pixels)
    check_video_tokens(count * size[0] * size[1] / TOKEN_PIXELS)
    return size


def sample(
    film: Film, fit: Fit | None = None, *, decode: bool = True, progress: Progress | None = None
) -> Sample:
    """Sample and resize a video as keye-vl-utils 1.0.0 does.

    A file's item may have ``fps`` (2.0) or ``nframes``, ``min_frames``, ``max_frames``,
    ``video_start``, ``video_end`` (seconds), ``min_pixels``, ``max_pixels``, ``total_pixels``,
    ``resized_height`` with ``resized_width``. That of a list of frames may have ``fps``, the rate
    they were taken at, or ``timestamps``, the time of each in seconds; and the keys of an image.

    Args:
        fit: The prompt it is part of, which may lower the number of a file's frames or refuse it.
        decode: Whether to decode a file's frames. Else ``frames`` is None.
        progress: Called as ``progress("frames", done, total)`` after each frame.

    Returns:
        Frames of one size if of a file; of a list, the last one repeated once if their number is
        odd. Keywords: ``fps``, of the sampled frames: frames over the clip's length (also at a
        variable rate, as published), or the given or default one.
    """
    if film.file is None:
        return _of_list(film, progress)
    return film.sampled(partial(_of_file, film, fit, decode, progress))


def layout(
    sample: Sample, patch_size: int, resized: Callable[[int, int], Size]
) -> tuple[tuple[Frame, ...], float]:
    """All frames in the size that the image processor's rule gives the first."""
    fps = float(sample.keywords.get("fps", DEFAULT_FPS))
    if not fps > 0:
        raise ValueError(f"fps must be a positive number, got {fps}")
    rows, columns = (side // patch_size for side in resized(*sample.size))
    return (Frame(rows, columns, None),) * sample.count, 1 / fps


def resize(frame: torch.Tensor, height: int, width: int, resample: int) -> torch.Tensor:
    """The image processor's resize, by Pillow."""
    if frame.shape[1:] == (height, width):
        return frame
    picture = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    return channels_first(np.array(picture.resize((width, height), resample=resample)))


def resize_bicubic(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The helper's resize: [3, h, w] uint8 to [3, height, width] uint8, antialiased.

    Computed in fp32, clamped and rounded half to even, as torchvision's functional resize treats a
    uint8 tensor. PyTorch's own 8-bit path is faster and differs by more than rounding.
    """
    if frame.shape[1:] == (height, width):
        return frame
    size = (height, width)
    resized = interpolate(frame[None].float(), size, mode="bicubic", antialias=True)
    return resized.clamp_(0, 255).round_().to(torch.uint8)[0]


def batch(videos: Sequence[VideoPatches]) -> dict[str, torch.Tensor]:
    """second_per_grid_ts: [num_videos], fp32, seconds between frames."""
    seconds = [video.seconds_per_frame for video in videos]
    return {"second_per_grid_ts": torch.tensor(seconds, dtype=torch.float32)}


def placeholders(
    _frames: Sequence[Frame], counts: Sequence[int], ids: TokenIds, _encode: Encode
) -> list[int]:
    """One placeholder for each merged token."""
    return [ids.video] * sum(counts)


def _of_list(film: Film, progress: Progress | None) -> Sample:
    frames = list(listed_pictures(film, range(len(film.frames)), PREVIEW, progress))
    frames += frames[-1:] * (len(frames) % 2)
    fps = film.options.get("fps", DEFAULT_FPS)
    if film.times is not None and len(film.times) > 1:
        fps = (len(film.times) - 1) / (film.times[-1] - film.times[0])
    return Sample(frames, len(frames), frames[0].shape[1:], {"fps": fps})


def _of_file(film: Film, fit: Fit | None, decode: bool, progress: Progress | None) -> Sample:
    clip = film.clip(frame_count)

    def undecoded(count: int) -> Sample:
        size = frame_size(*film.file.frame_size, count, film.options)
        return Sample(None, count, size, {"fps": replace(clip, count=count).fps})

    def tokens(count: int) -> int:
        return count * fit.tokens(replace(undecoded(count), count=1))

    if fit is not None and fit.room is not None:
        fitting = (count for count in range(clip.count, 1, -2) if tokens(count) <= fit.room)
        clip = replace(clip, count=fit.most(next(fitting, None), clip.count, film.name))
    elif fit is not None and fit.budget.limit is not None:
        key = "nframes" if "nframes" in film.options else "max_frames"
        fit.budget.check_frames(clip.count, tokens, film.name, key)
    if not decode:
        return undecoded(clip.count)
    frames: list[torch.Tensor] = []
    for pixels in counted(film.file.read(clip.indices), clip.count, progress):
        if not frames:
            size = frame_size(*pixels.shape[:2], clip.count, film.options)
        frames.append(resize_bicubic(channels_first(pixels), *size))
    return Sample(frames, clip.count, size, {"fps": clip.fps})


def _total_pixels() -> int:
    text = os.environ.get("VIDEO_MAX_PIXELS")
    if text is None:
        return int(TOTAL_PIXELS)
    try:
        value = int(float(text))
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise ValueError(f"VIDEO_MAX_PIXELS must be a positive number, got {text!r}")
    return value


PREVIEW = Rules(
    version="1.0",
    name="Keye-VL-8B-Preview",
    item_keys=COMMON_KEYS
    | {
        "video": (
            *SOURCES["video"],
            *("fps", "nframes", "min_frames", "max_frames", "total_pixels"),
            *(*CLIP_KEYS, *PICTURE_KEYS),
        ),
        "frames": (*SOURCES["video"], "fps", "timestamps", *PICTURE_KEYS),
    },
    video_keywords=frozenset({"fps"}),
    max_pixels=MAX_PIXELS,
    alpha="white",
    enlarge_small=True,
    max_frame_pixels=None,
    total_pixels_key="total_pixels",
    advice="a lower max_pixels may fit",
    sample=sample,
    layout=layout,
    resize=resize,
    batch=batch,
    placeholders=placeholders,
)
