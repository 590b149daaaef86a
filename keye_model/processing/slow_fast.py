"""Slow and fast frames of Keye-VL-1.5: which frame is which, and how large each kind becomes.

A frame much like the last slow one is fast and gets about 0.3 of its tokens. Both rules are those
of keye-vl-utils 1.5.x, whose HSV conversion is OpenCV's for 8-bit RGB.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from keye_model.processing.image import helper_size
from keye_model.processing.video_sampling import (
    FACTOR,
    TOKEN_PIXELS,
    bounded_size,
    check_video_tokens,
)

MIN_PIXELS = 48 * TOKEN_PIXELS  # of a frame
MAX_PIXELS = 768 * TOKEN_PIXELS
TOTAL_PIXELS = 65536 * TOKEN_PIXELS  # of a video
MIN_FRAME_SIMILARITY = 0.9
FAST_TOKEN_RATIO = 0.3
_COMPARE_MAX_PIXELS = 256 * TOKEN_PIXELS
_SAME_PATCH = 0.7  # cosine above which two patches count as alike
# Converted at a time: few enough that temporaries stay in the cache, and enough that two threads
# seldom meet at Python's lock.
_CACHED_PATCHES = 126
_BLACK = 0.01  # norm below which a patch is black


class FrameSizes(NamedTuple):
    """Pixels of slow and of fast frames, each side a multiple of 28."""

    height: int
    width: int
    fast_height: int
    fast_width: int


def classify_frames(
    frames: Iterable[torch.Tensor], min_similarity: float = MIN_FRAME_SIMILARITY
) -> list[bool]:
    """Tell for each frame whether it is fast; the first is slow.

    Each frame is compared with the last slow one. Below ``min_similarity`` (the share of 28x28
    patches that look alike) it is slow and takes that one's place. Two black frames have nothing to
    compare, and the second is fast.

    Args:
        frames: [3, height, width], uint8 RGB. Read once; none is kept.
    """
    fast: list[bool] = []
    reference = None
    for look in _looks_ahead(frames):
        alike = reference is not None and not frame_similarity(reference, look) < min_similarity
        fast.append(alike)
        if not alike:
            reference = look
    return fast


class FrameLook(NamedTuple):
    """What a frame is compared by.

    Attributes:
        hsv: [3, num_patches, 784], fp32 holding OpenCV's bytes: hue 0 to 179, then 0 to 255.
        norms: [num_patches], fp32, length of each patch as a vector of 2352 values.
    """

    hsv: np.ndarray
    norms: np.ndarray


def look_at(small: torch.Tensor) -> FrameLook:
    """Describe a frame for comparison: [3, height, width] uint8, sides multiples of 28."""
    pixels = small.permute(1, 2, 0).numpy()
    rows, columns = small.shape[1] // FACTOR, small.shape[2] // FACTOR
    cut = pixels.reshape(rows, FACTOR, columns, FACTOR, 3)
    patches = np.ascontiguousarray(cut.transpose(4, 0, 2, 1, 3)).reshape(3, -1, TOKEN_PIXELS)
    hsv = np.empty(patches.shape, dtype=np.float32)
    for start in range(0, len(patches[0]), _CACHED_PATCHES):
        part = slice(start, start + _CACHED_PATCHES)
        rgb_to_hsv(patches[:, part], out=hsv[:, part])
    return FrameLook(hsv, np.sqrt(_patch_products(hsv, hsv)) + np.float32(1e-8))


def frame_similarity(a: FrameLook, b: FrameLook) -> float:
    """Share of patches with a cosine above 0.7, black pairs left out; NaN if all are black.

    The share is an fp32 number as published, which decides at the limit: 9 of 10 patches are
    0.89999998, less than 0.9.
    """
    cosines = _patch_products(a.hsv, b.hsv) / (a.norms * b.norms)
    seen = (a.norms >= _BLACK) | (b.norms >= _BLACK)
    if not seen.any():
        return math.nan
    alike = (cosines > _SAME_PATCH) & seen
    return float(np.float32(alike.sum()) / np.float32(seen.sum()))


def rgb_to_hsv(rgb: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """OpenCV's 8-bit RGB to HSV: [3, ...] uint8 → the same shape in fp32, whole numbers.

    OpenCV multiplies by tabled 12-bit fixed-point reciprocals and rounds by adding half. Every
    number involved is a multiple of 2^-12 that fp32 holds exactly.
    """
    out = np.empty(rgb.shape, dtype=np.float32) if out is None else out
    red, green, blue = rgb
    high, low = np.maximum(green, blue), np.minimum(green, blue)
    value, inner = np.maximum(red, high), np.minimum(red, high)
    span = value - np.minimum(inner, low)
    # Way round the hue circle from red, in units of span / 60 degrees: on or back from 0, 2 or 4
    # spans, as red, else green, else blue is largest, by the difference of the other two. Masks of
    # 8 bits, as np.where is many times slower.
    bluish, not_red = -(green < blue).view(np.uint8), -(red < high).view(np.uint8)
    swap = (inner ^ low) & (bluish ^ not_red)
    inner ^= swap
    low ^= swap
    turn = (span & not_red).astype(np.int16)
    turn += span & not_red & bluish
    turn *= 2
    turn += inner
    turn -= low

    hue, saturation, _ = out
    _fixed_point_quotient(turn, span, 30, out=hue)
    hue += 180.5
    above = hue.astype(np.uint16)  # 180 too much; hence positive, where cutting off is floor
    hue[...] = np.minimum(above, above - 180, out=above)  # differences below 0 wrap to 65386 on
    _fixed_point_quotient(span, value, 255, out=saturation)
    saturation += 0.5
    np.floor(saturation, out=saturation)
    out[2] = value
    return out


def resize_bilinear(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize [3, h, w] uint8 to [3, height, width] uint8, bilinear with antialiasing.

    PyTorch's own 8-bit resampler, as keye-vl-utils 1.5.x and the 1.5 processor call it.
    """
    if frame.shape[1:] == (height, width):
        return frame
    # Strides that say channels-last outright (a batch of one leaves it open) save a repack.
    batch = frame.permute(1, 2, 0).contiguous()[None]
    batch = batch.as_strided(batch.shape, (batch.numel(), *batch.stride()[1:])).permute(0, 3, 1, 2)
    return interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]


