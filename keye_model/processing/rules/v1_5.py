"""Keye-VL-1.5: keye-vl-utils 1.5.x and the transformers port.

Slow and fast frames have a size each (`slow_fast`) and are resized once, from their original size.
In the prompt each frame stands behind its mark and its time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from keye_model.inputs.request import Progress
from keye_model.processing.budget import Fit
from keye_model.processing.film import Clip, Film
from keye_model.processing.patches import Frame, Sample, Size, VideoPatches
from keye_model.processing.rules.base import CLIP_KEYS, COMMON_KEYS, RESIZED_KEYS, Encode, Rules
from keye_model.processing.slow_fast import (
    MAX_PIXELS,
    MIN_FRAME_SIMILARITY,
    MIN_PIXELS,
    TOTAL_PIXELS,
    FrameSizes,
    classify_frames,
    frame_sizes,
    resize_bilinear,
)
from keye_model.processing.source import SOURCES
from keye_model.processing.tokenizer import TokenIds
from keye_model.processing.video_loading import ClipFrames, listed_pictures
from keye_model.processing.video_sampling import (
    DEFAULT_FPS,
    FACTOR,
    TOKEN_PIXELS,
    checked_count,
    frame_indices,
)


def frame_count(total: int, rate: float, options: Mapping[str, Any]) -> int:
    """How many of ``total`` frames at ``rate`` frames per second are sampled.

    ``fps`` up to the video's own rate, at most ``max_frames`` and what the token budget holds at
    the smallest frame size; at least 1, where the published helper gives 0 and fails. ``nframes``,
    which that helper does not have, is taken as it is.

    Raises:
        ValueError: As `checked_count`.
    """
    if "nframes" in options:
        count = round(options["nframes"])
    else:
        budget = options.get("video_total_pixels", TOTAL_PIXELS)
        most = int(budget / options.get("min_pixels", MIN_PIXELS))
        count = int(total / rate * min(options.get("fps", DEFAULT_FPS), rate))
        count = max(1, int(min(count, options.get("max_frames", most), most)))
    return checked_count(count, total, options, step=1)


def sample(
    film: Film, fit: Fit | None = None, *, decode: bool = True, progress: Progress | None = None
) -> Sample:
    """Sample a video as keye-vl-utils 1.5.x does.

    The item may have ``fps`` (2.0) or ``nframes``, ``max_frames``, ``min_pixels``, ``max_pixels``,
    ``video_total_pixels`` and ``min_frame_similarity`` (0.9); that of a file ``video_start`` and
    ``video_end`` (seconds), too; that of a list of frames ``timestamps``, the time of each in
    seconds, and ``resized_height`` with ``resized_width``. ``video_start``, ``video_end`` and
    ``nframes`` are not served by the published helper and work as in 8B-Preview.

    Args:
        fit: The prompt it is part of, which may lower the number and size of a file's frames.
        decode: Whether to decode a file's frames. Else ``frames`` is None, and the split into
            slow and fast is the one with most tokens.
        progress: Called as ``progress("frames", done, total)`` after each frame.

    Returns:
        Frames in their original size; those of a file may be iterated more than once. Keywords:
        ``height``, ``width``, ``fast_height``, ``fast_width``; ``frame_types`` [frames] int32, 1
        for fast; ``timestamps`` [frames] fp32, seconds from the first frame of the file (so not
        from ``video_start``), absent for a list of frames without times. At a variable rate they
        are the real presentation times.
    """
    if film.file is None:
        return _of_list(film, progress)
    return film.sampled(partial(_of_file, film, fit, decode, progress))


def layout(
    sample: Sample, patch_size: int, _resized: Callable[[int, int], Size]
) -> tuple[tuple[Frame, ...], float]:
    """Slow frames in one size and fast ones in another, by `frame_sizes` if none are given."""
    count, sizes = sample.count, dict(sample.keywords)
    times, types = sizes.pop("timestamps", None), sizes.pop("frame_types", None)
    fast = [False] * count if types is None else [bool(kind) for kind in types]
    times = [None] * count if times is None else [float(time) for time in times]
    for name, values in (("frame_types", fast), ("timestamps", times)):
        if len(values) != count:
            raise ValueError(
                f"{name} must have one value for each of {count} frames, got {len(values)}"
            )
    found = _checked_sizes(sizes) if sizes else frame_sizes(*sample.size, *_counts(fast))
    grids = [
        (height // patch_size, width // patch_size) for height, width in (found[:2], found[2:])
    ]
    frames = tuple(
        Frame(*grids[is_fast], time, is_fast) for time, is_fast in zip(times, fast, strict=True)
    )
    span = times[-1] - times[0] if None not in times else 0.0
    return frames, span / (count - 1) if span > 0 else 1 / DEFAULT_FPS


def resize(frame: torch.Tensor, height: int, width: int, _resample: int) -> torch.Tensor:
    """`resize_bilinear`, whatever the image processor's filter is."""
    return resize_bilinear(frame, height, width)


