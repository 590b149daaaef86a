"""Pictures as Keye-VL sees them: loading, the two resize rules, and cutting into patches.

A picture is resized twice on the published path: by the helper package (`helper_size`,
keye-vl-utils) and again by the checkpoint's image processor (`processor_size`,
image_processing_keye.py of Keye-VL-8B-Preview, or the Qwen2-VL rule in the transformers port of
1.5). Both round each side to a multiple of patch_size * merge_size = 28 pixels.
"""

from __future__ import annotations

import io
import math
import numbers
import os
import struct
import zlib
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from keye_model.processing.fetch import (
    decode_base64,
    decode_data_url,
    describe,
    fetch,
    file_url_path,
)
from keye_model.processing.items import source_of

MAX_RATIO = 200  # longer side / shorter side, in both rules
MIN_PIXELS = 4 * 28 * 28  # helper's default bound for images, both releases
MAX_PIXELS = {"1.0": 16384 * 28 * 28, "1.5": 20480 * 28 * 28}  # by keye-vl-utils release
MAX_TOKENS = 1 << 17  # of a picture after either resize: as much as the longest context
MAX_IMAGE_BYTES = 256 << 20
FETCH_TIMEOUT = 60.0  # seconds
# What Pillow's decoders raise on broken files; each format has its own habits.
_BROKEN = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, LookupError, TypeError)
_BROKEN += (struct.error, zlib.error)
_SHORTEST_BASE64 = 64  # characters; a shorter string is taken for the name of a missing file


def load_image(
    source: Any, *, alpha: Literal["white", "drop"] = "white", local_files_only: bool = False
) -> Image.Image:
    """Load one picture as RGB.

    EXIF orientation is not applied, because the published helper does not apply it: a photo that a
    phone stored lying down with a note to turn it is seen lying down. Turn it beforehand with
    ``PIL.ImageOps.exif_transpose``. Of a file with several frames the first is taken.

    16-bit grey becomes 8-bit by its high byte (value // 256), as Pillow reads 16-bit colour.

    Args:
        source: A path, a ``file://`` or ``https://`` URL, a ``data:…;base64,`` URL, a bare base64
            string, the bytes of an image file, an open binary file (read from its start if it can
            seek), a PIL image, or a uint8 NumPy array or torch tensor [height, width],
            [height, width, channels] or [channels, height, width] with 1, 3 or 4 channels (read as
            channels-last if both fit).
        alpha: What becomes of a picture with transparency: "white" composites it over white, as
            keye-vl-utils 1.0.0 does for RGBA (and here for grey and palettes, too), "drop" discards
            the alpha channel (1.5.x, and both image processors).
        local_files_only: Refuse https URLs. ``HF_HUB_OFFLINE=1`` does the same.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: Empty, truncated, not an image, more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``
            (which Pillow itself would only warn about), or 32-bit samples, whose white is unknown.
        TypeError: Another kind of source, or an array that is not uint8.
        RuntimeError: A URL that could not be fetched, or offline.
    """
    if alpha not in ("white", "drop"):
        raise ValueError(f"alpha must be 'white' or 'drop', got {alpha!r}")
    name = describe(source)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        image = _from_array(source)
    elif isinstance(source, Image.Image):
        image = source
    else:
        image = _open(_read(source, name, local_files_only), name)
    try:
        image.load()
    except _BROKEN as error:
        raise ValueError(f"image must be a complete image file, got {name}: {error}") from error
    return _as_rgb(_as_bytes(image, name), alpha)


def fetch_image(
    item: dict[str, Any], *, version: str, factor: int = 28, local_files_only: bool = False
) -> Image.Image:
    """Load and resize the picture of one message item as keye-vl-utils does.

    Args:
        item: Has ``image`` or ``image_url`` (a source, or ``{"url": source}``), and optionally
            ``min_pixels``, ``max_pixels``, or both ``resized_height`` and ``resized_width``. The
            checkpoint's image processor resizes once more within its own bounds, so here
            ``max_pixels`` can lower its 1003520 pixels (1280 tokens) and not raise them; for that
            set ``processor.image_processor.max_pixels``, or pass ``max_pixels`` to
            `KeyeProcessor.from_pretrained`. So for ``min_pixels``.
        version: "1.0" or "1.5": the release's default ``max_pixels`` and handling of alpha.

    Raises:
        ValueError: No source, or the picture's sides differ by more than a factor of 200; else as
            `load_image`.
    """
    source = source_of(item)
    if source is None:
        raise ValueError(f"an image item must have 'image' or 'image_url', got {sorted(item)}")
    alpha = "white" if version == "1.0" else "drop"
    image = load_image(source, alpha=alpha, local_files_only=local_files_only)
    min_pixels, max_pixels = MIN_PIXELS, MAX_PIXELS[version]
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
    _check_sizes(height, width, factor, min_pixels, max_pixels)
    _check_ratio(height, width)
    high = max(factor, factor * round(height / factor))
    wide = max(factor, factor * round(width / factor))
    high, wide = _fit(height, width, high, wide, factor, min_pixels, max_pixels)
    _check_tokens(high, wide, factor)
    return max(high, factor), max(wide, factor)


def processor_size(
    height: int,
    width: int,
    *,
    factor: int = 28,
    min_pixels: int,
    max_pixels: int,
    version: str = "1.0",
) -> tuple[int, int]:
    """Size that the checkpoint's image processor resizes to.

    Args:
        version: "1.0" first enlarges a picture with a side below ``factor`` in proportion
            (image_processing_keye.py of Keye-VL-8B-Preview); "1.5" does not.

    Raises:
        ValueError: A size is not a positive integer, the ratio of sides exceeds 200, the result has
            more than 131072 tokens, or ``max_pixels`` leaves a side of less than one ``factor``.
    """
    _check_sizes(height, width, factor, min_pixels, max_pixels)
    if version == "1.0":
        if height < factor:
            height, width = factor, max(1, round(width * factor / height))
        if width < factor:
            height, width = round(height * factor / width), factor
    _check_ratio(height, width)
    high, wide = factor * round(height / factor), factor * round(width / factor)
    high, wide = _fit(height, width, high, wide, factor, min_pixels, max_pixels)
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


def _check_sizes(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> None:
    values = {
        "height": height,
        "width": width,
        "factor": factor,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
    }
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


def _read(source: Any, name: str, local_files_only: bool) -> bytes:
    """The bytes of an image file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if hasattr(source, "read"):
        if hasattr(source, "seekable") and source.seekable():
            source.seek(0)  # an earlier reading may have left it at its end
        data = source.read()
        if not isinstance(data, bytes):
            raise TypeError(f"image file must be opened in binary mode, got {name}")
        return data
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            "image must be a path, URL, base64 string, bytes, open file, PIL image, array or "
            f"tensor, got {name}"
        )
    text = os.fsdecode(source)
    scheme = text[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return fetch(
            text,
            max_bytes=MAX_IMAGE_BYTES,
            timeout=FETCH_TIMEOUT,
            local_files_only=local_files_only,
        )
    if scheme.startswith("data:"):
        return decode_data_url(text)
    path = file_url_path(text) if scheme.startswith("file://") else os.path.expanduser(text)
    if os.path.isfile(path):
        with open(path, "rb") as file:
            return file.read()
    data = decode_base64(text) if len(text) >= _SHORTEST_BASE64 else None
    if data is None:
        raise FileNotFoundError(f"image must be an existing file, got {name}")
    return data


def _as_bytes(image: Image.Image, name: str) -> Image.Image:
    """The picture with 8-bit samples; Pillow would clip others to black and white."""
    # Older releases of Pillow open 16-bit grey PNGs as mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"image must have 8 or 16 bits a sample, got mode {image.mode!r} (32 bits) in {name}: "
            "scale it to 0 to 255 and convert it to mode 'L'"
        )
    return image


def _as_rgb(image: Image.Image, alpha: str) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")  # before RGB, so that a transparent palette brings no warning
    if alpha == "drop":
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ValueError(f"image must not be empty, got zero bytes from {name}")
    limit = Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError(f"image must be an image file that Pillow can read, got {name}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"image must have at most {limit} pixels, got {name}: {error}") from error
    except _BROKEN as error:
        raise ValueError(f"image must be a complete image file, got {name}: {error}") from error
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"image must have at most {limit} pixels, got {image.width}x{image.height} in {name}"
        )
    return image


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu().numpy() if array.dtype == torch.uint8 else array
    shape = tuple(array.shape)
    if array.dtype not in (np.uint8, torch.uint8):
        raise TypeError(f"an image array must be uint8 (0 to 255), got {array.dtype}")
    if len(shape) == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    channels = array.shape[2] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or channels not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            "an image array must have shape [height, width], [height, width, channels] or "
            f"[channels, height, width] with 1, 3 or 4 channels, got {shape}"
        )
    array = np.ascontiguousarray(array)
    return Image.fromarray(array[..., 0] if len(shape) == 3 and channels == 1 else array)