def frame_sizes(
    height: int,
    width: int,
    num_slow: int,
    num_fast: int,
    options: Mapping[str, float] = MappingProxyType({}),
) -> FrameSizes:
    """Sizes of slow and fast frames so that a video of both meets its token budget.

    As published, the budget can be overshot by a little (`_slow_tokens`), and rounding down to
    multiples of 28 may leave a frame with fewer than 48 tokens.

    Args:
        height, width: Of the original frames.
        options: ``min_pixels`` and ``max_pixels`` of a slow frame; below 48 tokens the minimum is
            48 tokens. ``video_total_pixels``, the budget of the whole video.

    Raises:
        ValueError: As `helper_size` and `check_video_tokens`.
    """
    min_pixels = max(int(options.get("min_pixels", MIN_PIXELS)), MIN_PIXELS)
    max_pixels = options.get("max_pixels", MAX_PIXELS)
    total_pixels = options.get("video_total_pixels", TOTAL_PIXELS)
    tokens = _slow_tokens(num_slow, num_fast, min_pixels, max_pixels, total_pixels)
    slow = bounded_size(height, width, min_pixels, tokens * TOKEN_PIXELS)
    slow_tokens = slow[0] * slow[1] // TOKEN_PIXELS
    fast_pixels = max(int(slow_tokens * FAST_TOKEN_RATIO) * TOKEN_PIXELS, MIN_PIXELS)
    sizes = FrameSizes(*slow, *bounded_size(height, width, min_pixels, fast_pixels))
    fast_tokens = sizes.fast_height * sizes.fast_width // TOKEN_PIXELS
    check_video_tokens(num_slow * slow_tokens + num_fast * fast_tokens)
    return sizes


def _slow_tokens(
    num_slow: int, num_fast: int, min_pixels: int, max_pixels: float, total_pixels: float
) -> float:
    """Most tokens of a slow frame: the first count past the budget, or what ``max_pixels`` holds.

    The published search returns the first count that overshoots, not the last that fits.
    """
    least_fast = min_pixels // TOKEN_PIXELS
    low, high = min_pixels / TOKEN_PIXELS, max_pixels / TOKEN_PIXELS
    while low < high:
        middle = int(low + high) // 2
        fast = max(int(FAST_TOKEN_RATIO * middle), least_fast)
        if (num_slow * middle + num_fast * fast) * TOKEN_PIXELS > total_pixels:
            high = middle
        else:
            low = middle + 1
    return low


def _looks_ahead(frames: Iterable[torch.Tensor]) -> Iterator[FrameLook]:
    """Looks in order; two threads, for two cores, make the next three while the caller has one."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        coming: deque[Future[FrameLook]] = deque()
        for frame in frames:
            coming.append(pool.submit(lambda frame=frame: look_at(_shrink(frame))))
            if len(coming) > 3:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _shrink(frame: torch.Tensor) -> torch.Tensor:
    size = helper_size(*frame.shape[1:], min_pixels=MIN_PIXELS, max_pixels=_COMPARE_MAX_PIXELS)
    return resize_bilinear(frame, *size)


def _fixed_point_quotient(
    number: np.ndarray, divisor: np.ndarray, scale: int, *, out: np.ndarray
) -> np.ndarray:
    """``number * scale / divisor``, the reciprocal rounded to 12 binary places; 0 for 0 / 0."""
    out[...] = divisor
    out += np.float32(1e-30)  # only 0 changes by this
    np.divide(np.float32(scale), out, out=out)
    out += 3072  # from 2048 to 4096 fp32 has 12 binary places
    out -= 3072
    out *= number.astype(np.float32)
    return out


def _patch_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot product of each patch of a with that of b: [num_patches]."""
    return np.einsum("cpk,cpk->p", a, b)