def batch(videos: Sequence[VideoPatches]) -> dict[str, torch.Tensor]:
    """num_frames: [num_videos], int64, frames of each video."""
    return {"num_frames": torch.tensor([len(video.frames) for video in videos])}


def placeholders(
    frames: Sequence[Frame], counts: Sequence[int], ids: TokenIds, encode: Encode
) -> list[int]:
    """Each frame's placeholders behind its mark and its time, those of a fast one in marks."""
    tokens: list[int] = []
    for frame, count in zip(frames, counts, strict=True):
        tokens.append(ids.frame)
        if frame.timestamp is not None:
            # As published: the fp32 time, widened, to one decimal; ties go to even.
            tokens += encode(f"{float(np.float32(frame.timestamp)):.1f}")
        places = [ids.video] * count
        tokens += [ids.fast_start, *places, ids.fast_end] if frame.fast else places
    return tokens


def _of_list(film: Film, progress: Progress | None) -> Sample:
    rate, total = film.options.get("fps", DEFAULT_FPS), len(film.frames)
    places = frame_indices(0, total - 1, frame_count(total, rate, film.options))
    bounds = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    frames = list(listed_pictures(film, places, V1_5, progress, **bounds))
    size = frames[0].shape[1:]
    if any(frame.shape[1:] != size for frame in frames):
        raise ValueError("the frames of a video must be equally large after resizing")
    times = film.times
    if times is None and "fps" in film.options:
        times = [(1 / rate) * index for index in range(total)]
    times = times and [times[place] for place in places]
    fast = classify_frames(frames, _similarity(film))
    sizes = frame_sizes(*size, *_counts(fast), film.options)
    return Sample(frames, len(frames), size, _keywords(sizes, fast, times))


def _of_file(film: Film, fit: Fit | None, decode: bool, progress: Progress | None) -> Sample:
    clip, options = film.clip(frame_count), film.options
    fitted = fit is not None and fit.room is not None
    if fitted:
        most = _most_frames(film, clip, fit)
        clip = replace(clip, count=fit.most(most, clip.count, film.name))
    if decode:
        frames = ClipFrames(clip, progress)
        fast = classify_frames(frames, _similarity(film))
        size = frames.size
    else:
        frames, size = None, film.file.frame_size
        fast = _costliest(film, clip.count)
    if fitted:
        options = _fitting_options(film, fit, size, fast, clip.times)
    keywords = _keywords(frame_sizes(*size, *_counts(fast), options), fast, clip.times)
    return Sample(frames, clip.count, size, keywords, smaller=options is not film.options)


def _keywords(sizes: FrameSizes, fast: list[bool], times: list[float] | None) -> dict[str, Any]:
    found = sizes._asdict() | {"frame_types": torch.tensor(fast, dtype=torch.int32)}
    return found if times is None else found | {"timestamps": torch.tensor(times).float()}


def _fitting_options(
    film: Film, fit: Fit, size: Size, fast: list[bool], times: list[float]
) -> Mapping[str, float]:
    """The item's options; if they exceed ``fit.room``, with the largest ``video_total_pixels``
    that does not, or 0 if even the smallest frames are too large.
    """
    options, counts = film.options, _counts(fast)
    sizes = frame_sizes(*size, *counts, options)
    marks = fit.tokens(_undecoded(size, sizes, fast, times)) - _tokens(sizes, *counts)

    def lowered(total: int) -> dict[str, float]:
        return options | {"video_total_pixels": total * TOKEN_PIXELS}

    def tokens(total: int) -> int:
        return marks + _tokens(frame_sizes(*size, *counts, lowered(total)), *counts)

    most = int(options.get("video_total_pixels", TOTAL_PIXELS) / TOKEN_PIXELS)
    total = bisect_right(range(1, most + 1), fit.room, key=tokens)
    return lowered(total) if total < most else options


