"""One picture, from whatever names or holds it to 8-bit RGB."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from keye_model.processing.fetch import describe
from keye_model.processing.source import read_source

MAX_IMAGE_BYTES = 256 << 20  # of a URL, and of an open file that cannot seek
FETCH_TIMEOUT = 60.0  # seconds
# What people take for a picture, by how it begins.
_OTHERS = {
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML document",
    b"%pdf": "a PDF document",
    b"version https://git-lfs": "a Git LFS pointer",
}
# What Pillow's decoders raise on broken files; each format has its own habits.
_BROKEN = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, LookupError, TypeError)
_BROKEN += (struct.error, zlib.error)


def load_image(
    source: Any, *, alpha: Literal["white", "drop"] = "white", local_files_only: bool = False
) -> Image.Image:
    """Load one picture as RGB.

    EXIF orientation is not applied, because the published helper does not apply it: a photo that a
    phone stored lying down with a note to turn it is seen lying down. Turn it beforehand with
    ``PIL.ImageOps.exif_transpose``. Of a file with several frames the first is taken.

    16-bit grey becomes 8-bit by its high byte (value // 256), as Pillow reads 16-bit colour.

    Args:
        source: What `read_source` finds: a path, a ``file:``, ``https:`` or ``data:`` URL, a bare
            base64 string, the bytes of an image file, or an open binary file; or a PIL image; or
            an array or tensor as `array_pixels` takes it.
        alpha: What becomes of a picture with transparency: "white" composites it over white, as
            keye-vl-utils 1.0.0 does for RGBA (and here for grey and palettes, too), "drop" discards
            the alpha channel (1.5.x, and both image processors).
        local_files_only: Refuse https URLs. ``HF_HUB_OFFLINE=1`` does the same.

    Raises:
        FileNotFoundError: The path does not exist, or is no regular file.
        ValueError: Empty, truncated, not an image, more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``
            (which Pillow itself would only warn about), or 32-bit samples, whose white is unknown.
        TypeError: Another kind of source, or an array that is not uint8.
        NotImplementedError: PostScript, a program that Ghostscript would run.
        PermissionError, RuntimeError: As `read_source`.
    """
    if alpha not in ("white", "drop"):
        raise ValueError(f"alpha must be 'white' or 'drop', got {alpha!r}")
    name = describe(source)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        pixels = np.ascontiguousarray(array_pixels(source))
        source = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if isinstance(source, Image.Image):
        return _decoded(source, alpha, name)
    found = read_source(
        source,
        "image",
        max_bytes=MAX_IMAGE_BYTES,
        timeout=FETCH_TIMEOUT,
        local_files_only=local_files_only,
    )
    if isinstance(found, str):
        with open(found, "rb") as file:
            return _decoded(_open(file, name), alpha, name)
    file = io.BytesIO(found) if isinstance(found, bytes) else found
    return _decoded(_open(file, name), alpha, name)


def array_pixels(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """The pixels of an array or tensor as [height, width, channels] uint8, in its memory if on CPU.

    Args:
        array: uint8, [height, width], [height, width, channels] or [channels, height, width] with
            1, 3 or 4 channels. Where both fit, as in (3, 11, 3), the last dim is the channels.

    Raises:
        TypeError: Another dtype: neither the white of integers nor that of floats is known.
        ValueError: Another shape, nothing in it, or a tensor without values.
    """
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype != "uint8":
        raise TypeError(
            f"an image array must be uint8 (0 to 255), got {dtype}: scale it, round and convert it"
        )
    if isinstance(array, torch.Tensor):
        if array.is_meta or array.layout != torch.strided:
            raise ValueError(
                f"an image tensor must be dense and hold values, got layout {array.layout} on "
                f"{array.device}"
            )
        array = array.detach().cpu().numpy()
    shape = tuple(array.shape)
    pixels = array[..., None] if len(shape) == 2 else array
    if len(shape) == 3 and shape[2] not in (1, 3, 4):
        pixels = array.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            "an image array must have shape [height, width], [height, width, channels] or "
            f"[channels, height, width] with 1, 3 or 4 channels, got {shape}"
        )
    return pixels


def _open(file: BinaryIO, name: str) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:
        file.seek(0)
        start = file.read(64).lstrip().lower()
        what = next((f", {_OTHERS[sign]}" for sign in _OTHERS if start.startswith(sign)), "")
        raise ValueError(
            f"image must be an image file that Pillow can read, got {name}{what}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"image must have at most {limit} pixels, got {name}: {error}") from error
    except _BROKEN as error:
        raise ValueError(f"image must be a complete image file, got {name}: {error}") from error
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"image must have at most {limit} pixels, got {image.width}x{image.height} in {name}"
        )
    if image.format == "EPS":
        raise NotImplementedError(
            f"image must hold pixels, got PostScript in {name}: Pillow would run Ghostscript on it"
        )
    return image


def _decoded(image: Image.Image, alpha: str, name: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"image must not be empty, got {image.width}x{image.height} from {name}")
    if image.mode in ("I", "F") and not _is_16_bit(image):
        raise ValueError(
            f"image must have 8 or 16 bits a sample, got mode {image.mode!r} (32 bits) in {name}: "
            "scale it to 0 to 255 and convert it to mode 'L'"
        )
    try:
        key = _transparent_value(image)
        image.load()
        return _as_rgb(_as_bytes(image, key), alpha)
    except _BROKEN as error:
        raise ValueError(f"image must be a complete image file, got {name}: {error}") from error


def _is_16_bit(image: Image.Image) -> bool:
    # Pillow opens 16-bit PGM as mode I; its older releases open 16-bit grey PNG so, too.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _transparent_value(image: Image.Image) -> Any:
    """The level or colour that stands for transparent, in units of the decoded samples; or None.

    A PNG names it in its own depth, and Pillow brings the samples alone to 8 bits. To be read
    before the pixels are, which forgets that depth.
    """
    key = image.info.get("transparency")
    depth = image.tile[0][3] if image.format == "PNG" and getattr(image, "tile", None) else None
    if depth in ("L;2", "L;4") and isinstance(key, int):
        return key * {"L;2": 85, "L;4": 17}[depth]
    if depth == "RGB;16B" and isinstance(key, tuple):
        return tuple(value >> 8 for value in key)
    return key


def _as_bytes(image: Image.Image, key: Any) -> Image.Image:
    """The picture with 8-bit samples; Pillow would clip others to black and white."""
    if _is_16_bit(image):
        levels = np.asarray(image)
        if image.format == "TIFF":
            bits, white_is_zero = image.tag_v2.get(258, (16,))[0], image.tag_v2.get(262) == 0
            levels = levels.astype(np.uint16) << (16 - bits)
            levels = ~levels if white_is_zero else levels
        grey = Image.fromarray((levels >> 8).astype(np.uint8))
        if not isinstance(key, int):
            return grey
        alpha = Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, alpha))
    if key is not None and key != image.info["transparency"]:
        image = image.copy()  # which keeps the caller's picture as it is
        image.info["transparency"] = key
    return image


def _as_rgb(image: Image.Image, alpha: str) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # Pillow knows no other way from it
        image = image.convert("LA")
    image = image.convert("RGBA")  # before RGB, so that a transparent palette brings no warning
    if alpha == "drop":
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas
