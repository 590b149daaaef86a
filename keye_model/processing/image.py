"""Pictures as Keye-VL sees them: the two resize rules, and cutting into patches.

A picture is resized twice on the published path: by the helper package (`helper_size`,
keye-vl-utils) and again by the checkpoint's image processor (`processor_size`,
image_processing_keye.py of Keye-VL-8B-Preview, or the Qwen2-VL rule in the transformers port of
1.5). Both round each side to a multiple of patch_size * merge_size = 28 pixels.
"""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from keye_model.processing.fetch import describe
from keye_model.processing.picture import load_image
from keye_model.processing.source import source_of

if TYPE_CHECKING:
    from keye_model.processing.rules.base import Rules

MAX_RATIO = 200  # longer side / shorter side, in both rules
MIN_PIXELS = 4 * 28 * 28  # helper's default bound for images, both releases
MAX_TOKENS = 1 << 17  # of a picture after either resize: as much as the longest context


def fetch_image(
    item: dict[str, Any], rules: Rules, *, factor: int = 28, local_files_only: bool = False
) -> Image.Image:
    """Load and resize the picture of one message item as keye-vl-utils does.

    Args:
        item: Has ``image`` or ``image_url`` (a source, or ``{"url": source}``), and optionally
            ``min_pixels``, ``max_pixels``, or both ``resized_height`` and ``resized_width``. The
            checkpoint's image processor resizes once more within its own bounds, so here
            ``max_pixels`` can lower its 1003520 pixels (1280 tokens) and not raise them; for that
            set ``processor.image_processor.max_pixels``, or pass ``max_pixels`` to
            `KeyeProcessor.from_pretrained`. So for ``min_pixels``.
        rules: The line's default ``max_pixels`` and its handling of alpha.

    Raises:
        ValueError: No source, or the picture's sides differ by more than a factor of 200; else as
            `load_image`.
    """
    source = source_of(item)
    if source is None:
        raise ValueError(f"an image item must have 'image' or 'image_url', got {sorted(item)}")
    image = load_image(source, alpha=rules.alpha, local_files_only=local_files_only)
    min_pixels, max_pixels = MIN_PIXELS, rules.max_pixels
    if "resized_height" in item and "resized_width" in item:
        height, width = item["resized_height"], item["resized_width"]
    else:
        height, width = image.height, image.width
        min_pixels = item.get("min_pixels", min_pixels)
        max_pixels = item.get("max_pixels", max_pixels)
    try:
        # A lone max_pixels may stand below the default min_pixels, as published.
        if "min_pixels" in item and "max_pixels" in item and min_pixels > max_pixels:
            raise ValueError(
                f"min_pixels must be at most max_pixels, got {min_pixels} and {max_pixels}"
            )
        height, width = helper_size(
            height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels
        )
    except ValueError as error:
        raise ValueError(f"image {describe(source)}: {error}") from error
    return image.resize((width, height))  # Pillow's default filter: bicubic


def helper_size(
    height: int, width: int, *, factor: int = 28, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Size that keye-vl-utils resizes to; the same for 1.0.0 and 1.5.x.

    Both sides become multiples of ``factor``, at least ``factor``. The product is brought below
    ``max_pixels`` by rounding down or above ``min_pixels`` by rounding up. (1.0.0 clamps to
    ``factor`` while shrinking and 1.5.x at the end; no other branch can go below.)

    Raises:
        ValueError: A size is not a positive integer, the ratio of sides exceeds 200, or the result
            has more than 131072 tokens.
    """
    bounds = {"factor": factor, "min_pixels": min_pixels, "max_pixels": max_pixels}
    _check_sizes(height=height, width=width, **bounds)
    _check_ratio(height, width)
    high = max(factor, factor * round(height / factor))
    wide = max(factor, factor * round(width / factor))
    high, wide = _fit(height, width, high, wide, **bounds)
    _check_tokens(high, wide, factor)
    return max(high, factor), max(wide, factor)


def processor_size(
    height: int,
    width: int,
    *,
    factor: int = 28,
    min_pixels: int,
    max_pixels: int,
    enlarge_small: bool = True,
) -> tuple[int, int]:
    """Size that the checkpoint's image processor resizes to.

    Args:
        enlarge_small: Whether a picture with a side below ``factor`` is first enlarged in
            proportion, as by image_processing_keye.py of Keye-VL-8B-Preview.

    Raises:
        ValueError: A size is not a positive integer, the ratio of sides exceeds 200, the result has
            more than 131072 tokens, or ``max_pixels`` leaves a side of less than one ``factor``.
    """
    bounds = {"factor": factor, "min_pixels": min_pixels, "max_pixels": max_pixels}
    _check_sizes(height=height, width=width, **bounds)
    if enlarge_small:
        if height < factor:
            height, width = factor, max(1, round(width * factor / height))
        if width < factor:
            height, width = round(height * factor / width), factor
    _check_ratio(height, width)
    high, wide = factor * round(height / factor), factor * round(width / factor)
    high, wide = _fit(height, width, high, wide, **bounds)
    if min(high, wide) < factor:
        raise ValueError(
            f"max_pixels must leave both sides of a {height}x{width} picture at least {factor} "
            f"pixels, got {max_pixels}"
        )
    _check_tokens(high, wide, factor)
    return high, wide


def patchify(frames: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut frames into square patches in raster order: frame, row, column.

    Args:
        frames: [t, 3, h * patch_size, w * patch_size], any dtype.

    Returns:
        [t * h * w, 3, patch_size, patch_size], dtype of ``frames``, contiguous. Not grouped into
        merge windows (image_processing_keye.py, with temporal_patch_size 1).
    """
    if frames.dim() != 4 or frames.shape[2] % patch_size or frames.shape[3] % patch_size:
        raise ValueError(
            f"frames must have shape [t, channels, height, width] with sides that divide by "
            f"{patch_size}, got {tuple(frames.shape)}"
        )
    t, channels, height, width = frames.shape
    h, w = height // patch_size, width // patch_size
    cut = frames.reshape(t, channels, h, patch_size, w, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(t * h * w, channels, patch_size, patch_size)


def normalize(
    pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Normalise raw bytes: (f32(v / 255) - mean) / std in fp32, by one table per channel.

    Args:
        pixels: [..., 3, height, width], uint8, on the host.

    Returns:
        fp32, shape of ``pixels``.
    """
    # The quotient is taken in double and rounded once, as the published rescale does.
    levels = (torch.arange(256, dtype=torch.float64) * (1 / 255)).float()
    out = torch.empty(pixels.shape, dtype=torch.float32)
    for channel in range(pixels.shape[-3]):
        table = (levels - torch.tensor(mean[channel])) / torch.tensor(std[channel])
        raw = pixels.select(-3, channel).numpy()
        out.select(-3, channel).copy_(torch.from_numpy(table.numpy()[raw]))
    return out


def _fit(
    height: int, width: int, high: int, wide: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The rounded size if its area is in bounds, else the original scaled to the nearer bound."""
    if high * wide > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        return (
            factor * math.floor(height / scale / factor),
            factor * math.floor(width / scale / factor),
        )
    if high * wide < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        return (
            factor * math.ceil(height * scale / factor),
            factor * math.ceil(width * scale / factor),
        )
    return high, wide


def _check_sizes(**values: float) -> None:
    for name, value in values.items():
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        # Only the upper bound may be infinite.
        if not number or not value > 0 or (value == math.inf and name != "max_pixels"):
            raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_ratio(height: int, width: int) -> None:
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise ValueError(
            f"the longer side must be at most {MAX_RATIO} times the shorter one, got "
            f"{height}x{width} (height x width)"
        )


def _check_tokens(high: int, wide: int, factor: int) -> None:
    tokens = high * wide // factor**2
    if tokens > MAX_TOKENS:
        raise ValueError(
            f"a picture or frame must have at most {MAX_TOKENS} tokens (a whole context) after "
            f"resizing, got {tokens}: lower min_pixels, max_pixels or the resized size"
        )