def _most_frames(film: Film, clip: Clip, fit: Fit) -> int | None:
    """How many of a clip's frames fit at their smallest; None if none do."""
    size = film.file.frame_size
    smallest = frame_sizes(*size, 1, 1, film.options | {"video_total_pixels": 0})

    def tokens(count: int) -> int:
        """All slow or all but the first fast: at fixed sizes no other split has more."""
        times = replace(clip, count=count).times
        splits = (_split(slow, count) for slow in _slow(film, count))
        return max(fit.tokens(_undecoded(size, smallest, fast, times)) for fast in splits)

    return bisect_right(range(1, clip.count + 1), fit.room, key=tokens) or None


def _undecoded(size: Size, sizes: FrameSizes, fast: list[bool], times: list[float]) -> Sample:
    keywords = {**sizes._asdict(), "frame_types": fast, "timestamps": times}
    return Sample(None, len(fast), size, keywords)


def _costliest(film: Film, count: int) -> list[bool]:
    """Which frames are fast in the split that has most tokens."""
    size = film.file.frame_size

    def tokens(slow: int) -> int:
        counts = slow, count - slow
        return _tokens(frame_sizes(*size, *counts, film.options), *counts) + 2 * counts[1]

    least, most = _slow(film, count)
    return _split(max(range(least, most + 1), key=tokens), count)


def _slow(film: Film, count: int) -> tuple[int, int]:
    """Least and most slow frames: the first is slow, and no similarity is below 0."""
    return 1, count if _similarity(film) > 0 else 1


def _split(slow: int, count: int) -> list[bool]:
    """Which of ``count`` frames are fast if only the first are slow."""
    return [False] * slow + [True] * (count - slow)


def _similarity(film: Film) -> float:
    return film.options.get("min_frame_similarity", MIN_FRAME_SIMILARITY)


def _checked_sizes(sizes: Mapping[str, int]) -> FrameSizes:
    missing = [name for name in FrameSizes._fields if name not in sizes]
    if missing:
        raise ValueError(f"{', '.join(sorted(sizes))} must come with {', '.join(missing)}")
    found = FrameSizes(**{name: int(size) for name, size in sizes.items()})
    for name, size in found._asdict().items():
        if size < FACTOR or size % FACTOR:
            raise ValueError(f"{name} must be a positive multiple of {FACTOR}, got {size}")
    return found


def _counts(fast: Sequence[bool]) -> tuple[int, int]:
    """Slow frames and fast ones."""
    return len(fast) - sum(fast), sum(fast)


def _tokens(sizes: FrameSizes, num_slow: int, num_fast: int) -> int:
    """Without marks and times."""
    slow, fast = sizes.height * sizes.width, sizes.fast_height * sizes.fast_width
    return (num_slow * slow + num_fast * fast) // TOKEN_PIXELS


_KEYS = ("fps", "nframes", "max_frames", "min_pixels", "max_pixels", "video_total_pixels")
_KEYS += ("min_frame_similarity",)

V1_5 = Rules(
    version="1.5",
    name="Keye-VL-1.5",
    item_keys=COMMON_KEYS
    | {
        "video": (*SOURCES["video"], *_KEYS, *CLIP_KEYS),
        "frames": (*SOURCES["video"], *_KEYS, "timestamps", *RESIZED_KEYS),
    },
    video_keywords=frozenset({*FrameSizes._fields, "timestamps", "frame_types"}),
    max_pixels=20480 * TOKEN_PIXELS,
    alpha="drop",
    enlarge_small=False,
    max_frame_pixels=MAX_PIXELS,
    total_pixels_key="video_total_pixels",
    advice="a lower video_total_pixels or max_frames may fit",
    sample=sample,
    layout=layout,
    resize=resize,
    batch=batch,
    placeholders=placeholders,
)
